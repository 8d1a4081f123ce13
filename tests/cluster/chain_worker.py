"""A small training that may be started again and again: what a chain of starts is tested with.

    python -m tests.cluster.chain_worker FOLDER [START:STEP …]

Trains FOLDER/model into FOLDER/run with W&B offline, whatever launcher started the ranks, and writes the trained
parameters to FOLDER/trained.pt. In start number START (from 1) every rank kills itself at the end of step STEP.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_ds import distributed
from orpo_ds.export import full_state
from tests import small_runs

STEPS, SAVE_STEPS, PAIRS = 6, 2, 11


class Kill(TrainerCallback):
    """Kills the process at the end of a step."""

    def __init__(self, step: int | None) -> None:
        self._step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **details: Any
    ) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def number_of_start(folder: Path) -> int:
    """Count this start, and say its number."""
    if distributed.is_main():
        with (folder / "starts").open("a") as file:
            file.write("x")
    distributed.gather_objects(None)
    return len((folder / "starts").read_text())


def train(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> None:
    """One start of the training."""
    fields: dict[str, Any] = {
        "model": str(folder / "model"),
        "pairs": PAIRS,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "disable_dropout": False,
        "report_to": "wandb",
        "resume_from_checkpoint": "auto",
        "callbacks": callbacks,
    }
    trainer = small_runs.trainer(folder / "run", **fields | changes)
    trainer.train()
    parameters = full_state(trainer.model)
    if distributed.is_main():
        torch.save(parameters, folder / "trained.pt")


def main(folder: Path, kills: dict[int, int]) -> None:
    """See the module."""
    torch.use_deterministic_algorithms(True)
    distributed.start_process_group(timeout_s=60)
    train(folder, Kill(kills.get(number_of_start(folder))))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(Path(words[0]), {int(start): int(step) for start, step in (word.split(":") for word in words[1:])})
