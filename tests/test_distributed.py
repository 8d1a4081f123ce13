"""The process group that a run joins."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import without_rendezvous
from tests.small_runs import REPOSITORY, settings

JOIN = """
import atexit
import torch
import torch.distributed as dist
from orpo_ds import distributed
atexit.register(lambda: print("at the end:", dist.is_initialized()))
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
    # gloo's threads are joined before Python is torn down: left running, they abort one process in some hundreds.
    assert lines[-1] == "at the end: False"


def test_another_backend_than_the_one_that_runs(tmp_path: Path) -> None:
    settings(tmp_path / "run", ddp_backend="gloo")
    with pytest.raises(ValueError, match="ddp_backend='mpi': the process group runs on 'gloo' already"):
        settings(tmp_path / "run", ddp_backend="mpi")


def test_a_local_rank_that_is_not_the_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert settings(tmp_path / "run", local_rank=0).local_process_index == 0
    with pytest.raises(ValueError, match="local_rank=3, but the launcher's LOCAL_RANK says 0"):
        settings(tmp_path / "run", local_rank=3)
