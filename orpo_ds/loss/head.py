"""The head on one tile and one block: what forward sums (`OnlineSoftmax`), what backward does (`Gradients`).

The letters are those of `token_logps`, whose docstring has the formulas. Logits, their peak and the target's are kept
in bits, l / ln 2: the factor rides along in the matrix product, and 2^bits takes half the time of exp(l) on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_ds.loss.tiles import TileCache, Tiling, WeightGradient, Workspace, product_into
from orpo_ds.loss.vocab_parallel import VocabShard

BITS = 1 / math.log(2)


@dataclass(frozen=True)
class HeadOptions:
    """What a call of `token_logps` is told, apart from its tensors."""

    softcap: float | None
    scale: float
    tile_rows: int | None
    tile_columns: int | None
    cache_bytes: int
    shard: VocabShard
    differentiable: bool


class Head:
    """The tensors of one call, its options and its workspace: everything that a tile is computed from."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        label: Tensor,
        options: HeadOptions,
    ) -> None:
        self.hidden, self.weight, self.bias, self.index, self.label = hidden, weight, bias, index, label
        self.softcap, self.scale, self.shard = options.softcap, options.scale, options.shard
        self._unit = BITS if self.softcap is None else 1.0  # a soft-cap makes bits after its tanh
        self.work = Workspace(
            hidden,
            weight,
            num_rows=index.shape[0],
            tile_rows=options.tile_rows,
            tile_columns=options.tile_columns,
        )

    def states(self, rows: slice) -> Tensor:
        """The hidden states [r, H] of a block, ready for products."""
        return self.work.operand(self.hidden[self.index[rows]])

    def run(self, columns: slice) -> Tensor:
        """A run of the weight [c, H], ready for products; the next call may overwrite it."""
        return self.work.run(self.weight[columns])

    def bits_into(self, tile: Tensor, states: Tensor, run: Tensor, columns: slice) -> Tensor:
        """Write l / ln 2 of one tile [r, c]."""
        product_into(tile, states, run.t(), alpha=self.scale * self._unit, add=False)
        if self.bias is not None:
            tile.add_(self.bias[columns], alpha=self._unit)
        if self.softcap is not None:
            tile.div_(self.softcap).tanh_().mul_(self.softcap * BITS)
        return tile

    def slope(self, bits: Tensor) -> Tensor | None:
        """dl/dz = 1 - (l/k)^2 of logits, in bits, of any shape; None where it is 1."""
        return None if self.softcap is None else (bits / (self.softcap * BITS)).square_().neg_().add_(1)

    def places(self, label: Tensor) -> Places:
        """Where the labels [r] of a block stand in the runs of columns."""
        return Places.of(label, self.work.tiling, self.shard)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the labels of a block of rows stand among its runs of columns.

    Attributes:
        position: int64 [runs, r, 1], the label's place in the run; some valid place where it is in another run.
        held: bool [runs, r], whether it is there at all.
    """

    position: Tensor
    held: Tensor

    @classmethod
    def of(cls, label: Tensor, tiling: Tiling, shard: VocabShard) -> Places:
        """Look the labels [r] up in all runs at once: in each run alone it is eight small operations."""
        starts = torch.tensor([run.start for run in tiling.columns], device=label.device)[:, None]
        sizes = torch.tensor([run.stop - run.start for run in tiling.columns], device=label.device)[:, None]
        position, held = shard.locate(label, start=starts, size=sizes)
        return cls(position.unsqueeze(-1), held)


class OnlineSoftmax:
    """m, s and t of one block of rows and, for a frozen head, the direction of its hidden gradient."""

    def __init__(self, head: Head, block: int, *, cache: TileCache, with_direction: bool) -> None:
        """Run the head over the whole vocabulary (all ranks' shards of it) for block number `block`."""
        rows = head.work.tiling.rows[block]
        self._head, self._label = head, head.label[rows]
        states = head.states(rows)
        like = states.new_empty(states.shape[0], dtype=head.work.sum_dtype)
        # Not -inf: exp(m_old - m) is 0 either way, but this is not NaN if a whole run of logits is -inf.
        self.peak = torch.full_like(like, torch.finfo(like.dtype).min)
        self.mass = torch.zeros_like(like)
        self._mean = torch.zeros_like(states, dtype=like.dtype) if with_direction else None

        places = head.places(self._label)
        found = like.new_empty(len(head.work.tiling.columns), len(like))
        for j, columns in enumerate(head.work.tiling.columns):
            scratch = head.work.tile(rows, columns)
            kept = cache.keep((block, j), like=scratch)
            run = head.run(columns)
            bits = head.bits_into(scratch if kept is None else kept, states, run, columns)
            torch.gather(bits, 1, places.position[j], out=found[j].unsqueeze(-1))
            self._add(bits, run=run, scratch=scratch)
        self.target = torch.where(places.held, found, -torch.inf).amax(0)
        self._combine()

    def logp(self) -> Tensor:
        """The log-probs [r] of the block's labels."""
        return (self.target - self.peak) / BITS - self.mass.log()

    def direction(self) -> Tensor:
        """The direction a sum_v D_rv W_v [r, H] of the hidden gradient, complete over the shards."""
        assert self._mean is not None
        weight = self._head.weight
        position, held = self._head.shard.locate(self._label, start=0, size=weight.shape[0])
        slope = self._head.slope(self.target)
        share = held.to(self.mass.dtype) if slope is None else slope * held
        direction = self._mean.neg_().addcmul_(weight[position].to(self._mean.dtype), share[:, None])
        return self._head.shard.sum_(direction.mul_(self._head.scale))

    def _add(self, bits: Tensor, *, run: Tensor, scratch: Tensor) -> None:
        """Take in a tile [r, c]; overwrite `scratch` [r, c], which may be `bits`."""
        slope = self._head.slope(bits) if self._mean is not None else None
        peak = torch.maximum(self.peak, bits.amax(1))
        decay = torch.exp2(self.peak - peak)
        exps = torch.sub(bits, peak[:, None], out=scratch).exp2_()
        self.peak, self.mass = peak, self.mass.mul_(decay).add_(exps.sum(1))
        if self._mean is not None:
            exps = self._head.work.operand(exps if slope is None else exps.mul_(slope))
            product_into(self._mean.mul_(decay[:, None]), exps, run, alpha=1, add=True)

    def _combine(self) -> None:
        """From this shard's peak, mass and target to the whole vocabulary's; normalise the mean of W."""
        own_peak = self.peak
        self.peak, self.mass, self.target = self._head.shard.combine(self.peak, self.mass, self.target)
        if self._mean is not None:
            self._mean.mul_((torch.exp2(own_peak - self.peak) / self.mass)[:, None])


class Gradients:
    """dh, dW and db of one backward, each None where it is not wanted, added up block by block."""

    def __init__(self, head: Head, *, hidden: bool, weight: bool, bias: bool) -> None:
        self._head = head
        self._hidden = torch.zeros_like(head.hidden) if hidden else None
        self._weight = WeightGradient(head.weight, head.work) if weight else None
        self._bias = head.weight.new_zeros(head.weight.shape[0], dtype=head.work.sum_dtype) if bias else None

    def add_block(self, block: int, grad: Tensor, peak: Tensor, mass: Tensor, *, cache: TileCache) -> None:
        """Add the part of block number `block`, with its g, m and s [r]."""
        head = self._head
        rows = head.work.tiling.rows[block]
        states = head.states(rows)
        scaled_states = head.work.operand(states * grad[:, None])
        grad_states = torch.empty_like(states, dtype=head.work.sum_dtype)
        places = head.places(head.label[rows])
        minus_held = places.held.to(head.work.sum_dtype).neg_().unsqueeze(-1)
        peak, share = peak[:, None], mass.reciprocal()[:, None]
        # A tile becomes -D = (p - 1[v = y]) (1 - (l/k)^2), in place; the products take alpha < 0.
        for j, columns in enumerate(head.work.tiling.columns):
            run = head.run(columns)
            bits = cache.take((block, j))
            if bits is None:
                bits = head.bits_into(head.work.tile(rows, columns), states, run, columns)
            slope = head.slope(bits)
            minus_d = bits.sub_(peak).exp2_().mul_(share)
            minus_d.scatter_add_(1, places.position[j], minus_held[j])
            if slope is not None:
                minus_d.mul_(slope)
                del slope  # or the products would run beside it
            if self._bias is not None:
                self._bias[columns].addmv_(minus_d.t(), grad, alpha=-1)
            minus_d = head.work.operand(minus_d)
            if self._weight is not None:
                self._weight.add(columns, minus_d.t(), scaled_states, alpha=-head.scale, first=block == 0)
            if self._hidden is not None:
                product_into(grad_states, minus_d, run, alpha=-head.scale, add=j > 0)
        if self._hidden is not None:
            whole = head.shard.sum_(grad_states.mul_(grad[:, None]))
            self._hidden.index_add_(0, head.index[rows], whole.to(self._hidden.dtype))

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return dh [N, H], dW [V, H] and db [V], each in the dtype of what it is the gradient of."""
        weight = None if self._weight is None else self._weight.result()
        if self._bias is None:
            return self._hidden, weight, None
        assert self._head.bias is not None
        return self._hidden, weight, self._bias.to(self._head.bias.dtype)
