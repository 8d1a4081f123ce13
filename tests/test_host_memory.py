"""Freed heap pages go back to the operating system, at the two moments of a step where they are many."""

from pathlib import Path

import pytest
import torch
from torch import nn

from orpo_ds.host_memory import give_back, give_back_after_backward

CPU = torch.device("cpu")
BLOCKS, BLOCK_MIB = 200, 1  # below the size that the C library maps on its own


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def leave_holes() -> list[torch.Tensor]:
    """Free every block of a row of blocks; the small ones between them, which are returned, keep the heap in place."""
    large, small = [], []
    for _ in range(BLOCKS):
        large.append(torch.ones(BLOCK_MIB * 2**18))
        small.append(torch.ones(2**10))
    del large
    return small


@pytest.fixture(autouse=True)
def _blocks_lie_in_the_heap() -> None:
    # glibc maps blocks above a threshold, which is the largest mapped block that was ever freed, up to 32 MiB.
    del [torch.ones(2**20)][0]


def test_holes_are_given_back() -> None:
    before = resident_mib()
    kept = leave_holes()
    left = resident_mib()
    assert left - before > BLOCKS * BLOCK_MIB / 2, "the heap gives holes back by itself; nothing is tested"
    give_back(CPU)
    assert left - resident_mib() > BLOCKS * BLOCK_MIB / 2
    assert len(kept) == BLOCKS


def test_they_are_given_back_when_the_embedding_has_its_gradient() -> None:
    embedding = nn.Embedding(8, 4)
    give_back_after_backward(embedding, CPU)
    loss = embedding(torch.tensor([1])).sum()
    kept = leave_holes()
    left = resident_mib()
    loss.backward()
    assert left - resident_mib() > BLOCKS * BLOCK_MIB / 2
    assert embedding.weight.grad is not None
    assert embedding.weight.grad[1].eq(1).all()
    assert len(kept) == BLOCKS


def test_a_frozen_embedding_is_left_alone() -> None:
    embedding = nn.Embedding(8, 4).requires_grad_(False)
    give_back_after_backward(embedding, CPU)  # a hook on it would raise
