"""The process group that a run joins."""

import os
import signal
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


KILLED = """
import os, signal, sys
import deepspeed, torch
from orpo_ds import distributed
rank, port = sys.argv[1:]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
distributed.start_process_group(timeout_s=60)
own = torch.full((1000,), 1.0 + distributed.rank())
deepspeed.comm.inference_all_reduce(own)
maps = open("/proc/self/maps").read().splitlines()
print(own.sum().item(), sum("deepspeed_allreduce_buffer" in line for line in maps), flush=True)
deepspeed.comm.barrier()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.distributed
def test_ranks_that_are_killed_leave_no_shared_memory(free_port: int) -> None:
    """Nor do they meet that of a job before them, here filled with what no rank has written."""
    names = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{free_port}"
    left = [Path(f"/dev/shm/{names}_{rank}") for rank in (0, 1)]
    for path in left:
        path.write_bytes(b"\xff" * 70_000_000)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(rank), str(free_port)],
            cwd=REPOSITORY,
            env=without_rendezvous(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=200)[0].splitlines()[-1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert said == ["3000.0 2"] * 2  # the sum went through the buffers of both ranks
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL] * 2
    assert not any(path.exists() for path in left)


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
