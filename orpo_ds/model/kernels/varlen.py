"""The CUDA kernels: flash-attn's and torch's variable-length attention, called with gathered keys.

Both take queries and keys with borders of their own (`cu_seqlens_q`, `cu_seqlens_k`, int32). The queries of a
packed row lie in order already; keys and values are gathered once, trunk before branch. Where a segment has
more keys than queries both align the causal mask with the bottom right corner (flash-attn since 2.1), so that
query i of a rejected branch sees the trunk and the branch up to itself. A window of w tokens is (w - 1, 0) to
both: they count the tokens to the left of the diagonal, inclusive.

The gather's backward adds at most two gradients into a row (a trunk is seen by its own segment and by one
branch). A sum of two is the same in either order, so it repeats bit by bit although CUDA's index_add works in
no fixed order. The kernels' own backward does so when torch's deterministic algorithms are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from orpo_ds.data.packing import VarlenLayout
from orpo_ds.model.kernels.score_rule import ScoreRule

HEAD_DIM_MULTIPLE = 8  # torch's varlen operator takes no other head sizes; flash-attn pads by itself

log = logging.getLogger(__name__)


@cache
def load_flash_attn() -> Callable[..., Any] | None:
    """`flash_attn.flash_attn_varlen_func`, or None (and one line in the log) where it cannot be imported."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        log.info("flash-attn is not used: %s", error)
        return None
    return flash_attn_varlen_func


@cache
def load_torch_varlen() -> Callable[..., Any] | None:
    """`torch.nn.attention.varlen.varlen_attn`, or None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        log.info("torch's variable-length attention is not used: %s", error)
        return None
    return varlen_attn


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, rule: ScoreRule
) -> Tensor:
    """Attention of a packed row by `flash_attn_varlen_func`; see `orpo_ds.model.kernels` for the shapes."""
    attend = load_flash_attn()
    assert attend is not None, "choose_kernel takes flash-attn only where it can be imported"
    width = max(query.shape[-1], value.shape[-1])
    out = attend(
        _widen(query, width),
        _widen(key, width).index_select(0, layout.kv_index),
        _widen(value, width).index_select(0, layout.kv_index),
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        softmax_scale=rule.scaling,
        causal=True,
        window_size=_window(rule),
        softcap=rule.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _narrow(out, value)


def torch_varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, rule: ScoreRule
) -> Tensor:
    """Attention of a packed row by `varlen_attn`; see `orpo_ds.model.kernels` for the shapes."""
    attend = load_torch_varlen()
    assert attend is not None, "choose_kernel takes varlen_attn only where this torch has it"
    assert rule.softcap is None, "choose_kernel takes varlen_attn only without a soft-cap"
    width = max(query.shape[-1], value.shape[-1])
    width += -width % HEAD_DIM_MULTIPLE
    out = attend(
        _widen(query, width),
        _widen(key, width).index_select(0, layout.kv_index),
        _widen(value, width).index_select(0, layout.kv_index),
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        scale=rule.scaling,
        window_size=_window(rule),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return _narrow(out, value)


def _window(rule: ScoreRule) -> tuple[int, int]:
    """(tokens to the left, tokens to the right) of the diagonal; -1 is no limit."""
    return (-1, 0) if rule.window is None else (rule.window - 1, 0)


def _widen(heads: Tensor, width: int) -> Tensor:
    """Zeros up to `width` in the last dimension: they change no dot product and are cut off the output."""
    missing = width - heads.shape[-1]
    return functional.pad(heads, (0, missing)) if missing else heads


def _narrow(out: Tensor, value: Tensor) -> Tensor:
    """The head size of the values again."""
    return out[..., : value.shape[-1]]
