"""One rank's part of a packed row whose tokens are split over several ranks (sequence parallelism).

The row [1, T] is cut into equal runs of tokens; a last run that is too short is filled with inert tokens. A rank keeps
its tokens, their positions, and those target rows whose source lies among them: a label is an id, so it does not matter
where the token that it names lies. The layout stays that of the whole row, since attention sees all of it.

Everything that is counted (pairs, tokens) is split such that the sums over the ranks are those of the row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from orpo_ds.data.packing import MicroBatch, TargetRows


def part_length(tokens: int, *, parts: int) -> int:
    """Tokens of each part of a row of `tokens`, inert ones included."""
    return -(-tokens // parts)


def part_of_row(batch: MicroBatch, *, part: int, parts: int) -> MicroBatch:
    """The tokens of a packed micro-batch that one of several ranks computes.

    Args:
        batch: packed, [1, T].
        part: which of them, from 0.
        parts: ranks that share the row.

    Returns:
        A micro-batch of [1, ceil(T / parts)] tokens with the layout of the whole row. Its pairs, and the tokens of
        their full sequences, are counted in part 0 alone.
    """
    assert batch.layout is not None, "only a packed row is split"
    tokens = batch.input_ids.shape[1]
    length = part_length(tokens, parts=parts)
    first = part * length

    def own(values: Tensor) -> Tensor:
        return pad(values, (0, length * parts - tokens))[:, first : first + length]

    kept = max(min(first + length, tokens) - first, 0)
    return replace(
        batch,
        input_ids=own(batch.input_ids),
        position_ids=own(batch.position_ids),
        token_weight=own(batch.token_weight),
        rows=rows_of_part(batch.rows, first=first, length=length),
        pair_ids=batch.pair_ids if part == 0 else (),
        real_tokens=min(kept, batch.real_tokens),  # a row without pairs has a token that is none
        unshared_tokens=batch.unshared_tokens if part == 0 else 0,
    )


def rows_of_part(rows: TargetRows, *, first: int, length: int) -> TargetRows:
    """The target rows whose source is one of `length` tokens from `first` on; may be none."""
    here = in_part(rows, first=first, length=length)
    return replace(
        rows,
        index=rows.index[here] - first,
        label=rows.label[here],
        nll=rows.nll[here],
        chosen_pair=rows.chosen_pair[here],
        rejected_pair=rows.rejected_pair[here],
    )


def in_part(rows: TargetRows, *, first: int, length: int) -> Tensor:
    """Bool [R]: whether the source of a target row is one of `length` tokens from `first` on."""
    return torch.logical_and(rows.index >= first, rows.index < first + length)
