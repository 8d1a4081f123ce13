r"""Log-probabilities of target tokens from hidden states, without the [R, V] matrix of logits.

Target row r has a hidden state h_r [H] and a label y_r; the head has a weight W [V, H], a bias b [V], a scale
a and a soft-cap k:

    z_rv = a h_r . W_v + b_v            l_rv = k tanh(z_rv / k)      (l = z without a soft-cap)
    logp_r = l_{r,y_r} - log sum_v exp(l_rv)

Forward walks the vocabulary run by run and keeps three numbers a row (the online softmax of
arXiv:1805.02867):

    m <- max(m, max_v l_rv)      s <- s exp(m_old - m) + sum_v exp(l_rv - m)      t = l_{r,y_r}
    logp_r = (t - m) - log s

t - m <= 0 and s >= 1, so logp_r <= 0 always, and a token of probability 1 has logp exactly 0.

Backward, with the incoming gradient g_r and D = d logp / d z:

    p_rv = exp(l_rv - m) / s            D_rv = (1[v = y_r] - p_rv) (1 - (l_rv / k)^2)

    dh_r = g_r a sum_v D_rv W_v         dW_v = a sum_r D_rv (g_r h_r)         db_v = sum_r D_rv g_r

g multiplies the narrow factors [r, H], never the wide tile. A tile's l is computed again from h and W, or
taken from the cache: four products of [R, H] x [H, V] in all, three where the cache holds.

A frozen head (LoRA) wants neither dW nor db, and its dh_r is g_r times a direction that does not depend on g.
Forward accumulates sum_v p_rv W_v beside s, as flash attention does with its values, and backward is a
scaling: two products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_ds.loss.tiles import MIB, TileCache, WeightGradient, Workspace, product_into
from orpo_ds.loss.vocab_parallel import VocabShard


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    *,
    index: Tensor,
    label: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    tile_rows: int | None = None,
    tile_columns: int | None = None,
    logits_cache_mib: int = 0,
    vocab_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> Tensor:
    """Log-probability of `label[r]` given `hidden[index[r]]`, for R target rows.

    Args:
        hidden: [N, H], any float dtype.
        weight: [V, H], the head. A `Parameter` that ZeRO-3 partitions must be gathered here and again in
            backward, which it is when this runs inside the forward of a module that owns or registers it.
        index: [R] int64 rows of `hidden`, in any order; a row may repeat, and its gradients add up.
        label: [R] int64 token ids.
        bias: [V].
        softcap: final logit soft-capping (Gemma); None for none.
        scale: factor on the logits, before the bias (Cohere's `logit_scale`).
        tile_rows: most target rows whose logits exist at once; None takes what was measured to be fast.
        tile_columns: most tokens of the vocabulary whose logits exist at once; None likewise.
        logits_cache_mib: MiB of logits that forward may keep, which backward then need not compute again.
        vocab_group: the ranks that share the vocabulary: each holds some rows of the whole weight and bias,
            and the same hidden states, index and label.
        vocab_start: the token id of this rank's first row.

    Returns:
        [R] fp32 (float64 if an input is), <= 0. R = 0 is legal; its gradients are zeros, not None. A label
        outside the vocabulary gives -inf where it cannot be refused: over a vocab_group, and on a GPU, where
        reading it would stall the stream.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together; on a CPU also a label outside the
            vocabulary.
        RuntimeError: from backward, when the weight is not there, or when asked for a second derivative.
    """
    _check_tensors(hidden, weight, index=index, label=label, bias=bias)
    _check_options(
        softcap=softcap, tile_rows=tile_rows, tile_columns=tile_columns, logits_cache_mib=logits_cache_mib
    )
    if vocab_group is None and label.device.type == "cpu":
        _check_labels(label, vocab_size=weight.shape[0])
    head = _Head(
        softcap=softcap,
        scale=scale,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
        cache_bytes=logits_cache_mib * MIB,
        shard=VocabShard(group=vocab_group, start=vocab_start),
        differentiable=torch.is_grad_enabled(),
    )
    return _TokenLogps.apply(hidden, weight, bias, index, label, head)


@dataclass(frozen=True)
class _Head:
    """What one call is told, apart from its tensors."""

    softcap: float | None
    scale: float
    tile_rows: int | None
    tile_columns: int | None
    cache_bytes: int
    shard: VocabShard
    differentiable: bool  # grad mode is always off inside an autograd.Function, so it is read outside

    def workspace(self, hidden: Tensor, weight: Tensor, *, num_rows: int) -> Workspace:
        """Forward and backward each make their own, and cut the same tiles."""
        return Workspace(
            hidden, weight, num_rows=num_rows, tile_rows=self.tile_rows, tile_columns=self.tile_columns
        )

    def logits_into(self, tile: Tensor, states: Tensor, run: Tensor, bias: Tensor | None) -> Tensor:
        """Write the l of one tile [r, c] from states [r, H] and its run of the weight [c, H] and bias [c]."""
        product_into(tile, states, run.t(), alpha=self.scale, add=False)
        if bias is not None:
            tile.add_(bias)
        if self.softcap is not None:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)
        return tile

    def slope(self, logits: Tensor) -> Tensor | None:
        """dl/dz = 1 - (l/k)^2, of any shape; None where it is 1."""
        return None if self.softcap is None else (logits / self.softcap).square_().neg_().add_(1)


class _TokenLogps(torch.autograd.Function):
    """One block of rows at a time, and inside it one run of columns at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        label: Tensor,
        head: _Head,
    ) -> Tensor:
        want_hidden, *want_head = (head.differentiable and want for want in ctx.needs_input_grad[:3])
        frozen = want_hidden and not any(want_head)
        work = head.workspace(hidden, weight, num_rows=index.shape[0])
        cache = TileCache(head.cache_bytes if any(want_head) else 0)
        logps = hidden.new_empty(index.shape[0], dtype=work.sum_dtype)
        peak, mass = torch.empty_like(logps), torch.empty_like(logps)
        direction = hidden.new_empty(index.shape[0], hidden.shape[1]) if frozen else None

        for i, rows in enumerate(work.tiling.rows):
            states = work.operand(hidden[index[rows]])
            softmax = _OnlineSoftmax(label[rows], head, work, width=hidden.shape[1] if frozen else None)
            for j, columns in enumerate(work.tiling.columns):
                scratch = work.tile(rows, columns)
                kept = cache.keep((i, j), like=scratch)
                run = work.operand(weight[columns])
                logits = head.logits_into(
                    scratch if kept is None else kept, states, run, None if bias is None else bias[columns]
                )
                softmax.add(logits, columns, run=run, scratch=scratch)
            peak[rows], mass[rows], target = head.shard.combine(softmax.peak, softmax.mass, softmax.target)
            logps[rows] = (target - peak[rows]) - mass[rows].log()
            if direction is not None:
                direction[rows] = softmax.direction(weight, peak[rows], mass[rows], target)

        if want_hidden or any(want_head):
            # The weight and bias are kept as they were passed, not through save_for_backward: under ZeRO-3
            # that could pin the gathered weight, or copy it where saved-tensor hooks offload activations. The
            # Parameter object is what stays valid: DeepSpeed frees its data after this module and points it
            # at a newly gathered copy before this backward.
            ctx.weight, ctx.bias, ctx.weight_shape = weight, bias, weight.shape
            ctx.head, ctx.cache, ctx.direction = head, cache, direction
            ctx.save_for_backward(hidden, index, label, peak, mass)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.direction is not None:
            return _scaled_direction(ctx, grad), None, None, None, None, None
        hidden, index, label, peak, mass = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        head, weight = ctx.head, ctx.weight.detach()
        bias = None if ctx.bias is None else ctx.bias.detach()
        if weight.shape != ctx.weight_shape:
            raise RuntimeError(
                f"the head's weight is {list(weight.shape)} in backward and was {list(ctx.weight_shape)} in "
                "forward: ZeRO-3 has not gathered it. Call token_logps inside the forward of the module that "
                "owns the weight, or that lists it with deepspeed.zero.register_external_parameter."
            )
        work = head.workspace(hidden, weight, num_rows=index.shape[0])
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_weight = WeightGradient(weight, work) if want_weight else None
        grad_bias = weight.new_zeros(weight.shape[0], dtype=work.sum_dtype) if want_bias else None

        for i, rows in enumerate(work.tiling.rows):
            states = work.operand(hidden[index[rows]])
            incoming = grad[rows, None]
            scaled_states = work.operand(states * incoming)
            grad_states = torch.empty_like(states, dtype=work.sum_dtype)
            for j, columns in enumerate(work.tiling.columns):
                run = work.operand(weight[columns])
                logits = ctx.cache.take((i, j))
                if logits is None:
                    logits = head.logits_into(
                        work.tile(rows, columns), states, run, None if bias is None else bias[columns]
                    )
                minus_d = _minus_d_(
                    logits, columns, head, label=label[rows], peak=peak[rows], mass=mass[rows]
                )
                if grad_bias is not None:
                    grad_bias[columns].addmv_(minus_d.t(), grad[rows], alpha=-1)
                minus_d = work.operand(minus_d)
                if grad_weight is not None:
                    grad_weight.add(columns, minus_d.t(), scaled_states, alpha=-head.scale, first=i == 0)
                if grad_hidden is not None:
                    product_into(grad_states, minus_d, run, alpha=-head.scale, add=j > 0)
            if grad_hidden is not None:
                whole = head.shard.sum_(grad_states.mul_(incoming))
                grad_hidden.index_add_(0, index[rows], whole.to(hidden.dtype))

        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.result(),
            None if grad_bias is None else grad_bias.to(ctx.bias.dtype),
            None,
            None,
            None,
        )


