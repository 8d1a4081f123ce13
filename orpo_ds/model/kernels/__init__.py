"""Three ways to compute the attention of a packed row, one signature, and the rule that picks among them.

A kernel takes query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv], the layout of the row and a ScoreRule,
and returns [T, Hq, Dv] in query's dtype. Hq is a multiple of Hkv. Every kernel is differentiable in the three
tensors and stateless, so recomputation under gradient checkpointing repeats it exactly.

| kernel         | runs on                        | head size | soft-cap |
| -------------- | ------------------------------ | --------- | -------- |
| flash-attn     | CUDA, sm80 on, fp16 and bf16   | up to 256 | yes      |
| torch's varlen | CUDA, sm80 on, fp16 and bf16   | up to 256 | no       |
| SDPA           | anything                       | any       | yes      |
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from orpo_ds.data.packing import VarlenLayout
from orpo_ds.model.kernels.score_rule import ScoreRule
from orpo_ds.model.kernels.sdpa import sdpa_attention
from orpo_ds.model.kernels.varlen import (
    flash_attention,
    load_flash_attn,
    load_torch_varlen,
    torch_varlen_attention,
)

FLASH_MAX_HEAD_DIM = 256
FLASH_MIN_CAPABILITY = (8, 0)


class Kernel(Protocol):
    """What the functions of this package have in common; shapes as above."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, rule: ScoreRule
    ) -> Tensor:
        """Attention of a packed row."""


def choose_kernel(query: Tensor, value: Tensor, rule: ScoreRule) -> Kernel:
    """The fastest kernel that computes exactly this on this device."""
    if not _suits_flash(query, value):
        return sdpa_attention
    if load_flash_attn() is not None:
        return flash_attention
    if load_torch_varlen() is not None and rule.softcap is None:
        return torch_varlen_attention
    return sdpa_attention


def _suits_flash(query: Tensor, value: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and max(query.shape[-1], value.shape[-1]) <= FLASH_MAX_HEAD_DIM
        and torch.cuda.get_device_capability(query.device) >= FLASH_MIN_CAPABILITY
    )
