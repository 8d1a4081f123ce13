"""Two ranks under ZeRO-3 of which one is told to stop.

    deepspeed --num_accelerators 2 --module tests.faults.preempted_worker FOLDER

Trains FOLDER/whole to its end. Trains FOLDER/broken, where rank 1 alone gets SIGUSR1 within step 3, and continues it
in the same process. Begins FOLDER/left, where rank 1 gets SIGTERM within step 2, and lets that end the process: each
rank writes FOLDER/left-<rank> on its way out.
"""

import atexit
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_ds import ORPOTrainer, distributed
from orpo_ds.export import full_state
from orpo_ds.preemption import PreemptedExit
from tests import small_runs

STEPS, TOLD_STEP = 4, 3


class TellRankOne(TrainerCallback):
    """Sends a signal to rank 1 as a step begins, twice."""

    def __init__(self, number: signal.Signals, *, step: int) -> None:
        self._number, self._step = number, step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **details: object
    ) -> None:
        if distributed.rank() == 1 and state.global_step + 1 == self._step:
            os.kill(os.getpid(), self._number)
            os.kill(os.getpid(), self._number)


def make_trainer(folder: Path, output: str, *callbacks: TrainerCallback) -> ORPOTrainer:
    return small_runs.trainer(
        folder / output,
        model=str(folder / "model"),
        callbacks=list(callbacks),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_tokens_per_micro_batch=130,
        max_steps=STEPS,
        lr_scheduler_type="cosine",
        disable_dropout=False,
        deepspeed="zero3_offload",
    )


def main(folder: Path) -> None:
    """See the module."""
    distributed.start_process_group(timeout_s=120)
    torch.use_deterministic_algorithms(True)
    whole = make_trainer(folder, "whole")
    whole.train()
    results = {"whole": full_state(whole.model)}
    del whole
    try:
        make_trainer(folder, "broken", TellRankOne(signal.SIGUSR1, step=TOLD_STEP)).train()
        stopped = None
    except PreemptedExit as stop:
        stopped = stop.step
    results["stopped"] = distributed.gather_objects(stopped)
    resumed = make_trainer(folder, "broken")
    resumed.train(resume_from_checkpoint=True)
    results["resumed"] = full_state(resumed.model)
    if distributed.is_main():
        torch.save(results, folder / "results.pt")
    atexit.register((folder / f"left-{distributed.rank()}").touch)
    make_trainer(folder, "left", TellRankOne(signal.SIGTERM, step=2)).train()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
