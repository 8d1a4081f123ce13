"""Ids are TRL's where TRL's are right; BOS and EOS stand once; the options are checked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from orpo_ds.data.preference import Preference, RowError, to_preference
from orpo_ds.data.tokenize import TokenizeOptions, TokenPair, tokenize_pair
from tests.data.test_preference import REFUSED, ROWS
from tests.data.trl_reference import TrlIds, trl_encoder_decoder_ids, trl_ids
from tests.real_tokenizers import CORPUS, tokenizer, with_template

UNCUT = TokenizeOptions(max_length=None)
REAL_DATA = Path(__file__).parents[3] / "shared" / "data" / "dpo_en_demo.jsonl"


def _tokenize(
    preference: Preference, processing_class: PreTrainedTokenizerBase, options: TokenizeOptions = UNCUT
) -> TokenPair:
    return tokenize_pair(preference, processing_class=processing_class, options=options, row_number=3)


def _without_second_eos(ids: list[int], eos: int) -> list[int]:
    """TRL's ids without the EOS that it puts behind an EOS and a newline."""
    assert ids[-1] == eos
    assert ids[-3] == eos
    return ids[:-1]


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in REFUSED for shape in ROWS if shape not in REFUSED[name]]
)
def test_ids_are_trls(name: str, shape: str) -> None:
    processing_class = tokenizer(name)
    preference = to_preference(ROWS[shape], processing_class=processing_class, row_number=0)
    expected = trl_ids(preference, processing_class)
    if preference.chosen.endswith("<|im_end|>\n"):
        eos = processing_class.eos_token_id
        expected = TrlIds(
            chosen=_without_second_eos(expected.chosen, eos),
            rejected=_without_second_eos(expected.rejected, eos),
            chosen_start=expected.chosen_start,
            rejected_start=expected.rejected_start,
        )
    found = _tokenize(preference, processing_class)
    assert TrlIds(found.chosen, found.rejected, found.chosen_start, found.rejected_start) == expected
    shared = [one == other for one, other in zip(found.chosen, found.rejected, strict=False)]
    assert found.trunk == (shared.index(False) if False in shared else len(shared))


WORDS = sorted({word for word in CORPUS.replace("\n", " \n ").split(" ") if word})
text = st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", "th", "e"]), min_size=1, max_size=12).map("".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(prompt=text, chosen=text, rejected=text)
@pytest.mark.parametrize("name", ["crossing", "mistral", "qwen2"])
def test_ids_are_trls_whatever_merges_over_the_border(
    name: str, prompt: str, chosen: str, rejected: str
) -> None:
    """The ids always; the border wherever TRL's rule (at most the last prompt token changed) holds."""
    processing_class = tokenizer(name)
    preference = Preference(prompt, chosen, rejected)
    try:
        expected = trl_ids(preference, processing_class)
    except ValueError:
        return  # TRL refuses prompts that differ in more than their last token
    prompt_ids = processing_class(prompt, add_special_tokens=False)["input_ids"]
    if processing_class.bos_token_id is not None:
        prompt_ids = [processing_class.bos_token_id, *prompt_ids]
    untouched = [_shared(prompt_ids, expected.chosen), _shared(prompt_ids, expected.rejected)]
    if chosen == rejected or min(untouched) == 0:
        with pytest.raises(RowError, match=r"empty_prompt|identical_responses"):
            _tokenize(preference, processing_class)
        return

    found = _tokenize(preference, processing_class)
    assert (found.chosen, found.rejected) == (expected.chosen, expected.rejected)
    assert [found.chosen_start, found.rejected_start] == untouched
    if min(untouched) >= len(prompt_ids) - 1:
        assert untouched == [expected.chosen_start, expected.rejected_start]


def _shared(first: list[int], second: list[int]) -> int:
    return max(n for n in range(min(len(first), len(second)) + 1) if first[:n] == second[:n])


