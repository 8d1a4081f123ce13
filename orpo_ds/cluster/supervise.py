"""`orpo-ds supervise`: start a training again and again until it is done.

    orpo-ds supervise -- deepspeed --num_gpus 8 --module orpo_ds train --config run.yaml --resume_from_checkpoint auto

Outside of SLURM it is a loop around the command. In a batch job (`--requeue`) it starts the command once, and a run
that is to go on gives the machines back: the job is requeued and begins again when its turn comes. What counts as
progress, and when a chain is given up, is in `restarts.py`.

Signals that ask for an end (SIGUSR1, SIGTERM, SIGINT) reach the ranks as SIGUSR1, which the trainer answers with a
checkpoint. It goes to the whole process group, because DeepSpeed's launcher does not pass it on; whoever in there does
not know the signal ignores it. As a signal can come before a rank is ready for it, it is sent again until the command
ends. After such a signal the loop does not start the command again; a job of SLURM is requeued, unless SLURM itself
says that it is over (`scancel`).
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from orpo_ds.cli import RunError
from orpo_ds.cluster import slurm
from orpo_ds.cluster.restarts import DEFAULT_LIMIT, GivenUpError, Restarts, checkpoint_name, run_dir_of
from orpo_ds.redact import redact_command_line

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.1
REPEAT_SECONDS = 10.0
LEFT_BEHIND_SECONDS = 5.0
DEFAULT_PAUSE = 10.0


def main(words: Sequence[str]) -> None:
    """Run `orpo-ds supervise`."""
    parser = _parser()
    words = list(words)
    cut = words.index("--") if "--" in words else len(words)
    options, command = parser.parse_args(words[:cut]), words[cut + 1 :]
    if not command:
        raise ValueError("no command: orpo-ds supervise [options] -- COMMAND …")
    run_dir = Path(options.output_dir) if options.output_dir else run_dir_of(command)
    try:
        status = supervise(
            command,
            run_dir=run_dir,
            before=shlex.split(options.before),
            limit=options.max_restarts_without_progress,
            pause_s=options.pause,
            requeue=options.requeue,
        )
    except slurm.SlurmError as error:
        raise RunError(str(error)) from error
    if status:
        raise SystemExit(status)


def supervise(
    command: Sequence[str],
    *,
    run_dir: Path,
    before: Sequence[str] = (),
    limit: int = DEFAULT_LIMIT,
    pause_s: float = DEFAULT_PAUSE,
    requeue: bool = False,
) -> int:
    """Run a training to its end, over restarts. Must be called in the main thread: it handles signals.

    Args:
        command: starts the training, the first time and every time.
        run_dir: where the training saves its checkpoints.
        before: a command to run before each start; when it fails, the start has failed.
        limit: restarts without a new checkpoint, in a row, after which it is given up.
        pause_s: seconds before a restart after no progress.
        requeue: requeue this job of SLURM in place of a restart here.

    Returns:
        0 when the training is done; else the status of its last start, as a shell says it (128 + N for signal N).
    """
    job = slurm.this_job() if requeue else None
    name = f"slurm-{job}" if job else f"pid-{os.getpid()}-{time.time():.0f}"
    restarts = Restarts(run_dir, name=name, limit=limit)
    with Supervisor(escalates=job is None) as supervisor:
        while True:
            status = 0
            try:
                chain = restarts.begin()
                if chain.starts > 1:
                    _say(f"restart {chain.starts - 1}, from {checkpoint_name(chain.newest)}")
                if before and not supervisor.requests:
                    status = supervisor.run(before, on_terminate=partial(_requeue_if_time_is_up, job))
                if status == 0 and not supervisor.requests:
                    status = supervisor.run(command, on_terminate=partial(_requeue_if_time_is_up, job))
                    if status == 0:
                        return 0
                if job is None and supervisor.requests:
                    _say(f"stopped, with exit status {status}. The same command goes on from there.")
                    return status
                if job is not None and slurm.is_ending(job):
                    _say(f"exit status {status}. SLURM ends the job, and decides whether it runs again.")
                    return status
                ended = restarts.judge(status)
            except GivenUpError as error:
                _say(str(error))
                return status or 1
            if job is not None:
                slurm.requeue(job)
                _say(f"{ended.text}. Job {job} is requeued.")
                return status
            _say(f"{ended.text}. It is started again.")
            if not ended.progress:
                supervisor.pause(pause_s)


class Supervisor:
    """Starts commands, one after the other, and passes on what asks them to stop. A context manager.

    Attributes:
        requests: signals to stop that came so far.
    """

    def __init__(self, *, escalates: bool) -> None:
        """Nothing is handled before the context is entered.

        Args:
            escalates: a second request to stop is passed on as SIGTERM, a third one as SIGKILL. SLURM does so itself.
        """
        self.requests = 0
        self._escalates = escalates
        self._process: subprocess.Popen[bytes] | None = None
        self._sent_at = 0.0
        self._terminated = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Supervisor:
        self._handlers = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], *, on_terminate: Callable[[], None]) -> int:
        """Run a command to its end.

        Args:
            command: with its arguments.
            on_terminate: called once, soon after a first SIGTERM; the command still runs.

        Returns:
            Its status as a shell says it.
        """
        _say(shlex.join(redact_command_line(command)))
        # What is ignored stays ignored through `exec`, until the trainer sets its handler.
        self._process = subprocess.Popen(
            ["sh", "-c", 'trap "" USR1; exec "$@"', "sh", *command], process_group=0
        )
        while (status := self._process.poll()) is None:
            if self._terminated:
                self._terminated = False
                on_terminate()
            if self.requests and time.monotonic() - self._sent_at > REPEAT_SECONDS:
                self._pass_on()
            time.sleep(POLL_SECONDS)
        self._end_group()
        self._process = None
        return status if status >= 0 else 128 - status

    def pause(self, seconds: float) -> None:
        """Wait, unless a request to stop comes."""
        until = time.monotonic() + seconds
        while not self.requests and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.requests += 1
        self._terminated = number == signal.SIGTERM
        _say(f"{signal.Signals(number).name}: the run is asked to save and to stop")
        self._pass_on()

    def _pass_on(self) -> None:
        self._sent_at = time.monotonic()
        if self._process is None:
            return
        level = min(self.requests, 3) if self._escalates else 1
        self._signal_group({1: signal.SIGUSR1, 2: signal.SIGTERM, 3: signal.SIGKILL}[level])

    def _end_group(self) -> None:
        """Kill what a launcher that died has left behind: it would hold the GPUs and the output folder."""
        until = time.monotonic() + LEFT_BEHIND_SECONDS
        while self._signal_group(0) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: int) -> bool:
        """Whether there was anybody to signal."""
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orpo-ds supervise",
        usage="orpo-ds supervise [options] -- COMMAND …",
        description="Start a training again until it is done. COMMAND needs --resume_from_checkpoint auto.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max-restarts-without-progress",
        type=int,
        default=DEFAULT_LIMIT,
        metavar="N",
        help="give up after N restarts in a row that brought no new checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="where the checkpoints are; by default the output_dir of COMMAND's words or its --config file",
    )
    parser.add_argument(
        "--before",
        default="",
        metavar="COMMAND",
        help="run it before each start, such as 'orpo-ds preflight …'; when it fails, the start has failed",
    )
    parser.add_argument(
        "--pause",
        type=float,
        default=DEFAULT_PAUSE,
        metavar="SECONDS",
        help="before a restart after no progress (default: %(default)g)",
    )
    parser.add_argument(
        "--requeue",
        action="store_true",
        help="in a batch job of SLURM: requeue the job in place of a restart here",
    )
    return parser


def _requeue_if_time_is_up(job: str | None) -> None:
    """Before SLURM kills a job that had not ended by its time limit: nobody is left to do it afterwards."""
    if job is not None and slurm.time_is_up(job):
        slurm.requeue(job)
        _say(f"the time is up before the run has ended. Job {job} is requeued.")


def _say(text: str) -> None:
    print(f"orpo-ds supervise: {text}", file=sys.stderr, flush=True)
