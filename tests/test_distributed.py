"""The process group that a run joins."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import without_rendezvous
from tests.small_runs import REPOSITORY, settings

JOIN = """
import torch
import torch.distributed as dist
from orpo_ds import distributed
try:
    distributed.start_process_group(timeout_s=77, backend="nothing")
except ValueError as error:
    print(error)
distributed.start_process_group(timeout_s=77, backend="gloo")
gloo = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
print(dist.get_backend(), gloo.options._timeout.total_seconds())
"""


def test_the_process_group_is_the_one_asked_for() -> None:
    """In a process of its own: a process joins once."""
    finished = subprocess.run(
        [sys.executable, "-c", JOIN],
        cwd=REPOSITORY,
        env=without_rendezvous(),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = finished.stdout.splitlines()
    assert "ddp_backend='nothing': this torch has no such backend. Leave it out." in lines, finished.stderr
    assert "gloo 77.0" in lines


def test_another_backend_than_the_one_that_runs(tmp_path: Path) -> None:
    settings(tmp_path / "run", ddp_backend="gloo")
    with pytest.raises(ValueError, match="ddp_backend='mpi': the process group runs on 'gloo' already"):
        settings(tmp_path / "run", ddp_backend="mpi")


def test_a_local_rank_that_is_not_the_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert settings(tmp_path / "run", local_rank=0).local_process_index == 0
    with pytest.raises(ValueError, match="local_rank=3, but the launcher's LOCAL_RANK says 0"):
        settings(tmp_path / "run", local_rank=3)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_that_is_done_ends_well_though_gloo_is_not() -> None:
    """Half of these rounds die of SIGABRT where nobody waits for gloo's threads."""
    rounds = 6
    finished = subprocess.run(
        [sys.executable, "-m", "tests.exit_worker", str(rounds)],
        cwd=REPOSITORY,
        env=without_rendezvous(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    statuses = [line for line in finished.stdout.splitlines() if line.startswith("statuses")]
    assert statuses == ["statuses 0 0"] * rounds, finished.stderr[-4000:]
