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

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_ds.loss.head import Gradients, Head, HeadOptions, OnlineSoftmax
from orpo_ds.loss.tiles import MIB, TileCache
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
    options = HeadOptions(
        softcap=softcap,
        scale=scale,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
        cache_bytes=logits_cache_mib * MIB,
        shard=VocabShard(group=vocab_group, start=vocab_start),
        differentiable=torch.is_grad_enabled(),  # read here: inside an autograd.Function it is always off
    )
    return _TokenLogps.apply(hidden, weight, bias, index, label, options)


class _TokenLogps(torch.autograd.Function):
    """One block of rows at a time; a block walks the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        label: Tensor,
        options: HeadOptions,
    ) -> Tensor:
        want_hidden, *want_head = (options.differentiable and want for want in ctx.needs_input_grad[:3])
        frozen = want_hidden and not any(want_head)
        head = Head(hidden, weight, bias, index, label, options)
        cache = TileCache(options.cache_bytes if any(want_head) else 0)
        logps = hidden.new_empty(index.shape[0], dtype=head.work.sum_dtype)
        peak, mass = torch.empty_like(logps), torch.empty_like(logps)
        direction = hidden.new_empty(index.shape[0], hidden.shape[1]) if frozen else None
        for block, rows in enumerate(head.work.tiling.rows):
            softmax = OnlineSoftmax(head, block, cache=cache, with_direction=frozen)
            logps[rows], peak[rows], mass[rows] = softmax.logp(), softmax.peak, softmax.mass
            if direction is not None:
                direction[rows] = softmax.direction()
            del softmax  # or the next block would be summed beside this one's [r, H]

        ctx.blocks, ctx.direction = head.work.tiling.rows, direction
        if frozen:
            ctx.save_for_backward(hidden, index)
        elif any(want_head):
            # The weight and bias are kept as they were passed, not through save_for_backward: under ZeRO-3
            # that could pin the gathered weight, or copy it where saved-tensor hooks offload activations. The
            # Parameter object is what stays valid: DeepSpeed frees its data after this module and points it
            # at a newly gathered copy before this backward.
            ctx.weight, ctx.bias, ctx.weight_shape = weight, bias, weight.shape
            ctx.options, ctx.cache = options, cache
            ctx.save_for_backward(hidden, index, label, peak, mass)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        no_more = (None, None, None)  # index, label, options
        if ctx.direction is not None:
            return _scaled_direction(ctx, grad), None, None, *no_more
        hidden, index, label, peak, mass = ctx.saved_tensors
        weight, bias = ctx.weight.detach(), None if ctx.bias is None else ctx.bias.detach()
        if weight.shape != ctx.weight_shape:
            raise RuntimeError(
                f"the head's weight is {list(weight.shape)} in backward and was {list(ctx.weight_shape)} in "
                "forward: ZeRO-3 has not gathered it. Call token_logps inside the forward of the module that "
                "owns the weight, or that lists it with deepspeed.zero.register_external_parameter."
            )
        head = Head(hidden, weight, bias, index, label, ctx.options)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        gradients = Gradients(head, hidden=want_hidden, weight=want_weight, bias=want_bias)
        for block, rows in enumerate(ctx.blocks):
            gradients.add_block(block, grad[rows], peak[rows], mass[rows], cache=ctx.cache)
        return *gradients.result(), *no_more


def _scaled_direction(ctx: Any, grad: Tensor) -> Tensor:
    """The hidden gradient [N, H] of a frozen head, block by block: no second [R, H] is alive."""
    hidden, index = ctx.saved_tensors
    grad_hidden = torch.zeros_like(hidden)
    for rows in ctx.blocks:
        grad_hidden.index_add_(0, index[rows], (ctx.direction[rows] * grad[rows, None]).to(hidden.dtype))
    return grad_hidden


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
