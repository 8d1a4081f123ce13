"""`hosts` and `slurm`: virtual hosts and a real SLURM, made for a test file and taken down after it.

Both have the scope of a file, not of the session: pytest-xdist's workers are sessions of their own, and one that kept
the hosts to its end would let the others wait for nothing. They come up in about five seconds.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster.virtual_hosts import (
    HOST_COMMANDS,
    NODES,
    SLURM_COMMANDS,
    Slurm,
    VirtualHosts,
    missing,
    run_tool,
    sole_use,
    tools_folder,
)


@pytest.fixture(scope="module")
def _machine() -> Iterator[None]:
    """The machine's network namespaces, for this test file alone."""
    if not (tools_folder() / "hosts_up.sh").is_file():
        pytest.skip(f"no virtual hosts: {tools_folder()} is missing; ORPO_TEST_TOOLS says where it is")
    if os.geteuid() != 0:
        pytest.skip("virtual hosts need root")
    with sole_use():
        yield


def _bring_up(script: str, commands: tuple[str, ...]) -> None:
    """Run a script that installs what it needs, and skip where that cannot be had."""
    run_tool("slurm_down.sh")
    run_tool("hosts_down.sh")  # a test that was killed may have left a slow or a dead host
    try:
        run_tool(script, str(NODES))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        if lacking := missing(commands):
            pytest.skip(f"no virtual hosts: {', '.join(lacking)} could not be installed. {error}")
        raise


@pytest.fixture(scope="module")
def hosts(_machine: None) -> VirtualHosts:
    """`head`, `node1`, `node2`."""
    _bring_up("hosts_up.sh", HOST_COMMANDS)
    return VirtualHosts()


@pytest.fixture(scope="module")
def slurm(_machine: None) -> Slurm:
    """SLURM on `head`, `node1`, `node2`; the hosts are `slurm.hosts`. A test file takes this one or `hosts`."""
    _bring_up("slurm_up.sh", HOST_COMMANDS + SLURM_COMMANDS)
    return Slurm(VirtualHosts())
