"""Trains on two ranks under ZeRO-3 with CPU offload; one run goes through, one is killed in a step and resumed.

    deepspeed --num_accelerators 2 --module tests.faults.resume_worker first  FOLDER      dies on purpose
    deepspeed --num_accelerators 2 --module tests.faults.resume_worker second FOLDER

`first` trains FOLDER/whole to the end, then FOLDER/broken, where every rank kills itself between two micro-batches of
step 5. `second` resumes FOLDER/broken. What the model saw is appended, micro-batch by micro-batch, to
FOLDER/<process>-<rank>.jsonl; the trained parameters go to FOLDER/<process>.pt.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_ds import ORPOTrainer, distributed
from orpo_ds.export import full_state
from tests import small_runs

STEPS, SAVE_STEPS, KILLED_STEP = 6, 2, 5
PAIRS = (
    11  # 3 steps an epoch, the last of 3 pairs: the checkpoint of step 4 is in the middle of the second epoch
)
TIGHT_TOKENS = 130  # a micro-batch takes one or two of the pairs, so a rank's two pairs can need two of them


class Witness(TrainerCallback):
    """Writes down each micro-batch, and kills the process in the second one of step `killed_step`."""

    def __init__(self, path: Path, *, killed_step: int | None = None) -> None:
        self._path = path
        self._killed_step = killed_step
        self._step = self._micro_batches = 0

    def watch(self, model: torch.nn.Module) -> None:
        """Look at what goes into the input embedding."""
        model.get_input_embeddings().register_forward_hook(self._seen)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **details: Any
    ) -> None:
        self._step, self._micro_batches = state.global_step + 1, 0

    def _seen(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if self._step == 0:  # the check of the packing, before the first step
            return
        self._micro_batches += 1
        if self._step == self._killed_step and self._micro_batches == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        with self._path.open("a") as file:
            print(json.dumps([self._step, inputs[0].tolist()]), file=file)


def run(
    folder: Path, output: str, *, process: str, killed_step: int | None = None, resume: bool = False
) -> None:
    """Train FOLDER/`output` as `process`."""
    torch.use_deterministic_algorithms(True)
    witness = Witness(folder / f"{process}-{distributed.rank()}.jsonl", killed_step=killed_step)
    trainer: ORPOTrainer = small_runs.trainer(
        folder / output,
        model=str(folder / "model"),
        pairs=PAIRS,
        callbacks=[witness],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_tokens_per_micro_batch=TIGHT_TOKENS,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.01,
        disable_dropout=False,
        deepspeed="zero3_offload",
    )
    witness.watch(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    parameters = full_state(trainer.model)
    if distributed.is_main():
        torch.save(parameters, folder / f"{process}.pt")


def main(role: str, folder: Path) -> None:
    """See the module."""
    distributed.start_process_group(timeout_s=120)
    if role == "first":
        run(folder, "whole", process="whole")
        run(folder, "broken", process="killed", killed_step=KILLED_STEP)
    else:
        run(folder, "broken", process="resumed", resume=True)


if __name__ == "__main__":
    main(sys.argv[-2], Path(sys.argv[-1]))
