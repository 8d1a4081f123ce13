"""Metrics travel as sums and counts, and meet the other ranks once per logging step.

A micro-batch adds its sums on the device, without `.item()`, so nothing waits for the GPU. When a log is due,
one tensor with all sums and counts is added up over the ranks, and only then divided. The mean of a metric is
therefore that of the pairs (or tokens) themselves, whatever the number of ranks and micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from orpo_ds.data.packing import MicroBatch

# By what a sum is divided. Everything else is a sum over pairs.
PER_STEP = frozenset({"aux_loss", "loss"})
PER_NLL_TOKEN = frozenset({"nll_loss"})

OverRanks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Counts:
    """What metrics and rates are divided by. The values of several ranks or micro-batches add up.

    Attributes:
        pairs: pairs trained on.
        nll_tokens: tokens that the nll counts.
        real_tokens: tokens pushed through the model, without padding.
        unshared_tokens: tokens of the two full sequences of every pair.
        slots: places in `input_ids`, padding and dummy tokens included.
        useful_flops: FLOPs that the unique tokens need (`orpo_ds.monitor.flops`).
        possible_flops: FLOPs that the device's matrix products could have done in `seconds`.
        seconds: wall-clock time of the steps.
        ranks: 1 for each rank.
    """

    pairs: float = 0.0
    nll_tokens: float = 0.0
    real_tokens: float = 0.0
    unshared_tokens: float = 0.0
    slots: float = 0.0
    useful_flops: float = 0.0
    possible_flops: float = 0.0
    seconds: float = 0.0
    ranks: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Totals:
    """Sums and counts over all ranks and all micro-batches since the last log."""

    sums: dict[str, float]
    counts: Counts


class MetricSums:
    """Adds up the metrics of micro-batches until they are logged."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # [M] float64 on the device
        self._nll_tokens: Tensor | None = None  # scalar int64 on the device: counting it must not wait
        self._counts = Counts()

    def add_micro_batch(self, sums: Mapping[str, Tensor], batch: MicroBatch) -> None:
        """Take the detached scalar sums of a micro-batch; waits for nothing.

        Args:
            sums: by TRL's names: `loss` and `aux_loss` as this micro-batch's share of its step's value,
                `nll_loss` summed over nll tokens, all others summed over pairs. The same names every time.
            batch: where they come from; for the counts.
        """
        names = tuple(sorted(sums))
        assert self._names in ((), names), f"metrics {names} after {self._names}"
        # fp32 sums of thousands of micro-batches would lose the last digits of the mean.
        values = torch.stack([sums[name].detach() for name in names]).double()
        nll_tokens = batch.rows.nll.sum()
        if self._sums is None or self._nll_tokens is None:
            self._names, self._sums, self._nll_tokens = names, values, nll_tokens
        else:
            self._sums += values
            self._nll_tokens += nll_tokens
        self._counts += Counts(
            pairs=len(batch.pair_ids),
            real_tokens=batch.real_tokens,
            unshared_tokens=batch.unshared_tokens,
            slots=batch.input_ids.numel(),
        )

    def reduce(self, sum_over_ranks: OverRanks, *, own: Counts | None = None) -> Totals:
        """Add up all ranks in one collective, and start anew. Collective; waits for the device.

        Args:
            sum_over_ranks: returns the sum over all ranks of a float64 vector `[M]`.
            own: further counts of this rank, such as its time (`StepClock.take`).

        Returns:
            the totals, the same on every rank.
        """
        assert self._sums is not None, "no micro-batch since the last log"
        assert self._nll_tokens is not None
        counts = self._counts + (own if own is not None else Counts())
        on_host = torch.tensor(astuple(counts), dtype=torch.float64, device=self._sums.device)
        vector = torch.cat((self._sums, self._nll_tokens.double().reshape(1), on_host))
        names = self._names
        self._names, self._sums, self._nll_tokens, self._counts = (), None, None, Counts()
        summed = sum_over_ranks(vector).tolist()
        nll_tokens, counted = summed[len(names)], summed[len(names) + 1 :]
        return Totals(
            sums=dict(zip(names, summed[: len(names)], strict=True)),
            counts=Counts(*counted) + Counts(nll_tokens=nll_tokens),
        )


class StepClock:
    """Wall-clock time of the steps since the last log, without evaluations and saves in between."""

    def __init__(self, *, peak_flops: float, useful_flops: Callable[[tuple[int, ...]], float]) -> None:
        """Make a stopped clock.

        Args:
            peak_flops: FLOP/s that this rank's matrix products reach (`orpo_ds.monitor.peak`).
            useful_flops: FLOPs that these pairs (dataset indices) need, see `orpo_ds.monitor.flops`.
        """
        self._peak_flops = peak_flops
        self._useful_flops = useful_flops
        self._flops = 0.0
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Begin to count, at the first step."""
        self._started = time.perf_counter()

    def add_pairs(self, pair_ids: tuple[int, ...]) -> None:
        """Count the useful work of these pairs."""
        self._flops += self._useful_flops(pair_ids)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside: an evaluation, a save."""
        self._stop()
        try:
            yield
        finally:
            self.start()

    def take(self) -> Counts:
        """Time and work of this rank since the last call."""
        self._stop()
        self.start()
        counts = Counts(
            useful_flops=self._flops,
            possible_flops=self._seconds * self._peak_flops,
            seconds=self._seconds,
            ranks=1.0,
        )
        self._flops = self._seconds = 0.0
        return counts

    def _stop(self) -> None:
        assert self._started is not None, "start() comes first"
        self._seconds += time.perf_counter() - self._started
        self._started = None


def mean_metrics(totals: Totals, *, steps: int) -> dict[str, float]:
    """The metrics by TRL's names: `loss` and `aux_loss` are means over steps, the others over tokens or pairs."""
    divisors = {
        **dict.fromkeys(PER_STEP, float(steps)),
        **dict.fromkeys(PER_NLL_TOKEN, totals.counts.nll_tokens),
    }
    return {name: value / divisors.get(name, totals.counts.pairs) for name, value in totals.sums.items()}


def step_statistics(totals: Totals, *, steps: int) -> dict[str, float]:
    """Speed and use of the hardware over `steps` steps.

    Returns:
        `step_time_s`: seconds a step; `pairs_per_s` and `tokens_per_s` (real tokens) of the whole job;
        `packing_efficiency`: share of the places in `input_ids` that hold a real token; `trunk_saving`: share
        of the tokens of the full sequences that the shared trunks spare; `useful_flops_fraction`: useful
        FLOPs over those that the matrix products of all ranks could have done in the time.
    """
    counts = totals.counts
    seconds = counts.seconds / counts.ranks
    return {
        "step_time_s": seconds / steps,
        "pairs_per_s": counts.pairs / seconds,
        "tokens_per_s": counts.real_tokens / seconds,
        "packing_efficiency": counts.real_tokens / counts.slots,
        "trunk_saving": 1.0 - counts.real_tokens / counts.unshared_tokens,
        "useful_flops_fraction": counts.useful_flops / counts.possible_flops,
    }
