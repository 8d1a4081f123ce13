"""W&B, the dashboard: transformers' `WandbCallback` with what a run of ours has to add.

The callback logs the metrics over `train/global_step`. This module starts the run for it: in the output folder, with
the dataset's fingerprint and the git commit in its config, without any token, and under the id of the run that is
continued. `WANDB_MODE=offline` writes the same run to the disk.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.integrations.integration_utils import WandbCallback

from orpo_ds.monitor.background import Background
from orpo_ds.redact import redact, redact_command_line

logger = logging.getLogger(__name__)

RUN_FILE = "wandb_run.json"


# WandbCallback spells some keywords of its events out, which Background takes as **kwargs.
class OrpoWandbCallback(Background, WandbCallback):  # type: ignore[misc]
    """`WandbCallback`, continued over resumes and free of secrets.

    Attributes:
        run_folder: where the run is on this disk; None before it has started.
    """

    def __init__(self, output_dir: str | Path, *, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Prepare; nothing is started or written before the training begins.

        Args:
            output_dir: the run's output folder. `WANDB_DIR` overrides it for W&B's own files.
            facts: what else the run's config should say (dataset fingerprint, world size, ...); asked at the start.
        """
        super().__init__()
        self.output_dir = Path(output_dir)
        self.facts = facts
        self.run_folder: Path | None = None

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Start or continue the run, then let transformers fill it. Called in the background thread."""
        # Without `_wandb` the callback does nothing: a start that fails is not tried again at every log.
        wandb, self._wandb = self._wandb, None  # type: ignore[assignment]
        is_resume = state.global_step > 0
        with command_line_without_secrets():
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", args.project),
                name=args.run_name,
                dir=os.environ.get("WANDB_DIR", str(self.output_dir)),
                id=os.environ.get("WANDB_RUN_ID") or (self._saved_id() if is_resume else None),
                resume="allow",
                config=redact({**self.facts(), "git_commit": git_commit()}),
            )
        self._wandb = wandb
        self.run_folder = Path(run.dir).parent
        self._save_id(run.id)
        # transformers copies all of `args` into the config, and masks only what is called `..._token`.
        redacted = copy.copy(args)
        redacted.to_dict = lambda: redact(args.to_dict())  # type: ignore[method-assign]
        super().setup(redacted, state, model, **kwargs)

    def _saved_id(self) -> str | None:
        path = self.output_dir / RUN_FILE
        if not path.is_file():
            logger.warning("%s is missing: this run continues under a new W&B id", path)
            return None
        run_id: str = json.loads(path.read_text(encoding="utf-8"))["id"]
        return run_id

    def _save_id(self, run_id: str) -> None:
        text = json.dumps({"id": run_id, "folder": str(self.run_folder)}) + "\n"
        (self.output_dir / RUN_FILE).write_text(text, encoding="utf-8")


@contextmanager
def command_line_without_secrets() -> Iterator[None]:
    """W&B records `sys.argv`; hide the values of options like `--hub_token` from it."""
    words = sys.argv
    sys.argv = [words[0], *redact_command_line(words[1:])]
    try:
        yield
    finally:
        sys.argv = words


def git_commit() -> str | None:
    """Commit of the repository in the working directory, with `-dirty` for uncommitted changes; None if none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
