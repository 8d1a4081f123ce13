"""A dashboard that fails or hangs neither stops nor slows the training."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_ds.monitor import background
from orpo_ds.monitor.background import in_background


class Recorder(TrainerCallback):
    """Notes the step and the logs of every event; waits for `gate` and raises `error` when they are set."""

    gate: threading.Event | None = None
    error: Exception | None = None

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.gate is not None:
            self.gate.wait(60)
        if self.error is not None:
            raise self.error
        self.seen.append((state.global_step, kwargs["logs"]))


@pytest.fixture
def args(tmp_path: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), report_to=[])


def log_steps(callback: TrainerCallback, args: TrainingArguments, *, steps: int) -> None:
    """One state and one dictionary for all steps, as a trainer has them."""
    state, logs = TrainerState(), {"loss": 0.0}
    for step in range(1, steps + 1):
        state.global_step = step
        logs["loss"] = float(step)
        callback.on_log(args, state, TrainerControl(), logs=logs)


def test_events_arrive_in_order_with_the_state_of_their_time(args: TrainingArguments) -> None:
    callback = in_background(Recorder)()
    assert isinstance(callback, Recorder)
    callback.gate = threading.Event()  # nothing is reported before the last step is over
    log_steps(callback, args, steps=50)
    callback.gate.set()
    callback.on_train_end(args, TrainerState(), TrainerControl())
    assert callback.seen == [(step, {"loss": float(step)}) for step in range(1, 51)]


def test_a_callback_that_raises_is_mentioned_once(
    args: TrainingArguments, caplog: pytest.LogCaptureFixture
) -> None:
    callback = in_background(Recorder)()
    assert isinstance(callback, Recorder)
    callback.error = ConnectionError("the server is down")
    with caplog.at_level(logging.WARNING):
        log_steps(callback, args, steps=20)
        callback.on_train_end(args, TrainerState(), TrainerControl())
    assert [record.getMessage() for record in caplog.records if "server is down" in record.getMessage()] == [
        "Recorder failed (ConnectionError: the server is down). The training goes on, and metrics.jsonl has every "
        "metric."
    ]


def test_a_callback_that_hangs_costs_nothing_and_is_mentioned_once(
    args: TrainingArguments, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "MAX_WAITING_EVENTS", 5)
    monkeypatch.setattr(background, "END_SECONDS", 0.5)
    callback = in_background(Recorder)()
    assert isinstance(callback, Recorder)
    callback.gate = threading.Event()  # never set while the training goes on
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        log_steps(callback, args, steps=1000)
        callback.on_train_end(args, TrainerState(), TrainerControl())
    # The gate would hold the first event for a minute.
    assert time.monotonic() - began < 30
    assert sum("too slow" in record.getMessage() for record in caplog.records) == 1
    callback.gate.set()
    assert callback.drain(30)
    # The queue held five events; when the thread took the first one, one more found a place.
    steps = [step for step, _ in callback.seen]
    assert steps[:5] == [1, 2, 3, 4, 5]
    assert len(steps) <= 6


def test_what_comes_after_the_end_waits_once_for_a_callback_that_hangs(
    args: TrainingArguments, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "END_SECONDS", 0.5)
    callback = in_background(Recorder)()
    assert isinstance(callback, Recorder)
    callback.gate = threading.Event()
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        log_steps(callback, args, steps=1)
        callback.on_train_end(args, TrainerState(), TrainerControl())
        log_steps(callback, args, steps=200)  # half a second each, had the end not shown that it is in vain
    assert time.monotonic() - began < 30
    assert sum("did not report everything" in record.getMessage() for record in caplog.records) == 1
    callback.gate.set()
    assert callback.drain(30)
    assert len(callback.seen) == 201
