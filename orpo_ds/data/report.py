"""What a dataset would train on, counted without training: usable and refused rows, lengths, cuts, packing."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orpo_ds.data.batches import PairCost, plan_micro_batches
from orpo_ds.data.preference import Reason, RowError
from orpo_ds.data.processing import ProcessingClass
from orpo_ds.data.tokenize import MAP_BATCH_ROWS, tokenize_rows
from orpo_ds.data.truncate import TokenizeOptions, TokenPair

LENGTHS = ("prompt", "chosen response", "rejected response", "whole pair", "trunk")
PLANNED_BATCHES = 50  # whose packing is worked out: more would not change the second digit


@dataclass(frozen=True)
class Packing:
    """What the first global batches come to.

    Attributes:
        pairs_per_micro_batch: on average.
        filled: share of the budget of a micro-batch that holds tokens.
        of_padded: tokens of the packed rows over those of the same pairs in padded rows, two a pair.
    """

    pairs_per_micro_batch: float
    filled: float
    of_padded: float


@dataclass
class DataReport:
    """Counts over the rows that have been examined.

    Attributes:
        rows: examined so far.
        refused: reason -> numbers of the rows that cannot be used.
        details: reason -> what is wrong with the first of them.
        lengths: tokens of every usable pair by the names of `LENGTHS`, after cutting.
        cut_prompts: pairs whose prompt was cut.
        cut_responses: pairs of which a response was cut.
        cut_tokens: tokens that were cut off, over all prompts and responses.
        example: the first usable pair.
        example_row: its row.
    """

    rows: int = 0
    refused: dict[Reason, list[int]] = field(default_factory=dict)
    details: dict[Reason, str] = field(default_factory=dict)
    lengths: dict[str, array[int]] = field(default_factory=lambda: {name: array("i") for name in LENGTHS})
    cut_prompts: int = 0
    cut_responses: int = 0
    cut_tokens: int = 0
    example: TokenPair | None = None
    example_row: int = 0

    @property
    def usable(self) -> int:
        """Pairs that can be trained on."""
        return len(self.lengths["trunk"])

    @property
    def trunk_saving(self) -> float:
        """Share of the tokens of the full sequences that the shared trunks spare."""
        trunk, pair = self.tokens("trunk").sum(), self.tokens("whole pair").sum()
        return float(trunk / (trunk + pair))

    def tokens(self, name: str) -> NDArray[np.int64]:
        """One of the `lengths`, [usable]."""
        return np.array(self.lengths[name], dtype=np.int64)

    def too_long(self, max_tokens: int | None) -> int:
        """Pairs that no micro-batch of so many tokens has room for."""
        return 0 if max_tokens is None else int((self.tokens("whole pair") > max_tokens).sum())

    def packing(self, *, batch_size: int, max_tokens: int | None) -> Packing:
        """Plan the first global batches, in the order of the rows, for one rank.

        Args:
            batch_size: pairs of a global batch.
            max_tokens: budget of a micro-batch that every pair fits in; None: a batch is one micro-batch.
        """
        pair = self.tokens("whole pair")
        longest = np.maximum(self.tokens("chosen response"), self.tokens("rejected response"))
        sequence = self.tokens("prompt") + longest
        pairs = micro_batches = tokens = room = padded = 0
        for first in range(0, min(len(pair), PLANNED_BATCHES * batch_size), batch_size):
            batch = pair[first : first + batch_size]
            budget = int(batch.sum()) if max_tokens is None else max_tokens
            costs = [PairCost(tokens=int(count), flops=float(count)) for count in batch]
            [plan] = plan_micro_batches(costs, world_size=1, max_tokens=budget)
            pairs, tokens = pairs + len(batch), tokens + int(batch.sum())
            micro_batches, room = micro_batches + len(plan), room + len(plan) * budget
            padded += 2 * len(batch) * int(sequence[first : first + batch_size].max())
        return Packing(pairs / micro_batches, tokens / room, tokens / padded)


def examine(
    rows: Iterable[Mapping[str, Any]], *, processing_class: ProcessingClass, options: TokenizeOptions
) -> Iterator[DataReport]:
    """Tokenise all rows as the training does, a block at a time, and keep only counts.

    Yields:
        The report, which grows, after every block of rows.

    Raises:
        ValueError: what is wrong with all rows, such as a tokenizer without a chat template.
    """
    report = DataReport()
    source = iter(rows)
    while block := list(islice(source, MAP_BATCH_ROWS)):
        numbers = range(report.rows, report.rows + len(block))
        tokenized = tokenize_rows(block, numbers=numbers, processing_class=processing_class, options=options)
        report.rows += len(block)
        at_limit = []
        for row, number, one in zip(block, numbers, tokenized, strict=True):
            if isinstance(one, RowError):
                report.refused.setdefault(one.reason, []).append(number)
                report.details.setdefault(one.reason, one.detail)
                continue
            _count(report, one, number)
            if _may_be_cut(one, options):
                at_limit.append((row, number, one))
        _count_cuts(report, at_limit, processing_class=processing_class, options=options)
        yield report


def _count(report: DataReport, pair: TokenPair, number: int) -> None:
    counted = (
        pair.chosen_start,
        len(pair.chosen) - pair.chosen_start,
        len(pair.rejected) - pair.rejected_start,
        len(pair.chosen) + len(pair.rejected) - pair.trunk,
        pair.trunk,
    )
    for name, tokens in zip(LENGTHS, counted, strict=True):
        report.lengths[name].append(tokens)
    if report.example is None:
        report.example, report.example_row = pair, number


def _may_be_cut(pair: TokenPair, options: TokenizeOptions) -> bool:
    """Whether a pair is as long as a limit: only such a pair can have been longer."""
    limits = [(max(len(pair.chosen), len(pair.rejected)), options.max_length)]
    if options.is_encoder_decoder:
        responses = (len(pair.chosen) - pair.chosen_start, len(pair.rejected) - pair.rejected_start)
        limits.append((max(responses), options.max_completion_length))
    return any(limit is not None and length >= limit for length, limit in limits)


def _count_cuts(
    report: DataReport,
    at_limit: Sequence[tuple[Mapping[str, Any], int, TokenPair]],
    *,
    processing_class: ProcessingClass,
    options: TokenizeOptions,
) -> None:
    """Tokenise pairs again without limits, and count what they lost."""
    whole = tokenize_rows(
        [row for row, _, _ in at_limit],
        numbers=[number for _, number, _ in at_limit],
        processing_class=processing_class,
        options=replace(options, max_length=None, max_prompt_length=None, max_completion_length=None),
    )
    for (_, _, cut), full in zip(at_limit, whole, strict=True):
        if isinstance(full, RowError):  # what cannot be used about it was cut off
            continue
        prompt = full.chosen_start - cut.chosen_start
        responses = sum(
            (len(before) - before_start) - (len(after) - after_start)
            for before, before_start, after, after_start in (
                (full.chosen, full.chosen_start, cut.chosen, cut.chosen_start),
                (full.rejected, full.rejected_start, cut.rejected, cut.rejected_start),
            )
        )
        report.cut_prompts += prompt > 0
        report.cut_responses += responses > 0
        report.cut_tokens += prompt + responses
