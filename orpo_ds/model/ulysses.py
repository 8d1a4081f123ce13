"""Sequence parallelism: the ranks of a group share one packed row, so that a pair may be longer than one GPU holds.

Each rank holds a run of the row's tokens (`orpo_ds.data.row_part`). Everything in a decoder layer but the attention
looks at one token at a time and needs nothing more. For the attention the ranks trade tokens for heads, as in DeepSpeed
Ulysses (Jacobs et al., arXiv:2309.14509):

    [T/n tokens, all heads]  -- all-to-all -->  [T tokens, heads/n]      queries, keys and values in one exchange
    attention of the whole row, as on one rank, for these heads
    [T tokens, heads/n]      -- all-to-all -->  [T/n tokens, all heads]

The kernel sees a whole row and its whole layout, so shared trunks, windows and soft-caps need nothing new.
DeepSpeed's own class (`runtime/sequence_parallel/ulysses_sp.py`) fixes the shapes per batch, gathers the positions in
each layer and knows a layout only by them; so the exchange is done here, with torch's differentiable all-to-all.

With fewer key heads than ranks (or a number that they do not divide) key and value heads are repeated until each rank
gets the ones that its query heads look at. The gradients of the copies come back to the rank that holds the token, and
the repetition's backward adds them up.

Tokens that only fill the last part are cut off before the attention and get zeros after it: nothing sees them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single
from torch.nn.functional import pad


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a row.

    Attributes:
        rank: which part of the row this rank holds, from 0.
        size: how many share it, at least 2.
        group: for collectives among them.
    """

    rank: int
    size: int
    group: dist.ProcessGroup

    @property
    def reports(self) -> bool:
        """Whether this rank is the one of the group whose sums are counted."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the group, in place and without a gradient; returned for convenience."""
        dist.all_reduce(values, group=self.group)
        return values


def whole_row(
    query: Tensor, key: Tensor, value: Tensor, *, tokens: int, sequence: SequenceGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of this rank's tokens to this rank's heads of all tokens.

    Args:
        query: [L, Hq, D], L the tokens of each rank; the group's size n divides Hq.
        key: [L, Hkv, D]; Hkv divides Hq.
        value: [L, Hkv, Dv].
        tokens: T, those of the row without the inert ones, T <= n L.
        sequence: the ranks that share the row.

    Returns:
        query [T, Hq/n, D], key [T, h, D] and value [T, h, Dv], where h = Hkv / gcd(Hkv, n).
    """
    ranks = sequence.size
    copies = ranks // math.gcd(key.shape[1], ranks)
    key, value = (heads.repeat_interleave(copies, dim=1) for heads in (key, value))
    shapes = [(part.shape[1] // ranks, part.shape[2]) for part in (query, key, value)]
    # [n, L, width]: what goes to each rank, the three side by side.
    outgoing = torch.cat(
        [part.unflatten(1, (ranks, -1)).flatten(2).transpose(0, 1) for part in (query, key, value)], dim=2
    )
    incoming = _exchange(outgoing, sequence).flatten(0, 1)[:tokens]
    query, key, value = (
        part.unflatten(1, shape)
        for part, shape in zip(
            incoming.split([heads * size for heads, size in shapes], dim=1), shapes, strict=True
        )
    )
    return query, key, value


def own_tokens(attended: Tensor, *, length: int, sequence: SequenceGroup) -> Tensor:
    """The way back: [T, Hq/n, Dv] of this rank's heads to [L, Hq, Dv] of its `length` = L tokens."""
    ranks, size = sequence.size, attended.shape[2]
    rows = pad(attended.flatten(1), (0, 0, 0, length * ranks - attended.shape[0]))
    incoming = _exchange(rows.unflatten(0, (ranks, length)), sequence)  # [n, L, Hq/n Dv]
    return incoming.transpose(0, 1).flatten(1).unflatten(1, (-1, size))


def _exchange(outgoing: Tensor, sequence: SequenceGroup) -> Tensor:
    """Entry i of dimension 0 goes to rank i, and comes from rank i. Differentiable. Collective."""
    outgoing = outgoing.contiguous()
    received: Tensor = all_to_all_single(outgoing.new_empty(outgoing.shape), outgoing, group=sequence.group)
    return received
