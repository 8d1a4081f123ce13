"""The measured peaks: of the matrix products, and of memory."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from orpo_ds.monitor.peak import matmul_flops_per_second, peak_memory_mib

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_product_of_the_same_dtype_is_much_faster(dtype: torch.dtype) -> None:
    """Timed here in another way: many products of a middling size in one go.

    Other work on the machine slows both, so the better of three goes counts, and a half is enough to tell a peak
    from a mistake in the formula or in the clock.
    """
    peak = max(matmul_flops_per_second(CPU, dtype) for _ in range(3))
    left, right = torch.randn(2, 384, 384).to(dtype)
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(10):
            torch.mm(left, right)
        rates.append(10 * 2 * 384**3 / (time.perf_counter() - began))
    assert peak > 0.5 * max(rates)


def test_it_keeps_to_its_time() -> None:
    matmul_flops_per_second(CPU, torch.float32)
    began = time.process_time()
    matmul_flops_per_second(CPU, torch.float32, max_seconds=0.2)
    # Process time counts every thread; waiting for a busy machine does not count.
    assert time.process_time() - began < 0.5 * torch.get_num_threads()


def test_memory_is_this_processs_own() -> None:
    """A child of a process that holds 300 MiB reports what it holds itself: 200 MiB that it has freed again."""
    ballast = bytearray(300 * 2**20)
    script = """
from orpo_ds.monitor.peak import peak_memory_mib
import torch
before = peak_memory_mib(torch.device("cpu"))
block = b"x" * (200 * 2**20)
del block
print(before, peak_memory_mib(torch.device("cpu")))
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = map(float, answer.stdout.split())
    assert after - before == pytest.approx(200, abs=10)
    assert len(ballast) == 300 * 2**20
    assert peak_memory_mib(CPU) >= 300


@pytest.mark.gpu
def test_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = peak_memory_mib(device)
    block = torch.empty(100 * 2**20, dtype=torch.uint8, device=device)
    del block
    assert peak_memory_mib(device) == pytest.approx(before + 100, abs=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_of_a_gpu(dtype: torch.dtype) -> None:
    """Any data-centre GPU does more than a TFLOP/s in these, and none a hundred PFLOP/s."""
    assert 1e12 < matmul_flops_per_second(torch.device("cuda"), dtype) < 1e17
