"""Which dashboards a run reports to: `args.report_to`, as transformers reads it, each in the background."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import WandbCallback, get_reporting_integration_callbacks

from orpo_ds.monitor.background import in_background
from orpo_ds.monitor.wandb import OrpoWandbCallback


def reporting_callbacks(
    args: TrainingArguments, *, output_dir: str, facts: Callable[[], Mapping[str, Any]]
) -> list[TrainerCallback]:
    """The callbacks of `args.report_to`; none on ranks other than the main one, which have nothing to report.

    Args:
        args: the run's settings.
        output_dir: the run's output folder, where W&B's run goes.
        facts: what W&B's config should say beside the settings; asked when the training begins.

    Raises:
        ValueError: `report_to` names something that transformers does not know.
        RuntimeError: its package is not installed.
    """
    if args.process_index != 0:
        return []
    return [
        OrpoWandbCallback(output_dir, facts=facts) if kind is WandbCallback else in_background(kind)()
        for kind in get_reporting_integration_callbacks(args.report_to)
    ]
