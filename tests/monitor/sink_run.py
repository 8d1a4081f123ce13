"""A real training with W&B against a server that is not there, or does not answer; started by test_sinks.py.

python -m tests.monitor.sink_run OUTPUT
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from transformers import TrainerCallback

from orpo_ds.monitor import background
from tests import small_runs


class Waiting(TrainerCallback):
    """Notes at every step how many events W&B has still before it."""

    def __init__(self) -> None:
        self.trainer: small_runs.ORPOTrainer | None = None
        self.waiting: list[int] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        assert self.trainer is not None
        (wandb,) = [
            item
            for item in self.trainer.callback_handler.callbacks
            if type(item).__name__ == "OrpoWandbCallback"
        ]
        self.waiting.append(wandb._events.unfinished_tasks)


def main(output_dir: Path) -> None:
    background.START_SECONDS = 0.1
    logging.basicConfig(level=logging.WARNING)
    waiting = Waiting()
    trainer = small_runs.trainer(output_dir / "run", report_to="wandb", max_steps=5, callbacks=[waiting])
    waiting.trainer = trainer
    trainer.train()
    print("WAITING", json.dumps(waiting.waiting))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
