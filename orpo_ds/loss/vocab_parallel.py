"""A vocabulary that is split over ranks: each holds the rows [start, start + size) of the head's weight.

A log-softmax needs three numbers a row from the whole vocabulary, and all three combine over shards:

    peak = max_v l_v              all-reduce MAX
    mass = sum_v 2^(l_v - peak)   each shard's is rescaled to the common peak, then all-reduce SUM
    l_y                           -inf on the ranks that do not hold y, so it rides along with the peak

with logits in bits, l / ln 2.

Hidden states are the same on every rank of the group. The gradient that a rank computes from its own columns
is a part; `sum_` makes it whole, so that every rank's backward returns the same gradient of the same
log-probs (Megatron-LM's convention, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary. Without a group it is the whole, and no collective runs."""

    group: dist.ProcessGroup | None
    start: int

    def locate(self, label: Tensor, *, start: Tensor | int, size: Tensor | int) -> tuple[Tensor, Tensor]:
        """Where labels [r] stand among `size` columns of this shard from `start` on, and whether there at all.

        With `start` and `size` [runs, 1] both results are [runs, r], else [r].

        A label that is elsewhere gets some valid position. Gathering there and masking costs r reads;
        selecting the rows that are there would need their number on the host, which on a GPU stalls the
        stream.
        """
        position = label - (self.start + start)
        return position.clamp(min=0).clamp(max=size - 1), (position >= 0) & (position < size)

    def combine(self, peak: Tensor, mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Peak, mass and target [r] of this shard -> those of the whole vocabulary. Two all-reduces."""
        if self.group is None:
            return peak, mass, target
        maxima = torch.stack((peak, target))
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.group)
        mass = mass * torch.exp2(peak - maxima[0])
        dist.all_reduce(mass, op=dist.ReduceOp.SUM, group=self.group)
        return maxima[0], mass, maxima[1]

    def sum_(self, partial: Tensor) -> Tensor:
        """Sum `partial` over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(partial, op=dist.ReduceOp.SUM, group=self.group)
        return partial
