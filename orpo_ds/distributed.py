"""What a rank needs to know about the others.

DeepSpeed owns the process group. This module only makes sure that one exists (a plain `python script.py` is a job
of one rank) and spells the few collectives of the trainer once, so that no other file asks for ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
import time
from collections import Counter
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_tensor_parallel_size = 1
_data_group: dist.ProcessGroup | None = None  # the ranks whose rows are not this one's; None: all are

GLOO_WORKER = "pt_gloo_runloop"  # as torch names those threads
WORKERS_SECONDS = 5.0  # one that waits for a rank that is gone is not waited for


def ensure_rendezvous() -> None:
    """Give a process that no launcher started the environment of a job of one rank.

    The `deepspeed` launcher, torchrun and our SLURM scripts set RANK and friends. Without them the rendezvous is
    on a free port of the loopback interface, so that two single runs on one machine do not meet.
    """
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def start_process_group(*, timeout_s: int, backend: str | None = None) -> None:
    """Join the process group through DeepSpeed. A second call does nothing.

    Args:
        timeout_s: seconds a collective may take before the ranks give up (`ddp_timeout`).
        backend: of the collectives (`ddp_backend`); None: nccl on GPUs, gloo on CPUs.

    Raises:
        ValueError: torch has no such backend here, or the process group has another one already.
    """
    import deepspeed

    from orpo_ds import native_ops

    ensure_rendezvous()
    if dist.is_initialized():
        if backend not in (None, dist.get_backend()):
            raise ValueError(
                f"ddp_backend={backend!r}: the process group runs on {dist.get_backend()!r} already."
            )
        return
    native_ops.ready_for_ranks()
    if backend is None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    elif not dist.is_backend_available(backend):
        raise ValueError(f"ddp_backend={backend!r}: this torch has no such backend. Leave it out.")
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        timeout=datetime.timedelta(seconds=timeout_s),
        verbose=False,
    )
    if backend == "gloo":
        dist.barrier()  # by now every rank has written its buffer and mapped those of the others
        _unlink_shared_memory()
        atexit.register(let_workers_finish)


def let_workers_finish() -> None:
    """Give gloo's threads the interpreter until they have nothing left to do in it. At the end of the process.

    A collective is over for the ranks when its thread still has to drop the tensors; where Python has dropped them
    already, the thread needs the GIL for that. If the interpreter is shutting down by then, it ends the thread, C++
    calls `std::terminate`, and a process that had done everything right dies of SIGABRT (pytorch #179291). The groups
    cannot be ended instead: destroying them ends the threads only when nobody holds a reference, and DeepSpeed does.

    A thread that waits for the GIL, or for work, sleeps; one that is about to do either does not. While this function
    sleeps, the GIL is free: a thread that is asleep at several looks in a row has nothing left to do.
    """
    deadline, asleep = time.monotonic() + WORKERS_SECONDS, 0
    while asleep < 3 and time.monotonic() < deadline:
        asleep = asleep + 1 if all(state == "S" for state in _worker_states()) else 0
        time.sleep(0.01)


def _worker_states() -> list[str]:
    """What Linux says of each of gloo's worker threads: `S` for asleep, `R` for running or ready to run."""
    states = []
    for stat in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            name, _, rest = stat.read_text().rpartition(")")
            if name.partition("(")[2] == GLOO_WORKER:
                states.append(rest.split()[0])
    return states


def form_tensor_groups(size: int) -> None:
    """Form groups of `size` consecutive ranks, which get the same rows; the process group must be there.

    Raises:
        ValueError: the ranks cannot be grouped so, or this process formed other groups before.
    """
    global _tensor_parallel_size, _data_group
    if size == _tensor_parallel_size:
        return
    if _tensor_parallel_size != 1:
        raise ValueError(
            f"tensor_parallel_size={size}: this process is in a group of {_tensor_parallel_size} already, and "
            "DeepSpeed forms its groups once. Start a new process."
        )
    if world_size() % size:
        raise ValueError(
            f"tensor_parallel_size={size} does not divide the {world_size()} ranks of this job: start a multiple of it."
        )
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(tensor_model_parallel_size=size)
    _tensor_parallel_size, _data_group = size, groups.get_data_parallel_group()


def data_rank() -> int:
    """The number of this rank's share of a global batch."""
    return rank() // _tensor_parallel_size


def data_size() -> int:
    """Shares that a global batch is dealt into: one for each rank, or for each tensor-parallel group."""
    return world_size() // _tensor_parallel_size


def _unlink_shared_memory() -> None:
    """Take the name from this rank's buffer of DeepSpeed's collectives over shared memory.

    DeepSpeed never does: 69 MB stayed in `/dev/shm` of each rank that was killed, and a rank of the next job on this
    port could take an old state in them for a new one. Memory without a name lives as long as a process maps it.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{os.environ['RANK']}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def rank() -> int:
    """This process's number in the job; 0 outside of one."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its host, as the launcher set it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes in the job; 1 outside of one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_of_hosts() -> list[int]:
    """Number of ranks on each host of the job. Collective."""
    return list(Counter(gather_objects(socket.gethostname())).values())


def is_main() -> bool:
    """Whether this is the one process that writes what exists once."""
    return rank() == 0


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks with different rows, in place; returned for convenience."""
    if data_size() > 1:
        dist.all_reduce(values, group=_data_group)
    return values


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over the ranks, in place; returned for convenience."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. For small things: it pickles."""
    if world_size() == 1:
        return [value]
    gathered: list[T] = [value] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered
