"""Vocabulary and rows split over gloo ranks, against one process that has it all."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from orpo_ds.loss import orpo_loss, token_logps
from tests.loss.dense import float64_reference, fp32_bounds, make_problem
from tests.loss.test_odds_ratio import leaf, make_rows, totals


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_agree_with_one_process(world_size: int, seed: int, tmp_path: Path) -> None:
    mp.spawn(_rank, args=(world_size, seed, str(tmp_path / "rendezvous")), nprocs=world_size)


def _rank(rank: int, world_size: int, seed: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    for frozen in (False, True):
        for head in ({}, {"bias": True, "softcap": 3.0, "scale": 0.5}):
            torch.manual_seed(seed)
            _vocabulary_is_split(rank, world_size, head=head, frozen=frozen)
    torch.manual_seed(seed)
    _unheld_label_is_minus_infinity(rank, world_size)
    torch.manual_seed(seed)
    _rows_are_split(rank, world_size)
    dist.destroy_process_group()


def _vocabulary_is_split(rank: int, world_size: int, *, head: dict, frozen: bool) -> None:
    """Uneven shards; every rank gets the whole log-probs and hidden gradient, and its rows of dW and db."""
    problem = make_problem(**head)
    expected, expected_gradients = float64_reference(problem)
    bounds = fp32_bounds(problem)
    edges = [0, *sorted((torch.randperm(299)[: world_size - 1] + 1).tolist()), 301]
    mine = slice(edges[rank], edges[rank + 1])
    weight = problem.weight.detach()[mine].clone().requires_grad_(not frozen)
    bias = None if problem.bias is None else problem.bias.detach()[mine].clone().requires_grad_(not frozen)
    logps = token_logps(
        problem.hidden,
        weight,
        **(problem.options | {"bias": bias}),
        tile_rows=6,
        tile_columns=20,
        vocab_group=dist.group.WORLD,
        vocab_start=mine.start,
    )
    logps.backward(problem.grad)
    torch.testing.assert_close(logps.detach().double(), expected, rtol=0, atol=bounds["logps"])
    gradients = {"hidden": (problem.hidden.grad, expected_gradients["hidden"])}
    if not frozen:
        gradients["weight"] = (weight.grad, expected_gradients["weight"][mine])
        if bias is not None:
            gradients["bias"] = (bias.grad, expected_gradients["bias"][mine])
    for name, (actual, wanted) in gradients.items():
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=bounds[name])


def _unheld_label_is_minus_infinity(rank: int, world_size: int) -> None:
    label = torch.tensor([0, 10 * world_size, 3])
    logps = token_logps(
        torch.randn(1, 4),
        torch.randn(10, 4),
        index=torch.zeros(3, dtype=torch.int64),
        label=label,
        vocab_group=dist.group.WORLD,
        vocab_start=10 * rank,
    )
    assert torch.equal(logps.isneginf(), torch.tensor([False, True, False]))


def _rows_are_split(rank: int, world_size: int) -> None:
    """Rows dealt out unevenly, the last rank none: loss and metrics of all, the gradient of one's own rows."""
    rows = make_rows()
    whole_logps = leaf(rows.logps)
    whole = orpo_loss(**(rows.arguments() | {"logps": whole_logps}), beta=0.3, **totals(rows))
    whole.loss.backward()
    owner = torch.randint(0, world_size - 1, rows.logps.shape)
    mine = owner == rank
    logps = leaf(rows.logps[mine])
    part = orpo_loss(
        logps,
        nll=rows.nll[mine],
        chosen_pair=rows.chosen_pair[mine],
        rejected_pair=rows.rejected_pair[mine],
        chosen_len=rows.chosen_len,
        rejected_len=rows.rejected_len,
        beta=0.3,
        **totals(rows),
        group=dist.group.WORLD,
    )
    part.loss.backward()
    torch.testing.assert_close(part.loss, whole.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(part.sums, whole.sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part.chosen_logps, whole.chosen_logps)
    torch.testing.assert_close(logps.grad, whole_logps.grad[mine], rtol=1e-5, atol=1e-8)
