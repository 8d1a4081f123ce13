"""What a save and a resume need to know about the other ranks: one collective, and how to fail together.

A checkpoint is written by all ranks and is worth nothing when one of them failed. So every step of a save
or a resume runs as `together(ranks, action)`: each rank tries its part, all ranks hear how it went, and
either all go on or all raise the same error. A rank that raised alone would leave the others waiting in a
collective.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed

from orpo_ds import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This rank's place and the one collective that is used here.

    `all_gather(x)` returns the list of every rank's `x` in rank order, on every rank. It also serves as a
    barrier.
    """

    rank: int
    world_size: int
    all_gather: Callable[[Any], list[Any]]

    @property
    def is_main(self) -> bool:
        """Whether this rank does what is done once."""
        return self.rank == 0


def one_rank() -> Ranks:
    """The ranks of a run with a single process."""
    return Ranks(rank=0, world_size=1, all_gather=lambda value: [value])


def job_ranks() -> Ranks:
    """The ranks of this job: those of torch's process group, or one when there is none."""
    world_size = distributed.world_size()
    if world_size == 1:
        return one_rank()

    def all_gather(value: Any) -> list[Any]:
        gathered: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    return Ranks(rank=distributed.rank(), world_size=world_size, all_gather=all_gather)


class TogetherError(RuntimeError):
    """What went wrong on which ranks; every rank raises it with the same text."""


def together(ranks: Ranks, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return all results, in rank order, on every rank.

    An OSError or ValueError of `action` on any rank becomes a TogetherError on all ranks. Any other
    exception is a bug and is not caught: the process ends, and the launcher ends the others.
    """
    result: T | None = None
    failure: str | None = None
    try:
        result = action()
    except (OSError, ValueError) as error:
        failure = str(error)
    outcomes = ranks.all_gather((result, failure, socket.gethostname()))
    failures = [
        f"rank {rank} on {host}: {text}" if ranks.world_size > 1 else text
        for rank, (_, text, host) in enumerate(outcomes)
        if text is not None
    ]
    if failures:
        raise TogetherError("; ".join(failures))
    return [outcome[0] for outcome in outcomes]


def on_main(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only and return its result on every rank; fails as `together` does."""
    return together(ranks, lambda: action() if ranks.is_main else None)[0]  # type: ignore[return-value]


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the file system of `folder`, which need not exist yet."""
    while not folder.is_dir():
        folder = folder.absolute().parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
