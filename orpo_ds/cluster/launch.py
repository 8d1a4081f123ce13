"""Start a run on every host of a hostfile, and see it to its end.

DeepSpeed's own launcher starts the ranks through pdsh. What it leaves open is done here:

- the environment of training reaches every host, and tokens stand on no command line (`forwarded.py`);
- the hosts are checked first (`preflight.py`), so that a bad one is named and the others do not wait for it;
- a host that is lost, or a rank that fails, ends the job on all hosts: DeepSpeed waits for every ssh, and ranks wait
  for a lost one until `ddp_timeout`, which is half an hour;
- SIGINT, SIGTERM and SIGUSR1 reach the ranks, which save and end with status 85; DeepSpeed would end them;
- the exit status is that of the host that failed first, and 85 only where nothing failed. pdsh returns the largest,
  which would call a crash beside a preempted rank preempted.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from orpo_ds.cluster.forwarded import forwarded, shell_lines, without_secrets
from orpo_ds.cluster.hostfile import read_hostfile
from orpo_ds.cluster.job import JOB_VARIABLE
from orpo_ds.cluster.preflight import add_limits, check_hosts, limits_of
from orpo_ds.cluster.remote import LOST, SSH_OPTIONS_VARIABLE, on_hosts, ssh_options
from orpo_ds.cluster.transport import over_ssh
from orpo_ds.preemption import REQUEUE_EXIT_CODE

SSH_TIMEOUT_S = 60.0
POLL_S = 0.2
REPEAT_S = 2.0
# What pdsh says of a host whose command failed: `pdsh@head: node2: ssh exited with exit code 1`.
ENDED = re.compile(r"^pdsh@\S+: (\S+): ssh exited with exit code (\d+)\s*$")


@dataclass(frozen=True)
class Launch:
    """What is started where."""

    hostfile: Path
    hosts: tuple[str, ...]
    module: str
    words: tuple[str, ...]
    master_addr: str | None
    master_port: int
    stop_after_s: float
    job: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def environment_file(self) -> Path:
        """Where a host finds its variables; `%h` is its name: hosts may share the folder, and each removes its own."""
        return Path(tempfile.gettempdir(), f"orpo-ds-{self.job}-%h.sh")

    def command(self) -> list[str]:
        """The words of DeepSpeed's launcher."""
        launcher = Path(sys.executable).with_name("deepspeed")
        words = [str(launcher), "--hostfile", str(self.hostfile), "--launcher", "pdsh", "--force_multi"]
        if self.master_addr is not None:
            words += ["--master_addr", self.master_addr]
        words += ["--master_port", str(self.master_port), "--venv_script", str(self.environment_file)]
        return [*words, "--module", self.module, *(quoted(word) for word in self.words)]


class Progress:
    """Which hosts have ended with which status, read from what pdsh says while it passes by."""

    def __init__(self) -> None:
        self.failed: dict[str, int] = {}

    def follow(self, process: subprocess.Popen[str]) -> None:
        """Pass stderr on, line by line, and take down who failed, in order."""
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            if found := ENDED.match(line):
                self.failed.setdefault(found[1], int(found[2]))

    @property
    def failure(self) -> tuple[str, int] | None:
        """The host that failed first, and its status; one that was preempted (85) has not failed."""
        return next(
            ((host, status) for host, status in list(self.failed.items()) if status != REQUEUE_EXIT_CODE),
            None,
        )


def main(words: Sequence[str]) -> None:
    """Parse the command line, check the hosts, start the run, and exit with its status."""
    options, rest = _parser().parse_known_args(list(words))
    hosts = read_hostfile(options.hostfile)
    launch = Launch(
        hostfile=Path(options.hostfile).expanduser().resolve(),
        hosts=tuple(hosts),
        module=options.module or "orpo_ds",
        words=tuple(rest if options.module else ["train", *rest]),
        master_addr=options.master_addr,
        master_port=options.master_port,
        stop_after_s=options.stop_after_s,
    )
    with _Signals(launch) as signals:
        if options.preflight and not check_hosts(over_ssh(hosts), words=rest, limits=limits_of(options)):
            raise SystemExit(1)
        raise SystemExit(_run(launch, signals))


def _run(launch: Launch, signals: _Signals) -> int:
    """Start the ranks, wait for their end, and leave no process of theirs behind.

    Returns:
        0: done; 85: preempted and saved; anything else: the status of the host that failed first.

    Raises:
        ValueError: a host cannot be reached before the start.
    """
    variables = {**forwarded(), JOB_VARIABLE: launch.job}
    _send_environment(launch, variables)
    process = subprocess.Popen(
        launch.command(),
        env=_own_environment(),
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is for us, to pass on; DeepSpeed would kill the ranks on all hosts
    )
    progress = Progress()
    reader = threading.Thread(target=progress.follow, args=(process,), daemon=True)
    reader.start()
    signals.pass_on()
    _wait(process, launch, progress, signals)
    reader.join(timeout=10)
    if progress.failure is not None:
        host, status = progress.failure
        how = "was lost" if status == LOST else f"ended with status {status}"
        _say(f"the run failed: {host} {how} first")
        return status
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _wait(process: subprocess.Popen[str], launch: Launch, progress: Progress, signals: _Signals) -> None:
    """Wait for DeepSpeed's launcher; once a host has failed, or on a second signal, end the job on the others."""
    deadline = None
    while process.poll() is None:
        time.sleep(POLL_S)
        if progress.failure is not None and deadline is None:
            host, status = progress.failure
            how = "is lost" if status == LOST else f"has ended with status {status}"
            _say(f"{host} {how}; the other hosts have {launch.stop_after_s:g} s to end by themselves")
            deadline = time.monotonic() + launch.stop_after_s
        if signals.insists or (deadline is not None and time.monotonic() > deadline):
            _stop(launch)
            process.terminate()
            process.wait()
            return


