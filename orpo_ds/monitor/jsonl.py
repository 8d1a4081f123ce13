"""`metrics.jsonl`: one JSON object a logging step, whatever else watches the run.

Every line is valid JSON: NaN and infinity, which JSON lacks, are written as null. A resumed run takes back
the lines after its checkpoint, so each step is there once; they move to `metrics.superseded.jsonl`, nothing
is lost. A full disk is said once; the lines wait in memory for the next try, and the training goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
SUPERSEDED_SUFFIX = ".superseded.jsonl"
MAX_WAITING_LINES = 100_000


class MetricsFile:
    """Writes `metrics.jsonl`, or lines of another kind. One process of a job does; no file before the first write."""

    def __init__(self, output_dir: str | Path, *, name: str = FILE_NAME) -> None:
        self.path = Path(output_dir) / name
        self._waiting: list[str] = []
        self._warned = False

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line, on the disk's way when this returns. Never raises for the disk's sake.

        Args:
            entry: metrics by name, with `step` among them.
        """
        self._waiting.append(json.dumps(finite(entry), allow_nan=False) + "\n")
        del self._waiting[:-MAX_WAITING_LINES]
        try:
            self._write_waiting()
        except OSError as error:
            if not self._warned:
                logger.warning("cannot write %s (%s); training goes on and tries again", self.path, error)
                self._warned = True

    def _write_waiting(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        left = memoryview("".join(self._waiting).encode())
        # Without a buffer: Python would try to write its rest once more when it closes the file.
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                # Half a line would spoil the file, and the next one with it.
                os.truncate(self.path, end)
                raise
        self._waiting.clear()

    def rewind(self, step: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Before a resume continues: take back what was written after `step`, and a line cut off by a crash.

        Of the lines of `step` itself those stay that are in `history`: an evaluation may have come after the save.

        The lines are appended to `metrics.superseded.jsonl` first; then the file is replaced in one go.
        """
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        known = [finite(entry) for entry in history if entry["step"] == step]
        kept = {
            line
            for line in lines
            if (number := step_of_line(line)) is not None
            and (number < step or (number == step and json.loads(line) in known))
        }
        superseded = [line for line in lines if line not in kept]
        if not superseded:
            return
        with self.path.with_suffix(SUPERSEDED_SUFFIX).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in superseded)
            file.flush()
            os.fsync(file.fileno())
        shortened = self.path.with_suffix(".tmp")
        shortened.write_text("".join(f"{line}\n" for line in lines if line in kept), encoding="utf-8")
        shortened.replace(self.path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a metrics file, oldest first; a last line that is still being written is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if step_of_line(line) is not None]


def step_of_line(line: str) -> int | None:
    """The `step` of a line, None for a line that is cut off."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry.get("step") if isinstance(entry, dict) else None


def finite(value: Any) -> Any:
    """`value` with NaN and infinities in it replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
