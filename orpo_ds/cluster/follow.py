"""Follow the logs of a job on the terminal until the job ends; a requeued job is followed on.

Ctrl-C stops the following and not the job.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from orpo_ds.cluster import slurm

POLL_SECONDS = 1.0
ASK_SECONDS = 5.0


def follow(job: str, *, pattern: str) -> str | None:
    """Print what a job writes, until it has left the queue.

    Args:
        job: its id; that of the array for an array.
        pattern: of its log, as SLURM takes it: `%j`, or `%A` and `%a`.

    Returns:
        How it ended (`COMPLETED`, `FAILED`, ...); None if a person looked away, or SLURM does not know any more.

    Raises:
        SlurmError: SLURM does not answer.
    """
    logs = Logs(pattern, job=job)
    said: dict[str, str] = {}
    try:
        while tasks := slurm.queued(job):
            for task, state in tasks.items():
                if said.get(task) != state:
                    _say(f"job {task}: {state}")
            said = tasks
            until = time.monotonic() + ASK_SECONDS
            while time.monotonic() < until:
                logs.show()
                time.sleep(POLL_SECONDS)
        logs.show()
    except KeyboardInterrupt:
        _say(f"job {job} goes on; `scancel {job}` ends it. Its log: {pattern.replace('%j', job)}")
        return None
    states = slurm.final_states(job)
    for task, state in states.items():
        _say(f"job {task}: {state}")
    return next((state for state in states.values() if state != "COMPLETED"), "COMPLETED") if states else None


class Logs:
    """The log files of a job's tasks, as far as they were shown."""

    def __init__(self, pattern: str, *, job: str) -> None:
        self._glob = pattern.replace("%j", job).replace("%A", job).replace("%a", "*")
        self._shown: dict[Path, int] = {}

    def show(self) -> None:
        """Print what is new; of several files, with a line that says which one follows."""
        folder = Path(self._glob).parent
        for path in sorted(folder.glob(Path(self._glob).name)):
            with path.open("rb") as file:
                file.seek(self._shown.get(path, 0))
                new = file.read()
            if not new:
                continue
            self._shown[path] = self._shown.get(path, 0) + len(new)
            if "*" in self._glob:
                _say(f"{path}:")
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()


def _say(text: str) -> None:
    print(f"orpo-ds submit: {text}", flush=True)
