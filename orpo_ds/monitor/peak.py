"""What this device can do and what it has used: the peak of its matrix products, and its peak of memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch

FIRST_SIZE = 256  # 34 MFLOP a product: milliseconds even where a dtype is emulated
LARGEST_SIZE = {"cpu": 2048, "cuda": 8192}
MIB = 2**20


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, *, max_seconds: float = 0.4) -> float:
    """FLOP/s of the fastest square matrix product found in `max_seconds`, with the threads of this process.

    Sizes double as long as the next one fits into the time that is left: small products do not fill a device,
    and large ones would take seconds where the dtype is not native. Other work on the machine makes the
    result smaller, so ranks that share a machine measure at the same time, as they train.
    """
    best = 0.0
    deadline = time.perf_counter() + max_seconds
    size = FIRST_SIZE
    while size <= LARGEST_SIZE.get(device.type, LARGEST_SIZE["cpu"]):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        torch.mm(left, right, out=out)  # chooses and loads the kernel
        seconds = min(_time_product(left, right, out) for _ in range(2))
        best = max(best, 2.0 * size**3 / seconds)
        # Making, warming up and timing the next size is four products of eight times the work.
        if time.perf_counter() + 4 * 8 * seconds > deadline:
            break
        size *= 2
    while time.perf_counter() + seconds < deadline:
        best = max(best, 2.0 * out.shape[0] ** 3 / _time_product(left, right, out))
    return best


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that this process has held so far, in MiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss where there is a choice: it starts with the peak of the process that forked this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def _time_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    """Seconds of one product; the work is finished before the clock is read."""
    _wait_for(left.device)
    start = time.perf_counter()
    torch.mm(left, right, out=out)
    _wait_for(left.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
