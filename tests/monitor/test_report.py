"""What `report_to` starts, and what the dashboards without a file of their own are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
)
from transformers.integrations import integration_utils as integrations

from orpo_ds.monitor.report import PACKAGES, check_report_to, node_run
from orpo_ds.monitor.tensorboard import OrpoTensorBoardCallback
from orpo_ds.monitor.wandb import RUN_FILE, copy_run_id
from tests import small_runs
from tests.environment import without_rendezvous
from tests.monitor.wandb_file import OfflineRun

TOKEN = "hf_FAKEFAKEFAKEFAKEFAKEFAKE"
OWN_WANDB = """
import sys
from pathlib import Path
from transformers.integrations import WandbCallback
from tests import small_runs
trainer = small_runs.trainer(Path(sys.argv[1]) / "run", callbacks=[WandbCallback])
trainer.train()
"""
COLUMNS, ROWS = ["prompt", "answer"], [["2 + 2?", "four"], ["a | b\nc?", "yes"]]


@pytest.mark.parametrize("wish", [None, "none", "all", "tensorboard", ["tensorboard", "wandb"], []])
def test_report_to_is_read_as_transformers_reads_it(wish: Any) -> None:
    theirs = integrations.get_reporting_integration_callbacks(wish)
    assert [integrations.INTEGRATION_TO_CALLBACK[name] for name in check_report_to(wish)] == theirs


def test_each_dashboard_of_transformers_has_its_package() -> None:
    # Kubeflow needs no package: it is there where its variable is.
    assert PACKAGES.keys() == integrations.INTEGRATION_TO_CALLBACK.keys() - {"kubeflow"}


def test_an_unknown_dashboard_is_a_users_error() -> None:
    with pytest.raises(ValueError, match=r"report_to='wandbb' is not supported. Use of: all, none, .*wandb"):
        check_report_to("wandbb")


def test_a_package_that_is_not_installed_is_a_users_error(tmp_path: Path) -> None:
    assert not integrations.is_clearml_available(), "the test wants a package that is not installed"
    with pytest.raises(ValueError, match=r"report_to='clearml': .*Run `pip install clearml`"):
        small_runs.trainer(tmp_path / "run", report_to="clearml")


def test_each_node_has_a_run_of_its_own() -> None:
    # Two nodes, of three ranks and of two.
    runs = [node_run([0, 1, 2, 0, 1], rank=rank, group="job-1") for rank in range(5)]
    assert [run.node for run in runs] == ["node0"] * 3 + ["node1"] * 2
    assert [run.is_main for run in runs] == [True] * 3 + [False] * 2
    assert {run.group for run in runs} == {"job-1"}


def test_tensorboard_has_the_metrics_and_no_token(tmp_path: Path) -> None:
    board = tmp_path / "board"
    trainer = small_runs.trainer(
        tmp_path / "run",
        report_to=["tensorboard"],
        logging_dir=str(board),
        run_name=TOKEN,  # the settings are copied as text
        log_gradients_by_layer=True,
        eval_dataset=small_runs.dataset(3),
        eval_strategy="epoch",
    )
    trainer.train()
    (callback,) = [item for item in trainer.callback_handler.callbacks if hasattr(item, "tb_writer")]
    assert callback.drain(30)
    events = EventAccumulator(str(board))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in [("loss", "train/loss"), ("rewards/margins", "train/rewards/margins")]:
        logged = {event.step: event.value for event in events.Scalars(theirs)}
        assert logged == pytest.approx({line["step"]: line[ours] for line in lines if ours in line}, rel=1e-6)
    (evaluation,) = [line for line in lines if "eval_loss" in line]
    assert events.Scalars("eval/loss")[0].value == pytest.approx(evaluation["eval_loss"], rel=1e-6)
    assert "train/grad_norm_by_layer/layers.1" in events.Tags()["scalars"]
    for path in board.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), f"the token is in {path}"


def test_transformers_own_callbacks_work_unmodified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given by the user as they are: the trainer's events carry what each of them asks for."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = small_runs.trainer(
        tmp_path / "run",
        callbacks=[
            integrations.TensorBoardCallback,
            PrinterCallback,
            ProgressCallback(),
            # Margins grow: judged as if lower were better, nothing improves after the first evaluation.
            EarlyStoppingCallback(early_stopping_patience=2),
        ],
        eval_dataset=small_runs.dataset(3),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=False,
        load_best_model_at_end=True,
        max_steps=9,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    printed = capsys.readouterr()
    assert "'eval_rewards/margins'" in printed.out
    assert "3/9" in printed.err


@pytest.mark.slow
def test_a_wandb_callback_of_ones_own(tmp_path: Path) -> None:
    """The one of transformers, passed by the user beside `report_to="none"`: its run has every step."""
    finished = subprocess.run(
        [sys.executable, "-c", OWN_WANDB, str(tmp_path)],
        cwd=small_runs.REPOSITORY,
        env=without_rendezvous()
        | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    history = OfflineRun(folder).history
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [row["train/loss"] for row in history if "train/loss" in row] == [line["loss"] for line in steps]
    margins = [row["train/rewards/margins"] for row in history if "train/rewards/margins" in row]
    assert margins == [line["rewards/margins"] for line in steps]
    assert len(steps) == 2


def test_the_id_of_a_run_travels_with_its_checkpoints(tmp_path: Path) -> None:
    first, checkpoint, second = (tmp_path / name for name in ("first", "checkpoint-1", "second"))
    for folder in (first, checkpoint, second):
        folder.mkdir()
    copy_run_id(first, checkpoint)
    assert not list(checkpoint.iterdir())  # no W&B run, nothing to carry
    (first / RUN_FILE).write_text('{"id": "abc"}')
    copy_run_id(first, checkpoint)
    copy_run_id(checkpoint, second)
    assert (second / RUN_FILE).read_text() == '{"id": "abc"}'
    (checkpoint / RUN_FILE).write_text('{"id": "other"}')
    copy_run_id(checkpoint, second)
    assert (second / RUN_FILE).read_text() == '{"id": "abc"}'


def test_a_table_on_tensorboard_is_markdown(tmp_path: Path) -> None:
    args = small_runs.settings(tmp_path / "run")
    callback = OrpoTensorBoardCallback(str(tmp_path / "board"))
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    callback.log_table("answers", COLUMNS, ROWS, step=7)
    assert callback.drain(30)
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    (event,) = events.Tensors("answers/text_summary")
    assert event.step == 7
    text = event.tensor_proto.string_val[0].decode()
    assert text.splitlines() == [
        "| prompt | answer |",
        "| --- | --- |",
        "| 2 + 2? | four |",
        "| a \\| b<br>c? | yes |",
    ]
