"""`launch/deepspeed/train.sh` on two hosts: what reaches the ranks, what comes back, and what is left: nothing."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orpo_ds.cluster.launch import Progress
from tests.cluster.virtual_hosts import REPOSITORY, RUN_TIMEOUT_S, VirtualHosts, environment

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = REPOSITORY / "launch/deepspeed/train.sh"
WORKER = "tests.cluster.rank_worker"
# What a shell, DeepSpeed's double quotes and pdsh's %h would each make something else of.
ODD_WORDS = ["two words", '{"use_reentrant": false}', "$HOME `id` \\n", "100%h", "it's", "ü;|&"]
TOKEN = "hf_thisIsNoTokenOfAnybody0123456789"
WANDB_KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the ranks say what reached them."""
    made = tmp_path / "ranks"
    made.mkdir()
    return made


@pytest.fixture
def job(hosts: VirtualHosts, folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts a launch; `wait` gives its status and output, and nothing of it may be left on a living host."""
    started: list[subprocess.Popen[bytes]] = []
    log = tmp_path / "log.txt"

    def start(*words: str, options: list[str] | None = None, changes: Mapping[str, str] | None = None) -> Any:
        command = [
            SCRIPT,
            hosts.hostfile,
            "--no_preflight",
            *(options or []),
            "--module",
            WORKER,
            folder,
            *words,
        ]
        process = hosts.start("head", *command, log=log, changes=changes)
        started.append(process)

        def wait(timeout_s: float = RUN_TIMEOUT_S) -> tuple[int, str]:
            status = process.wait(timeout=timeout_s)
            return status, log.read_text()

        return SimpleNamespace(process=process, wait=wait, log=log)

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def ranks_are_up(job: Any, folder: Path) -> None:
    """Wait until both ranks have said what reached them."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while len(list(folder.glob("rank*.json"))) < 2:
        assert job.process.poll() is None, job.log.read_text()
        assert time.monotonic() < deadline, job.log.read_text()
        time.sleep(0.1)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, as the kernel sees it."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    return bool(mask >> (number - 1) & 1)


def left_over(hosts: VirtualHosts, *names: str) -> list[str]:
    return [line for name in names for line in hosts.processes(name, WORKER)]


def test_words_and_environment_reach_the_ranks_and_tokens_no_log(
    hosts: VirtualHosts, job: Any, folder: Path
) -> None:
    carried = {
        "HF_TOKEN": TOKEN,
        "WANDB_API_KEY": WANDB_KEY,
        "MLFLOW_TRACKING_TOKEN": TOKEN,  # DeepSpeed forwards MLFLOW* itself, and prints it
        "WANDB_PROJECT": "two words and a 'quote'",
        "HF_HUB_OFFLINE": "1",
        "NCCL_DEBUG": "WARN",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "SITE_SCRATCH": "/scratch",
        "ORPO_DS_FORWARD": "SITE_SCRATCH",
    }
    status, output = job("done", "done", *ODD_WORDS, changes={**carried, "SITE_OTHER": "x"}).wait()
    assert status == 0, output
    facts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [fact["host"] for fact in facts] == list(hosts.nodes)
    del carried["ORPO_DS_FORWARD"]
    for fact in facts:
        assert fact["words"] == ODD_WORDS
        assert {name: fact["environment"].get(name) for name in carried} == carried
        assert fact["environment"]["PATH"].startswith(str(Path(sys.executable).parent))
        assert "SITE_OTHER" not in fact["environment"]
    assert TOKEN not in output
    assert WANDB_KEY not in output
    job_number = facts[0]["environment"]["ORPO_DS_JOB"]
    assert not list(Path("/tmp").glob(f"orpo-ds-{job_number}*")), "the file with the variables was left"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_reaches_the_ranks_whose_85_comes_back(
    hosts: VirtualHosts, job: Any, folder: Path, number: signal.Signals
) -> None:
    running = job("wait", "wait")
    ranks_are_up(running, folder)
    running.process.send_signal(number)
    status, output = running.wait()
    assert status == 85, output
    assert [(folder / f"signal{rank}").read_text() for rank in range(2)] == [number.name] * 2
    assert not left_over(hosts, *hosts.nodes)


def test_a_signal_that_comes_before_the_ranks_is_kept_for_them(
    hosts: VirtualHosts, job: Any, folder: Path
) -> None:
    running = job("wait", "wait")
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while "cmd = pdsh" not in running.log.read_text():  # DeepSpeed is about to start them
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.process.send_signal(signal.SIGUSR1)
    assert not list(folder.glob("rank*.json"))
    status, output = running.wait()
    assert status == 85, output
    assert len(list(folder.glob("signal*"))) == 2


def test_a_signal_before_the_start_is_a_preemption(tmp_path: Path) -> None:
    """In the preflight: nothing was trained, and the run is to be started again."""
    hostfile = tmp_path / "hosts.txt"
    hostfile.write_text("192.0.2.1 slots=1\n")  # an address that documents use; nobody answers there
    words = [sys.executable, "-m", "orpo_ds", "launch", str(hostfile), "--output_dir", str(tmp_path)]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not catches(process.pid, signal.SIGUSR1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 85, process.stderr.read() if process.stderr else ""


def test_a_rank_that_fails_ends_a_rank_that_hangs(hosts: VirtualHosts, job: Any, folder: Path) -> None:
    status, output = job("hang", "fail:3", options=["--stop_after_s", "2"]).wait()
    assert status == 3, output
    assert "node2 ended with status 3 first" in output
    assert not left_over(hosts, *hosts.nodes)


def test_a_lost_host_ends_the_run(hosts: VirtualHosts, job: Any, folder: Path) -> None:
    running = job("hang", "hang", options=["--stop_after_s", "2"])
    ranks_are_up(running, folder)
    hosts.kill("node2")
    try:
        lost_at = time.monotonic()
        status, output = running.wait()
        seconds = time.monotonic() - lost_at
    finally:
        hosts.revive()
    assert status == 255, output
    assert "node2 was lost first" in output
    # Missing answers for 3 x 2 s, 2 s of patience, 5 s of grace; the rest is a busy machine. ssh alone: 11 minutes.
    assert seconds < 90
    assert not left_over(hosts, "node1")


def test_a_failure_beside_a_preempted_host_is_a_failure() -> None:
    """The status of pdsh would be 85, the largest, and a chain of jobs would go on for ever."""
    progress = Progress()
    ends = [
        f"pdsh@head: {host}: ssh exited with exit code {status}"
        for host, status in (("node1", 85), ("node2", 1))
    ]
    progress.follow(SimpleNamespace(stderr=io.StringIO("\n".join(["node1: saved", *ends]))))  # type: ignore[arg-type]
    assert progress.failed == {"node1": 85, "node2": 1}
    assert progress.failure == ("node2", 1)
