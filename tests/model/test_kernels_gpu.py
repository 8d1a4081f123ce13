"""The CUDA kernels in bf16 against float64 attention of the full sequences, beside SDPA in bf16 and fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orpo_ds.data.packing import pack
from orpo_ds.model.kernels import (
    Kernel,
    choose_kernel,
    flash_attention,
    load_flash_attn,
    load_torch_varlen,
    sdpa_attention,
    torch_varlen_attention,
)
from orpo_ds.model.kernels.score_rule import ScoreRule
from tests.model.pairs import full_sequence_attention, random_pairs

pytestmark = pytest.mark.gpu

SHAPES = [(350, 230, 180), (1, 40, 60), (700, 1, 90), (64, 64, 0), (0, 30, 20)]
RULES = {
    "plain": ScoreRule(scaling=0.125),
    "window": ScoreRule(scaling=0.125, window=128),
    "softcap": ScoreRule(scaling=0.125, softcap=5.0),
    "softcap and window": ScoreRule(scaling=0.125, softcap=5.0, window=128),
}
KERNELS: dict[str, Kernel] = {
    "flash-attn": flash_attention,
    "torch": torch_varlen_attention,
    "sdpa": sdpa_attention,
}
# (Hq, Hkv, D, Dv)
HEADS = {"gqa": (8, 2, 64, 64), "odd sizes": (4, 4, 72, 40), "wide": (4, 1, 256, 256)}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("name", KERNELS)
def test_output_and_gradients(
    name: str, heads: tuple[int, int, int, int], rule: ScoreRule, seed: int
) -> None:
    if name == "flash-attn" and load_flash_attn() is None:
        pytest.skip("flash-attn cannot be imported")
    if name == "torch" and (load_torch_varlen() is None or rule.softcap is not None):
        pytest.skip("this torch has no variable-length attention, or it has no soft-cap")
    query_heads, key_heads, size, value_size = heads
    pairs = random_pairs(SHAPES, vocab_size=1000, seed=seed)
    batch = pack(pairs, pair_ids=range(len(pairs)))
    shapes = ((query_heads, size), (key_heads, size), (key_heads, value_size))
    inputs = [torch.randn(batch.real_tokens, *shape).bfloat16() for shape in shapes]
    weight = torch.randn(batch.real_tokens, query_heads, value_size).bfloat16()

    exact = [tensor.double().requires_grad_() for tensor in inputs]
    truth = full_sequence_attention(pairs, *exact, rule)
    wanted = [truth, *torch.autograd.grad(truth, exact, weight.double())]

    on_device = batch.to("cuda")
    ours = _on_cuda(KERNELS[name], inputs, weight, on_device.layout, rule)
    # bf16 rounds scores, weights and outputs; gradients also sum over queries. SDPA in bf16 gets the same
    # allowance.
    tolerance = 8 * torch.finfo(torch.bfloat16).eps
    for mine, true in zip(ours, wanted, strict=True):
        assert (mine - true).abs().max() <= tolerance * true.abs().max()
        assert (mine - true).square().mean().sqrt() <= tolerance / 8 * true.square().mean().sqrt()

    in_fp32 = _on_cuda(sdpa_attention, [t.float() for t in inputs], weight.float(), on_device.layout, rule)
    for mine, true in zip(in_fp32, wanted, strict=True):
        assert (mine - true).abs().max() <= 1e-4 * true.abs().max()


def _on_cuda(kernel: Kernel, inputs: list[Tensor], weight: Tensor, layout, rule: ScoreRule) -> list[Tensor]:
    leaves = [tensor.cuda().requires_grad_() for tensor in inputs]
    out = kernel(*leaves, layout, rule)
    return [tensor.double().cpu() for tensor in (out, *torch.autograd.grad(out, leaves, weight.cuda()))]


def test_bf16_takes_a_varlen_kernel_and_fp32_takes_sdpa() -> None:
    query = torch.zeros(4, 2, 64, device="cuda")
    assert choose_kernel(query, query, RULES["plain"]) is sdpa_attention
    query = query.bfloat16()
    if torch.cuda.get_device_capability() < (8, 0):
        assert choose_kernel(query, query, RULES["plain"]) is sdpa_attention
    elif load_flash_attn() is not None:
        assert choose_kernel(query, query, RULES["softcap"]) is flash_attention
    else:
        assert choose_kernel(query, query, RULES["plain"]) is torch_varlen_attention
        assert choose_kernel(query, query, RULES["softcap"]) is sdpa_attention


@pytest.mark.parametrize("name", ["flash-attn", "torch"])
def test_deterministic_algorithms_repeat_bit_by_bit(name: str, seed: int) -> None:
    if (load_flash_attn if name == "flash-attn" else load_torch_varlen)() is None:
        pytest.skip(f"{name} cannot be imported")
    batch = pack(random_pairs(SHAPES, vocab_size=1000, seed=seed), pair_ids=range(len(SHAPES))).to("cuda")
    shapes = ((8, 64), (2, 64), (2, 64))
    inputs = [torch.randn(batch.real_tokens, *shape).bfloat16() for shape in shapes]
    weight = torch.randn(batch.real_tokens, 8, 64).bfloat16()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            _on_cuda(KERNELS[name], inputs, weight, batch.layout, RULES["plain"]) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
