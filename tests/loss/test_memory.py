"""The head's memory: the formula against what torch's allocator reports, and against more rows."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from orpo_ds.loss import head_memory_bytes, token_logps

VOCAB, WIDTH = 6000, 64
TILES = {"tile_rows": 512, "tile_columns": 1024}


def measured_peak(
    rows: int, *, dtype: torch.dtype, frozen: bool, bias: bool, softcap: float | None, cache_mib: int
) -> int:
    """Bytes alive at the worst moment of forward and backward, beyond the inputs: torch's allocator, replayed."""
    hidden = torch.randn(rows, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH).to(dtype).requires_grad_(not frozen)
    bias_vector = torch.randn(VOCAB).to(dtype).requires_grad_(not frozen) if bias else None
    index, label, grad = torch.arange(rows), torch.randint(0, VOCAB, (rows,)), torch.rand(rows)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        logps = token_logps(
            hidden,
            weight,
            index=index,
            label=label,
            bias=bias_vector,
            softcap=softcap,
            logits_cache_mib=cache_mib,
            **TILES,
        )
        logps.backward(grad)
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("cache_mib", [0, 5])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [100, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formula_is_within_a_tenth_of_the_allocator(
    dtype: torch.dtype, rows: int, frozen: bool, softcap: float | None, cache_mib: int
) -> None:
    measured = measured_peak(
        rows, dtype=dtype, frozen=frozen, bias=True, softcap=softcap, cache_mib=cache_mib
    )
    formula = head_memory_bytes(
        rows=rows,
        hidden_size=WIDTH,
        vocab_size=VOCAB,
        hidden_dtype=dtype,
        weight_dtype=dtype,
        frozen=frozen,
        bias=True,
        softcap=softcap is not None,
        logits_cache_mib=cache_mib,
        **TILES,
    )
    assert formula == pytest.approx(measured, rel=0.1)


def test_only_the_hidden_gradient_grows_with_the_rows() -> None:
    """From 1k to 8k rows: 4 H bytes of gradient a row, 12 of log-prob, peak and mass, and nothing of size V."""
    few, many = 1024, 8192
    peaks = [
        measured_peak(rows, dtype=torch.float32, frozen=False, bias=False, softcap=None, cache_mib=0)
        for rows in (few, many)
    ]
    assert peaks[1] - peaks[0] == pytest.approx((many - few) * (4 * WIDTH + 12), rel=0.01)