def _stop(launch: Launch) -> None:
    """End what is left of the job on every host that can be reached; a lost one may be back by now."""
    for ended in on_hosts(launch.hosts, _job_command("stop", launch.job), timeout_s=SSH_TIMEOUT_S):
        if ended.status == 0 and ended.last_line != "0":
            _say(f"{ended.host}: stopped what still ran ({ended.last_line} processes)")
        elif ended.status != 0:
            _say(f"{ended.host}: processes may be left: {ended.output}")


class _Signals:
    """SIGINT, SIGTERM and SIGUSR1 reach the ranks; a second SIGINT or SIGTERM ends the run at once.

    Before there is anybody to pass them on to, nothing was trained and nothing is lost: we leave as a preempted run.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._senders: list[threading.Thread] = []
        self._passes_on = False
        self._asked = False
        self._over = threading.Event()
        self.insists = False

    def __enter__(self) -> _Signals:
        self._before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for sender in self._senders:
            sender.join(timeout=SSH_TIMEOUT_S)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """From now on there are, or will be, ranks."""
        self._passes_on = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._passes_on:
            raise SystemExit(REQUEUE_EXIT_CODE)
        if self._asked and number != signal.SIGUSR1:
            self.insists = True
            return
        self._asked = self._asked or number != signal.SIGUSR1
        name = "USR1" if number == signal.SIGUSR1 else "TERM"
        sender = threading.Thread(target=self._send, args=(name,), daemon=True)
        sender.start()
        self._senders.append(sender)

    def _send(self, name: str) -> None:
        _say(f"SIG{name} goes to the ranks, which save and end; Ctrl-C or SIGTERM again ends them at once")
        command = _job_command("signal", self._launch.job, name)
        waiting: Sequence[str] = self._launch.hosts
        while waiting and not self._over.is_set():
            answers = on_hosts(waiting, command, timeout_s=SSH_TIMEOUT_S)
            for ended in answers:
                if ended.status != 0 and not self._over.is_set():
                    _say(f"{ended.host}: SIG{name} did not get through: {ended.output}")
            # A host without a rank has none yet, or none any more: then the run is over soon.
            waiting = [ended.host for ended in answers if ended.status == 0 and ended.last_line == "0"]
            self._over.wait(REPEAT_S)


def quoted(word: str) -> str:
    """A word of the command line, such that the rank gets it as it is.

    DeepSpeed puts the words on a line for the hosts' shells, and quotes only those with a space, in double quotes.
    So every special character, spaces too, is spelled in bash's `$'...'`; `%` because pdsh replaces `%h`.
    """
    if re.fullmatch(r"[\w@+=:,./-]+", word, re.ASCII):
        return word
    spelled = "".join(
        letter
        if re.fullmatch(r"[\w@+=:,./-]", letter, re.ASCII)
        else "".join(f"\\x{byte:02x}" for byte in letter.encode())
        for letter in word
    )
    return f"$'{spelled}'"


def _send_environment(launch: Launch, variables: Mapping[str, str]) -> None:
    """Put the variables where each host will source them: a file for this user's eyes, removed once it is read."""
    path = shlex.quote(str(launch.environment_file))
    text = shell_lines(variables) + f"rm -f {path}\n"
    for ended in on_hosts(launch.hosts, f"umask 077; cat > {path}", text=text, timeout_s=SSH_TIMEOUT_S):
        if ended.status != 0:
            raise ValueError(
                f"host {ended.host}: cannot be prepared over ssh ({ended.output or ended.status}). "
                f"`ssh {ended.host} true` must work without a password."
            )


def _own_environment() -> dict[str, str]:
    """DeepSpeed's: no tokens, because it prints what it forwards by itself (PYTHON*, MLFLOW*, ...)."""
    # Its own `.deepspeed_env` still counts, and comes after ours.
    return {**without_secrets(os.environ), SSH_OPTIONS_VARIABLE: ssh_options(), "PDSH_RCMD_TYPE": "ssh"}


def _job_command(*words: str) -> str:
    """`python -m orpo_ds.cluster.job WORDS`, for a shell on a host."""
    exports = shell_lines({"PYTHONPATH": os.environ.get("PYTHONPATH", "").strip(os.pathsep)})
    command = shlex.join([sys.executable, "-m", "orpo_ds.cluster.job", *words])
    return f"{exports.strip()}; cd {shlex.quote(os.getcwd())}; {command}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orpo-ds launch",
        allow_abbrev=False,
        description="Start `orpo-ds train` on every host of a hostfile. All other arguments are those of `train`.",
    )
    parser.add_argument("hostfile", help="DeepSpeed's hostfile: a line `host slots=GPUS` for every host.")
    parser.add_argument(
        "--master_addr", help="Address of the first host; by default what `hostname -I` says there."
    )
    parser.add_argument(
        "--no_preflight", dest="preflight", action="store_false", help="Start without checking the hosts."
    )
    parser.add_argument(
        "--stop_after_s",
        type=float,
        default=20.0,
        help="Seconds that the other hosts have to end by themselves once one has failed.",
    )
    parser.add_argument(
        "--module", help="Start this module with the other arguments instead of `orpo_ds train`."
    )
    add_limits(parser)
    return parser


def _say(text: str) -> None:
    print(f"orpo-ds launch: {text}", file=sys.stderr, flush=True)
