"""The first step of runs that log their gradients; started on two ranks by test_gradients.py.

deepspeed --num_accelerators=2 --module tests.monitor.gradients_worker FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orpo_ds import distributed
from orpo_ds.data.padding import pad
from tests import small_runs

PAIRS = 8


def zero(stage: int, *, offload: bool = False) -> dict[str, Any]:
    place = {"offload_optimizer": {"device": "cpu"}} if offload and stage > 1 else {}
    # Shards of nothing that is small would leave stage 3 untested.
    keep = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **place, **keep}}


def first_entry(folder: Path, stage: int, *, offload: bool = False, **changes: Any) -> dict[str, Any]:
    """The first logged step of a run with a global batch of all pairs, in micro-batches of two pairs."""
    trainer = small_runs.trainer(
        folder / f"run{stage}{offload}",
        pairs=PAIRS,
        deepspeed=zero(stage, offload=offload),
        per_device_train_batch_size=PAIRS // distributed.world_size(),
        max_tokens_per_micro_batch=512,
        max_steps=1,
        **{"log_gradients_by_layer": True, **changes},
    )
    trainer.train()
    return trainer.state.log_history[0]


def loss_outside_of_deepspeed(folder: Path) -> tuple[PreTrainedModel, Tensor]:
    """The same model, and the loss of all pairs as one padded micro-batch."""
    trainer = small_runs.trainer(folder / "outside", pairs=PAIRS)
    assert trainer.train_dataset is not None
    pairs = [trainer.train_dataset[number] for number in range(PAIRS)]
    batch = pad(pairs, pair_ids=range(PAIRS), pad_token_id=0, nll_on_prompt=True)
    sums = trainer.policy(batch, nll_tokens_total=int(batch.rows.nll.sum()), pairs_total=PAIRS)
    return trainer.model, sums["loss"]


if __name__ == "__main__":
    work = Path(sys.argv[-1])  # the launcher puts --local_rank first
    distributed.start_process_group(timeout_s=120)
    found = {str(stage): first_entry(work, stage) for stage in range(4)}
    found |= {f"{stage} offload": first_entry(work, stage, offload=True) for stage in (2, 3)}
    if distributed.is_main():
        torch.save(found, work / "found.pt")
