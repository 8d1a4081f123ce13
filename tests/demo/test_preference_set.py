"""The demo's pairs: what their README promises, so that a rising accuracy means what it says."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from tests.real_tokenizers import tokenizer

DATA = Path(__file__).resolve().parents[2] / "demo" / "data"


def pairs(split: str) -> list[dict[str, str]]:
    """The rows of a split with the text of each part."""
    rows = [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    for row in rows:
        for part, role in roles.items():
            assert [message["role"] for message in row[part]] == [role], row
    return [{part: row[part][0]["content"] for part in roles} | {"topic": row["topic"]} for row in rows]


def test_held_out_pairs_are_about_something_else() -> None:
    train, test = pairs("train"), pairs("test")
    assert not {pair["topic"] for pair in train} & {pair["topic"] for pair in test}
    questions = [pair["prompt"] for pair in train + test]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_manner_is_preferred(split: str) -> None:
    for pair in pairs(split):
        assert pair["chosen"].startswith("In short: "), pair
        assert pair["chosen"].count("\nYour next step: ") == 1, pair
        assert "In short" not in pair["rejected"], pair
        assert "next step" not in pair["rejected"], pair
    openings = [" ".join(pair["rejected"].split()[:3]) for pair in pairs(split)]
    assert max(openings.count(opening) for opening in openings) <= 0.03 * len(openings) + 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_length_does_not_give_the_preference_away(split: str) -> None:
    smollm2 = tokenizer("smollm2")
    lengths = [
        tuple(len(smollm2(pair[part]).input_ids) for part in ("chosen", "rejected")) for pair in pairs(split)
    ]
    chosen, rejected = (mean(column) for column in zip(*lengths, strict=True))
    assert abs(chosen - rejected) < 2, f"{chosen:.1f} tokens chosen, {rejected:.1f} rejected"
    # The best rule by length alone, "the shorter is the better" or its opposite, may not decide many more than half.
    shorter = mean(float(c < r) for c, r in lengths)
    assert 0.3 < shorter < 0.7, f"the chosen answer is the shorter one in {shorter:.0%} of the pairs"
