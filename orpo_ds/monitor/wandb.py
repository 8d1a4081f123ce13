"""W&B, the dashboard: transformers' `WandbCallback` with what a run of ours has to add.

The callback logs the metrics over `train/global_step`. This module starts the run for it: in the output folder, with
the dataset's fingerprint and the git commit in its config, without any token, and under the id of the run that is
continued. A server that cannot be reached does not lose the run: it is written to the disk, as `WANDB_MODE=offline`
does, and `wandb sync` uploads it. A training that fails ends its run with exit code 1.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    WandbCallback,
    WandbLogModel,
    save_model_architecture_to_file,
)

from orpo_ds.monitor.background import END_SECONDS, Background
from orpo_ds.monitor.source import source_facts
from orpo_ds.preemption import REQUEUE_EXIT_CODE, PreemptedExit
from orpo_ds.redact import redact, redact_command_line, redact_text

logger = logging.getLogger(__name__)

RUN_FILE = "wandb_run.json"
# Where the trained model waits to become an artifact; all ranks write it, because ZeRO-3 has no model on one.
FINAL_MODEL = ".wandb-model"
ONE_DAY = 86_400.0
NOT_IN_ARTIFACT_NAMES = re.compile(r"[^\w.-]")


@dataclass(frozen=True)
class NodeRun:
    """One of several W&B runs of a job: that of a node.

    Attributes:
        node: the node's name, such as `node0`.
        group: what W&B groups the runs of this job by.
        is_main: whether the job's main process is on this node.
    """

    node: str
    group: str
    is_main: bool


class ModelArtifact(WandbCallback):
    """`WandbCallback` that uploads the final model which all ranks wrote into `output_dir/.wandb-model`.

    transformers would gather the model in this callback, in one process: under ZeRO the others would not take part.
    """

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Log the model as transformers does, `model-<run>` with the alias `final_model`; the folder is removed."""
        assert args.output_dir is not None
        folder = Path(args.output_dir) / FINAL_MODEL
        if not self._log_model.is_enabled or not folder.is_dir():
            return
        try:
            if self._wandb is not None and self._wandb.run is not None:
                self._log_final_model(args, self._wandb.run, folder, model=model)
        finally:
            shutil.rmtree(folder)

    def _log_final_model(self, args: TrainingArguments, run: Any, folder: Path, *, model: Any) -> None:
        figures = {
            name: value
            for name, value in dict(self._wandb.summary).items()
            if isinstance(value, int | float) and not name.startswith("_")
        }
        name = run.id if args.run_name in (None, args.output_dir) else run.name
        save_model_architecture_to_file(model, str(folder))
        artifact = self._wandb.Artifact(
            name=NOT_IN_ARTIFACT_NAMES.sub("-", f"model-{name}"),
            type="model",
            metadata={**figures, "final_model": True},
        )
        artifact.add_dir(str(folder))  # copies the files
        run.log_artifact(artifact, aliases=["final_model"])


