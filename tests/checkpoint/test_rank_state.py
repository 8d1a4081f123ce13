"""Random generators go on where they were, and a failed write says why."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from orpo_ds.checkpoint import load_rank_state, one_rank, save_rank_state
from orpo_ds.checkpoint.rank_state import save_torch_file


def draws() -> list[object]:
    """Draws that use every part of a state: `gauss` and `standard_normal` keep a second number for later."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.random_sample(5).tolist(),
        float(np.random.standard_normal()),
        torch.randn(7).tolist(),
    ]


def test_all_generators_continue(tmp_path: Path) -> None:
    draws()
    save_rank_state(tmp_path, one_rank())
    expected = [draws(), draws()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draws() != expected[0]
    load_rank_state(tmp_path, one_rank())
    assert [draws(), draws()] == expected


@pytest.mark.gpu
def test_gpu_generators_continue(tmp_path: Path) -> None:
    save_rank_state(tmp_path, one_rank())
    expected = torch.randn(5, device="cuda")
    load_rank_state(tmp_path, one_rank())
    assert torch.equal(torch.randn(5, device="cuda"), expected)


def test_a_failed_write_names_the_file_and_the_reason(tmp_path: Path) -> None:
    # /dev/full answers every write with ENOSPC.
    path = tmp_path / "state.pt"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device.*state\.pt"):
        save_torch_file({"weights": torch.zeros(100_000)}, path)
    assert not path.exists()
