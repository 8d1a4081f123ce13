"""The self-check under ZeRO-3 on two ranks: one verdict, and an engine that trains on after it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def per_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("zero3")
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--no_local_rank",
    ]
    ran = subprocess.run(
        [*launcher, "--master_port", str(_free_port()), "--module", "tests.model.zero3_worker", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_sharded_model_is_packed(per_rank: list[dict[str, Any]]) -> None:
    for found in per_rank:
        assert found["qwen2"]["verdict"]["ok"], found["qwen2"]["verdict"]["reason"]


@pytest.mark.parametrize(("name", "named"), [("gpt_oss", "sinks"), ("phimoe", "sliding window of 512")])
def test_the_reason_is_the_one_without_sharding(
    per_rank: list[dict[str, Any]], name: str, named: str
) -> None:
    for found in per_rank:
        assert not found[name]["verdict"]["ok"]
        assert named in found[name]["verdict"]["reason"]


@pytest.mark.parametrize("name", ["qwen2", "gpt_oss", "phimoe"])
def test_training_goes_on_after_the_check(per_rank: list[dict[str, Any]], name: str) -> None:
    """The learning rate is 0, so both steps have the loss of the model without DeepSpeed."""
    for found in per_rank:
        for loss in found[name]["losses"]:
            assert math.isclose(loss, found[name]["expected"], rel_tol=1e-5)
