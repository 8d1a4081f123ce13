"""Training on two hosts: `train.sh` over pdsh, ZeRO-3 with everything offloaded, the losses of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import small_runs
from tests.cluster.virtual_hosts import REPOSITORY, VirtualHosts

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 3
TOLERANCE = (
    1e-5  # relative, as in tests/distributed: fp32 sums in another order, amplified over three updates
)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_two_hosts_train_as_one(hosts: VirtualHosts, tmp_path: Path) -> None:
    small_runs.save_model_folder(tmp_path / "model")
    small_runs.write_jsonl(tmp_path / "train.jsonl", small_runs.rows(16))
    common = {"max_steps": STEPS, "deepspeed": "zero3_offload", "learning_rate": 1e-3}
    words = small_runs.command_line(
        tmp_path, output_dir=tmp_path / "two", per_device_train_batch_size=4, **common
    )
    done = hosts.run(
        "head",
        *(REPOSITORY / "launch/deepspeed/train.sh", hosts.hostfile, "--disk_gib", "0.01", *words[1:]),
    )
    assert done.returncode == 0, done.stdout
    assert "2 hosts are fit" in done.stdout

    alone = small_runs.command_line(
        tmp_path, output_dir=tmp_path / "one", per_device_train_batch_size=8, **common
    )
    answer = small_runs.run_cli(alone, datasets_cache=tmp_path / "datasets")
    assert answer.status == 0, answer.stderr
    together, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(expected) == STEPS
    assert expected[0] != expected[-1]
    assert together == pytest.approx(expected, rel=TOLERANCE)
