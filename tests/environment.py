"""The environment for a process that a test starts."""

from __future__ import annotations

import os

RENDEZVOUS = frozenset(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def without_rendezvous() -> dict[str, str]:
    """This process's environment, less what an earlier test's run of one rank has put there: its port is taken."""
    return {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
