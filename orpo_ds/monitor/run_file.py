"""Writes `run.json` (`run_state`) while a training goes on, as one more dashboard."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_ds.monitor.background import Background
from orpo_ds.monitor.run_state import RUN_STATE_FILE, RunState
from orpo_ds.preemption import PreemptedExit
from orpo_ds.redact import redact_text


class _Writer(TrainerCallback):
    """Writes `run.json` at the events of a training."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.run: RunState | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say that the run has begun, or goes on after a resume."""
        now = time.time()
        self.write(
            RunState(
                state="running",
                step=state.global_step,
                total_steps=state.max_steps,
                host=socket.gethostname(),
                pid=os.getpid(),
                process_started=psutil.Process().create_time(),
                world_size=args.world_size,
                started=now,
                first_step=state.global_step,
                updated=now,
            )
        )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give a sign of life; an evaluation before the training is none."""
        if self.run is not None:
            now = time.time()
            self.write(replace(self.run, step=state.global_step, updated=now, pause=now - self.run.updated))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say that the training came to its end."""
        if self.run is not None:
            self.write(replace(self.run, state="finished", step=state.global_step, updated=time.time()))

    def write(self, run: RunState) -> None:
        """Replace the file in one go."""
        self.run = run
        path = self.run_dir / RUN_STATE_FILE
        partial = path.with_suffix(".json.tmp")
        partial.write_text(json.dumps(asdict(run), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


class RunFile(Background, _Writer):
    """Writes `run.json` in the background, so that a slow or full disk costs the training nothing."""

    def report_preemption(self, stop: PreemptedExit) -> None:
        """Say that the training is to be continued."""
        if self.run is not None:
            self.write(replace(self.run, state="preempted", step=stop.step, updated=time.time()))

    def report_failure(self, error: BaseException) -> None:
        """Say what the training failed with."""
        if self.run is not None:
            text = redact_text(f"{type(error).__name__}: {error}")
            self.write(replace(self.run, state="failed", error=text, updated=time.time()))
