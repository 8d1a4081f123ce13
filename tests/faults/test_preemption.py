"""A signal ends a training in order, wherever it comes; what is continued equals a training that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from orpo_ds import ORPOTrainer
from orpo_ds.checkpoint import read_manifest
from orpo_ds.monitor.jsonl import read_metrics
from orpo_ds.monitor.run_state import read_run_state
from orpo_ds.preemption import REQUEUE_EXIT_CODE, SIGNALS, PreemptedExit, leave_on_signals
from tests import small_runs
from tests.environment import without_rendezvous
from tests.faults import preempted_worker
from tests.faults.test_resume import (
    STEPS,
    checkpoint_differences,
    differences,
    make_trainer,
    numbers,
    parameters,
)

EVAL_EVERY, EVAL_ROUNDS = 3, 3


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """The signals' handlers are this process's: put back what a preempted training left."""
    former = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


class Tell(TrainerCallback):
    """Sends this process a signal, `times` in a row, at the first `event` with this many steps done; counts events."""

    def __init__(
        self, event: str, step: int, *, number: signal.Signals = signal.SIGUSR1, times: int = 1
    ) -> None:
        self._when, self._number, self._times = (event, step), number, times
        self._sent = False
        self.seen: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if not (name.startswith("on_") and hasattr(TrainerCallback, name)):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **details: Any) -> None:
            self.seen.append((name, state.global_step))
            if (name, state.global_step) == self._when and not self._sent:
                self._sent = True
                for _ in range(self._times):
                    os.kill(os.getpid(), self._number)

        return note


def run(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> ORPOTrainer:
    """Two ranks' worth of steps: 3 an epoch; saves after steps 2, 4 and 6, evaluates after 3 and 6 in three rounds."""
    return make_trainer(
        folder, callbacks=callbacks, **{"per_device_eval_batch_size": 2, "eval_steps": EVAL_EVERY, **changes}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed, with its parameters beside it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer = run(folder)
    trainer.train()
    torch.save(parameters(trainer), folder.parent / "parameters.pt")
    return folder


def assert_as_undisturbed(broken: Path, trainer: ORPOTrainer, whole: Path) -> None:
    """Parameters, the last checkpoint and every line of the metrics."""
    assert list(differences(parameters(trainer), torch.load(whole.parent / "parameters.pt"))) == []
    assert checkpoint_differences(broken / f"checkpoint-{STEPS}", whole / f"checkpoint-{STEPS}") == []
    assert numbers(broken) == numbers(whole)


# event, steps done at it, the step after which the run stops
MOMENTS = {
    "as a step begins": ("on_step_begin", 3, 4),
    "between two micro-batches": ("on_substep_end", 3, 4),
    "after the loss of the step is summed": ("on_pre_optimizer_step", 4, 6),
    "after the last step of an epoch": ("on_epoch_end", 3, 4),
    "when a log is written, before an evaluation": ("on_log", 3, 3),
    "in an evaluation": ("on_prediction_step", 3, 3),
    "when an evaluation is over": ("on_evaluate", 3, 3),
    "in a save": ("on_save", 2, 2),
    "in the last step": ("on_step_begin", 5, 6),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_wherever_the_signal_comes(moment: str, whole: Path, tmp_path: Path) -> None:
    event, step, stops = MOMENTS[moment]
    tell = Tell(event, step, number=signal.SIGTERM if step % 2 else signal.SIGUSR1, times=2)
    with pytest.raises(PreemptedExit) as left:
        run(tmp_path / "run", tell).train()
    assert left.value.code == REQUEUE_EXIT_CODE
    assert left.value.step == stops
    assert read_manifest(tmp_path / "run" / f"checkpoint-{stops}").metadata.step == stops
    assert [at for name, at in tell.seen if name == "on_save"].count(stops) == 1
    state = read_run_state(tmp_path / "run")
    assert state is not None
    assert (state.state, state.step) == ("preempted", stops)
    if moment == "in an evaluation":
        assert [at for name, at in tell.seen if name == "on_prediction_step"] == [3], "it evaluated on"
    resumed = run(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert_as_undisturbed(tmp_path / "run", resumed, whole)


def test_before_the_first_step_nothing_is_saved(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(PreemptedExit) as left:
        run(tmp_path / "run", Tell("on_train_begin", 0)).train()
    assert left.value.step == 0
    assert list((tmp_path / "run").glob("checkpoint-*")) == []
    again = run(tmp_path / "run")
    again.train()
    assert_as_undisturbed(tmp_path / "run", again, whole)


def test_an_evaluation_before_the_training_is_given_up(tmp_path: Path) -> None:
    tell = Tell("on_prediction_step", 0)
    with pytest.raises(PreemptedExit):
        run(tmp_path / "run", tell, eval_on_start=True).train()
    assert [name for name, _ in tell.seen if name in ("on_prediction_step", "on_step_begin")] == [
        "on_prediction_step"
    ]


def test_before_the_first_step_of_a_resume(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(PreemptedExit):
        run(tmp_path / "run", Tell("on_prediction_step", 3)).train()
    with pytest.raises(PreemptedExit) as left:  # it makes up for the evaluation, and is stopped in it again
        run(tmp_path / "run", Tell("on_prediction_step", 3)).train(resume_from_checkpoint=True)
    assert left.value.step == 3
    resumed = run(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert_as_undisturbed(tmp_path / "run", resumed, whole)


@pytest.mark.parametrize("changes", [{"save_strategy": "no"}, {"save_only_model": True}], ids=str)
def test_it_is_saved_whole_whatever_the_run_saves(tmp_path: Path, changes: dict[str, Any]) -> None:
    undisturbed = run(tmp_path / "whole", **changes)
    undisturbed.train()
    with pytest.raises(PreemptedExit):
        run(tmp_path / "run", Tell("on_step_begin", 2), **changes).train()
    resumed = run(tmp_path / "run", **changes)
    resumed.train(resume_from_checkpoint=True)
    assert list(differences(parameters(resumed), parameters(undisturbed))) == []


def test_steps_since_the_last_log_are_logged(tmp_path: Path) -> None:
    with pytest.raises(PreemptedExit):
        run(tmp_path / "run", Tell("on_step_begin", 3), logging_steps=3, eval_strategy="no").train()
    run(tmp_path / "run", logging_steps=3, eval_strategy="no").train(resume_from_checkpoint=True)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [3, 4, 6]


def test_the_best_checkpoint_of_an_evaluation_that_is_made_up_for(whole: Path, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_steps": 3}
    undisturbed = run(tmp_path / "whole", **best)
    undisturbed.train()
    with pytest.raises(PreemptedExit):
        run(tmp_path / "run", Tell("on_prediction_step", 3), **best).train()
    resumed = run(tmp_path / "run", **best)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_global_step == undisturbed.state.best_global_step
    assert resumed.state.best_metric == undisturbed.state.best_metric
    assert list(differences(parameters(resumed), parameters(undisturbed))) == []


def test_switched_off_a_signal_does_what_it_does_to_any_program(tmp_path: Path) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    trainer = run(tmp_path / "run", Tell("on_step_begin", 3), enable_jit_checkpoint=False)
    assert trainer.train().global_step == STEPS
    assert heard == [signal.SIGUSR1]


def test_former_handlers_are_back_after_the_training(tmp_path: Path) -> None:
    leave_on_signals()
    former = [signal.getsignal(number) for number in SIGNALS]

    class Look(TrainerCallback):
        def on_step_begin(self, *args: Any, **details: Any) -> None:
            during.append([signal.getsignal(number) for number in SIGNALS])

    for enabled in (True, False):
        during: list[Any] = []
        run(tmp_path / str(enabled), Look(), max_steps=1, enable_jit_checkpoint=enabled).train()
        assert [signal.getsignal(number) for number in SIGNALS] == former
        assert during[0] != former
        assert (during[0] == [signal.SIG_DFL] * 2) == (not enabled)


def test_the_command_leaves_at_once_before_its_training(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "orpo_ds", *small_runs.command_line(tmp_path)],
        cwd=small_runs.REPOSITORY,
        env=without_rendezvous(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + small_runs.LAUNCH_TIMEOUT_S
        while not catches(process.pid, signal.SIGUSR1):
            assert process.poll() is None, "it ended before it listened"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=small_runs.LAUNCH_TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == REQUEUE_EXIT_CODE, errors[-4000:]
    assert "SIGUSR1: no training is under way" in errors
    assert "Traceback" not in errors


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, as Linux tells it."""
    [mask] = [
        line.split()[1]
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("SigCgt")
    ]
    return bool(int(mask, 16) >> (number - 1) & 1)


# ---------------------------------------------------------------------- two ranks, ZeRO-3, offload


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of `preempted_worker.py` and how its launcher ended."""
    folder = tmp_path_factory.mktemp("preempted")
    small_runs.save_model_folder(folder / "model", "gpt2", embd_pdrop=0.1)
    return folder, small_runs.launch("tests.faults.preempted_worker", str(folder))


@pytest.mark.distributed
@pytest.mark.slow
class TestTwoRanks:
    def test_a_signal_to_one_rank_ends_all_with_the_same_status(
        self, launched: tuple[Path, subprocess.CompletedProcess[str]]
    ) -> None:
        folder, finished = launched
        assert finished.returncode == REQUEUE_EXIT_CODE, finished.stdout[-6000:]
        assert "Traceback" not in finished.stdout
        assert "stopped after step 2, its checkpoint is saved (SIGTERM to rank 1)" in finished.stdout
        # Each came to its own end: nobody was killed by the launcher.
        assert sorted(path.name for path in folder.glob("left-*")) == ["left-0", "left-1"]
        assert read_manifest(folder / "left" / "checkpoint-2").metadata.world_size == 2

    def test_all_ranks_stop_after_the_same_step_and_the_resume_is_exact(
        self, launched: tuple[Path, subprocess.CompletedProcess[str]]
    ) -> None:
        folder, finished = launched
        assert (folder / "results.pt").is_file(), finished.stdout[-6000:]
        results = torch.load(folder / "results.pt")
        assert results["stopped"] == [preempted_worker.TOLD_STEP] * 2
        assert list(differences(results["whole"], results["resumed"])) == []
        assert numbers(folder / "broken") == numbers(folder / "whole")
        steps = [
            json.loads(line)["step"]
            for line in (folder / "broken" / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps == list(range(1, preempted_worker.STEPS + 1))
