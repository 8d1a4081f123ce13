"""Random pairs, and the same numbers computed without packing: what the packed results are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orpo_ds.data.packing import TargetRows
from orpo_ds.data.tokenize import TokenPair

FIRST_ORDINARY_ID = 3  # below it: pad, bos, eos


def random_pair(
    *, trunk: int, chosen: int, rejected: int, vocab_size: int, generator: torch.Generator
) -> TokenPair:
    """A pair whose sequences share `trunk` tokens and go on for `chosen` and `rejected` tokens.

    The prompt is the trunk. Where one sequence is the beginning of the other, so that the trunk holds a whole
    response, the prompt is half of it.
    """

    def draw(count: int) -> list[int]:
        return torch.randint(FIRST_ORDINARY_ID, vocab_size, (count,), generator=generator).tolist()

    shared, branch_c, branch_r = draw(trunk), draw(chosen), draw(rejected)
    if branch_c and branch_r and branch_c[0] == branch_r[0]:  # or the trunk would be longer than asked for
        ordinary = vocab_size - FIRST_ORDINARY_ID
        branch_r[0] = FIRST_ORDINARY_ID + (branch_r[0] - FIRST_ORDINARY_ID + 1) % ordinary
    prompt = trunk if branch_c and branch_r else trunk // 2
    return TokenPair(
        chosen=shared + branch_c,
        rejected=shared + branch_r,
        chosen_start=prompt,
        rejected_start=prompt,
        trunk=trunk,
    )


def random_pairs(shapes: Sequence[tuple[int, int, int]], *, vocab_size: int, seed: int) -> list[TokenPair]:
    """A pair for each (trunk, chosen, rejected)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        random_pair(trunk=trunk, chosen=chosen, rejected=rejected, vocab_size=vocab_size, generator=generator)
        for trunk, chosen, rejected in shapes
    ]


def logps_of(logits: Tensor, rows: TargetRows) -> Tensor:
    """[R] log-probs of the target rows from logits [N, V], in the logits' dtype."""
    return logits.log_softmax(-1)[rows.index, rows.label]
