"""Means over ranks and micro-batches equal those over the pairs themselves; rates are what their names say."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from orpo_ds.data.packing import MicroBatch, pack
from orpo_ds.data.truncate import TokenPair
from orpo_ds.monitor import metrics as metrics_module
from orpo_ds.monitor.metrics import Counts, MetricSums, StepClock, Totals, mean_metrics, step_statistics


def token_pair(prompt: int, chosen: int, rejected: int) -> TokenPair:
    """A pair whose responses differ from their first token on."""
    return TokenPair(
        chosen=[1] * prompt + [2] * chosen,
        rejected=[1] * prompt + [3] * rejected,
        chosen_start=prompt,
        rejected_start=prompt,
        trunk=prompt,
    )


def micro_batch(lengths: list[tuple[int, int, int]]) -> MicroBatch:
    return pack([token_pair(*length) for length in lengths], pair_ids=range(len(lengths)))


def tensors(values: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def no_other_rank(vector: Tensor) -> Tensor:
    return vector


@pytest.mark.parametrize(("world_size", "most_pairs"), [(1, 100), (1, 3), (4, 2)])
def test_means_do_not_depend_on_how_the_pairs_are_dealt(world_size: int, most_pairs: int, seed: int) -> None:
    """Two steps of 24 pairs, dealt to ranks and micro-batches in different ways, against means over the pairs."""
    numbers = random.Random(seed)
    steps = [
        [(numbers.randint(1, 9), numbers.randint(1, 9), numbers.randint(1, 9)) for _ in range(24)]
        for _ in range(2)
    ]
    margin = {pair: numbers.uniform(-1, 1) for step in steps for pair in step}
    nll = {pair: numbers.uniform(0, 50) for step in steps for pair in step}

    ranks = [MetricSums() for _ in range(world_size)]
    losses = []
    for step in steps:
        nll_tokens = sum(prompt + chosen - 1 for prompt, chosen, _ in step)
        losses.append(sum(nll[pair] for pair in step) / nll_tokens)
        for rank, sums in enumerate(ranks):
            mine = step[rank::world_size]
            for start in range(0, len(mine), most_pairs):
                part = mine[start : start + most_pairs]
                nll_sum = sum(nll[pair] for pair in part)
                values = {
                    "loss": nll_sum / nll_tokens,
                    "nll_loss": nll_sum,
                    "rewards/margins": sum(margin[pair] for pair in part),
                }
                sums.add_micro_batch(tensors(values), micro_batch(part))

    vectors: list[Tensor] = []
    for sums in ranks:
        sums.reduce(lambda vector: vectors.append(vector) or vector)  # type: ignore[func-returns-value]
    assert len(vectors) == world_size, "one collective a log"

    # The last rank hears the sum of all, as each would.
    again = MetricSums()
    again.add_micro_batch(
        tensors(dict.fromkeys(("loss", "nll_loss", "rewards/margins"), 0.0)), micro_batch([(1, 1, 1)])
    )
    totals = again.reduce(lambda own: torch.stack(vectors).sum(0))

    everything = [pair for step in steps for pair in step]
    tokens = sum(prompt + chosen - 1 for prompt, chosen, _ in everything)
    # The sums are fp32 scalars: a relative 2^-24 each, and they are added in fp64.
    assert mean_metrics(totals, steps=2) == pytest.approx(
        {
            "loss": sum(losses) / 2,
            "nll_loss": sum(nll[pair] for pair in everything) / tokens,
            "rewards/margins": sum(margin[pair] for pair in everything) / len(everything),
        },
        rel=2**-22,
        abs=2**-22,
    )
    counts = totals.counts
    assert (counts.pairs, counts.nll_tokens) == (48, tokens)
    assert counts.real_tokens == sum(map(sum, everything))
    assert counts.unshared_tokens == sum(
        2 * prompt + chosen + rejected for prompt, chosen, rejected in everything
    )


def test_a_small_share_is_not_lost_in_a_large_sum() -> None:
    """Added up in fp32, a million and 4,096 times 1/64 would stay a million."""
    sums = MetricSums()
    batch = micro_batch([(1, 1, 1)])
    sums.add_micro_batch(tensors({"nll_loss": 2.0**20}), batch)
    for _ in range(4096):
        sums.add_micro_batch(tensors({"nll_loss": 2.0**-6}), batch)
    assert sums.reduce(no_other_rank).sums["nll_loss"] == 2.0**20 + 64


def test_a_rank_without_pairs_adds_nothing() -> None:
    sums = MetricSums()
    sums.add_micro_batch(tensors({"loss": 0.0, "nll_loss": 0.0}), micro_batch([]))
    counts = sums.reduce(no_other_rank).counts
    assert counts == Counts(slots=1)


def test_a_log_starts_anew_and_metrics_may_not_change_within_one() -> None:
    sums, batch = MetricSums(), micro_batch([(2, 3, 4)])
    sums.add_micro_batch(tensors({"loss": 1.0}), batch)
    with pytest.raises(AssertionError, match="aux_loss"):
        sums.add_micro_batch(tensors({"aux_loss": 1.0, "loss": 1.0}), batch)
    sums.reduce(no_other_rank)
    sums.add_micro_batch(tensors({"aux_loss": 5.0, "loss": 3.0}), batch)
    assert sums.reduce(no_other_rank).sums == {"aux_loss": 5.0, "loss": 3.0}


def test_adding_a_micro_batch_never_waits_for_the_device() -> None:
    """On the meta device every `.item()` raises; a GPU would only be waited for, which nobody would notice."""
    sums = MetricSums()
    batch = micro_batch([(2, 3, 4)]).to("meta")
    for _ in range(2):
        sums.add_micro_batch({"loss": torch.zeros((), device="meta")}, batch)


def test_statistics_of_two_ranks() -> None:
    """Two ranks, 4 steps in 8 seconds, each able to do 1000 FLOP/s."""
    each = Counts(
        pairs=16,
        real_tokens=400,
        unshared_tokens=500,
        slots=410,
        useful_flops=3000,
        possible_flops=8000,
        seconds=8,
        ranks=1,
    )
    assert step_statistics(Totals(sums={}, counts=each + each), steps=4) == pytest.approx(
        {
            "step_time_s": 2.0,
            "pairs_per_s": 4.0,
            "tokens_per_s": 100.0,
            "packing_efficiency": 400 / 410,
            "trunk_saving": 0.2,
            "useful_flops_fraction": 0.375,
        }
    )


def test_the_clock_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: now)
    clock = StepClock(peak_flops=10.0, useful_flops=lambda pairs: float(sum(pairs)))
    clock.start()
    now += 3
    clock.add_pairs((1, 2))
    with clock.paused():
        now += 50
    now += 2
    clock.add_pairs((4,))
    assert clock.take() == Counts(useful_flops=7, possible_flops=50, seconds=5, ranks=1)
    now += 1
    assert clock.take() == Counts(useful_flops=0, possible_flops=10, seconds=1, ranks=1)
