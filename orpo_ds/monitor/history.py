"""A run's metrics read back: what `orpo-ds status` and `orpo-ds plot` look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_ds.monitor.jsonl import FILE_NAME, read_metrics
from orpo_ds.monitor.run_state import RUN_STATE_FILE

NAMES_SHOWN = 5


@dataclass(frozen=True)
class History:
    """Entries of `metrics.jsonl`, oldest first.

    Attributes:
        run_dir: of the run.
        entries: what was logged, training steps and evaluations mixed.
    """

    run_dir: Path
    entries: list[dict[str, Any]]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was logged and finite."""
        found = [
            (entry["step"], float(value))
            for entry in self.entries
            if isinstance(value := entry.get(name), int | float)
        ]
        return [step for step, _ in found], [value for _, value in found]

    def gaps(self, name: str) -> list[int]:
        """Steps at which a metric was NaN or infinite, which `metrics.jsonl` writes as null."""
        return [entry["step"] for entry in self.entries if name in entry and entry[name] is None]

    def last(self, name: str) -> float | None:
        """The newest finite value of a metric."""
        _, values = self.series(name)
        return values[-1] if values else None

    def evaluation_names(self, metric: str) -> list[str]:
        """Names under which `metric` was evaluated: `eval_loss`, or `eval_<set>_loss` for several sets."""
        names = {
            name: None
            for entry in self.entries
            for name in entry
            if name.startswith("eval_") and name.endswith(f"_{metric}")
        }
        return list(names)


def find_run(given: str | Path) -> Path:
    """The output folder of a run: the folder itself, or that of its `metrics.jsonl`.

    Raises:
        ValueError: no such folder, or no run in it; names runs below it.
    """
    path = Path(given).expanduser()
    run_dir = path.parent if path.name == FILE_NAME else path
    if not run_dir.is_dir():
        raise ValueError(
            f"{given}: there is no such folder (from {Path.cwd()}). Give the output_dir of a run."
        )
    if not any((run_dir / name).is_file() for name in (FILE_NAME, RUN_STATE_FILE)):
        below = sorted(str(found.parent) for found in run_dir.glob(f"*/{FILE_NAME}"))
        hint = f" There are runs in it: {', '.join(below[:NAMES_SHOWN])}." if below else ""
        raise ValueError(
            f"{given} is not the output_dir of a run: it has neither {FILE_NAME} nor {RUN_STATE_FILE}.{hint}"
        )
    return run_dir


def read_history(run_dir: Path) -> History:
    """The metrics so far; none where nothing was logged yet. A last line that is being written is left out.

    Raises:
        ValueError: the file holds something else than metrics.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        return History(run_dir, [])
    try:
        return History(run_dir, read_metrics(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a metrics file: {error}") from error
