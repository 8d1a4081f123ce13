"""Freed heap pages go back to the operating system, at the two moments of a step where they are many.

The heap of the process that runs the tests has holes already, so the measurement is a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from orpo_ds.host_memory import give_back, give_back_after_backward

CPU = torch.device("cpu")
BLOCKS_MIB = 200


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def leave_holes() -> list[torch.Tensor]:
    """Free blocks of a MiB; the small ones between them, which are returned, keep the heap in place."""
    large, small = [], []
    for _ in range(BLOCKS_MIB):
        large.append(torch.ones(2**18))
        small.append(torch.ones(2**10))
    return small


def measure(moment: str) -> dict[str, float]:
    """MiB that holes leave behind, and that are given back by hand or by a backward pass."""
    embedding = nn.Embedding(8, 4)
    embedding(
        torch.tensor([1])
    ).sum().backward()  # the first pass of a process loads what every later one uses
    give_back_after_backward(embedding, CPU)
    loss = embedding(torch.tensor([1])).sum()
    del [torch.ones(2**20)][0]  # glibc maps larger blocks than the largest mapped one that was ever freed
    before = resident_mib()
    kept = leave_holes()
    left = resident_mib()
    if moment == "backward":
        loss.backward()
    else:
        give_back(CPU)
    assert len(kept) == BLOCKS_MIB
    return {"left": left - before, "given back": left - resident_mib()}


@pytest.mark.parametrize("moment", ["at once", "backward"])
def test_holes_are_given_back(moment: str) -> None:
    script = [sys.executable, __file__, moment]
    found = json.loads(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    assert all(mib > BLOCKS_MIB / 2 for mib in found.values()), found


def test_the_gradient_is_left_as_it_is() -> None:
    embedding = nn.Embedding(8, 4)
    give_back_after_backward(embedding, CPU)
    embedding(torch.tensor([1, 1])).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.sum(1).tolist() == [0, 8, 0, 0, 0, 0, 0, 0]


def test_a_frozen_embedding_is_left_alone() -> None:
    embedding = nn.Embedding(8, 4).requires_grad_(False)
    give_back_after_backward(embedding, CPU)  # a hook on it would raise


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
