"""Which evaluation was the best so far: transformers' rules, by `metric_for_best_model` and `greater_is_better`."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.trainer_callback import TrainerState

from orpo_ds.config import ORPOConfig


def metric(found: Mapping[str, float], args: ORPOConfig) -> float:
    """What `metric_for_best_model` (by default the loss) came to in an evaluation.

    Args:
        found: the evaluation's metrics, by name with their prefix `eval_`.
        args: the run's settings.

    Raises:
        ValueError: the evaluation has no such metric; says which ones it has.
    """
    name = args.metric_for_best_model or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in found:
        raise ValueError(f"metric_for_best_model={name!r} was not evaluated. There is: {', '.join(found)}.")
    return found[name]


def note(found: Mapping[str, float], args: ORPOConfig, state: TrainerState) -> bool:
    """Note in `state` when an evaluation is the best one so far; without `metric_for_best_model` none is.

    Returns:
        Whether it is.
    """
    if args.metric_for_best_model is None:
        return False
    value = metric(found, args)
    if state.best_metric is not None and not (
        value > state.best_metric if args.greater_is_better else value < state.best_metric
    ):
        return False
    state.best_metric, state.best_global_step = value, state.global_step
    return True
