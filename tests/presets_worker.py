"""hpZ on four ranks as two hosts of two: against plain ZeRO-3, without and with a resume in the middle.

    deepspeed --num_accelerators 4 --module tests.presets_worker FOLDER

Trains into FOLDER/<run> and writes FOLDER/results.pt.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from orpo_ds import distributed
from orpo_ds.config import read_deepspeed_config
from orpo_ds.deepspeed_json import settle_host_groups
from orpo_ds.export import full_state
from tests import small_runs

STEPS = 4
RANKS_OF_A_HOST = 2


class SecondPartitions(TrainerCallback):
    """Elements of each sharded parameter and of this rank's second partition of it; an update throws that away."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int | None]] = []

    def on_pre_optimizer_step(self, *_: Any, model: PreTrainedModel, **__: Any) -> None:
        """Look after the backward pass."""
        sharded = [value for value in model.parameters() if not value.ds_persist]
        self.found = [
            (value.ds_numel, None if value.ds_secondary_tensor is None else value.ds_secondary_tensor.numel())
            for value in sharded
        ]


def trained(
    folder: Path, deepspeed: dict[str, Any], *, resume: bool = False, **changes: Any
) -> dict[str, Any]:
    """Losses, parameters and second partitions of a run."""
    deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 100  # as in a model of a size
    trainer = small_runs.trainer(
        folder, deepspeed=deepspeed, pairs=40, per_device_train_batch_size=1, max_steps=STEPS, **changes
    )
    second = SecondPartitions()
    trainer.add_callback(second)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "losses": [line["loss"] for line in small_runs.step_lines(trainer)],
        "second": second.found,
        "parameters": full_state(trainer.model),
    }


def hpz() -> dict[str, Any]:
    """The preset, as two hosts fill it."""
    settings = read_deepspeed_config("zero3_hpz")
    settle_host_groups(settings, lambda: [RANKS_OF_A_HOST, RANKS_OF_A_HOST])
    return settings


def main(folder: Path) -> None:
    """See the module."""
    distributed.start_process_group(timeout_s=120)
    results = {
        "zero3": trained(folder / "zero3", read_deepspeed_config("zero3")),
        "hpz": trained(folder / "hpz", hpz(), save_strategy="steps", save_steps=STEPS // 2),
    }
    if distributed.is_main():
        # What a job that was killed after its first checkpoint leaves.
        (folder / "hpz" / f"checkpoint-{STEPS}").rename(folder / "last")
    distributed.gather_objects(None)
    results["resumed"] = trained(folder / "hpz", hpz(), resume=True)
    if distributed.is_main():
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
