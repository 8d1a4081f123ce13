"""`dry_run`: the largest micro-batch that can occur, through forward, backward and update, and then the end.

A run that does not fit should say so in its first minute, and not at the step, hours later, where the longest pairs
meet. Two optimizer steps are done: the first makes the optimizer's state, the second has everything there at once. A
step that has several micro-batches has two here, because gradients wait while the second goes forward. All ranks run
the same micro-batch, the one that `auto_find_batch_size` begins with; of a stream, whose longest pairs are not known,
two sequences of `max_length` that share one token.

Nothing is written, and the process ends with `SystemExit(0)`: the weights in memory have been moved by two
meaningless steps, and a script's `save_model()` after `train()` must not save them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NoReturn

import torch

from orpo_ds import distributed
from orpo_ds.config import ORPOConfig
from orpo_ds.data.feed import Feed, PairSource, StepPlan
from orpo_ds.data.packing import MicroBatch
from orpo_ds.data.tokenize import TokenDataset
from orpo_ds.data.truncate import TokenPair
from orpo_ds.engine import Engine
from orpo_ds.layout import RunLayout
from orpo_ds.monitor.peak import peak_memory_mib
from orpo_ds.rehearsal import largest_micro_batch
from orpo_ds.step import train_step

STEPS = 2


@dataclass(frozen=True)
class DryRun:
    """What the largest micro-batch took.

    Attributes:
        tokens: of the micro-batch, as the model sees them.
        peak_mib: most memory of any rank so far.
        seconds: of one micro-batch and the update, on the slowest rank.
    """

    tokens: int
    peak_mib: float
    seconds: float

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"dry run: the largest micro-batch ({self.tokens:,} tokens) fits. Peak memory {self.peak_mib:,.0f} MiB, "
            f"{self.seconds:.2f} s for it and an update. Nothing was written."
        )


def end_with_dry_run(engine: Engine, layout: RunLayout, dataset: PairSource, *, args: ORPOConfig) -> NoReturn:
    """Do what `dry_run` promises: try the largest micro-batch, say what it took, and end the process. Collective."""
    with layout.attention():
        found = dry_run(engine, layout.feed(dataset, max_tokens=args.micro_batch_tokens), args=args)
    if distributed.is_main():
        print(found, flush=True)
    raise SystemExit(0)


def dry_run(engine: Engine, feed: Feed, *, args: ORPOConfig) -> DryRun:
    """Run the largest micro-batch and update the weights in memory. Collective.

    Args:
        engine: before its first step.
        feed: of the training set.
        args: the run's settings.

    Raises:
        StepOutOfMemoryError: it does not fit.
    """
    batch = _largest(feed, args).to(args.device)
    share = args.per_device_train_batch_size * args.gradient_accumulation_steps
    micro_batches = 1 if len(batch.pair_ids) >= share else 2
    ranks = distributed.world_size()
    plan = StepPlan(
        pairs=len(batch.pair_ids) * micro_batches * ranks,
        nll_tokens=max(int(batch.rows.nll.sum()), 1) * micro_batches * ranks,
        tokens=batch.unshared_tokens * micro_batches * ranks,
        micro_batches=[list(batch.pair_ids)] * micro_batches,
    )
    engine.deepspeed.train()
    seconds = 0.0
    for _ in range(STEPS):
        begin = time.perf_counter()
        train_step(engine, plan, [batch] * micro_batches, record=lambda sums, batch: None)
        seconds = (time.perf_counter() - begin) / micro_batches
    worst = distributed.max_over_ranks(
        torch.tensor([peak_memory_mib(args.device), seconds], device=args.device)
    )
    return DryRun(tokens=batch.input_ids.numel(), peak_mib=worst[0].item(), seconds=worst[1].item())


def _largest(feed: Feed, args: ORPOConfig) -> MicroBatch:
    if isinstance(feed.dataset, TokenDataset):
        return feed.build(largest_micro_batch(feed, args=args))
    example = feed.dataset.example
    length = args.max_length or max(len(example.chosen), len(example.rejected))
    ids = (example.chosen * length)[:length]
    other = next(token for token in (0, 1) if token != ids[1]) if length > 1 else ids[0]
    pair = TokenPair(
        chosen=ids, rejected=[ids[0], *[other] * (length - 1)], chosen_start=1, rejected_start=1, trunk=1
    )
    count = max((feed.max_tokens or 0) // (2 * length), 1)
    return feed.layout([pair] * count, list(range(count)))
