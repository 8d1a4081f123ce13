"""Reporting callbacks that can neither stop a training nor slow it.

W&B, TensorBoard and the others that transformers offers talk to servers and disks. Here each works in a thread of
its own: the training puts an event into a queue and goes on. When a callback raises, this is said once and the
training goes on; when it is so slow that its queue is full, events are dropped, which is also said once.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

MAX_WAITING_EVENTS = 10_000
# The start may hook itself into the model, so it is waited for, but not for a server that does not answer.
START_SECONDS = 10.0
END_SECONDS = 60.0


class Background(TrainerCallback):
    """Put in front of a callback class, runs its events in a thread, in order.

    An event sees the trainer's state as it was when the event happened, though its lists go on growing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._events: queue.Queue[Callable[[], object]] = queue.Queue(MAX_WAITING_EVENTS)
        self._thread: threading.Thread | None = None
        self._said: set[str] = set()
        self._training_ended = False

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
        self.drain(END_SECONDS)

    def drain(self, seconds: float) -> bool:
        """Wait until every event so far is reported, at most `seconds`; returns whether it is."""
        deadline = time.monotonic() + seconds
        with self._events.all_tasks_done:
            while self._events.unfinished_tasks and (left := deadline - time.monotonic()) > 0:
                self._events.all_tasks_done.wait(left)
            return not self._events.unfinished_tasks

    def _post(
        self,
        event: Callable[..., object],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        kwargs: dict[str, Any],
    ) -> None:
        frozen, signals = copy.copy(state), copy.copy(control)
        try:
            self._events.put_nowait(lambda: event(args, frozen, signals, **kwargs))
        except queue.Full:
            self._say_once("is too slow: what it cannot take is not reported there")
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=type(self).__name__, daemon=True)
            self._thread.start()
        if self._training_ended:
            self.drain(END_SECONDS)

    def _work(self) -> None:
        while True:
            event = self._events.get()
            try:
                event()
            # Whatever a dashboard's client raises, the training must not end for it.
            except Exception as error:  # noqa: BLE001
                self._say_once(f"failed ({type(error).__name__}: {error})")
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
