"""Two jobs in one folder: the second one is told who is there; a killed one leaves nothing in the way."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_ds.checkpoint import one_rank, sole_job
from orpo_ds.checkpoint.lock import LOCK_NAME
from tests import small_runs

HOLDER = """
import sys
from orpo_ds.checkpoint import one_rank, sole_job
with sole_job(sys.argv[1], one_rank()):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_job_is_told_who_is_there(tmp_path: Path) -> None:
    environment = os.environ | {"SLURM_JOB_ID": "4711"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=small_runs.REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        before = sorted(tmp_path.iterdir())
        with pytest.raises(
            ValueError, match=f"in use by process {holder.pid} on .*, SLURM job 4711, since 20"
        ):
            small_runs.trainer(tmp_path, max_steps=1).train()
        assert sorted(path for path in tmp_path.iterdir() if path.name != "tokens") == before
        holder.send_signal(signal.SIGKILL)
    with sole_job(tmp_path, one_rank()):  # the kernel has let go of it
        assert str(os.getpid()) in (tmp_path / LOCK_NAME).read_text()
    with sole_job(tmp_path, one_rank()):
        pass
