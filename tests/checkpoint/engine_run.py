"""Trains a small network under DeepSpeed on two ranks, saves and resumes it; started by test_engine_state.py.

    deepspeed --num_accelerators 2 --no_local_rank --module tests.checkpoint.engine_run OUTPUT

For each ZeRO setting: six steps without interruption, with a checkpoint after the third; then a new model and
engine that load it and train to the sixth step. Both leave their state in OUTPUT/<setting>/<run>-<rank>.pt.
Then a save in which the files of rank 1 alone cannot be written. What was seen there is in
OUTPUT/failed_save-<rank>.json.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn
from transformers import get_scheduler

from orpo_ds import distributed
from orpo_ds.checkpoint import (
    CheckpointMetadata,
    CheckpointSaveError,
    CheckpointStore,
    job_ranks,
    load_rank_state,
    resolve_resume,
    save_rank_state,
    verify,
)
from orpo_ds.checkpoint.engine_state import check_engine, load_engine, save_engine
from orpo_ds.checkpoint.ranks import Ranks

SAVED_STEP, LAST_STEP, MICRO_STEPS = 3, 6, 2
WIDTH = 32

SETTINGS: dict[str, dict[str, Any]] = {
    "zero3_offload": {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
            "sub_group_size": 1000,  # several sub-groups, each its own call of the CPU optimizer
            "stage3_param_persistence_threshold": 16,
        }
    },
    "zero3_frozen_bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "zero2_offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "zero1_bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "zero0": {"zero_optimization": {"stage": 0}},
}


class Network(nn.Module):
    """Layers of unlike sizes, so that partitions need padding; dropout, so that random states matter."""

    def __init__(self, *, freeze_first: bool) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 41)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(41, 7)
        self.register_buffer("offset", torch.full((7,), 0.5))
        self.first.requires_grad_(not freeze_first)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.second.weight.dtype)
        return ((self.second(self.drop(self.first(inputs).tanh())) - self.offset) ** 2).mean()


def start(setting: str, *, seed: int) -> tuple[Any, Any]:
    """A new engine and its schedule; the seed decides the first weights."""
    torch.manual_seed(seed)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_STEPS,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        **SETTINGS[setting],
    }
    if config["zero_optimization"]["stage"] == 3:
        with deepspeed.zero.Init(
            config_dict_or_path=config, dtype=torch.bfloat16 if "bf16" in config else torch.float32
        ):
            model = Network(freeze_first="frozen" in setting)
    else:
        model = Network(freeze_first="frozen" in setting)
    trainable = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    groups = [
        {"params": [value for name, value in trainable if "weight" in name], "weight_decay": 0.1},
        {"params": [value for name, value in trainable if "bias" in name], "weight_decay": 0.0},
    ]
    kind = DeepSpeedCPUAdam if "offload" in setting else torch.optim.AdamW
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=kind(groups, lr=1e-2),
        model_parameters=[value for _, value in trainable],
        config=config,
    )
    check_engine(engine)
    scheduler = get_scheduler(
        "cosine", engine.basic_optimizer, num_warmup_steps=2, num_training_steps=LAST_STEP
    )
    return engine, scheduler


def train(engine: Any, scheduler: Any, *, first: int, last: int, rank: int) -> list[float]:
    """Train from step `first` to `last`; returns the losses of all micro-steps."""
    losses = []
    for step in range(first, last):
        for micro_step in range(MICRO_STEPS):
            generator = torch.Generator().manual_seed(1000 * step + 10 * micro_step + rank)
            loss = engine(torch.randn(4, WIDTH, generator=generator))
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
        scheduler.step()
    return losses


def seed_rank(rank: int, offset: int) -> None:
    random.seed(rank + offset)
    np.random.seed(rank + offset)
    torch.manual_seed(rank + offset)


def optimizer_state(engine: Any) -> list[dict[str, Any]]:
    return [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
        for state in engine.basic_optimizer.state.values()
    ]


def final_state(engine: Any, scheduler: Any, losses: list[float]) -> dict[str, Any]:
    """Everything that has to be equal at the end, and the next draws of the random generators."""
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        whole = {name: value.detach().clone() for name, value in parameters.items()}
    masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None) or getattr(
        engine.optimizer, "single_partition_of_fp32_groups", []
    )
    return {
        "parameters": whole,
        "masters": [value.detach().clone() for value in masters],
        "buffers": {name: value.clone() for name, value in engine.module.named_buffers()},
        "optimizer": optimizer_state(engine),
        "learning_rates": [group["lr"] for group in engine.basic_optimizer.param_groups],
        "schedule": scheduler.state_dict(),
        "counters": [engine.global_steps, engine.skipped_steps, engine.global_samples],
        "losses": losses[-MICRO_STEPS * (LAST_STEP - SAVED_STEP) :],
        "draws": [random.random(), float(np.random.standard_normal()), torch.rand(3)],
    }


def metadata(step: int, ranks: Ranks) -> CheckpointMetadata:
    return CheckpointMetadata(
        step=step,
        epoch=0.0,
        seed=0,
        world_size=ranks.world_size,
        zero_stage=3,
        global_batch_size=1,
        dataset_fingerprint="none",
        config={},
    )


def run_setting(setting: str, output: Path, ranks: Ranks) -> None:
    folder = output / setting
    store = CheckpointStore(folder, save_total_limit=None, ranks=ranks)
    store.clean_up()
    engine, scheduler = start(setting, seed=1)
    seed_rank(ranks.rank, offset=50)
    losses = train(engine, scheduler, first=0, last=SAVED_STEP, rank=ranks.rank)

    def write(partial: Path) -> None:
        save_engine(engine, partial, scheduler=scheduler)
        save_rank_state(partial, ranks)

    saved = store.save(write, metadata(SAVED_STEP, ranks))
    losses += train(engine, scheduler, first=SAVED_STEP, last=LAST_STEP, rank=ranks.rank)
    torch.save(final_state(engine, scheduler, losses), folder / f"uninterrupted-{ranks.rank}.pt")
    engine.destroy()

    # Other weights and random states than the checkpoint's, so that whatever is not restored shows.
    engine, scheduler = start(setting, seed=2)
    seed_rank(ranks.rank, offset=90)
    found = resolve_resume(True, folder, ranks=ranks)
    assert found == saved, (found, saved)
    load_engine(engine, found, scheduler=scheduler)
    load_rank_state(found, ranks)
    losses = train(engine, scheduler, first=SAVED_STEP, last=LAST_STEP, rank=ranks.rank)
    torch.save(final_state(engine, scheduler, losses), folder / f"resumed-{ranks.rank}.pt")
    engine.destroy()


def run_failed_save(output: Path, ranks: Ranks) -> None:
    """A save whose second rank may not write files of more than 1000 bytes, and one after it that works."""
    folder = output / "failed"
    engine, scheduler = start("zero3_offload", seed=1)
    store = CheckpointStore(folder, save_total_limit=None, ranks=ranks)

    def write(partial: Path) -> None:
        save_engine(engine, partial, scheduler=scheduler)
        save_rank_state(partial, ranks)

    train(engine, scheduler, first=0, last=1, rank=ranks.rank)
    first = store.save(write, metadata(1, ranks))
    train(engine, scheduler, first=1, last=2, rank=ranks.rank)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        store.save(write, metadata(2, ranks))
        error = None
    except CheckpointSaveError as caught:
        error = str(caught)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = sorted(path.name for path in folder.iterdir())
    problems = verify(first, ranks)
    train(engine, scheduler, first=2, last=3, rank=ranks.rank)
    again = store.save(write, metadata(3, ranks))
    report = {"error": error, "left": left, "problems": problems, "again": verify(again, ranks)}
    (output / f"failed_save-{ranks.rank}.json").write_text(json.dumps(report))
    engine.destroy()


def main(output: Path) -> None:
    distributed.start_process_group(timeout_s=120)
    torch.use_deterministic_algorithms(True)
    ranks = job_ranks()
    for setting in SETTINGS:
        run_setting(setting, output, ranks)
    run_failed_save(output, ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
