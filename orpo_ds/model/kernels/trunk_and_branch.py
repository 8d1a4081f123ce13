"""A long branch against its trunk and itself on a CPU, without a mask of [queries, keys].

The mask of a rejected branch says two simple things: every query sees the whole trunk, and within the branch attention
is causal. torch's flash kernel does either without a mask and keeps no scores. So the two run one after the other, and
their results meet by their log-sum-exps:

    lse = log(exp lse_trunk + exp lse_own)      out = exp(lse_trunk - lse) out_trunk + exp(lse_own - lse) out_own

Backward needs no more than that: given the *merged* output and log-sum-exp, the kernel's backward over some of the keys
is exactly the gradient through them (as in ring attention, Liu et al., arXiv:2310.01889, and flash attention itself,
which walks over the keys in blocks). The queries' two gradients add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def trunk_and_branch(
    query: Tensor, trunk: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], *, scaling: float
) -> Tensor:
    """Attention of a branch of L tokens after a trunk of t tokens, on a CPU.

    Args:
        query: [Hq, L, D].
        trunk: keys and values [Hkv, t, D]; Hkv divides Hq.
        own: keys and values [Hkv, L, D].
        scaling: factor of the scores.

    Returns:
        [Hq, L, D] in query's dtype.
    """
    out: Tensor = _TrunkAndBranch.apply(query[None], *(part[None] for part in (*trunk, *own)), scaling)
    return out[0]


class _TrunkAndBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        trunk_key: Tensor,
        trunk_value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        scaling: float,
    ) -> Tensor:
        of_trunk, lse_trunk = _forward(query, trunk_key, trunk_value, 0.0, False, scale=scaling)
        of_own, lse_own = _forward(query, own_key, own_value, 0.0, True, scale=scaling)
        lse = torch.logaddexp(lse_trunk, lse_own)  # [1, Hq, L], fp32 for half precision
        out = of_trunk * (lse_trunk - lse).exp()[..., None] + of_own * (lse_own - lse).exp()[..., None]
        out = out.to(query.dtype)
        ctx.save_for_backward(query, trunk_key, trunk_value, own_key, own_value, out, lse)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, trunk_key, trunk_value, own_key, own_value, out, lse = ctx.saved_tensors
        through_trunk, *trunk_grads = _backward(
            grad, query, trunk_key, trunk_value, out, lse, 0.0, False, scale=ctx.scaling
        )
        through_own, *own_grads = _backward(
            grad, query, own_key, own_value, out, lse, 0.0, True, scale=ctx.scaling
        )
        return through_trunk + through_own, *trunk_grads, *own_grads, None
