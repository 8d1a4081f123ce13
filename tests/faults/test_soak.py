"""A training that is killed again and again ends with the bits of the one that was left alone."""

import subprocess
import sys

import pytest

from tests import small_runs
from tests.environment import without_rendezvous

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_a_short_soak_on_this_machine() -> None:
    """`benchmarks/soak.py`, which compares; the long one has virtual hosts and 30 kills."""
    done = subprocess.run(
        [sys.executable, "benchmarks/soak.py", "--here", "--kills", "2", "--steps", "40", "--seed", "1"],
        cwd=small_runs.REPOSITORY,
        env={**without_rendezvous(), "PYTHONPATH": str(small_runs.REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert "restarts: 2" in done.stdout
    assert "yes the parameters have the same bytes" in done.stdout
