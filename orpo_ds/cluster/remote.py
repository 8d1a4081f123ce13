"""Short commands on every host over ssh, all at once, each with a time limit of its own.

Training is started by DeepSpeed through pdsh; this is for what stands around it. ssh is used directly, because its
exit status and output then belong to one host, and a dead one costs the others nothing.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

SSH_OPTIONS_VARIABLE = "PDSH_SSH_ARGS_APPEND"
# A host that loses power leaves ssh waiting for minutes; a missing answer ends it within seconds.
SSH_OPTIONS = "-o ServerAliveInterval=3 -o ServerAliveCountMax=2 -o ConnectTimeout=10"
LOST = 255  # ssh's own exit status: no connection, or no connection any more


@dataclass(frozen=True)
class Ended:
    """How a command on a host ended; `status` is None where it ran out of time."""

    host: str
    status: int | None
    output: str

    @property
    def last_line(self) -> str:
        """What our own command said, behind whatever a login shell has printed."""
        return self.output.rpartition("\n")[2]


def ssh_options() -> str:
    """Options of every ssh to the hosts: the user's `PDSH_SSH_ARGS_APPEND`, or those that notice a lost host."""
    return os.environ.get(SSH_OPTIONS_VARIABLE, SSH_OPTIONS)


def ssh_command(host: str, command: str) -> list[str]:
    """The words that run a shell command on a host without asking for a password."""
    return ["ssh", "-o", "BatchMode=yes", *shlex.split(ssh_options()), host, command]


def on_hosts(hosts: Sequence[str], command: str, *, text: str = "", timeout_s: float) -> list[Ended]:
    """Run a shell command on all hosts at once.

    Args:
        hosts: names that ssh knows.
        command: for the login shell there; `%h` in it and in `text` becomes the host's name, as in pdsh.
        text: standard input of the command on each host.
        timeout_s: seconds until a host is given up.

    Returns:
        How it ended on each host, in their order.
    """

    def run(host: str) -> Ended:
        try:
            done = subprocess.run(
                ssh_command(host, command.replace("%h", host)),
                input=text.replace("%h", host),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return Ended(host, None, f"no answer within {timeout_s:g} s")
        return Ended(host, done.returncode, done.stdout.strip())

    with ThreadPoolExecutor(max_workers=max(1, len(hosts))) as pool:
        return list(pool.map(run, hosts))
