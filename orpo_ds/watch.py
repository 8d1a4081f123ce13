"""What the trainer sees of its own steps: the metrics of the pairs, and how well the time was used."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from orpo_ds import distributed
from orpo_ds.data.feed import Feed
from orpo_ds.data.packing import MicroBatch
from orpo_ds.model.size import ModelSize
from orpo_ds.monitor.flops import UsefulFlops
from orpo_ds.monitor.gradients import LayerGradients
from orpo_ds.monitor.metrics import MetricSums, StepClock, mean_metrics, step_statistics
from orpo_ds.monitor.peak import matmul_flops_per_second, peak_memory_mib
from orpo_ds.step import StepOutcome


class Watch:
    """Collects what `metrics.jsonl` says about training steps. One collective a log, none a step."""

    def __init__(
        self,
        feed: Feed,
        size: ModelSize,
        *,
        device: torch.device,
        dtype: torch.dtype,
        gradients: LayerGradients | None = None,
    ) -> None:
        """Measure what the device's matrix products reach, for `useful_flops_fraction`. All ranks at once.

        Args:
            feed: of the training set.
            size: of the model.
            device: of the model.
            dtype: of the model's products.
            gradients: of the layers, where they are to be logged.
        """
        self._device = device
        self._gradients = gradients
        self._sums = MetricSums()
        self._real_tokens = self._slots = 0
        # How many random matrices the measurement draws depends on the time they take: the training's own random
        # numbers must not, or two runs with dropout would never be the same.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            peak_flops = matmul_flops_per_second(device, dtype)
        ranks_per_row = distributed.world_size() / distributed.data_size()
        self._clock = StepClock(
            peak_flops=peak_flops * ranks_per_row,  # a tensor-parallel group reports through one of its ranks
            useful_flops=UsefulFlops(size, feed.dataset.lengths, feed.nll_on_prompt),
        )
        self.logged_step = 0
        self._learning_rate = 0.0
        self._loss, self._steps, self._pairs, self._began = 0.0, 0, 0, 0.0

    def start(self, step: int) -> None:
        """Begin to count; `step` optimizer steps were done before."""
        self.logged_step = step
        self._began = time.perf_counter()
        self._clock.start()

    def record(self, sums: dict[str, Tensor], batch: MicroBatch) -> None:
        """Take the sums of one micro-batch of this rank."""
        self._sums.add_micro_batch(sums, batch)
        self._clock.add_pairs(batch.pair_ids)
        self._real_tokens += batch.real_tokens
        self._slots += batch.input_ids.numel()

    def end_step(self, outcome: StepOutcome, *, pairs: int, learning_rate: float) -> None:
        """Note what an optimizer step over `pairs` pairs did with its `learning_rate`."""
        self._learning_rate = learning_rate
        self._loss += outcome.loss
        self._pairs += pairs
        self._steps += 1

    def take_tokens(self, *, padding: bool) -> int:
        """Tokens of all ranks since this was asked last, with or without the padding. Collective."""
        own, self._real_tokens, self._slots = self._slots if padding else self._real_tokens, 0, 0
        return int(distributed.sum_over_ranks(torch.tensor(own, device=self._device)).item())

    def paused(self) -> AbstractContextManager[None]:
        """Leave an evaluation or a save out of the steps' time."""
        return self._clock.paused()

    def figures(self, step: int) -> dict[str, float]:
        """Metrics and statistics of the steps since the last log, the same on every rank. Collective."""
        totals = self._sums.reduce(distributed.sum_over_ranks, own=self._clock.take())
        steps, self.logged_step = step - self.logged_step, step
        peak = torch.tensor(peak_memory_mib(self._device), device=self._device)
        return {
            **mean_metrics(totals, steps=steps),
            **step_statistics(totals, steps=steps),
            "learning_rate": self._learning_rate,
            **(self._gradients.figures() if self._gradients is not None else {}),
            "peak_memory_mib": distributed.max_over_ranks(peak).item(),
        }

    def summary(self) -> dict[str, float]:
        """Give the figures that transformers closes a training with."""
        seconds = time.perf_counter() - self._began
        return {
            "train_runtime": seconds,
            "train_samples_per_second": self._pairs / seconds,
            "train_steps_per_second": self._steps / seconds,
            "train_loss": self._loss / max(self._steps, 1),
        }