def _scaled_direction(ctx: Any, grad: Tensor) -> Tensor:
    """The hidden gradient [N, H] of a frozen head, block by block so that no second [R, H] is alive."""
    hidden, index, *_ = ctx.saved_tensors
    grad_hidden = torch.zeros_like(hidden)
    for rows in ctx.head.workspace(hidden, ctx.weight, num_rows=index.shape[0]).tiling.rows:
        grad_hidden.index_add_(0, index[rows], (ctx.direction[rows] * grad[rows, None]).to(hidden.dtype))
    return grad_hidden


class _OnlineSoftmax:
    """The m, s and t of one block of rows; with `width` H also the direction of a frozen head."""

    def __init__(self, label: Tensor, head: _Head, work: Workspace, *, width: int | None) -> None:
        self._label, self._head, self._work = label, head, work
        like = torch.empty_like(label, dtype=work.sum_dtype)
        # Not -inf: exp(m_old - m) is 0 either way, but this is not NaN if a whole run of logits is -inf.
        self.peak = torch.full_like(like, torch.finfo(work.sum_dtype).min)
        self.mass = torch.zeros_like(like)
        self.target = torch.full_like(like, -torch.inf)
        self._pull = None if width is None else like.new_zeros(label.shape[0], width)

    def add(self, logits: Tensor, columns: slice, *, run: Tensor, scratch: Tensor) -> None:
        """Take in the tile [r, c] of `columns`. `scratch` [r, c] is overwritten; it may be `logits`."""
        position, held = self._head.shard.locate(self._label, columns)
        self.target = torch.where(held, logits.gather(1, position[:, None])[:, 0], self.target)
        slope = None if self._pull is None else self._head.slope(logits)
        peak = torch.maximum(self.peak, logits.amax(1))
        decay = torch.exp(self.peak - peak)
        exps = torch.sub(logits, peak[:, None], out=scratch).exp_()
        self.peak, self.mass = peak, self.mass * decay + exps.sum(1)
        if self._pull is not None:
            exps = exps if slope is None else exps.mul_(slope)
            product_into(self._pull.mul_(decay[:, None]), self._work.operand(exps), run, alpha=1, add=True)

    def direction(self, weight: Tensor, peak: Tensor, mass: Tensor, target: Tensor) -> Tensor:
        """The direction d logp / d h [r, H], from peak, mass and target logit [r] of the whole vocabulary."""
        assert self._pull is not None
        position, held = self._head.shard.locate(self._label, slice(0, weight.shape[0]))
        slope = self._head.slope(target)
        push = held.to(mass.dtype) if slope is None else slope * held
        pull = self._pull.mul_((torch.exp(self.peak - peak) / mass)[:, None])
        return self._head.shard.sum_((weight[position] * push[:, None] - pull).mul_(self._head.scale))