def test_a_token_with_a_letter_of_the_response_is_no_prompt() -> None:
    """TRL lets at most one prompt token change, and so calls " blue" prompt here, with the response's first "e"."""
    processing_class = tokenizer("qwen2")
    preference = Preference("why is the sky blu", "e?", "ish?")
    assert processing_class.convert_ids_to_tokens(processing_class(preference.prompt)["input_ids"])[-2:] == [
        "Ġbl",
        "u",
    ]
    pair = _tokenize(preference, processing_class)
    trl = trl_ids(preference, processing_class)
    assert (pair.chosen, pair.rejected) == (trl.chosen, trl.rejected)
    assert processing_class.decode(trl.chosen[: trl.chosen_start]) == "why is the sky blue"
    assert processing_class.decode(pair.chosen[: pair.chosen_start]) == "why is the sky"


@pytest.mark.parametrize(
    ("name", "prompt", "response"),
    [
        ("mistral", "<s> Why?", " Because.</s>"),
        ("mistral", "Why?", " Because."),
        ("mistral", "<s>Why?", " Because.</s> \n"),
        ("smollm2", "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "Because.<|im_end|>\n"),
        ("smollm2", "Why?", " Because."),
        ("qwen2", "Why?", " Because.<|im_end|>"),
        ("qwen2", "Why?", " Because.<|im_end|>\n\n"),
    ],
)
def test_one_bos_and_one_closing_eos(name: str, prompt: str, response: str) -> None:
    processing_class = tokenizer(name)
    pair = _tokenize(Preference(prompt, response, " No" + response), processing_class)
    for ids, start in ((pair.chosen, pair.chosen_start), (pair.rejected, pair.rejected_start)):
        assert ids[start:].count(processing_class.eos_token_id) == 1
        closing = processing_class.decode(ids[start:]).rstrip()
        assert closing.endswith(processing_class.eos_token)
        if processing_class.bos_token_id is not None:
            assert ids[0] == processing_class.bos_token_id
            assert ids[1] != processing_class.bos_token_id


def test_an_eos_inside_a_response_of_several_turns_does_not_close_it() -> None:
    processing_class = with_template(
        "mistral",
        "{% for message in messages %}{{ message.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}",
    )
    row = ROWS["several turns of response"]
    preference = to_preference(row, processing_class=processing_class, row_number=0)
    pair = _tokenize(preference, processing_class)
    eos = processing_class.eos_token_id
    assert pair.chosen.count(eos) == 4  # after three of the four turns, and at the end
    assert pair.chosen[-1] == eos
    assert pair.chosen == trl_ids(preference, processing_class).chosen


@pytest.mark.parametrize("limit", [4, 9, 1000])
def test_encoder_decoder_ids_are_trls(limit: int) -> None:
    processing_class = tokenizer("t5")
    preference = Preference(
        "why is the sky blue?", "because blue light is scattered", "the cat ate the light"
    )
    prompt, chosen, rejected = trl_encoder_decoder_ids(
        preference, processing_class, max_completion_length=limit
    )
    options = TokenizeOptions(max_length=None, is_encoder_decoder=True, max_completion_length=limit)
    pair = _tokenize(preference, processing_class, options)
    assert (pair.chosen[: pair.chosen_start], pair.chosen[pair.chosen_start :]) == (prompt, chosen)
    assert (pair.rejected[: pair.rejected_start], pair.rejected[pair.rejected_start :]) == (prompt, rejected)
    assert chosen[-1] == rejected[-1] == processing_class.eos_token_id
    assert len(chosen) <= limit


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_encoder_input_keeps_its_eos_when_cut(mode: Any) -> None:
    processing_class = tokenizer("t5")
    preference = Preference("why is the sky blue? the cat sat on the mat.", "blue", "red")
    whole = _tokenize(preference, processing_class, TokenizeOptions(max_length=None, is_encoder_decoder=True))
    cut = _tokenize(
        preference,
        processing_class,
        TokenizeOptions(max_length=20, max_prompt_length=8, truncation_mode=mode, is_encoder_decoder=True),
    )
    prompt, shorter = whole.chosen[: whole.chosen_start], cut.chosen[: cut.chosen_start]
    kept = len(shorter) - 1
    assert 8 <= len(shorter) < len(prompt)
    assert shorter == (prompt[-len(shorter) :] if mode == "keep_end" else [*prompt[:kept], prompt[-1]])
    assert cut.chosen[cut.chosen_start :] == whole.chosen[whole.chosen_start :]


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    processing_class = tokenizer("qwen2")
    preference = Preference("Why?", " Because.", " No.")
    eos = processing_class.eos_token_id
    _tokenize(preference, processing_class, TokenizeOptions(vocab_size=eos + 1))
    with pytest.raises(RowError, match=r"id_beyond_vocabulary") as raised:
        _tokenize(preference, processing_class, TokenizeOptions(vocab_size=eos))
    assert f"token id {eos} ('<|im_end|>')" in str(raised.value)
    assert raised.value.row == 3


def test_a_tokenizer_without_eos() -> None:
    endless = copy.deepcopy(tokenizer("crossing"))
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"no EOS token.*Set tokenizer\.eos_token"):
        _tokenize(Preference("a", "b", "c"), endless)


