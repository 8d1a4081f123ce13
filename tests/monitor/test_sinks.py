"""Dashboards that really fail: a server that refuses, one that never answers, a full disk.

The training ends as if there were none, and says so once.
"""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from orpo_ds.monitor.jsonl import read_metrics
from orpo_ds.monitor.tensorboard import OrpoTensorBoardCallback
from orpo_ds.monitor.wandb import RUN_FILE
from tests import small_runs
from tests.environment import without_rendezvous
from tests.monitor.wandb_file import OfflineRun

API_KEY = "feedfacefeedfacefeedfacefeedfacefeedface"


@contextmanager
def server(*, listens: bool) -> Iterator[str]:
    """The URL of a port where nobody listens, or where connections are accepted and never answered."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if listens:
            port.listen(50)
        yield f"http://127.0.0.1:{port.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "never answers"])
def test_wandb_without_its_server(tmp_path: Path, listens: bool) -> None:
    with server(listens=listens) as url:
        variables = {
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": url,
            "WANDB_API_KEY": API_KEY,
            "WANDB_INIT_TIMEOUT": "3",
            "WANDB_X_GRAPHQL_TIMEOUT_SECONDS": "1",
            "WANDB_X_GRAPHQL_RETRY_MAX": "1",
        }
        finished = subprocess.run(
            [sys.executable, "-m", "tests.monitor.sink_run", str(tmp_path)],
            cwd=small_runs.REPOSITORY,
            env=without_rendezvous() | variables,
            capture_output=True,
            text=True,
            check=False,
        )
    assert finished.returncode == 0, finished.stderr[-4000:]
    # The server had not answered when the last step was over: no step waited for it.
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("WAITING ")]
    waiting = json.loads(line.removeprefix("WAITING "))
    assert len(waiting) == 5
    assert waiting == sorted(waiting)
    assert waiting[-1] >= 5
    said = [line for line in finished.stderr.splitlines() if "orpo_ds.monitor" in line]
    assert len(said) == 1, said
    assert "W&B's run cannot be started on the server" in said[0]
    assert "wandb sync" in said[0]
    # What was trained is on the disk, for `wandb sync`.
    run = OfflineRun(Path(json.loads((tmp_path / "run" / RUN_FILE).read_text())["folder"]))
    logged = [row["train/loss"] for row in run.history if "train/loss" in row]
    assert logged == [entry["loss"] for entry in read_metrics(tmp_path / "run" / "metrics.jsonl")]


def test_tensorboard_on_a_full_disk_is_said_once(
    tmp_path: Path, disk_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    disk = disk_of("64k")
    args = small_runs.settings(tmp_path / "run")
    callback = OrpoTensorBoardCallback(str(disk))
    state = TrainerState()
    with caplog.at_level(logging.WARNING):
        callback.on_train_begin(args, state, TrainerControl())
        assert callback.drain(30)
        (disk / "other").write_bytes(bytes(40 * 1024))  # leaves little, whatever TensorBoard has written
        for step in range(1, 2001):
            state.global_step = step
            callback.on_log(
                args, state, TrainerControl(), logs={f"metric{number}": 1.0 for number in range(10)}
            )
        callback.on_train_end(args, state, TrainerControl())
    said = [record.getMessage() for record in caplog.records if "TensorBoardCallback" in record.getMessage()]
    assert len(said) == 1, said
    assert "No space left on device" in said[0]


def test_tensorboard_in_a_folder_that_cannot_be_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        trainer = small_runs.trainer(
            tmp_path / "run", report_to="tensorboard", logging_dir=str(tmp_path / "file" / "board")
        )
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "TensorBoardCallback" in record.getMessage()]
    assert 1 <= len(said) <= 2, said  # two kinds of failure are each said once
    assert trainer.state.global_step == 2
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 2
