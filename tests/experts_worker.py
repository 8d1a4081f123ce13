"""Trains models whose ranks run different experts, on as many ranks as it was started on.

    deepspeed --num_accelerators 2 --module tests.experts_worker FOLDER

Writes FOLDER/results.pt: by model and ZeRO stage the parameters after training, and how often the
ranks ran different experts.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orpo_ds import distributed
from orpo_ds.experts import expert_blocks
from orpo_ds.export import full_state
from tests import small_runs
from tests.loose_experts import LOOSE
from tests.parity.tokenizer import tiny_tokenizer

SEED = 3
PAIRS = 4
SETTINGS: dict[str, Any] = {
    "max_steps": 2,
    "optim": "sgd",  # Adam would blow rounding up
    "learning_rate": 1.0,
    # The second step runs and moves nothing: after an update, rounding may send a token to another expert.
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 100.0, "lr_end": 0.0},
    "max_tokens_per_micro_batch": 400,
}
RUNS = [(name, stage) for name in LOOSE for stage in (2, 3)]


def train(name: str, folder: Path, *, stage: int) -> dict[str, Any]:
    """Two steps of the global batch of PAIRS pairs, cut into micro-batches of few tokens."""
    trainer = small_runs.trainer(
        folder / f"{name}-{stage}-{distributed.world_size()}",
        model=LOOSE[name](vocab_size=len(tiny_tokenizer()), seed=SEED),
        pairs=PAIRS,
        per_device_train_batch_size=PAIRS // distributed.world_size(),
        deepspeed=f"zero{stage}",
        **SETTINGS,
    )
    ran: list[set[str]] = []  # by call of a block
    for block in expert_blocks(trainer.model):
        block.register_forward_pre_hook(lambda *_: ran.append(set()))
        for expert, module in block.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *_, expert=expert: ran[-1].add(expert))
    before = full_state(trainer.model)
    trainer.train()
    per_rank = distributed.gather_objects(ran)
    per_rank = per_rank if len(per_rank) > 1 else [*per_rank, *per_rank]
    return {
        "before": before,
        "after": full_state(trainer.model),
        "calls_that_differ": sum(first != second for first, second in zip(*per_rank, strict=True)),
        "losses": [line["loss"] for line in small_runs.step_lines(trainer)],
    }


def main(folder: Path) -> None:
    """See the module."""
    distributed.start_process_group(timeout_s=120)
    results = {(name, stage): train(name, folder, stage=stage) for name, stage in RUNS}
    if distributed.is_main():
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
