"""What we ask of SLURM, by its own commands."""

from __future__ import annotations

import os
import re
import subprocess


class SlurmError(RuntimeError):
    """A command of SLURM failed; has its own words."""


def this_job() -> str:
    """Id of the batch job that this process runs in; for a task of an array `ARRAY_TASK`.

    Such a task has a plain id as well. But the plain id of one of them is that of the whole array, and to requeue it
    requeues them all (seen with SLURM 22.05).

    Raises:
        ValueError: it runs in none.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise ValueError("SLURM_JOB_ID is not set: this is not a batch job of SLURM.")
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return job if array is None else f"{array}_{task}"


def run(*words: str, stdin: str | None = None) -> str:
    """Standard output of a command of SLURM.

    Args:
        words: the command.
        stdin: what it reads.

    Raises:
        SlurmError: the command is not there, or failed.
    """
    try:
        answer = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise SlurmError(
            f"{words[0]}: there is no such command here. Is this a host of a SLURM cluster?"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]}: no answer from SLURM within 60 s") from None
    if answer.returncode != 0:
        raise SlurmError(f"{' '.join(words)}: {answer.stderr.strip() or answer.stdout.strip()}")
    return answer.stdout


def facts(job: str) -> list[dict[str, str]]:
    """What `scontrol show job` says, by name: of the job, or of each task of an array."""
    lines = run("scontrol", "--oneliner", "show", "job", job).splitlines()
    return [found for line in lines if (found := dict(re.findall(r"(\w+)=(\S*)", line)))]


def is_ending(job: str) -> bool:
    """Whether SLURM ends a job whose script still runs: it was cancelled or requeued, a node died, the time is up."""
    return facts(job)[-1]["JobState"] != "RUNNING"


def time_is_up(job: str) -> bool:
    """Whether SLURM ends a job because it has reached its time limit."""
    found = facts(job)[-1]
    return found["JobState"] != "RUNNING" and found["Reason"] == "TimeLimit"


def queued(job: str) -> dict[str, str]:
    """State by task of a job, or of an array's tasks, that has not ended: `RUNNING`, `PENDING (Resources)`, ..."""
    try:
        lines = run("squeue", "--noheader", f"--jobs={job}", "--format=%i|%T|%r").splitlines()
    except SlurmError as error:
        if "Invalid job id" in str(error):  # it has ended, and SLURM has forgotten it
            return {}
        raise
    found = {}
    for line in lines:
        task, state, reason = line.strip().split("|")
        found[task] = state if reason in ("None", "") else f"{state} ({reason})"
    return found


def final_states(job: str) -> dict[str, str]:
    """How the tasks of a job ended, as far as SLURM still knows: `COMPLETED`, `FAILED`, `CANCELLED`, ..."""
    try:
        jobs = facts(job)
    except SlurmError:
        return {}
    found = {}
    for each in jobs:
        task = each.get("ArrayTaskId")
        found[f"{each['ArrayJobId']}_{task}" if task else each["JobId"]] = each["JobState"]
    return found


def requeue(job: str) -> None:
    """Put a job back into the queue; it keeps its id and starts its script again."""
    run("scontrol", "requeue", job)
