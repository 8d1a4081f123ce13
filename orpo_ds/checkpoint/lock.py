"""One output folder, one live job: a second one would remove the first one's half-written checkpoint.

The kernel holds the lock (`flock`), so it ends with the process however that ends, and no lock is ever stale; over NFS
it holds between hosts. Who holds it stands in the file, for the message to the second job. The empty-handed file stays
behind, because removing it would race with the next job that opens it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from orpo_ds.checkpoint.ranks import Ranks, TogetherError, on_main

logger = logging.getLogger(__name__)

LOCK_NAME = ".orpo_ds.lock"
NOT_SUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def sole_job(output_dir: str | Path, ranks: Ranks) -> Iterator[None]:
    """Hold `output_dir` for this job. Collective; the main process holds the lock for all ranks.

    Args:
        output_dir: the run's output folder; made if need be.
        ranks: this rank and its collective.

    Raises:
        ValueError: on all ranks, when another job trains into it; says which one.
    """
    held: list[int] = []
    try:
        on_main(ranks, lambda: held.append(_lock(Path(output_dir))))
    except TogetherError as error:
        raise ValueError(str(error)) from None
    try:
        yield
    finally:
        for descriptor in held:
            os.ftruncate(descriptor, 0)
            os.close(descriptor)


def _lock(output_dir: Path) -> int:
    """The descriptor of the locked file."""
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"output_dir={str(output_dir)!r} is in use by {_holder(path)}. Wait until it ends, stop it, or choose "
            "another output_dir."
        ) from None
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            os.close(descriptor)
            raise
        logger.warning("%s cannot be locked on its file system: keep other jobs out yourself", output_dir)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(_this_job()).encode(), 0)
    return descriptor


def _this_job() -> dict[str, str | int | None]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _holder(path: Path) -> str:
    """The job that holds the lock, in words."""
    try:
        job = json.loads(path.read_text())
    except (OSError, ValueError):
        return "another job"  # it has not written its name yet
    slurm = f", SLURM job {job['slurm_job_id']}" if job["slurm_job_id"] else ""
    return f"process {job['pid']} on {job['host']}{slurm}, since {job['since']}"
