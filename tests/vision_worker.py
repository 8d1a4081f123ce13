"""Prompts with and without pictures on two ranks under ZeRO-3: in every step one rank has a picture, the other none.

    deepspeed --num_accelerators 2 --module tests.vision_worker FOLDER

What was seen goes to FOLDER/results.pt, by family. A rank that skipped the vision tower would leave the other waiting
for its weights for ever; the launch would then run into its time limit.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import unset_hf_deepspeed_config

from orpo_ds import ORPOTrainer, distributed
from orpo_ds.export import full_state
from tests import small_runs, vision

TRAINED, WITHOUT = 4, (1, 2)  # two pairs a step, in this order: with and without, without and with
EVALUATED = 3  # so that one rank has none in the last round
SETTINGS: dict[str, Any] = {
    "max_steps": TRAINED // 2,
    "max_length": 512,
    "train_sampling_strategy": "sequential",
    "optim": "sgd",
    "learning_rate": 0.05,
    "per_device_eval_batch_size": 1,
}


def trained(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    """Train and evaluate; returns all parameters before and after, and what was logged."""
    trainer = ORPOTrainer(
        vision.vision_model(family),
        small_runs.settings(folder / family, **SETTINGS | changes),
        train_dataset=vision.dataset(TRAINED, without=WITHOUT),
        eval_dataset=vision.dataset(EVALUATED, without=(0,)),
        processing_class=vision.PROCESSORS[family](),
    )
    before = full_state(trainer.model)
    trainer.train()
    evaluated = trainer.evaluate()
    unset_hf_deepspeed_config()  # while one lives that says ZeRO-3, transformers makes the next model in shards
    return {
        "before": before,
        "after": full_state(trainer.model),
        "history": trainer.state.log_history,
        "evaluated": evaluated,
    }


def main(folder: Path) -> None:
    """See the module."""
    distributed.start_process_group(timeout_s=120)
    results = {
        family: trained(folder, family, per_device_train_batch_size=1, deepspeed="zero3")
        for family in vision.PROCESSORS
    }
    if distributed.is_main():
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
