"""A resumed engine continues bit for bit, and a rank that cannot write leaves no other waiting.

One start of two ranks does all of it (engine_run.py); the tests read what it left.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from orpo_ds.checkpoint.engine_state import replay_bias_corrections
from tests.checkpoint.engine_run import SETTINGS

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RANKS = 2


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine_run")
    port = 30500 + os.getpid() % 1000
    command = [
        Path(sys.executable).with_name("deepspeed"),
        f"--num_accelerators={RANKS}",
        f"--master_port={port}",
    ]
    command += ["--no_local_rank", "--module", "tests.checkpoint.engine_run", folder]
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-8000:]
    return folder


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Where two nested states differ; tensors are compared by their bits, so that NaN equals NaN."""
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        if not same or not torch.equal(
            one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
        ):
            yield where
    elif isinstance(one, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(left, right, f"{where}/{index}")
    elif one != other:
        yield f"{where}: {one} and {other}"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(output: Path, setting: str) -> None:
    """Parameters, fp32 masters, optimizer state, learning rate, counters, losses and random draws, on each rank."""
    for rank in range(RANKS):
        straight, resumed = (
            torch.load(output / setting / f"{run}-{rank}.pt", weights_only=True)
            for run in ("uninterrupted", "resumed")
        )
        assert list(differences(straight, resumed)) == []
        assert straight["counters"][0] == 6
        assert straight["optimizer"], "no optimizer state was compared"


@pytest.mark.distributed
@pytest.mark.slow
def test_a_write_that_fails_on_one_rank_fails_the_save_on_both(output: Path) -> None:
    first, second = (json.loads((output / f"failed_save-{rank}.json").read_text()) for rank in range(RANKS))
    assert first["error"] == second["error"]
    for expected in ("rank 1 on ", "File too large", "engine/zero_pp_rank_1_mp_rank_00", "bytes were free"):
        assert expected in first["error"]
    assert first["left"] == ["checkpoint-1"], "the partial save is gone and the one before is there"
    assert first["problems"] == second["problems"] == []
    assert first["again"] == second["again"] == [], "the training went on to a good save"


def cpu_adam_steps(optimizer: DeepSpeedCPUAdam, weight: Tensor, *, first: int, last: int) -> None:
    for step in range(first, last):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


@pytest.mark.slow  # compiles DeepSpeed's CPU Adam when nobody has yet
@pytest.mark.parametrize("replayed", [True, False])
def test_cpu_adam_resumes_exactly_only_with_its_beta_products_replayed(replayed: bool) -> None:
    """Without the replay DeepSpeed 0.19.8 drifts. The day it no longer does, the replay can go."""
    middle, end = 37, 60
    straight = torch.ones(1000)
    optimizer = DeepSpeedCPUAdam([straight], lr=1e-2)
    cpu_adam_steps(optimizer, straight, first=0, last=middle)
    resumed, state = straight.clone(), optimizer.state_dict()
    again = DeepSpeedCPUAdam([resumed], lr=1e-2)
    again.load_state_dict(copy.deepcopy(state))
    if replayed:
        replay_bias_corrections(again)
    cpu_adam_steps(optimizer, straight, first=middle, last=end)
    cpu_adam_steps(again, resumed, first=middle, last=end)
    assert torch.equal(straight, resumed) == replayed
    # Both are right to rounding: each of 23 steps rounds weights below 2 to 2^-23, and its own size, lr, to 1e-6.
    torch.testing.assert_close(straight, resumed, rtol=0, atol=(end - middle) * (2**-23 + 1e-2 * 1e-6))
