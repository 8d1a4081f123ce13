"""Reporting callbacks that can neither stop a training nor slow it.

W&B, TensorBoard and the others that transformers offers talk to servers and disks. Here each works in a thread of
its own: the training puts an event into a queue and goes on. When a callback raises, this is said once and the
training goes on; when it is so slow that its queue is full, events are dropped, which is also said once. What a
callback copies from the settings has no token in it.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_ds.preemption import PreemptedExit
from orpo_ds.redact import redact, redact_text

logger = logging.getLogger(__name__)

MAX_WAITING_EVENTS = 10_000
# The start may hook itself into the model, so it is waited for, but not for a server that does not answer.
START_SECONDS = 10.0
END_SECONDS = 60.0
PREEMPTION_SECONDS = 10.0  # DeepSpeed's launcher kills after 30, the save among them


class Background(TrainerCallback):
    """Put in front of a callback class, runs its events in a thread, in order.

    An event sees the trainer's state as it was when the event happened, though its lists go on growing.

    Attributes:
        end_seconds: how long the end of a training waits for what is not yet reported.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.end_seconds = END_SECONDS
        self._events: queue.Queue[Callable[[], object]] = queue.Queue(MAX_WAITING_EVENTS)
        self._thread: threading.Thread | None = None
        self._said: set[str] = set()
        self._training_ended = False
        self._hangs = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start reporting, and wait a little for it."""
        self._post(super().on_train_begin, args, state, control, kwargs)
        self.drain(START_SECONDS)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report metrics."""
        # The trainer may go on to change this dictionary.
        self._post(super().on_log, args, state, control, kwargs | {"logs": dict(kwargs["logs"])})

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report an evaluation."""
        self._post(super().on_evaluate, args, state, control, kwargs)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any,
        **kwargs: Any,
    ) -> None:
        """Report a prediction."""
        self._post(super().on_predict, args, state, control, kwargs | {"metrics": metrics})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report a checkpoint."""
        self._post(super().on_save, args, state, control, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the end, and wait until all is reported, within bounds."""
        self._post(super().on_train_end, args, state, control, kwargs)
        self._training_ended = True
        self._wait_for_the_rest()

    def log_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int
    ) -> None:
        """Report a table, such as answers of the model, where the dashboard has tables."""
        self._put(lambda: self.report_table(name, columns, rows, step=step))

    def report_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int
    ) -> None:
        """Write a table, in the thread; a dashboard without tables has nothing to do."""

    def on_failure(self, error: BaseException) -> None:
        """Report that the training ended with `error`, and wait until all is reported, within bounds."""
        self._put(lambda: self.report_failure(error))
        self.drain(END_SECONDS)

    def report_failure(self, error: BaseException) -> None:
        """Mark the run as failed, in the thread; a dashboard that does not know failures has nothing to do."""

    def on_preemption(self, stop: PreemptedExit) -> None:
        """Report that the training was stopped and will be continued; the machine may be gone soon."""
        self._put(lambda: self.report_preemption(stop))
        self.drain(PREEMPTION_SECONDS)

    def report_preemption(self, stop: PreemptedExit) -> None:
        """Mark the run as preempted, in the thread; a dashboard that does not know that has nothing to do."""

    def drain(self, seconds: float) -> bool:
        """Wait until every event so far is reported, at most `seconds`; returns whether it is."""
        deadline = time.monotonic() + seconds
        with self._events.all_tasks_done:
            while self._events.unfinished_tasks and (left := deadline - time.monotonic()) > 0:
                self._events.all_tasks_done.wait(left)
            return not self._events.unfinished_tasks

    def as_reported(self, state: TrainerState) -> TrainerState:
        """The state of this moment, as the callback may see it."""
        return copy.copy(state)

    def _post(
        self,
        event: Callable[..., object],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        kwargs: dict[str, Any],
    ) -> None:
        settings, frozen, signals = without_secrets(args), self.as_reported(state), copy.copy(control)
        self._put(lambda: event(settings, frozen, signals, **kwargs))

    def _put(self, event: Callable[[], object]) -> None:
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._say_once("is too slow: what it cannot take is not reported there")
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=type(self).__name__, daemon=True)
            self._thread.start()
        if self._training_ended:
            self._wait_for_the_rest()

    def _wait_for_the_rest(self) -> None:
        """Wait for what is not yet reported; not again where that was in vain."""
        if not self._hangs and not self.drain(self.end_seconds):
            self._hangs = True
            self._say_once(f"did not report everything within {self.end_seconds:.0f} seconds of the end")

    def _work(self) -> None:
        while True:
            event = self._events.get()
            try:
                event()
            # Whatever a dashboard's client raises, the training must not end for it.
            except Exception as error:  # noqa: BLE001
                self._say_once(f"failed ({type(error).__name__}: {redact_text(str(error))})")
            finally:
                self._events.task_done()

    def _say_once(self, what: str) -> None:
        if what not in self._said and len(self._said) < 2:
            logger.warning(
                "%s %s. The training goes on, and metrics.jsonl has every metric.", type(self).__name__, what
            )
        self._said.add(what)


def in_background(callback: type[TrainerCallback]) -> type[TrainerCallback]:
    """The callback class with its events in a thread; still a subclass, so that it can be removed by its type."""
    return type(callback.__name__, (Background, callback), {"__doc__": callback.__doc__})


def without_secrets(args: TrainingArguments) -> TrainingArguments:
    """The settings whose `to_dict`, which every dashboard copies, masks more than what is called `..._token`."""
    settings = copy.copy(args)
    settings.to_dict = lambda: redact(args.to_dict())  # type: ignore[method-assign]
    return settings
