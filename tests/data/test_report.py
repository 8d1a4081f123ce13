"""The counts of a report against those of rows whose tokens are counted by hand: a byte is a token here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from orpo_ds.data.report import MAP_BATCH_ROWS, DataReport, examine
from orpo_ds.data.truncate import TokenizeOptions
from tests.parity.tokenizer import tiny_tokenizer


def report_of(rows: list[dict[str, Any]], **options: Any) -> DataReport:
    *_, whole = examine(rows, processing_class=tiny_tokenizer(), options=TokenizeOptions(**options))
    return whole


def text(prompt: int, chosen: int, rejected: int) -> dict[str, Any]:
    """A row of so many bytes, whose responses differ in their first one."""
    return {"prompt": "p" * prompt, "chosen": "c" * chosen, "rejected": "r" * rejected}


def test_lengths_are_counted_with_bos_and_eos() -> None:
    report = report_of([text(10, 4, 2), text(20, 1, 5)], max_length=None)
    assert {name: list(tokens) for name, tokens in report.lengths.items()} == {
        "prompt": [11, 21],
        "chosen response": [5, 2],
        "rejected response": [3, 6],
        "whole pair": [19, 29],
        "trunk": [11, 21],
    }
    assert (report.rows, report.usable, report.cut_tokens) == (2, 2, 0)
    assert report.trunk_saving == pytest.approx(1 - (19 + 29) / (30 + 50))
    assert report.example_row == 0
    assert report.example is not None
    assert len(report.example.rejected) == 14


def test_refused_rows_are_counted_by_reason_with_their_numbers() -> None:
    rows = [text(5, 2, 2) for _ in range(MAP_BATCH_ROWS + 10)]
    for number in (3, MAP_BATCH_ROWS + 5):
        rows[number] = {"prompt": "p", "chosen": "same", "rejected": "same"}
    rows[7] = text(5, 0, 2)
    report = report_of(rows)
    assert report.refused == {"identical_responses": [3, MAP_BATCH_ROWS + 5], "empty_response": [7]}
    assert report.details["empty_response"] == "chosen has no text"
    assert report.usable == len(rows) - 3


def test_what_is_cut_is_counted() -> None:
    """BOS and EOS are tokens: the rows are 30, 32, 41 and 31 long in their longer sequence; 32 is the limit."""
    rows = [text(20, 8, 1), text(20, 10, 1), text(30, 9, 1), text(5, 24, 2)]
    report = report_of(rows, max_length=32, max_prompt_length=10)
    assert (report.cut_prompts, report.cut_responses, report.cut_tokens) == (1, 0, 9)
    # The prompt may only give 41 - 35 = 6 of the 9: three tokens of the chosen response go.
    report = report_of(rows, max_length=32, max_prompt_length=25)
    assert (report.cut_prompts, report.cut_responses, report.cut_tokens) == (1, 1, 9)
    assert max(report.lengths["prompt"]) + 3 == 28


def test_packing_is_that_of_the_plan() -> None:
    """Rows of 19 tokens, 4 a batch: two fit 40 tokens, so two micro-batches a batch; padded they take 2 x 16 each."""
    report = report_of([text(10, 4, 2)] * 8)
    packing = report.packing(batch_size=4, max_tokens=40)
    assert packing.pairs_per_micro_batch == 2
    assert packing.filled == pytest.approx(38 / 40)
    assert packing.of_padded == pytest.approx(19 / (2 * 16))
    assert report.packing(batch_size=4, max_tokens=None).pairs_per_micro_batch == 4
    assert (report.too_long(18), report.too_long(19), report.too_long(None)) == (8, 0, 0)


def test_memory_is_numbers_only() -> None:
    report = report_of([text(10, 4, 2)] * 600)
    assert all(tokens.itemsize == 4 for tokens in report.lengths.values())
    assert np.array_equal(report.tokens("trunk"), np.full(600, 11))
