"""Which rank takes which pairs in which micro-step, where rows are padded: as `batches.py`, but widths meet.

A padded micro-batch of n pairs is a rectangle: 2n rows as long as its longest sequence. So pairs of like length belong
together, and the cuts of the pairs in order of length are all that there is to choose: the longest of a micro-batch
decides how many it holds. There are as few micro-steps as the budget allows, and then the largest rectangle, which the
other ranks wait for, is as small as it can be.
"""

from __future__ import annotations

from collections.abc import Sequence

from orpo_ds.data.batches import PairCost, deal_rows


def plan_padded(costs: Sequence[PairCost], *, world_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Deal the pairs of one global batch to ranks and micro-steps.

    Args:
        costs: of every pair of the global batch; its tokens are those of its own two sequences, padded to one length.
        world_size: ranks with work of their own (data-parallel size).
        max_tokens: room in one micro-batch, padding included.

    Returns:
        `plan[rank][micro_step]`: positions in `costs`, as `plan_micro_batches` returns them.

    Raises:
        ValueError: a pair alone does not fit in `max_tokens`.
    """
    assert costs, "GlobalBatches makes no empty batch"
    longest_first = sorted(range(len(costs)), key=lambda position: -costs[position].tokens)
    widest = costs[longest_first[0]].tokens
    if widest > max_tokens:
        raise ValueError(
            f"pair {longest_first[0]} of the global batch takes {widest} tokens of a micro-batch, both sequences "
            f"padded, and there is room for max_tokens_per_micro_batch={max_tokens}: raise "
            f"max_tokens_per_micro_batch to at least {widest} or lower max_length"
        )
    micro_steps = -(-len(_rectangles(costs, longest_first, area=max_tokens)) // world_size)
    # The smallest area of which as many rectangles as there are places hold all pairs.
    low, high = widest, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_rectangles(costs, longest_first, area=middle)) <= micro_steps * world_size:
            high = middle
        else:
            low = middle + 1
    rows = _rectangles(costs, longest_first, area=high)
    rows += [[] for _ in range(micro_steps * world_size - len(rows))]
    return deal_rows(costs, rows, world_size=world_size)


def _rectangles(costs: Sequence[PairCost], longest_first: Sequence[int], *, area: int) -> list[list[int]]:
    """Cut the pairs, longest first, into as few micro-batches as have at most `area` tokens, padding included."""
    rows: list[list[int]] = []
    for position in longest_first:
        if rows and (len(rows[-1]) + 1) * costs[rows[-1][0]].tokens <= area:
            rows[-1].append(position)
        else:
            rows.append([position])
    return rows
