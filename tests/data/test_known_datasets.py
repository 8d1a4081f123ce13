"""The datasets that people train ORPO on, row by row as they are published: their columns, and the text that is made.

The rows are our own; the columns, types and quirks are those of the hub's datasets named in each test. The expected
text is written out, and is that of TRL's `extract_prompt` and `apply_chat_template` as well.
"""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from trl.data_utils import apply_chat_template, extract_prompt

from orpo_ds.data.load import load_rows
from orpo_ds.data.preference import Preference, RowError, to_preference
from orpo_ds.data.tokenize import TokenizeOptions, tokenize_dataset
from tests.data.trl_reference import trl_preference
from tests.parity.tokenizer import tiny_tokenizer

QUESTION = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Blue light is scattered more."}
BAD = {"role": "assistant", "content": "It is painted."}
EXPECTED = Preference(
    prompt="user: Why is the sky blue?\nassistant: ",
    chosen="Blue light is scattered more.</s>",
    rejected="It is painted.</s>",
)

TRL_ULTRAFEEDBACK = {
    "chosen": [QUESTION, GOOD],
    "rejected": [QUESTION, BAD],
    "score_chosen": 8.5,
    "score_rejected": 2.0,
}
H4_ULTRAFEEDBACK = {
    "prompt": "Why is the sky blue?",
    "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
    "chosen": [QUESTION, GOOD],
    "rejected": [QUESTION, BAD],
    "messages": [QUESTION, GOOD],
    "score_chosen": 8.5,
    "score_rejected": 2.0,
}
HH_RLHF = {
    "chosen": "\n\nHuman: What is two and two?\n\nAssistant: Do you mean the sum?"
    "\n\nHuman: Yes.\n\nAssistant: It is four.",
    "rejected": "\n\nHuman: What is two and two?\n\nAssistant: Do you mean the sum?"
    "\n\nHuman: Yes.\n\nAssistant: Ask somebody else.",
}
HH_TRL_STYLE = {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}

CASES = {
    "trl-lib/ultrafeedback_binarized": (TRL_ULTRAFEEDBACK, EXPECTED),
    "HuggingFaceH4/ultrafeedback_binarized": (H4_ULTRAFEEDBACK, EXPECTED),
    "trl-internal-testing/hh-rlhf-helpful-base-trl-style": (HH_TRL_STYLE, EXPECTED),
    "Anthropic/hh-rlhf": (
        HH_RLHF,
        Preference(
            prompt="\n\nHuman: What is two and two?\n\nAssistant: Do you mean the sum?\n\nHuman: Yes.\n\nAssistant:",
            chosen=" It is four.",
            rejected=" Ask somebody else.",
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_load_as_they_are(name: str) -> None:
    """Through Arrow, whose types and null fillings a row from the hub has too."""
    row, expected = CASES[name]
    held = Dataset.from_list([row])[0]
    assert to_preference(held, processing_class=tiny_tokenizer(), row_number=0) == expected
    assert trl_preference({key: held[key] for key in row if key != "messages"}, tiny_tokenizer()) == expected


def test_ultrafeedback_by_trls_functions_themselves() -> None:
    extracted = extract_prompt({key: TRL_ULTRAFEEDBACK[key] for key in ("chosen", "rejected")})
    rendered = apply_chat_template(extracted, tiny_tokenizer())
    assert Preference(rendered["prompt"], rendered["chosen"], rendered["rejected"]) == EXPECTED


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_opens_the_conversation(column: str) -> None:
    """As argilla's and Intel's DPO sets have it; an empty one, and one beside a system message, change nothing."""

    def made(**more: Any) -> Preference:
        return to_preference({**HH_TRL_STYLE, **more}, processing_class=tiny_tokenizer(), row_number=3)

    said = made(**{column: "Be brief."})
    own = [{"role": "system", "content": "Be brief."}, QUESTION]
    assert said.prompt == "system: Be brief.\n" + EXPECTED.prompt
    assert (said.chosen, said.rejected) == (EXPECTED.chosen, EXPECTED.rejected)
    assert said == trl_preference({**HH_TRL_STYLE, "prompt": own}, tiny_tokenizer())
    assert made(**{column: ""}) == made(**{column: None}) == EXPECTED
    assert made(prompt=own, **{column: "Be long."}) == said
    implicit = {**TRL_ULTRAFEEDBACK, column: "Be brief."}
    assert to_preference(implicit, processing_class=tiny_tokenizer(), row_number=0) == said
    with pytest.raises(RowError, match=rf"row 3: {column} must be a string, got int 5"):
        made(**{column: 5})


def test_the_system_column_survives_loading(tmp_path: Any) -> None:
    Dataset.from_list([{**HH_TRL_STYLE, "system": "Be brief.", "score": 1}]).to_parquet(
        tmp_path / "rows.parquet"
    )
    rows = load_rows(str(tmp_path / "rows.parquet"), split="train")
    assert isinstance(rows, Dataset)
    [pair] = tokenize_dataset(
        rows,
        processing_class=tiny_tokenizer(),
        options=TokenizeOptions(),
        unusable="error",
        cache_dir=tmp_path / "cache",
    )
    assert (
        tiny_tokenizer().decode(pair.chosen[1 : pair.chosen_start]) == "system: Be brief.\n" + EXPECTED.prompt
    )
