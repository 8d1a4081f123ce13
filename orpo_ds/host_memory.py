"""Host memory that nothing uses any more goes back to the operating system.

On a CPU the activations of a step are blocks of some megabytes, below what the C library maps one by one, so they lie
in its heap. A layer's short-lived blocks leave holes between the long-lived ones, and the heap keeps every page it has
ever touched: with gradient checkpointing, a forward pass whose tensors take 120 MiB leaves 500 MiB behind, on which
the backward pass then builds. glibc gives the holes back when it is asked to, in some hundredths of a second; the two
moments that matter are the end of the forward pass, and the end of the backward pass, where the gradient of the input
embedding, as large as the vocabulary, is reduced.

Mapping every block on its own (`MALLOC_MMAP_THRESHOLD_`) has the same peak and costs a third more time in page faults.
On a GPU nothing of this applies: activations lie in device memory.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import nn


def give_back(device: torch.device) -> None:
    """Hand freed heap pages back, when tensors of `device` lie in the heap at all."""
    if device.type == "cpu":
        _trim()()


def give_back_after_backward(embedding: nn.Module, device: torch.device) -> None:
    """Hand freed heap pages back whenever the input embedding's gradient is complete: nothing else is alive then."""
    weight = embedding.weight
    if device.type == "cpu" and isinstance(weight, nn.Parameter) and weight.requires_grad:
        weight.register_hook(lambda gradient: give_back(device))


@functools.cache
def _trim() -> Callable[[], object]:
    """`malloc_trim(0)` of glibc; nothing where the C library is another one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return (lambda: None) if trim is None else functools.partial(trim, ctypes.c_size_t(0))
