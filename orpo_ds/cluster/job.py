"""The processes of one launch on this host: find them, signal them, end them.

Every process of a launch carries its number in the environment (`ORPO_DS_JOB`). The launcher calls this on every host:

    python -m orpo_ds.cluster.job signal JOB USR1     the ranks, and nothing else, get the signal
    python -m orpo_ds.cluster.job stop JOB            all processes get SIGTERM and, five seconds later, SIGKILL
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import psutil

JOB_VARIABLE = "ORPO_DS_JOB"
GRACE_S = 5.0


def processes_of(job: str) -> list[psutil.Process]:
    """All processes on this host that carry the job's number, but for this one and those that it runs in."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [
        process
        for process in psutil.process_iter()
        if process.pid not in own and _variable(process, JOB_VARIABLE) == job
    ]


def ranks_of(job: str) -> list[psutil.Process]:
    """The ranks: processes with a RANK whose parent has none. Their own children (workers, W&B) are no ranks."""
    ranks = []
    for process in processes_of(job):
        parent = process.parent()
        if _variable(process, "RANK") is not None and (parent is None or _variable(parent, "RANK") is None):
            ranks.append(process)
    return ranks


def send(job: str, number: signal.Signals) -> int:
    """Send a signal to the ranks on this host; returns how many there were."""
    ranks = ranks_of(job)
    for process in ranks:
        _try_signal(process, number)
    return len(ranks)


def stop(job: str) -> int:
    """End all processes of the job on this host; returns how many there were."""
    found = processes_of(job)
    for process in found:
        _try_signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(found, timeout=GRACE_S)
    for process in {*alive, *processes_of(job)}:
        _try_signal(process, signal.SIGKILL)
    return len(found)


def main(words: Sequence[str]) -> None:
    """Do what the command line says, and print how many processes it was done to."""
    action, job, *names = words
    found = stop(job) if action == "stop" else send(job, signal.Signals[f"SIG{names[0]}"])
    print(f"\n{found}")  # on a line of its own, whatever a login shell has printed before


def _variable(process: psutil.Process, name: str) -> str | None:
    """A variable of the process's first environment; None where there is none, or another user's process hides it."""
    try:
        value: str | None = process.environ().get(name)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
    return value


def _try_signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return  # it has ended by itself


if __name__ == "__main__":
    main(sys.argv[1:])
