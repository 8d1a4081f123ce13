"""One rank a host meets the others as training will, and reduces: NCCL on GPUs, gloo on CPUs.

Run as `python -m orpo_ds.cluster.preflight_allreduce` with the environment of a rank. It prints a line for every phase
that it reaches, so that a host which hangs can be told from those that wait for it.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PHASES = ("nothing", "started", "met", "reduced")
WARM_UP_BYTES = 1 << 20
BYTES = {"gloo": 16 << 20, "nccl": 256 << 20}
REPEAT = {"gloo": 1, "nccl": 5}


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet, and how long they may take for all of it."""

    address: str
    port: int
    rank: int
    world_size: int
    time_limit_s: float


@dataclass(frozen=True)
class Reduction:
    """How far one host came."""

    phase: str  # the last of PHASES that it reached
    error: str  # empty where all went well
    backend: str = ""
    moved_bytes: int = 0  # that each host sends, and receives: 2 (n-1) / n of the tensor
    seconds: float = 0.0  # of one all-reduce

    @property
    def bytes_a_second(self) -> float:
        """Bytes a second that each host sends, and receives."""
        return self.moved_bytes / self.seconds if self.seconds else 0.0


def reduce_here(meeting: Meeting) -> Reduction:
    """Start this host's rank in a process of its own, which is ended when the time is up."""
    command = [sys.executable, "-u", "-m", "orpo_ds.cluster.preflight_allreduce", json.dumps(asdict(meeting))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=meeting.time_limit_s)
        error = _last_line(errors) if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        error = f"no end within {meeting.time_limit_s:g} s"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"phase"')]
    last: dict[str, Any] = lines[-1] if lines else {"phase": PHASES[0]}
    return Reduction(error=error, **last)


def worker(meeting: Meeting) -> None:
    """The rank: meet, reduce, check the sum, say how long it took.

    Raises:
        RuntimeError: the sum is wrong, or torch's own error of a network that does not carry it.
    """
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    _say({"phase": "started"})
    dist.init_process_group(
        backend,
        init_method=f"tcp://{meeting.address}:{meeting.port}",
        rank=meeting.rank,
        world_size=meeting.world_size,
        timeout=datetime.timedelta(seconds=meeting.time_limit_s),
    )
    warm_up = torch.full((WARM_UP_BYTES // 4,), float(meeting.rank + 1), device=device)
    _say({"phase": "met"})
    dist.all_reduce(warm_up)
    expected = meeting.world_size * (meeting.world_size + 1) / 2
    if not torch.all(warm_up == expected):
        raise RuntimeError(f"the all-reduce gave {warm_up.unique().tolist()} where {expected} is right")
    tensor = torch.ones(BYTES[backend] // 4, device=device)
    dist.barrier()
    started = time.monotonic()
    for _ in range(REPEAT[backend]):
        dist.all_reduce(tensor)
    if backend == "nccl":
        torch.cuda.synchronize()
    seconds = (time.monotonic() - started) / REPEAT[backend]
    dist.barrier()
    share = 2 * (meeting.world_size - 1) / meeting.world_size
    moved = int(share * BYTES[backend])
    _say({"phase": "reduced", "backend": backend, "moved_bytes": moved, "seconds": seconds})
    dist.destroy_process_group()


def _say(values: Mapping[str, Any]) -> None:
    print(json.dumps(values), flush=True)


def _last_line(text: str) -> str:
    """The message of a traceback."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it ended without a message"


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    worker(Meeting(**json.loads(sys.argv[1])))
