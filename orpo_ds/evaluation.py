"""Loss and metrics of a whole dataset, exactly: every pair counts once, whatever the ranks and batches."""

from __future__ import annotations

import time

import torch
from tqdm.auto import tqdm

from orpo_ds import distributed
from orpo_ds.data.feed import Feed
from orpo_ds.engine import Engine, release_gathered
from orpo_ds.monitor.metrics import MetricSums, mean_metrics


@torch.no_grad()
def evaluate(
    engine: Engine,
    feed: Feed,
    *,
    batch_size: int,
    beta: float,
    aux_coefficient: float,
    device: torch.device,
    progress: bool = True,
) -> dict[str, float]:
    """Evaluate every pair of a dataset once. All ranks call it.

    Args:
        engine: the model and loss.
        feed: this rank's view of the dataset.
        batch_size: pairs of one round over all ranks; changes memory and time, not the result.
        beta: weight of the odds-ratio term.
        aux_coefficient: weight of a router's balance; 0 without one.
        device: where the micro-batches are wanted.
        progress: show a bar on the main process.

    Returns:
        `loss` (the nll over all nll tokens and the odds term over all pairs of the dataset), TRL's metrics, and
        transformers' `runtime`, `samples_per_second`.
    """
    started = time.perf_counter()
    count = len(feed.dataset)
    rounds = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    sums = MetricSums()
    engine.deepspeed.eval()
    steps = feed.steps(rounds, device=device)
    for plan, micro_batches in tqdm(
        steps,
        total=len(rounds),
        desc="Evaluating",
        leave=False,
        disable=not (progress and distributed.is_main()),
    ):
        for batch in micro_batches:
            found = engine.deepspeed(batch, nll_tokens_total=plan.nll_tokens, pairs_total=plan.pairs)
            del found["loss"]  # a share of this round's loss; that of the dataset follows from the sums
            sums.add_micro_batch(found, batch)
    engine.deepspeed.train()
    release_gathered(engine.deepspeed)
    means = mean_metrics(sums.reduce(distributed.sum_over_ranks), steps=len(rounds))
    seconds = time.perf_counter() - started
    loss = means["nll_loss"] - beta * means["log_odds_ratio"] + aux_coefficient * means.get("aux_loss", 0.0)
    return {"loss": loss, **means, "runtime": seconds, "samples_per_second": count / seconds}
