"""Memory of a forward and backward pass, counted on tensors that have shapes and no data.

A formula for the activations of a layer would have to be written for every family of models, and again for each
release of transformers. Instead the user's own model runs, under torch's `FakeTensorMode`: every operation is done on
shapes alone, autograd keeps what it would keep, gradient checkpointing drops and recomputes what it would, adapters
are there, and a dispatch mode counts the bytes of every storage from its birth to its death. A 405B model takes
seconds and no memory.

Two parts stand in for kernels, which are not looked into by torch: the tiled head, which asks `head_memory_bytes`
(held to torch's own allocator by `tests/loss/test_memory.py`), and on a GPU flash attention, which keeps its query,
gathered keys and values, its output and one number a query and head.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from orpo_ds.data.packing import MicroBatch, VarlenLayout
from orpo_ds.loss.memory import head_memory_bytes
from orpo_ds.model.anatomy import ModelParts, hidden_states
from orpo_ds.model.attention import packed_attention_enabled

STAND_IN = "orpo_shapes"  # no "flash" in it: transformers would import a package of that name


@dataclass(frozen=True)
class GradientRule:
    """What becomes of a gradient when it is complete.

    Attributes:
        kept: share of its bytes that stays on the device until the step.
        bucket: elements of DeepSpeed's bucket; a larger gradient waits beside it for the next one. 0: none waits.
        norm: whether its norm is taken at once, of a copy in float64, as with an offloaded optimizer.
        ranks: that share it.
    """

    kept: float
    bucket: int = 0
    norm: bool = False
    ranks: int = 1


@dataclass(frozen=True)
class Replayed:
    """Bytes on the device beyond the model and its optimizer.

    Attributes:
        saved: what the forward pass of the backbone leaves for the backward pass.
        peak: most at any moment of both passes, the gradients that the rule keeps included.
        kept: of those gradients at the end.
    """

    saved: int
    peak: int
    kept: int


def replay(
    parts: ModelParts,
    batch: MicroBatch,
    *,
    fake: FakeTensorMode,
    device: str,
    rule: GradientRule,
    logits_cache_mib: int = 0,
) -> Replayed:
    """Run a micro-batch forward and backward on shapes.

    Args:
        parts: of a model that was made under `fake` (see `orpo_ds.estimate.shapes`).
        batch: on the CPU, with its real ids.
        fake: the mode that the model was made under.
        device: "cpu" or "cuda", which attend and tile differently.
        rule: what becomes of a gradient that is complete.
        logits_cache_mib: see `ORPOConfig`.
    """
    live = _LiveBytes()
    kept: list[Tensor] = []
    waiting: list[Tensor] = []

    def reduce() -> None:
        while waiting:
            gradient = waiting.pop()
            if rule.norm:
                torch.empty(-(-gradient.numel() // rule.ranks), dtype=torch.float64)
            kept_bytes = int(gradient.nbytes * rule.kept)
            if not rule.bucket:
                del gradient  # without ZeRO it stays where it is; else it is copied into its partition
            kept.append(torch.empty(kept_bytes, dtype=torch.uint8))

    def complete(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        reduce()
        waiting.append(parameter.grad)
        parameter.grad = None
        if not 0 < rule.bucket < parameter.numel():
            reduce()

    trained = [parameter for parameter in parts.model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(complete) for parameter in trained]
    try:
        with fake:
            batch = batch.map_tensors(fake.from_tensor)
            with _attention(parts, batch, device=device), live:
                hidden, _ = hidden_states(parts, batch)
                saved = live.alive
                logps = _HeadStandIn.apply(
                    hidden,
                    parts.head.weight,
                    int(batch.rows.index.shape[0]),
                    device,
                    parts.softcap is not None,
                    logits_cache_mib,
                )
                del hidden
                logps.sum().backward()
                reduce()
    finally:
        for hook in hooks:
            hook.remove()
    return Replayed(saved=saved, peak=live.peak, kept=sum(tensor.nbytes for tensor in kept))


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self._key(leaf) not in before:
                self._note(leaf)
        return result

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


class _HeadStandIn(torch.autograd.Function):
    """The bytes of `token_logps`: gradients as autograd sees them, and for a moment the rest of its peak."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rows: int, device: str, softcap: bool, cache_mib: int
    ) -> Tensor:
        frozen = not weight.requires_grad
        whole = head_memory_bytes(
            rows=rows,
            hidden_size=weight.shape[1],
            vocab_size=weight.shape[0],
            hidden_rows=hidden.shape[0],
            hidden_dtype=hidden.dtype,
            weight_dtype=weight.dtype,
            device=device,
            frozen=frozen,
            softcap=softcap,
            logits_cache_mib=cache_mib,
        )
        gradients = hidden.nbytes + (0 if frozen else weight.nbytes)
        ctx.direction = hidden.new_empty(rows, hidden.shape[1]) if frozen else None
        ctx.scratch = max(whole - gradients, 0)
        ctx.weight = weight  # not saved: it is a parameter, which lives anyway
        ctx.save_for_backward(hidden)
        hidden.new_empty(ctx.scratch, dtype=torch.uint8)
        return hidden.new_empty(rows, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.empty_like(ctx.weight) if ctx.weight.requires_grad else None
        hidden.new_empty(ctx.scratch, dtype=torch.uint8)
        return grad_hidden, grad_weight, None, None, None, None


class _FlashStandIn(torch.autograd.Function):
    """The bytes of `flash_attn_varlen_func` with gathered keys (Dao 2023, arXiv:2307.08691, section 3.1)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[-1])
        log_sum = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, _, log_sum = ctx.saved_tensors
        torch.empty_like(log_sum)  # sum of out times its gradient, a number a query and head
        query.new_empty(query.shape, dtype=torch.float32)  # the query's gradient is summed in fp32
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash_shapes(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: VarlenLayout,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stands in for `orpo_ds.model.kernels.flash_attention` under transformers' attention interface."""
    query, key, value = (heads.squeeze(0).transpose(0, 1) for heads in (query, key, value))
    keys, values = key.index_select(0, layout.kv_index), value.index_select(0, layout.kv_index)
    return _FlashStandIn.apply(query, keys, values).unsqueeze(0), None


@contextmanager
def _attention(parts: ModelParts, batch: MicroBatch, *, device: str) -> Iterator[None]:
    """The attention of a packed row on `device`; a padded one uses the model's own."""
    if batch.layout is None:
        with nullcontext():
            yield
        return
    with packed_attention_enabled(parts.model):
        if device != "cpu":
            AttentionInterface.register(STAND_IN, _flash_shapes)
            parts.model.set_attn_implementation(STAND_IN)
        yield
