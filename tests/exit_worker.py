"""Pairs of ranks that end right after a collective, several times; prints the exit statuses of each pair.

    python -m tests.exit_worker ROUNDS

The main thread never gives the interpreter away of its own accord, as if its rank had the machine to itself: what
gloo's threads have still to do in it is then left for the very end.
"""

import os
import socket
import sys

import torch

from orpo_ds import distributed, native_ops


def rank_of_two(rank: int, port: int) -> None:
    """Join a group of two, and end."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    distributed.start_process_group(timeout_s=60)
    sys.setswitchinterval(100)
    for _ in range(5):
        distributed.gather_objects({"rank": rank})


def main(rounds: int) -> None:
    """See the module."""
    native_ops.ready_for_ranks()
    for _ in range(rounds):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                rank_of_two(rank, port)
                sys.exit(0)
            children.append(child)
        print(
            "statuses",
            *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children),
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]))