def test_no_prompt_needs_a_bos() -> None:
    preference = Preference("", "the cat sat", "a dog ate")
    pair = _tokenize(preference, tokenizer("crossing"))
    assert (pair.chosen_start, pair.rejected_start, pair.trunk) == (1, 1, 1)
    with pytest.raises(RowError, match="empty_prompt"):
        _tokenize(preference, tokenizer("qwen2"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 1}, "max_length=1"),
        ({"max_length": 512, "max_prompt_length": 512}, "max_prompt_length=512 leaves no room"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode='keep_middle'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TokenizeOptions(**options)


@pytest.mark.skipif(not REAL_DATA.exists(), reason=f"{REAL_DATA} is not here")
@pytest.mark.parametrize("name", ["qwen2", "smollm2"])
@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_real_data_keeps_the_contract(name: str, mode: Any) -> None:
    """Whole pairs have TRL's ids; of pairs too long for 1,024 tokens, prompt and responses survive."""
    processing_class = tokenizer(name)
    eos = processing_class.eos_token_id
    cut = 0
    for number, line in enumerate(REAL_DATA.read_text().splitlines()):
        preference = to_preference(json.loads(line), processing_class=processing_class, row_number=number)
        whole = trl_ids(preference, processing_class)
        chosen = _without_second_eos(whole.chosen, eos)
        rejected = _without_second_eos(whole.rejected, eos)
        options = TokenizeOptions(max_length=1024, max_prompt_length=512, truncation_mode=mode)
        pair = _tokenize(preference, processing_class, options)
        prompt = whole.chosen[: whole.chosen_start]
        if max(len(chosen), len(rejected)) <= 1024:
            assert (pair.chosen, pair.rejected) == (chosen, rejected)
            continue
        cut += 1
        assert max(len(pair.chosen), len(pair.rejected)) <= 1024
        assert pair.chosen[: pair.chosen_start] == pair.rejected[: pair.rejected_start]
        kept = pair.chosen[: pair.chosen_start]
        assert len(kept) >= min(len(prompt), 512)
        assert kept == (
            prompt[: len(kept)] if mode == "keep_start" else _end_with_bos(prompt, len(kept), name)
        )
        # Real responses survive: whole, or up to the limit.
        assert pair.chosen[pair.chosen_start :] == chosen[whole.chosen_start :][: 1024 - len(kept)]
        assert pair.rejected[pair.rejected_start :] == rejected[whole.rejected_start :][: 1024 - len(kept)]
        assert len(pair.chosen) > pair.chosen_start
        assert len(pair.rejected) > pair.rejected_start
    assert cut > 20  # the data holds long prompts; without any this test would show nothing


def _end_with_bos(prompt: list[int], length: int, name: str) -> list[int]:
    if tokenizer(name).bos_token_id is None:
        return prompt[-length:]
    return [prompt[0], *prompt[len(prompt) - length + 1 :]]