# WandbCallback spells some keywords of its events out, which Background takes as **kwargs.
class OrpoWandbCallback(Background, ModelArtifact):  # type: ignore[misc]
    """`WandbCallback`, continued over resumes and free of secrets.

    Attributes:
        run_folder: where the run is on this disk; None before it has started.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        facts: Callable[[], Mapping[str, Any]],
        node_run: NodeRun | None = None,
    ) -> None:
        """Prepare; nothing is started or written before the training begins.

        Args:
            output_dir: the run's output folder. `WANDB_DIR` overrides it for W&B's own files.
            facts: what else the run's config should say (dataset fingerprint, world size, ...); asked at the start.
            node_run: this node's own run; None for the one run of the whole job.
        """
        super().__init__()
        self.output_dir = Path(output_dir)
        self.facts = facts
        self.node_run = node_run
        self.run_folder: Path | None = None
        if node_run is not None and not node_run.is_main:
            self._log_model = WandbLogModel.FALSE  # once a job is enough
        if self._log_model.is_enabled:
            self.end_seconds = ONE_DAY  # who asks for the model waits for its upload

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Start or continue the run, then let transformers fill it. Called in the background thread."""
        # Without `_wandb` the callback does nothing: a start that fails is not tried again at every log.
        wandb, self._wandb = self._wandb, None  # type: ignore[assignment]
        # Without a step done, it is there after a start that ended before its first checkpoint.
        continues = state.global_step > 0 or self._run_file().is_file()
        wishes: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", args.project),
            "name": args.run_name,
            "dir": os.environ.get("WANDB_DIR", str(self.output_dir)),
            "id": os.environ.get("WANDB_RUN_ID") or (self._saved_id() if continues else None),
            "resume": "allow",
            "config": redact({**self.facts(), **source_facts()}),
        }
        if self.node_run is not None:
            wishes["name"] = f"{args.run_name or self.output_dir.name}-{self.node_run.node}"
            wishes["group"] = self.node_run.group
        run = self._start(wandb, wishes)
        self._wandb = wandb
        self.run_folder = Path(run.dir).parent
        self._save_id(run.id)
        super().setup(args, state, model, **kwargs)

    def _start(self, wandb: Any, wishes: dict[str, Any]) -> Any:
        """`wandb.init`; on the disk alone, with one warning, where the server cannot be reached or knows no key."""
        # The end of the run must not wait for ever for a server that has gone away.
        seconds = 0.0 if self._log_model.is_enabled else END_SECONDS
        settings = {} if "WANDB_FINISH_TIMEOUT" in os.environ else {"finish_timeout": seconds}
        with command_line_without_secrets():
            try:
                return wandb.init(**wishes, settings=settings)
            except wandb.Error as error:
                run = wandb.init(**wishes, settings=settings, mode="offline")
                logger.warning(
                    "W&B's run cannot be started on the server (%s). It is written to the disk; afterwards, "
                    "`wandb sync %s` uploads it.",
                    redact_text(" ".join(str(error).split())),
                    Path(run.dir).parent,
                )
                return run

    def as_reported(self, state: TrainerState) -> TrainerState:
        """On every node that has a run of its own, the callback is that of a main process."""
        reported = super().as_reported(state)
        reported.is_world_process_zero = True
        return reported

    def report_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int
    ) -> None:
        """Log a `wandb.Table` at this step."""
        if self._wandb is not None and self._wandb.run is not None:
            table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._wandb.log({name: table, "train/global_step": step})

    def report_failure(self, error: BaseException) -> None:
        """Send an alert, as W&B mails or posts it on request, and end the run as failed."""
        if self._wandb is None or self._wandb.run is None:
            return
        text = redact_text(f"{type(error).__name__}: {error}")
        self._wandb.alert(title="The training failed", text=text, level=self._wandb.AlertLevel.ERROR)
        self._wandb.run.summary["error"] = text
        self._wandb.finish(exit_code=1)

    def report_preemption(self, stop: PreemptedExit) -> None:
        """End the run as preempted: W&B shows it so, and the resume continues it under its id."""
        if self._wandb is None or self._wandb.run is None:
            return
        self._wandb.run.mark_preempting()
        self._wandb.finish(exit_code=REQUEUE_EXIT_CODE)

    def _saved_id(self) -> str | None:
        path = self._run_file()
        if not path.is_file():
            logger.warning("%s is missing: this run continues under a new W&B id", path)
            return None
        run_id: str = json.loads(path.read_text(encoding="utf-8"))["id"]
        return run_id

    def _save_id(self, run_id: str) -> None:
        text = json.dumps({"id": run_id, "folder": str(self.run_folder)}) + "\n"
        self._run_file().write_text(text, encoding="utf-8")

    def _run_file(self) -> Path:
        if self.node_run is None or self.node_run.is_main:
            return self.output_dir / RUN_FILE
        return self.output_dir / f"wandb_run-{self.node_run.node}.json"


def copy_run_id(source: Path, target: Path) -> None:
    """Carry the id of a W&B run along, from an output folder into a checkpoint and back, where there is none yet."""
    if (source / RUN_FILE).is_file() and not (target / RUN_FILE).exists():
        shutil.copyfile(source / RUN_FILE, target / RUN_FILE)


@contextmanager
def command_line_without_secrets() -> Iterator[None]:
    """W&B records `sys.argv`; hide the values of options like `--hub_token` from it."""
    words = sys.argv
    sys.argv = [words[0], *redact_command_line(words[1:])]
    try:
        yield
    finally:
        sys.argv = words
