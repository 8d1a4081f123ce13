"""Padded micro-batches: within the budget, as few as there can be, and the largest of them as small as it can be."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_ds.data.batches import PairCost
from orpo_ds.data.padded_batches import plan_padded


def costs_of(widths: list[int]) -> list[PairCost]:
    return [PairCost(tokens=2 * width, flops=float(width)) for width in widths]


def area(widths: list[int], row: list[int]) -> int:
    """Tokens of a micro-batch of these positions, padding included."""
    return 2 * len(row) * max((widths[position] for position in row), default=0)


def partitions(items: list[int]) -> list[list[list[int]]]:
    """All ways to divide a few things into groups."""
    if not items:
        return [[]]
    first, *rest = items
    found = []
    for groups in partitions(rest):
        found.append([[first], *groups])
        found += [
            [*groups[:place], [first, *group], *groups[place + 1 :]] for place, group in enumerate(groups)
        ]
    return found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    world_size=st.integers(1, 3),
    slack=st.integers(0, 120),
)
def test_no_other_way_to_divide_them_is_better(widths: list[int], world_size: int, slack: int) -> None:
    """Against every division there is."""
    budget = 2 * max(widths) + slack
    plan = plan_padded(costs_of(widths), world_size=world_size, max_tokens=budget)
    rows = list(itertools.chain.from_iterable(plan))
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(widths)))
    [micro_steps] = {len(rank) for rank in plan}
    largest = max(area(widths, row) for row in rows)
    assert largest <= budget
    possible = [
        groups
        for groups in partitions(list(range(len(widths))))
        if max(area(widths, group) for group in groups) <= budget
    ]
    assert micro_steps == min(-(-len(groups) // world_size) for groups in possible)
    assert largest == min(
        max(area(widths, group) for group in groups)
        for groups in possible
        if len(groups) <= micro_steps * world_size
    )


def test_one_long_pair_does_not_make_the_others_dear() -> None:
    """Room for the longest of the global batch in each row would take eight micro-steps."""
    widths = [100] + [12] * 7
    [plan] = plan_padded(costs_of(widths), world_size=1, max_tokens=200)
    assert sorted(map(sorted, plan)) == [[0], [1, 2, 3, 4, 5, 6, 7]]


def test_a_pair_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="pair 1 of the global batch takes 66 tokens"):
        plan_padded(costs_of([5, 33]), world_size=2, max_tokens=64)
