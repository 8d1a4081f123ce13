"""`orpo-ds preflight --slurm` within a job: the agents go over srun, to the job's own hosts."""

import re
import sys
from pathlib import Path

import pytest

from tests.cluster.virtual_hosts import Slurm

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_hosts_of_a_job(slurm: Slurm, tmp_path: Path) -> None:
    log, script = tmp_path / "log.txt", tmp_path / "job.sh"
    preflight = f"{sys.executable} -m orpo_ds preflight --slurm --output_dir {tmp_path} --disk_gib 0.01"
    lines = (
        "#!/bin/bash",
        preflight,
        "echo first: $?",
        f"{preflight} --shared_memory_mib 1e6",
        "echo second: $?",
    )
    script.write_text("\n".join(lines) + "\n")
    done = slurm.run(
        *("sbatch", "--wait", "--nodes=2", "--ntasks-per-node=2", f"--output={log}", script), timeout_s=300
    )
    output = log.read_text()
    assert done.returncode == 0, output
    fit, unfit = output.split("first: 0")
    assert "2 hosts are fit" in fit, output
    assert len(re.findall(r"^node[12] .*Gbit/s .*Gbit/s$", fit, re.MULTILINE)) == 2, output
    # A million MiB for each of the two tasks a node.
    lacking = re.findall(r"(node[12]): shared memory: \d+ MiB free in /dev/shm, needed 2000000", unfit)
    assert lacking == ["node1", "node2"], output
    assert "second: 1" in unfit, output
