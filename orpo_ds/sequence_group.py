"""Which ranks share a row, and what a run cannot do then.

Ranks that follow each other share one (they are on one host where hosts have as many as a group), so rank r holds part
`r % n` of the rows of group `r // n`. Nothing else of the job changes: DeepSpeed sees data-parallel ranks that hold
gradients to be summed, and shards weights and optimizer over all of them, so every ZeRO stage and every checkpoint is
as it was. A rank's gradient is that of the whole loss by the tokens it holds, and the sum over the ranks is the whole.
"""

from __future__ import annotations

import datetime
from functools import cache

import torch.distributed as dist

from orpo_ds import distributed
from orpo_ds.config import ORPOConfig
from orpo_ds.model.ulysses import SequenceGroup


def sequence_group(args: ORPOConfig) -> SequenceGroup | None:
    """The ranks that share each row with this one; None where a rank has rows of its own. Collective at first use.

    Raises:
        ValueError: a setting asks for what a split row cannot do.
    """
    if args.sequence_parallel_size == 1:
        return None
    refuse_with_split_rows(args)
    return _group(args.sequence_parallel_size, args.ddp_timeout)


@cache
def _group(size: int, timeout_s: int) -> SequenceGroup:
    groups = [
        dist.new_group(list(range(first, first + size)), timeout=datetime.timedelta(seconds=timeout_s))
        for first in range(0, distributed.world_size(), size)
    ]
    return SequenceGroup(rank=distributed.rank() % size, size=size, group=groups[distributed.rank() // size])


def refuse_with_split_rows(args: ORPOConfig) -> None:
    """Name what does not work with `sequence_parallel_size` above 1.

    Raises:
        ValueError: names the setting.
    """
    size = args.sequence_parallel_size
    if args.layout == "padded":
        raise ValueError(
            f"sequence_parallel_size={size} and layout='padded' exclude each other: only a packed row is split. Use "
            "layout='auto'."
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"sequence_parallel_size={size} and neftune_noise_alpha={args.neftune_noise_alpha} exclude each other: the "
            "noise is drawn for whole rows. Leave one of them out."
        )


def refuse_predictions(args: ORPOConfig) -> None:
    """Say that a prediction of a pair needs the whole pair on one rank.

    Raises:
        ValueError: where rows are split.
    """
    if args.sequence_parallel_size > 1:
        raise ValueError(
            f"sequence_parallel_size={args.sequence_parallel_size}: compute_metrics and predict() read whole "
            "sequences, and no rank has one. Set prediction_loss_only=True for loss and metrics of the pairs, or "
            "predict with the saved model."
        )