def _minus_d_(
    logits: Tensor, columns: slice, head: _Head, *, label: Tensor, peak: Tensor, mass: Tensor
) -> Tensor:
    """Turn l [r, c] into -D = (p - 1[v = y]) (1 - (l/k)^2), in place. The products' alpha turns the sign."""
    slope = head.slope(logits)
    probs = logits.sub_(peak[:, None]).exp_().mul_(mass.reciprocal()[:, None])
    position, held = head.shard.locate(label, columns)
    probs.scatter_add_(1, position[:, None], -held.to(probs.dtype)[:, None])
    return probs if slope is None else probs.mul_(slope)


def _check_tensors(
    hidden: Tensor, weight: Tensor, *, index: Tensor, label: Tensor, bias: Tensor | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"token_logps wants hidden [N, H] and weight [V, H]; got {list(hidden.shape)} and "
            f"{list(weight.shape)}. A weight [0] is one that ZeRO-3 has partitioned: gather it first."
        )
    int64 = index.dtype == label.dtype == torch.int64
    if index.ndim != 1 or index.shape != label.shape or not int64:
        raise ValueError(
            "token_logps wants index and label as int64 [R]; got "
            f"{index.dtype} {list(index.shape)} and {label.dtype} {list(label.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}; the weight's {weight.shape[0]} rows want one each.")


def _check_options(
    *, softcap: float | None, tile_rows: int | None, tile_columns: int | None, logits_cache_mib: int
) -> None:
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}: it must be positive, or None for no soft-cap.")
    for name, value in (("tile_rows", tile_rows), ("tile_columns", tile_columns)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1, or None for the measured default.")
    if logits_cache_mib < 0:
        raise ValueError(f"logits_cache_mib is {logits_cache_mib}: it must be 0 (keep nothing) or more.")


def _check_labels(label: Tensor, *, vocab_size: int) -> None:
    wrong = ((label < 0) | (label >= vocab_size)).nonzero()
    if wrong.numel():
        row = int(wrong[0])
        raise ValueError(
            f"label[{row}] is {int(label[row])}, outside the head's vocabulary of {vocab_size}. "
            "Do tokenizer and model belong together? Leave rows to ignore (-100) out of index and label."
        )
