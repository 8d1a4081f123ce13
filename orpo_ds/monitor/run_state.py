"""`run.json`: what a run is doing, for `orpo-ds status` and anybody's script.

It says who runs (host and process), how far it is, and how it ended. Whether a run that says `running` still lives
follows from its process, or, seen from another host, from the time of its last sign.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

RUN_STATE_FILE = "run.json"
# Without a process to look at: this many times the usual pause between two signs, and never less than five minutes.
SILENT_PAUSES, SILENT_SECONDS = 5.0, 300.0

Phase = Literal["running", "finished", "preempted", "failed"]


@dataclass(frozen=True)
class RunState:
    """Content of `run.json`; times are seconds since 1970.

    Attributes:
        state: as the run itself wrote it; a run that was killed still says `running`, see `is_alive`.
        step: optimizer steps done at the last sign.
        total_steps: of the whole training.
        host: of the main process.
        pid: of the main process.
        process_started: when that process began, so that a later process of the same number is not taken for it.
        world_size: ranks.
        started: when this training, or its last resume, began.
        first_step: the step it began at; above 0 after a resume.
        updated: the last sign.
        pause: seconds between the last two signs; 0 before there are two.
        error: what it failed with, None while it did not.
    """

    state: Phase
    step: int
    total_steps: int
    host: str
    pid: int
    process_started: float
    world_size: int
    started: float
    first_step: int
    updated: float
    pause: float = 0.0
    error: str | None = None


def read_run_state(run_dir: Path) -> RunState | None:
    """The content of `run.json`; None where there is none.

    Raises:
        ValueError: the file is there and is not one of ours.
    """
    path = run_dir / RUN_STATE_FILE
    try:
        return RunState(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Remove it to see the metrics alone.") from error


def is_alive(run: RunState, *, now: float) -> bool:
    """Whether a run that says `running` still does: its process lives, or, on another host, it was heard of lately."""
    if run.host != socket.gethostname():
        return now - run.updated < max(SILENT_SECONDS, SILENT_PAUSES * run.pause)
    try:
        return abs(psutil.Process(run.pid).create_time() - run.process_started) < 1.0
    except psutil.NoSuchProcess:
        return False
