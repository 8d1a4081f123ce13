"""Loss and metrics of a whole dataset, exactly: every pair counts once, whatever the ranks and batches.

A *round* is what transformers calls a batch of the evaluation: `per_device_eval_batch_size` pairs for every rank, in
the dataset's order. It changes memory and time, not the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput, denumpify_detensorize

from orpo_ds import distributed
from orpo_ds.config import ORPOConfig
from orpo_ds.data.tokenize import TokenDataset
from orpo_ds.engine import Engine, release_gathered
from orpo_ds.experts import ExpertCount
from orpo_ds.layout import RunLayout
from orpo_ds.monitor.metrics import MetricSums, mean_metrics
from orpo_ds.predictions import Collector, Predictions, Preprocess, Wanted, map_tree, stacked
from orpo_ds.sequence_group import refuse_predictions

# TRL's names of the two numbers that a pair's prediction is.
CHOSEN_MEAN, REJECTED_MEAN = "eval_logits/chosen", "eval_logits/rejected"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of the model as it is now. All ranks call it.

    Attributes:
        engine: model and loss.
        layout: of the run.
        args: the run's settings.
        compute_metrics: the user's figures of an `EvalPrediction`, or None.
        preprocess: the user's `preprocess_logits_for_metrics`, or None.
        on_round: called with the number of rounds after each of them.
    """

    engine: Engine
    layout: RunLayout
    args: ORPOConfig
    compute_metrics: Callable[..., dict[str, Any]] | None
    preprocess: Preprocess | None
    on_round: Callable[[int], None]

    @torch.no_grad()
    def run(
        self, dataset: TokenDataset, *, prefix: str, loss_only: bool, ignore_keys: Sequence[str] | None
    ) -> PredictionOutput:
        """Evaluate every pair of a dataset once.

        Args:
            dataset: token pairs.
            prefix: of the names of the metrics, without the `_` behind it.
            loss_only: collect no predictions, and so compute no metrics of the user's.
            ignore_keys: of TRL's `eval_logits/chosen` and `eval_logits/rejected`, those to leave out.

        Returns:
            Predictions and labels (see `predictions.Predictions`; None if `loss_only`) and metrics: `loss` (the nll
            over all nll tokens and the odds term over all pairs), TRL's, the user's, transformers' speed.
        """
        if not loss_only:
            refuse_predictions(self.args)
        started = time.perf_counter()
        args, feed = self.args, self.layout.feed(dataset, max_tokens=self.args.eval_micro_batch_tokens)
        size = args.per_device_eval_batch_size * args.data_parallel_size
        rounds = [range(first, min(first + size, len(dataset))) for first in range(0, len(dataset), size)]
        collected = None if loss_only else _Collected(self, dataset, ignore_keys=ignore_keys or ())
        sums, experts, engine = MetricSums(), ExpertCount(), self.engine.deepspeed
        engine.eval()
        with self.layout.attention(), closing(feed.steps(rounds, device=args.device)) as steps:
            for number, (plan, micro_batches) in enumerate(steps, start=1):
                for batch in micro_batches:
                    found = engine(
                        batch,
                        nll_tokens_total=plan.nll_tokens,
                        pairs_total=plan.pairs,
                        observe=None if collected is None else collected.collector,
                        count_experts=experts,
                    )
                    # Shares of this round's values; those of the dataset follow from the sums.
                    del found["loss"]
                    found.pop("aux_loss", None)
                    sums.add_micro_batch(found, batch)
                if collected is not None:
                    collected.end_round(last=number == len(rounds))
                self.on_round(len(rounds))
        engine.train()
        release_gathered(engine)
        means = mean_metrics(sums.reduce(distributed.sum_over_ranks), steps=len(rounds))
        if experts.total is not None:
            means["aux_loss"] = experts.over_ranks().balance().item()
        aux = self.layout.parts.aux_coefficient * means.get("aux_loss", 0.0)
        own = {"loss": means["nll_loss"] - args.beta * means["log_odds_ratio"] + aux, **means}
        users = {} if collected is None else collected.users_metrics()
        seconds = time.perf_counter() - started
        speed = {
            "runtime": seconds,
            "samples_per_second": len(dataset) / seconds,
            "steps_per_second": math.ceil(len(dataset) / size) / seconds,
        }
        metrics = {
            name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
            for name, value in (users | own | speed).items()
        }
        predictions: Any  # transformers' annotation leaves out that there may be none
        predictions, labels = (None, None) if collected is None else collected.arrays()
        return PredictionOutput(predictions, labels, metrics)


class _Collected:
    """The predictions of an evaluation, and what the user's functions make of them."""

    def __init__(self, evaluation: Evaluation, dataset: TokenDataset, *, ignore_keys: Sequence[str]) -> None:
        args = evaluation.args
        self._args = args
        self._compute = evaluation.compute_metrics
        self._of_batches: dict[str, Any] | None = None
        self._batches: list[Predictions] = []
        self._rounds = 0
        self.collector = Collector(
            dataset,
            Wanted(
                preprocess=evaluation.preprocess,
                means=(CHOSEN_MEAN not in ignore_keys, REJECTED_MEAN not in ignore_keys),
                inputs="inputs" in args.include_for_metrics,
                losses="loss" in args.include_for_metrics,
                any_object=args.eval_use_gather_object,
                ignored_label=args.label_pad_token_id,
                beta=args.beta,
            ),
        )

    def end_round(self, *, last: bool) -> None:
        """Move what has come together to the host: every round, or every `eval_accumulation_steps`."""
        self._rounds += 1
        self.collector.end_round()
        by_batch = self._args.batch_eval_metrics and self._compute is not None
        if not last and not by_batch and self._rounds % (self._args.eval_accumulation_steps or 1):
            return
        batches = self.collector.take()
        self._batches += batches
        if by_batch:  # transformers hands tensors over here, and arrays at the end
            (batch,) = batches
            tensors = Predictions(
                **{name: map_tree(_as_tensor, value) for name, value in vars(batch).items()}
            )
            self._of_batches = self._call(tensors, compute_result=last)

    def users_metrics(self) -> dict[str, Any]:
        """What `compute_metrics` returned on the main process; a metric that differs would tear the ranks apart."""
        if self._compute is None:
            return {}
        found = self._of_batches if self._args.batch_eval_metrics else self._call(self._whole())
        metrics: dict[str, Any] = denumpify_detensorize(found or {})
        return distributed.gather_objects(metrics)[0]

    def arrays(self) -> tuple[Any, Any]:
        """Predictions and labels of the whole dataset, as `predict` returns them."""
        whole = self._whole()
        return whole.predictions, whole.labels

    def _whole(self) -> Predictions:
        """One array of everything, or with `eval_do_concat_batches=False` lists with an array a batch."""
        join: Callable[[list[Any]], Any] = stacked if self._args.eval_do_concat_batches else list
        return Predictions(
            **{
                name: None if value is None else join([getattr(batch, name) for batch in self._batches])
                for name, value in vars(self._batches[0]).items()
            }
        )

    def _call(self, found: Predictions, **keywords: Any) -> dict[str, Any]:
        assert self._compute is not None
        return self._compute(
            EvalPrediction(found.predictions, found.labels, inputs=found.inputs, losses=found.losses),
            **keywords,
        )


def _as_tensor(value: Any) -> Any:
    """An array of numbers as a tensor; objects as they are."""
    is_numbers = isinstance(value, np.ndarray) and value.dtype != object
    return torch.from_numpy(value) if is_numbers else value
