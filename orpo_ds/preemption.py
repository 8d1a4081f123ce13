"""The machine is wanted back: a signal to any rank ends the training on all of them, saved and in order.

SLURM's `--signal=USR1@120`, a time limit, `scancel` and cloud machines say it with SIGUSR1 or SIGTERM, to one process
or to all. The signal's handler only takes note. Once a step the ranks add their notes up, in the all-reduce that the
loss needs anyway, so that all of them stop after the same step; an evaluation asks after each of its batches. They save
a verified checkpoint, tell the dashboards, wait for each other, and leave with status 85 (`REQUEUE_EXIT_CODE`): the
run is not over, start it again with `resume_from_checkpoint=True`.

| when the signal comes | what happens |
| --- | --- |
| before `train()` | nothing is lost: `orpo-ds train` leaves at once, status 85 |
| in `train()`, before its first step | the ranks leave together before that step; there is nothing to save |
| in a step | the step ends, its metrics are logged, it is saved |
| in an evaluation | the evaluation is given up, the step is saved, and the resume makes up for the evaluation |
| in a save, or in the answers of an evaluation | they end; the step is not saved twice |
| again | nothing more happens |
| after `train()` | as before it |

No torch here at the top: the command listens before it spends seconds on imports.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

REQUEUE_EXIT_CODE = 85  # no shell, signal or sysexits.h uses it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptedExit(SystemExit):
    """The training was stopped by a signal, and can be continued.

    A `SystemExit`: a script that does not catch it ends with status 85 and without a traceback, and no
    `except Exception` takes it for an error.

    Attributes:
        step: optimizer steps done; there is a checkpoint of them, unless it is 0.
    """

    def __init__(self, step: int) -> None:
        """Say where the training stands."""
        super().__init__(REQUEUE_EXIT_CODE)
        self.step = step

    def __str__(self) -> str:
        saved = "its checkpoint is saved" if self.step else "there is nothing to save"
        return f"stopped after step {self.step}, {saved}"


def leave_on_signals() -> None:
    """Until a training begins, and after it, a signal ends this process at once with status 85.

    For the main thread of a command; `Preemption.listening` takes over while there is something to save.
    """
    for number in SIGNALS:
        signal.signal(number, _leave_at_once)


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    print(
        f"orpo-ds (rank {rank}): {signal.Signals(number).name}: no training is under way, nothing to save. "
        f"Leaving with status {REQUEUE_EXIT_CODE}.",
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(REQUEUE_EXIT_CODE)


class Preemption:
    """What the ranks of one training know of signals.

    Attributes:
        agreed: all ranks know that they stop; the same on all of them.
    """

    def __init__(self, *, enabled: bool, device: torch.device) -> None:
        """Take note of nothing yet; handlers are only there within `listening`.

        Args:
            enabled: whether signals are to be caught at all; the same on every rank.
            device: of this rank's collectives.
        """
        self.agreed = False
        self._enabled = enabled
        self._device = device
        self._listening = False
        self._noted: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals while a training runs. Ranks that were preempted leave this together. Collective then.

        Where signals are not to be caught, they do what they do to any program. After a `PreemptedExit` they are
        ignored: launchers send SIGTERM to the ranks that are a moment later than the first.
        """
        former = self._install()
        try:
            self._listening = self._enabled
            yield
        except PreemptedExit as stop:
            for number in former:
                signal.signal(number, signal.SIG_IGN)
            former = {}
            self._say(stop)
            raise
        finally:
            self._listening = False
            for number, handler in former.items():
                signal.signal(number, handler)

    def _install(self) -> dict[signal.Signals, signal._HANDLER]:
        """Put the handlers in place; returns what was there."""
        if threading.current_thread() is not threading.main_thread():
            if self._enabled:
                logger.warning(
                    "train() runs in a thread, so this rank does not hear signals: preempt another one"
                )
            return {}
        former = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            if self._enabled:
                signal.signal(number, self._take_note)
            elif former[number] == _leave_at_once:
                signal.signal(number, signal.SIG_DFL)
        return former

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is None:
            self._noted = signal.Signals(number)

    @property
    def noted(self) -> bool:
        """Whether this rank was told to stop."""
        return self._noted is not None

    def agree(self) -> bool:
        """Whether any rank was told to stop, the same on all of them. Collective within a training, one number."""
        if self._listening and not self.agreed:
            import torch

            from orpo_ds import distributed

            told = torch.tensor(float(self.noted), device=self._device)
            self.agreed = bool(distributed.max_over_ranks(told).item())
        return self.agreed

    def _say(self, stop: PreemptedExit) -> None:
        """Log where the run stands, and which rank was told by what, when all ranks have come to this point."""
        from orpo_ds import distributed

        names = distributed.gather_objects(None if self._noted is None else self._noted.name)
        ranks: dict[str, list[int]] = {}
        for rank, name in enumerate(names):
            if name is not None:
                ranks.setdefault(name, []).append(rank)
        if distributed.is_main():
            whom = "; ".join(f"{name} to rank {', '.join(map(str, told))}" for name, told in ranks.items())
            logger.warning("%s (%s). Leaving with status %d: to be continued.", stop, whom, REQUEUE_EXIT_CODE)
