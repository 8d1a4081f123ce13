"""Which dashboards a run reports to: `args.report_to`, as transformers reads it, each in the background.

`run.json`, which `orpo-ds status` reads, is one more of them, and always there.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils as integrations
from transformers.integrations.integration_utils import WandbLogModel
from transformers.trainer_callback import CallbackHandler, TrainerState

from orpo_ds import distributed
from orpo_ds.config import WandbRuns
from orpo_ds.monitor.background import in_background
from orpo_ds.monitor.run_file import RunFile
from orpo_ds.monitor.tensorboard import OrpoTensorBoardCallback
from orpo_ds.monitor.wandb import NodeRun, OrpoWandbCallback
from orpo_ds.preemption import PreemptedExit

# What each integration of transformers asks for, and the package that answers.
PACKAGES: dict[str, tuple[Callable[[], bool], str]] = {
    "azure_ml": (integrations.is_azureml_available, "azureml-sdk"),
    "clearml": (integrations.is_clearml_available, "clearml"),
    "codecarbon": (integrations.is_codecarbon_available, "codecarbon"),
    "comet_ml": (integrations.is_comet_available, "comet-ml"),
    "dagshub": (integrations.is_dagshub_available, "dagshub mlflow"),
    "dvclive": (integrations.is_dvclive_available, "dvclive"),
    "flyte": (integrations.is_flytekit_available, "flytekit"),
    "mlflow": (integrations.is_mlflow_available, "mlflow"),
    "neptune": (integrations.is_neptune_available, "neptune"),
    "swanlab": (integrations.is_swanlab_available, "swanlab"),
    "tensorboard": (integrations.is_tensorboard_available, "tensorboard"),
    "trackio": (integrations.is_trackio_available, "trackio"),
    "wandb": (integrations.is_wandb_available, "wandb"),
}


@runtime_checkable
class TableSink(Protocol):
    """A callback that shows tables."""

    def log_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int
    ) -> None:
        """Show `rows`, each with one value a column."""


@runtime_checkable
class FailureSink(Protocol):
    """A callback that wants to know when the training fails."""

    def on_failure(self, error: BaseException) -> None:
        """Note the error that ends the training."""


@runtime_checkable
class PreemptionSink(Protocol):
    """A callback that wants to know when a signal ends the training."""

    def on_preemption(self, stop: PreemptedExit) -> None:
        """Note that the training was stopped and will be continued."""


def check_report_to(report_to: str | Sequence[str] | None) -> list[str]:
    """The dashboards' names, each of them known and installed. Asked on every rank, so that all of them stop.

    Raises:
        ValueError: transformers does not know the name, or its package is not installed (names the pip line).
    """
    if report_to is None or isinstance(report_to, str):
        wishes = {"none": [], "all": integrations.get_available_reporting_integrations(), None: []}
        names = wishes.get(report_to, [report_to])
    else:
        names = list(report_to)
    known = integrations.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise ValueError(
                f"report_to={name!r} is not supported. Use of: all, none, {', '.join(sorted(known))}."
            )
        is_available, package = PACKAGES.get(name, (lambda: True, name))
        if not is_available():
            raise ValueError(
                f"report_to={name!r}: {package} is not installed, or not set up here. Run `pip install {package}`, "
                "or leave it out of report_to."
            )
    return names


def reporting_callbacks(
    args: TrainingArguments,
    *,
    output_dir: str,
    facts: Callable[[], Mapping[str, Any]],
    logging_dir: str | None = None,
    wandb_runs: WandbRuns = "job",
) -> list[TrainerCallback]:
    """The callbacks of `args.report_to`, and the writer of `run.json`. Collective where nodes have runs of their own.

    Ranks other than the main one have nothing to report; with `wandb_runs="node"`, the first rank of each node has.

    Args:
        args: the run's settings.
        output_dir: the run's output folder, where W&B's run goes.
        facts: what W&B's config should say beside the settings; asked when the training begins.
        logging_dir: of TensorBoard; by default what transformers would take.
        wandb_runs: one W&B run for the whole job, or one for each node, in one group.

    Raises:
        ValueError: `report_to` names something that transformers does not know, or that is not installed.
    """
    names = check_report_to(args.report_to)
    own_node = _node_run(args) if wandb_runs == "node" and "wandb" in names else None
    if args.process_index != 0:
        if own_node is not None and args.local_process_index == 0:
            return [OrpoWandbCallback(output_dir, facts=facts, node_run=own_node)]
        return []
    made: dict[str, Callable[[], TrainerCallback]] = {
        "wandb": lambda: OrpoWandbCallback(output_dir, facts=facts, node_run=own_node),
        "tensorboard": lambda: OrpoTensorBoardCallback(logging_dir),
    }
    kinds = [made.get(name) or in_background(integrations.INTEGRATION_TO_CALLBACK[name]) for name in names]
    return [RunFile(Path(output_dir)), *(kind() for kind in kinds)]


def wants_final_model(report_to: str | Sequence[str] | None) -> bool:
    """Whether the trained model is to be a W&B artifact: `WANDB_LOG_MODEL` is `end` or `checkpoint`. Collective.

    The main process decides: launchers do not bring every variable to every node.
    """
    wish = WandbLogModel(os.environ.get("WANDB_LOG_MODEL", "false")).is_enabled
    return "wandb" in (report_to or ()) and distributed.gather_objects(wish)[0]


def _node_run(args: TrainingArguments) -> NodeRun:
    """This node's W&B run: nodes are numbered by their first ranks, and share a group."""
    ranks = distributed.gather_objects((args.local_process_index, uuid.uuid4().hex[:8]))
    group = os.environ.get("WANDB_RUN_GROUP") or f"{args.run_name or 'job'}-{ranks[0][1]}"
    return node_run([local for local, _ in ranks], rank=args.process_index, group=group)


def node_run(local_ranks: Sequence[int], *, rank: int, group: str) -> NodeRun:
    """The run of the node of `rank`.

    Args:
        local_ranks: each rank's number on its own node, by rank; a node begins at 0.
        rank: of this process.
        group: that the runs of all nodes share.
    """
    node = sum(local == 0 for local in local_ranks[: rank + 1]) - 1
    return NodeRun(node=f"node{node}", group=group, is_main=node == 0)


def log_table(
    handler: CallbackHandler,
    state: TrainerState,
    *,
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
) -> None:
    """Show a table, such as answers of the model, on every dashboard that has tables (W&B, TensorBoard).

    Args:
        handler: of the trainer; callbacks with a method `log_table` get it.
        state: of the trainer; the table stands at its step.
        name: of the table, the same each time, so that W&B keeps its history.
        columns: their names.
        rows: one value a column in each.
    """
    for callback in handler.callbacks:
        if isinstance(callback, TableSink):
            callback.log_table(name, columns, rows, step=state.global_step)


@contextmanager
def failures_reported(handler: CallbackHandler) -> Iterator[None]:
    """Tell the dashboards when what happens inside fails or is preempted, and let the error go on."""
    try:
        yield
    except PreemptedExit as stop:
        for callback in handler.callbacks:
            if isinstance(callback, PreemptionSink):
                callback.on_preemption(stop)
        raise
    except BaseException as error:
        for callback in handler.callbacks:
            if isinstance(callback, FailureSink):
                callback.on_failure(error)
        raise
