"""Runs the project's real flash-attn and torch varlen calls on a CPU, and measures their errors.

A script for a process of its own (`test_flash_contract.py` starts it): flash-attn's reference code is chosen
by environment variables that must stand before its import, and operators get CPU implementations that nobody
else should meet. It prints one JSON object, or with status 3 the reason why it cannot run.

Between our call and the arithmetic lies each library's own Python, untouched. Below its operator, for `cpu`:

* flash-attn's own reference of its AMD port (`FLASH_ATTENTION_TRITON_AMD_REF=1`), written by others, forward
and
  backward. It knows neither window nor soft-cap.
* what the docstring of `flash_attn_varlen_func` says, in float64, for the calls with a window or a soft-cap,
and
  for all calls of `torch.nn.attention.varlen`, whose operator is the same kernel.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from orpo_ds.data.packing import VarlenLayout, pack
from orpo_ds.model.kernels import flash_attention, torch_varlen_attention
from orpo_ds.model.kernels.score_rule import ScoreRule
from tests.model.pairs import SHAPES, full_sequence_attention, random_pairs

UNAVAILABLE = 3

# (Hq, Hkv, D, Dv)
HEADS = {"mha": (4, 4, 16, 16), "gqa": (6, 2, 32, 32), "mqa": (4, 1, 16, 16), "narrow values": (4, 2, 24, 16)}
RULES = {
    "plain": ScoreRule(scaling=0.3),
    "window": ScoreRule(scaling=0.3, window=5),
    "window of one": ScoreRule(scaling=0.3, window=1),
    "softcap": ScoreRule(scaling=0.5, softcap=1.5),
    "softcap and window": ScoreRule(scaling=0.5, softcap=1.5, window=5),
}


@dataclass(frozen=True)
class Call:
    """The arguments of one call, as they reach the operator; names are those of `flash_attn_varlen_func`."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    causal: bool
    window: tuple[int, int]
    softcap: float

    def check(self) -> None:
        """What the CUDA kernels demand of their arguments, and do not all check."""
        for tensor in (self.query, self.key, self.value):
            assert tensor.dtype in (torch.float16, torch.bfloat16)
            assert tensor.stride(-1) == 1, "the last dimension is contiguous"
            assert tensor.shape[-1] % 8 == 0, "head sizes are multiples of 8"
            assert tensor.shape[-1] == self.query.shape[-1], "one head size"
        for borders, longest, rows in (
            (self.cu_seqlens_q, self.max_seqlen_q, self.query),
            (self.cu_seqlens_k, self.max_seqlen_k, self.key),
        ):
            assert borders.dtype == torch.int32
            assert borders.is_contiguous()
            assert borders[-1] == len(rows)
            assert longest == borders.diff().max()

    def forward(self) -> Tensor:
        """`flash_attn_varlen_func` as its docstring defines it, in float64, rounded to the query's dtype.

        "If causal=True, the causal mask is aligned to the bottom right corner." "Query at position i will
        only attend to keys between [i + seqlen_k - seqlen_q - window_size[0], i + seqlen_k - seqlen_q +
        window_size[1]] inclusive." -1 is an infinite window. "Anything > 0 activates softcapping attention."
        """
        out = torch.empty(*self.query.shape[:2], self.value.shape[2], dtype=self.query.dtype)
        for rows, keys in self._segments():
            weights, _ = self._weights(rows, keys)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, self._expanded(self.value[keys])).to(out.dtype)
        return out

    def backward(self, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its gradients in query, key and value. Written out: below an operator there is no autograd."""
        heads = self.key.shape[1]
        dquery, dkey, dvalue = (torch.zeros(x.shape).double() for x in (self.query, self.key, self.value))
        for rows, keys in self._segments():
            weights, slope = self._weights(rows, keys)
            dweights = torch.einsum("qhd,khd->hqk", dout[rows].double(), self._expanded(self.value[keys]))
            dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * slope * self.scale
            dquery[rows] = torch.einsum("hqk,khd->qhd", dscores, self._expanded(self.key[keys]))
            for gradient, share in (
                (dkey, torch.einsum("hqk,qhd->khd", dscores, self.query[rows].double())),
                (dvalue, torch.einsum("hqk,qhd->khd", weights, dout[rows].double())),
            ):
                gradient[keys] += share.unflatten(1, (heads, -1)).sum(2)
        dtype = self.query.dtype
        return dquery.to(dtype), dkey.to(dtype), dvalue.to(dtype)

    def _segments(self) -> list[tuple[slice, slice]]:
        borders = (self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist())
        rows, keys = ([slice(start, end) for start, end in pairwise(border)] for border in borders)
        return list(zip(rows, keys, strict=True))

    def _expanded(self, heads: Tensor) -> Tensor:
        return heads.double().repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)

    def _weights(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor | float]:
        """Softmax [H, q, k], and the derivative of the soft-capped in the plain scores."""
        scores = torch.einsum("qhd,khd->hqk", self.query[rows].double(), self._expanded(self.key[keys]))
        scores *= self.scale
        slope: Tensor | float = 1.0
        if self.softcap > 0:
            scores = self.softcap * torch.tanh(scores / self.softcap)
            slope = 1.0 - (scores / self.softcap) ** 2
        num_queries, num_keys = scores.shape[1:]
        diagonal = torch.arange(num_queries).unsqueeze(1) + num_keys - num_queries
        column = torch.arange(num_keys)
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
        if self.causal:
            visible &= column <= diagonal
        if self.window[0] >= 0:
            visible &= column >= diagonal - self.window[0]
        if self.window[1] >= 0:
            visible &= column <= diagonal + self.window[1]
        return scores.masked_fill(~visible, -torch.inf).softmax(-1), slope


def install_flash_attn() -> None:
    """Give flash-attn's two varlen operators an implementation for `cpu`.

    Raises:
        ImportError: no flash-attn, or no triton that it can import.
    """
    os.environ["FLASH_ATTENTION_TRITON_AMD_ENABLE"] = "TRUE"
    os.environ["FLASH_ATTENTION_TRITON_AMD_REF"] = "1"
    from flash_attn import flash_attn_interface as interface

    forward, backward = interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward

    def call_of(arguments: dict[str, Any]) -> Call:
        return Call(
            *(arguments[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")),
            *(arguments[name] for name in ("max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal")),
            window=(arguments["window_size_left"], arguments["window_size_right"]),
            softcap=arguments["softcap"],
        )

    def reference_knows(call: Call) -> bool:
        return call.causal and call.window[0] == -1 and call.softcap == 0.0

    @forward.register_kernel("cpu")
    def cpu_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        call = call_of(_bind(forward, args, kwargs))
        call.check()
        if reference_knows(call):
            return forward._init_fn(*args, **kwargs)
        return call.forward(), torch.zeros(0), torch.zeros(0), torch.zeros(0)

    @backward.register_kernel("cpu")
    def cpu_backward(*args: Any, **kwargs: Any) -> Tensor:
        arguments = _bind(backward, args, kwargs)
        call = call_of(arguments)
        if reference_knows(call):
            return backward._init_fn(*args, **kwargs)
        for name, gradient in zip(("dq", "dk", "dv"), call.backward(arguments["dout"]), strict=True):
            arguments[name].copy_(gradient)
        return torch.zeros(0)


def install_torch_varlen() -> None:
    """Give torch's two varlen operators an implementation for `cpu`.

    They hand window_size to `aten._flash_attention_forward`, flash-attn's kernel, as it is.
    """
    forward, backward = torch_varlen._varlen_attn, torch_varlen._varlen_attn_backward

    def call_of(arguments: dict[str, Any]) -> Call:
        return Call(
            *(arguments[name] for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k")),
            *(arguments[name] for name in ("max_q", "max_k", "scale", "is_causal")),
            window=tuple(arguments["window_size"]),
            softcap=0.0,
        )

    @forward.register_kernel("cpu")
    def cpu_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        call = call_of(_bind(forward, args, kwargs))
        call.check()
        return call.forward(), torch.zeros(0), torch.zeros(2, dtype=torch.uint64)

    @backward.register_kernel("cpu")
    def cpu_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        arguments = _bind(backward, args, kwargs)
        return call_of(arguments).backward(arguments["grad_out"])


def _bind(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a `torch.library.custom_op` by name, defaults filled in."""
    bound = inspect.signature(operator._init_fn).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def errors(
    kernel: Callable[[Tensor, Tensor, Tensor, VarlenLayout, ScoreRule], Tensor],
    heads: tuple[int, int, int, int],
    rule: ScoreRule,
    *,
    seed: int,
) -> dict[str, float]:
    """Largest error of output and gradients, as a share of the largest true value."""
    query_heads, key_heads, size, value_size = heads
    pairs = random_pairs(SHAPES, vocab_size=50, seed=seed)
    batch = pack(pairs, pair_ids=range(len(pairs)))
    generator = torch.Generator().manual_seed(seed)
    shapes = ((query_heads, size), (key_heads, size), (key_heads, value_size))
    inputs = [
        torch.randn(batch.real_tokens, *shape, generator=generator).to(torch.float16).requires_grad_()
        for shape in shapes
    ]
    assert batch.layout is not None
    out = kernel(*inputs, batch.layout, rule)
    weight = torch.randn(out.shape, generator=generator).to(torch.float16)
    ours = [out, *torch.autograd.grad(out, inputs, weight)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = full_sequence_attention(pairs, *exact, rule)
    wanted = [truth, *torch.autograd.grad(truth, exact, weight.double())]
    names = ("output", "query gradient", "key gradient", "value gradient")
    return {
        name: ((mine - true).abs().max() / true.abs().max().clamp(min=1.0)).item()
        for name, mine, true in zip(names, ours, wanted, strict=True)
    }


def main() -> int:
    """Print the errors of one kernel for every head shape and rule, as JSON."""
    name, seed = sys.argv[1], int(sys.argv[2])
    install, kernel, rules = KERNELS[name]
    try:
        install()
    except ImportError as error:
        print(f"{type(error).__name__}: {error}")
        return UNAVAILABLE
    found = {
        f"{heads}, {rule}": errors(kernel, HEADS[heads], RULES[rule], seed=seed)
        for heads in HEADS
        for rule in rules
    }
    print(json.dumps(found))
    return 0


KERNELS = {
    "flash-attn": (install_flash_attn, flash_attention, tuple(RULES)),
    "torch": (
        install_torch_varlen,
        torch_varlen_attention,
        tuple(name for name, rule in RULES.items() if rule.softcap is None),
    ),
}

if __name__ == "__main__":
    sys.exit(main())
