"""The SDPA kernel against plain float64 attention of full sequences, put together from lengths alone."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo_ds.data.packing import VarlenLayout, pack
from orpo_ds.model.kernels import choose_kernel, sdpa, sdpa_attention
from orpo_ds.model.kernels.score_rule import ScoreRule
from tests.model.pairs import SHAPES, full_sequence_attention, random_pairs

HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
RULES = {
    "plain": ScoreRule(scaling=0.25),
    "scaling": ScoreRule(scaling=0.7),
    "window": ScoreRule(scaling=0.25, window=5),
    "window of one": ScoreRule(scaling=0.25, window=1),
    "window longer than all": ScoreRule(scaling=0.25, window=1000),
    "softcap": ScoreRule(scaling=0.5, softcap=1.5),
    "softcap and window": ScoreRule(scaling=0.5, softcap=1.5, window=5),
}


def _heads(tokens: int, *, heads: tuple[int, int], sizes: tuple[int, int] = (16, 16)) -> list[Tensor]:
    """Random float64 query [T, Hq, D], key [T, Hkv, D] and value [T, Hkv, Dv]."""
    shapes = ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1]))
    return [torch.randn(tokens, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _forward_and_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view_as(out)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), inputs)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_output_and_gradients_are_those_of_full_sequences(
    heads: tuple[int, int], rule: ScoreRule, seed: int
) -> None:
    pairs = random_pairs(SHAPES, vocab_size=50, seed=seed)
    batch = pack(pairs, pair_ids=range(len(pairs)))
    inputs = _heads(batch.real_tokens, heads=heads)
    ours = _forward_and_gradients(sdpa_attention(*inputs, batch.layout, rule), inputs)
    wanted = _forward_and_gradients(full_sequence_attention(pairs, *inputs, rule), inputs)
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("sizes", [(16, 8), (8, 24)])
def test_values_may_have_a_head_size_of_their_own(sizes: tuple[int, int], rule: ScoreRule, seed: int) -> None:
    pairs = random_pairs(SHAPES[:2], vocab_size=50, seed=seed)
    batch = pack(pairs, pair_ids=range(len(pairs)))
    inputs = _heads(batch.real_tokens, heads=(4, 2), sizes=sizes)
    ours = _forward_and_gradients(sdpa_attention(*inputs, batch.layout, rule), inputs)
    wanted = _forward_and_gradients(full_sequence_attention(pairs, *inputs, rule), inputs)
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_lower_precision_stays_within_its_rounding(rule: ScoreRule, dtype: torch.dtype, seed: int) -> None:
    pairs = random_pairs(SHAPES, vocab_size=50, seed=seed)
    batch = pack(pairs, pair_ids=range(len(pairs)))
    exact = _heads(batch.real_tokens, heads=(4, 2))
    rounded = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    out = sdpa_attention(*rounded, batch.layout, rule)
    assert out.dtype == dtype
    ours = _forward_and_gradients(out, rounded)
    wanted = _forward_and_gradients(
        full_sequence_attention(pairs, *(tensor.double() for tensor in rounded), rule), rounded
    )
    # A score, a weight and an output are rounded once each, and a gradient sums over at most 41 queries of
    # two heads; errors of independent roundings add like a random walk: 3 * sqrt(82) < 32.
    tolerance = 32 * torch.finfo(dtype).eps
    for mine, theirs in zip(ours, wanted, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("sizes", [(16, 16), (16, 8)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_long_segments_never_have_a_mask_of_all_scores(
    monkeypatch: pytest.MonkeyPatch, rule: ScoreRule, sizes: tuple[int, int], seed: int
) -> None:
    pairs = random_pairs(SHAPES, vocab_size=50, seed=seed)
    batch = pack(pairs, pair_ids=range(len(pairs)))
    inputs = _heads(batch.real_tokens, heads=(4, 2), sizes=sizes)
    whole = _forward_and_gradients(full_sequence_attention(pairs, *inputs, rule), inputs)
    masks = []
    visible = sdpa.visible_keys

    def spy(num_queries: int, num_keys: int, **rest: Any) -> Tensor:
        masks.append(4 * num_queries * num_keys)
        return visible(num_queries, num_keys, **rest)

    monkeypatch.setattr(sdpa, "SCORES_AT_ONCE", 400)
    monkeypatch.setattr(sdpa, "visible_keys", spy)
    cut = _forward_and_gradients(sdpa_attention(*inputs, batch.layout, rule), inputs)
    if rule.softcap is None:  # a mask that all heads share is small; its scores are the kernel's business
        masks = [size / 4 for size in masks]
    assert max(masks, default=0) <= 400
    for mine, theirs in zip(cut, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_a_long_branch_needs_no_mask_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], seed: int
) -> None:
    pairs = random_pairs(SHAPES, vocab_size=50, seed=seed)
    batch = pack(pairs, pair_ids=range(len(pairs)))
    inputs = _heads(batch.real_tokens, heads=heads)
    rule = RULES["scaling"]
    whole = _forward_and_gradients(full_sequence_attention(pairs, *inputs, rule), inputs)
    monkeypatch.setattr(sdpa, "SCORES_AT_ONCE", 0)
    monkeypatch.setattr(sdpa, "visible_keys", None)  # calling it would raise
    cut = _forward_and_gradients(sdpa_attention(*inputs, batch.layout, rule), inputs)
    for mine, theirs in zip(cut, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_masks_are_built_once_a_micro_batch_and_die_with_it(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    built = []
    monkeypatch.setattr(
        sdpa, "visible_keys", lambda *args, **kwargs: built.append(args) or torch.ones(args, dtype=torch.bool)
    )
    batch = pack(random_pairs(SHAPES[:3], vocab_size=50, seed=seed), pair_ids=range(3))
    inputs = _heads(batch.real_tokens, heads=(4, 2))
    for _ in range(4):  # layers
        sdpa_attention(*inputs, batch.layout, RULES["plain"])
    assert len(built) == 3, "one mask for each rejected branch, whatever the number of layers"
    layout = weakref.ref(batch.layout)
    del batch
    gc.collect()
    assert layout() is None, "the cache keeps no micro-batch alive"
    assert len(sdpa._plans) == 0


def test_a_segment_whose_trunk_is_part_of_another_trunk(seed: int) -> None:
    """Borders inside a piece: any layout is served, not only those that `pack` makes."""
    layout = VarlenLayout(
        cu_seqlens_q=torch.tensor([0, 6, 9], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, 6, 11], dtype=torch.int32),
        max_seqlen_q=6,
        max_seqlen_k=6,
        kv_index=torch.tensor([0, 1, 2, 3, 4, 5, 1, 2, 6, 7, 8], dtype=torch.int32),
        segments=((0, 6, 0, 0), (6, 9, 1, 2)),
    )
    query, key, value = _heads(9, heads=(2, 2))
    out = sdpa_attention(query, key, value, layout, RULES["plain"])
    for row in range(6, 9):
        seen = [1, 2, *range(6, row + 1)]
        weights = torch.softmax(0.25 * torch.einsum("hd,khd->hk", query[row], key[seen]), -1)
        torch.testing.assert_close(out[row], torch.einsum("hk,khd->hd", weights, value[seen]))


def test_a_cpu_gets_sdpa() -> None:
    query = torch.zeros(3, 2, 16, dtype=torch.bfloat16)
    assert choose_kernel(query, query, replace(RULES["plain"], window=2)) is sdpa_attention
