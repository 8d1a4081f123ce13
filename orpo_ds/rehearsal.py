"""`auto_find_batch_size`: the largest budget of a micro-batch that fits, found by trying before the first step.

A rank that runs out of memory alone leaves the others waiting in a collective of ZeRO, and no agreement can reach
them there. So the search happens before the training, with a micro-batch that is the same on every rank: the longest
pairs of the dataset, as many as the budget holds. All ranks run its forward and backward, say whether it fitted, and
halve the budget together until it does on all of them. Its gradient is dropped the way DeepSpeed drops one that
overflowed, and the random generators are put back, so that the training is that of a run with this budget, bit for bit.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]
from deepspeed.accelerator import get_accelerator

from orpo_ds import distributed
from orpo_ds.checkpoint.rank_state import random_state, set_random_state
from orpo_ds.config import ORPOConfig
from orpo_ds.data.feed import Feed
from orpo_ds.data.tokenize import TokenDataset
from orpo_ds.engine import Engine
from orpo_ds.gradients import after_failure, drop_gradient

logger = logging.getLogger(__name__)


def feed_that_fits(engine: Engine, feed: Feed, *, args: ORPOConfig) -> Feed:
    """A feed whose micro-batches fit: of `feed.max_tokens`, or of what is left of it after halving. Collective.

    Args:
        engine: before its first step.
        feed: of the training set; without `max_tokens` the search begins with a rank's share of the longest pairs.
        args: the run's settings.

    Raises:
        ValueError: the dataset is streamed: its longest pairs are not known.
        RuntimeError: on all ranks, when one pair alone does not fit.
    """
    dataset = feed.dataset
    if not isinstance(dataset, TokenDataset):
        raise ValueError(
            "auto_find_batch_size=True needs to know the longest pairs, and streamed data does not tell: set "
            "max_tokens_per_micro_batch."
        )
    pairs, tokens = _longest(feed, args=args)
    budget = feed.max_tokens or sum(tokens)
    while not _fits(engine, feed, _that_fill(budget, pairs, tokens), device=args.device):
        if budget <= tokens[0]:
            raise RuntimeError(
                f"out of memory: the longest pair of the dataset alone ({tokens[0]} tokens) does not fit. Lower "
                "max_length, set gradient_checkpointing=True, or offload with deepspeed='zero3_offload'."
            )
        smaller = max(budget // 2, tokens[0])
        if distributed.is_main():
            logger.warning("micro-batches of %d tokens do not fit in memory: trying %d", budget, smaller)
        budget = smaller
    if distributed.is_main():
        logger.warning("auto_find_batch_size: micro-batches of at most %d tokens", budget)
    return replace(feed, max_tokens=budget)


def largest_micro_batch(feed: Feed, *, args: ORPOConfig) -> list[int]:
    """The longest pairs that fill a micro-batch: nothing larger can occur in the training.

    Args:
        feed: of a training set that is not streamed.
        args: the run's settings.
    """
    pairs, tokens = _longest(feed, args=args)
    return _that_fill(feed.max_tokens or sum(tokens), pairs, tokens)


def _longest(feed: Feed, *, args: ORPOConfig) -> tuple[list[int], list[int]]:
    """The longest pairs, as many as a rank's share of a batch, and the tokens of each."""
    assert isinstance(feed.dataset, TokenDataset)
    lengths = feed.dataset.lengths
    longest = (-(lengths.trunk + lengths.chosen + lengths.rejected)).argsort(kind="stable")
    share = args.per_device_train_batch_size * args.gradient_accumulation_steps
    pairs = [int(pair) for pair in longest[:share]]
    tokens = [cost.tokens for cost in feed.costs(pairs)]
    return pairs, [max(tokens)] * len(tokens) if feed.padded else tokens  # padded to the longest of them


def _that_fill(budget: int, pairs: list[int], tokens: list[int]) -> list[int]:
    """As many of the pairs, longest first, as the budget holds."""
    chosen, room = [], budget
    for pair, size in zip(pairs, tokens, strict=True):
        if size <= room:
            chosen.append(pair)
            room -= size
    return chosen


def _fits(engine: Engine, feed: Feed, pairs: list[int], *, device: torch.device) -> bool:
    """Whether all ranks get through forward and backward of these pairs. Nothing is left of it."""
    ds = engine.deepspeed
    before = random_state()
    ds.train()
    failed = False
    try:
        batch = feed.build(pairs).to(device)
        ds.set_gradient_accumulation_boundary(True)
        loss = ds(batch, nll_tokens_total=max(len(batch.rows.index), 1), pairs_total=len(pairs))["loss"]
        ds.backward(loss, scale_wrt_gas=False)
        del loss
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        failed = True  # what the error refers to is freed with it, at the end of this clause
    if failed:
        after_failure(ds)
    drop_gradient(ds)
    get_accelerator().empty_cache()
    set_random_state(before)
    return not any(distributed.gather_objects(failed))
