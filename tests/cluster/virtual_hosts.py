"""Hosts and a SLURM cluster on this one machine, made of Linux namespaces by the scripts of `shared/tools`.

`shared/tools/README.md` says what such a host is. Files are shared between them, as on a cluster with a shared home;
network, processes, `/dev/shm` and mounts are each host's own. Only one set can be up on a machine: `sole_use` is
the lock that whoever uses it holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.environment import without_rendezvous

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS_VARIABLE = "ORPO_TEST_TOOLS"
# One set of hosts a machine, so one lock a machine; also taken by hand: `flock /tmp/orpo-test-hosts.lock -c …`.
LOCK = Path("/tmp/orpo-test-hosts.lock")
_ROOT = os.environ.get("ORPO_TEST_ROOT")  # as the scripts read it
HOSTS_ROOT = Path(_ROOT, "hosts") if _ROOT else Path("/tmp/orpo-test-hosts")
SLURM_ROOT = Path(_ROOT, "slurm") if _ROOT else Path("/tmp/orpo-test-slurm")
TOOL_TIMEOUT_S = 300  # of a script that may have to install a package
RUN_TIMEOUT_S = 420  # of a run on the hosts, however busy the machine is
NODES = 2
HOST_COMMANDS = ("ip", "pdsh", "sshd", "ssh", "nsenter")
SLURM_COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged")


@contextmanager
def sole_use() -> Iterator[None]:
    """Wait until no one else on this machine uses virtual hosts; take down, at the end, what is up."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            run_tool("slurm_down.sh")
            run_tool("hosts_down.sh")


def tools_folder() -> Path:
    """The scripts: beside the repository, or where `ORPO_TEST_TOOLS` says."""
    return Path(os.environ.get(TOOLS_VARIABLE, REPOSITORY.parent / "shared" / "tools"))


def missing(commands: tuple[str, ...]) -> list[str]:
    """Those of the commands that are not installed; servers lie in /usr/sbin, which a user's PATH may lack."""
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    return [command for command in commands if shutil.which(command, path=path) is None]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a run on a host starts with: this Python first on PATH, this repository, one thread a process."""
    return {
        **without_rendezvous(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        **(changes or {}),
    }


def run_tool(name: str, *words: str, timeout_s: float = TOOL_TIMEOUT_S) -> str:
    """Run a script of the tools to its end, and return what it printed.

    Raises:
        RuntimeError: it failed; its output is shown.
    """
    done = subprocess.run(
        [str(tools_folder() / name), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name} {' '.join(words)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


@dataclass(frozen=True)
class VirtualHosts:
    """`head`, `node1` and `node2`, with ssh and pdsh between them."""

    nodes: tuple[str, ...] = tuple(f"node{number + 1}" for number in range(NODES))
    head: str = "head"

    @property
    def hostfile(self) -> Path:
        """DeepSpeed's: `node1 slots=1`, `node2 slots=1`."""
        return HOSTS_ROOT / "hostfile"

    def command(self, host: str, *words: str | Path) -> list[str]:
        """The words that run a command inside a host; output, exit status and signals pass through."""
        return [str(tools_folder() / "on_host.sh"), host, *map(str, words)]

    def run(
        self,
        host: str,
        *words: str | Path,
        changes: Mapping[str, str] | None = None,
        cwd: Path = REPOSITORY,
        timeout_s: float = RUN_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside a host and wait for it; the exit status is for the caller to judge.

        Args:
            host: its name.
            words: the command.
            changes: to `environment()`.
            cwd: folder that it runs in.
            timeout_s: seconds until it is killed and the test fails.
        """
        return subprocess.run(
            self.command(host, *words),
            cwd=cwd,
            env=environment(changes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def start(
        self, host: str, *words: str | Path, log: Path, changes: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command inside a host; what it prints goes to a file that a test can watch."""
        with log.open("wb") as stream:
            return subprocess.Popen(
                self.command(host, *words),
                cwd=REPOSITORY,
                env=environment(changes),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def processes(self, host: str, pattern: str) -> list[str]:
        """The command lines inside a host that match a regular expression."""
        found = self.run(host, "pgrep", "-a", "-f", pattern, timeout_s=60).stdout.splitlines()
        return [line for line in found if "pgrep -a" not in line]

    def kill(self, host: str, *how: str) -> None:
        """Power loss; or `--processes`, `--unplug`, `--plug`."""
        run_tool("kill_host.sh", host, *how)

    def limit(self, host: str, *, rate: str | None = None) -> None:
        """Slow a host's network down to a rate such as `100mbit`; None: as before."""
        run_tool("limit_host.sh", host, *(["--rate", rate] if rate else []))

    def revive(self) -> None:
        """Bring dead hosts back."""
        run_tool("hosts_up.sh")


@dataclass(frozen=True)
class Slurm:
    """A real SLURM: slurmctld on `head`, a slurmd that claims 8 CPUs and 2 GPUs on each node."""

    hosts: VirtualHosts

    @property
    def root(self) -> Path:
        """Settings, state and logs."""
        return SLURM_ROOT

    @property
    def changes(self) -> dict[str, str]:
        """What puts `sbatch`, `srun` and the others on PATH; they run on `head`, or inside a job where they are."""
        bin_folder = f"{self.root / 'bin'}{os.pathsep}{Path(sys.executable).parent}"
        return {
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        }

    def run(
        self, *words: str | Path, cwd: Path = REPOSITORY, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command, or one of ours that calls them; the exit status is for the caller to judge."""
        return subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env=environment(self.changes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def revive(self) -> None:
        """Bring dead hosts and daemons back."""
        run_tool("slurm_up.sh")
