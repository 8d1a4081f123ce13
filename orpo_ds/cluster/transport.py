"""An agent on every host, over ssh or within a SLURM job: ask all of them at once, and know who did not answer."""

from __future__ import annotations

import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_ds.cluster.forwarded import forwarded, shell_lines, without_secrets
from orpo_ds.cluster.preflight_agent import MARK
from orpo_ds.cluster.remote import ssh_command

AGENT = [sys.executable, "-u", "-m", "orpo_ds.cluster.preflight_agent"]


@dataclass(frozen=True)
class Host:
    """A host of the run: its name, the processes it will get, and the words that start an agent there."""

    name: str
    slots: int
    command: tuple[str, ...]


def over_ssh(slots: Mapping[str, int]) -> list[Host]:
    """Agents by ssh, in this folder, with the environment that the ranks will get, tokens left out."""
    variables = without_secrets(forwarded())
    path = os.pathsep.join(part for part in (os.getcwd(), variables.get("PYTHONPATH")) if part)
    exports = shell_lines({**variables, "PYTHONPATH": path})
    command = f"{exports}cd {shlex.quote(os.getcwd())} && exec {shlex.join(AGENT)}"
    return [Host(name, count, tuple(ssh_command(name, command))) for name, count in slots.items()]


def over_srun(slots: Mapping[str, int]) -> list[Host]:
    """Agents by srun, from within a job; `--overlap`: beside the job's own steps, with all its GPUs."""
    words = ["srun", "--quiet", "--overlap", "--nodes=1", "--ntasks=1"]
    return [Host(name, count, (*words, f"--nodelist={name}", *AGENT)) for name, count in slots.items()]


@dataclass(frozen=True)
class Answer:
    """What a host answered, and when; `value` is None where it did not, and `error` says why."""

    value: Any
    error: str = ""
    received: float = 0.0  # seconds since 1970, by this host's clock


class Agents:
    """The agents of all hosts, as a context: they end with it."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = list(hosts)
        self._talks = {host.name: _Talk(host) for host in hosts}

    def __enter__(self) -> Agents:
        return self

    def __exit__(self, *_: object) -> None:
        for talk in self._talks.values():
            talk.end()

    def ask(self, requests: Mapping[str, Mapping[str, Any]], *, timeout_s: float) -> dict[str, Answer]:
        """Send each host its request, and wait for all answers.

        Args:
            requests: host name -> request.
            timeout_s: seconds until a host that has not answered is given up.
        """
        for name, request in requests.items():
            self._talks[name].send(request)
        deadline = time.monotonic() + timeout_s
        return {name: self._talks[name].answer(deadline, timeout_s) for name in requests}

    def ask_all(self, request: Mapping[str, Any], *, timeout_s: float) -> dict[str, Answer]:
        """The same request to every host."""
        return self.ask({host.name: request for host in self.hosts}, timeout_s=timeout_s)


class _Talk:
    """One agent's process, and its answers as they come."""

    def __init__(self, host: Host) -> None:
        self._process = subprocess.Popen(
            host.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._answers: queue.Queue[tuple[float, str | None]] = queue.Queue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=target, daemon=True) for target in (self._read_answers, self._read_errors)
        ]
        for reader in self._readers:
            reader.start()

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._answers.put((time.time(), line[len(MARK) :]))
        self._answers.put((time.time(), None))

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(line.strip() for line in self._process.stderr if line.strip())

    def send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            return  # it has ended; `answer` says how

    def answer(self, deadline: float, timeout_s: float) -> Answer:
        try:
            received, line = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return Answer(None, f"no answer within {timeout_s:g} s")
        if line is not None:
            return Answer(json.loads(line), received=received)
        self._answers.put((received, None))  # for the next question
        status = self._process.wait(timeout=10)
        self._readers[1].join(timeout=10)
        return Answer(None, " ".join(self._errors[-1:]) or f"it ended with status {status}")

    def end(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            self._process.kill()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
