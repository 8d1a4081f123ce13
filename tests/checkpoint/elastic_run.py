"""Trains four runs that change ranks and ZeRO stage on their way; test_elastic.py starts it and compares.

    deepspeed --num_accelerators 4 --module tests.checkpoint.elastic_run FOLDER first
    deepspeed --num_accelerators 2 --module tests.checkpoint.elastic_run FOLDER second
    deepspeed --num_accelerators 4 --module tests.checkpoint.elastic_run FOLDER third

FOLDER holds `model`. A run's legs go on in FOLDER/<run>, with the same batch settings on however many ranks. Which
pairs each step trained on, and the parameters at the end, are in FOLDER/<run>-<leg>.pt.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_ds import ORPOTrainer, distributed
from orpo_ds.export import full_state
from tests import small_runs

STEPS = 6
PAIRS = 19  # 3 steps an epoch, of 8, 8 and 3 pairs
FIRST_RANKS = 4
GLOBAL_BATCH = 8  # on these
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Leg:
    """Part of a run: in which start of the ranks, under which preset, and after which step it ends."""

    start: str
    preset: str
    last_step: int


# Steps 2 and 4 are in the middle of an epoch.
RUNS: dict[str, list[Leg]] = {
    "offload": [
        Leg("first", "zero3_offload", 2),
        Leg("second", "zero3_offload", 4),
        Leg("third", "zero3_offload", STEPS),
    ],
    "stages": [
        Leg("first", "zero3", 2),
        Leg("second", "zero2", 3),
        Leg("second", "zero0", 4),
        Leg("third", "zero3", STEPS),
    ],
    "lora": [
        Leg("first", "zero3", 2),
        Leg("second", "zero2_offload", 4),
    ],
    "bf16": [
        Leg("first", "zero1", 2),
        Leg("second", "zero3_offload", 3),
        Leg("second", "zero0", 4),
    ],
}


class StopAfter(TrainerCallback):
    """Saves and ends the training after a step, as a job that has to give its nodes back."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **details: Any
    ) -> None:
        control.should_training_stop = control.should_save = state.global_step == self._step


def make_trainer(
    folder: Path, run: str, output: str, *, preset: str, last_step: int, **more: Any
) -> ORPOTrainer:
    """A trainer of one leg of a run, or of all of it."""
    changes: dict[str, Any] = {
        "per_device_train_batch_size": GLOBAL_BATCH // FIRST_RANKS // 2,
        "gradient_accumulation_steps": 2,
        "max_tokens_per_micro_batch": 130,  # one or two pairs
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1000,  # at the end of a leg
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "bf16": run == "bf16",
        # As large as a gradient: an update is then a smooth function of it, and rounding stays rounding.
        "adam_epsilon": 1e-3,
        "deepspeed": preset,
    }
    if run == "lora":
        changes["peft_config"] = LoraConfig(**LORA)
    return small_runs.trainer(
        folder / output,
        model=str(folder / "model"),
        pairs=PAIRS,
        callbacks=[StopAfter(last_step)],
        **(changes | more),
    )


def train(trainer: ORPOTrainer, *, resume: bool) -> dict[str, Any]:
    """Train; returns the pairs of each global batch, over all ranks, and the parameters at the end."""
    seen: list[list[int]] = []
    step = trainer._step

    def noted(plan: Any, micro_batches: Any, watch: Any) -> None:
        mine = [pair for pairs in plan.micro_batches for pair in pairs]
        seen.append(sorted(pair for pairs in distributed.gather_objects(mine) for pair in pairs))
        step(plan, micro_batches, watch)

    trainer._step = noted  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=resume)
    return {"pairs": seen, "parameters": full_state(trainer.model)}


def main(folder: Path, start: str) -> None:
    """See the module."""
    distributed.start_process_group(timeout_s=120)
    for run, legs in RUNS.items():
        for number, leg in enumerate(legs):
            if leg.start != start:
                continue
            trainer = make_trainer(folder, run, run, preset=leg.preset, last_step=leg.last_step)
            result = train(trainer, resume=number > 0)
            if distributed.is_main():
                torch.save(result, folder / f"{run}-{number}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[-2]), sys.argv[-1])
