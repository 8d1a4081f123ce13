"""TensorBoard: transformers' `TensorBoardCallback` in the background, with tables as text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers.integrations.integration_utils import TensorBoardCallback

from orpo_ds.monitor.background import Background


class OrpoTensorBoardCallback(Background, TensorBoardCallback):  # type: ignore[misc]  # as OrpoWandbCallback
    """`TensorBoardCallback` that also shows tables."""

    def __init__(self, logging_dir: str | None = None) -> None:
        """Write into `logging_dir`; by default where `TENSORBOARD_LOGGING_DIR` says, or into the output folder."""
        super().__init__()
        if logging_dir is not None:
            self.logging_dir = os.path.expanduser(logging_dir)

    def report_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int
    ) -> None:
        """Write the table as Markdown, which TensorBoard's Text page renders."""
        if self.tb_writer is not None:
            lines = [columns, ["---"] * len(columns), *rows]
            text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
            self.tb_writer.add_text(name, text, step)
            self.tb_writer.flush()


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
