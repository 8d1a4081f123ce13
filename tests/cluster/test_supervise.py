"""`orpo-ds supervise` outside of SLURM: it starts again, passes signals on, and leaves no process behind."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch

from orpo_ds.checkpoint import verify
from orpo_ds.monitor.jsonl import read_metrics
from orpo_ds.preemption import REQUEUE_EXIT_CODE
from tests import small_runs
from tests.cluster import chain_worker
from tests.cluster.chain_worker import STEPS
from tests.cluster.test_restarts import save
from tests.environment import without_rendezvous
from tests.faults.test_resume import differences, numbers

TIMEOUT_S = 120


def start(folder: Path, command: Sequence[str], *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "orpo_ds", "supervise", "--output-dir", str(folder / "run")),
            *("--pause", "0", *options, "--", *command),
        ],
        cwd=small_runs.REPOSITORY,
        env={**without_rendezvous(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def script(path: Path, *lines: str) -> list[str]:
    path.write_text("\n".join(["import os, signal, subprocess, sys, time", *lines]) + "\n")
    return [sys.executable, str(path)]


def wait_for(path: Path) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.05)


def test_it_ends_with_the_status_of_the_last_start_when_nothing_is_gained(tmp_path: Path) -> None:
    """Two starts bring a checkpoint each, and then there is none."""
    for step in (1, 2):
        save(tmp_path / "ready", step)
    (tmp_path / "run").mkdir()
    command = script(
        tmp_path / "command.py",
        f"folder = {str(tmp_path)!r}",
        "start = len(os.listdir(folder + '/starts')) + 1",
        "os.mkdir(f'{folder}/starts/{start}')",
        "if start < 3: os.rename(f'{folder}/ready/checkpoint-{start}', f'{folder}/run/checkpoint-{start}')",
        "sys.exit(40 + start)",
    )
    (tmp_path / "starts").mkdir()
    supervised = start(tmp_path, command, "--max-restarts-without-progress", "2")
    output, _ = supervised.communicate(timeout=TIMEOUT_S)
    # Two with progress, and the next is followed by two restarts without.
    assert len(list((tmp_path / "starts").iterdir())) == 2 + 1 + 2, output
    assert supervised.returncode == 45
    assert "2 restarts in a row brought no new checkpoint" in output
    assert "checkpoint-2" in output
    assert "Traceback" not in output


def test_a_signal_reaches_the_ranks_through_a_launcher_that_does_not_know_it(tmp_path: Path) -> None:
    rank = script(
        tmp_path / "rank.py",
        f"signal.signal(signal.SIGUSR1, lambda *_: sys.exit({REQUEUE_EXIT_CODE}))",
        f"open({str(tmp_path / 'ready')!r}, 'w').close()",
        "time.sleep(60)",
    )
    launcher = script(tmp_path / "launcher.py", f"sys.exit(subprocess.run({rank!r}).returncode)")
    supervised = start(tmp_path, launcher)
    wait_for(tmp_path / "ready")
    supervised.send_signal(signal.SIGTERM)
    output, _ = supervised.communicate(timeout=TIMEOUT_S)
    assert supervised.returncode == REQUEUE_EXIT_CODE, output
    assert "goes on from there" in output


def test_what_a_dead_launcher_leaves_behind_is_killed(tmp_path: Path) -> None:
    orphan = script(tmp_path / "orphan.py", "time.sleep(600)")
    launcher = script(
        tmp_path / "launcher.py",
        f"orphan = subprocess.Popen({orphan!r})",
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(orphan.pid))",
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    supervised = start(tmp_path, launcher, "--max-restarts-without-progress", "0")
    # The orphan holds the pipe: this returns when it is gone.
    output, _ = supervised.communicate(timeout=TIMEOUT_S)
    assert supervised.returncode == 128 + signal.SIGKILL, output
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_command_is_needed(tmp_path: Path) -> None:
    answer = small_runs.run_cli(["supervise", "--pause", "1"], datasets_cache=tmp_path)
    assert answer.status == 2
    assert "no command" in answer.stderr


@pytest.mark.slow
def test_a_supervised_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """It dies before its first checkpoint, and once more after it; then it comes to its end."""
    small_runs.save_model_folder(tmp_path / "model")
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(tmp_path / "model", undisturbed / "model")
    chain_worker.train(undisturbed, report_to="none")
    supervised = start(
        tmp_path, [sys.executable, "-m", "tests.cluster.chain_worker", str(tmp_path), "1:1", "2:5"]
    )
    output, _ = supervised.communicate(timeout=3 * TIMEOUT_S)
    assert supervised.returncode == 0, output
    assert "restart 1, from no checkpoint" in output
    assert "restart 2, from checkpoint-4" in output

    run = tmp_path / "run"
    assert (
        list(differences(torch.load(undisturbed / "trained.pt"), torch.load(tmp_path / "trained.pt"))) == []
    )
    assert numbers(run) == numbers(undisturbed / "run")
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert verify(run / f"checkpoint-{STEPS}") == []
    # One W&B run: its three starts have written three folders under one id.
    folders = [path.name for path in (run / "wandb").glob("offline-run-*")]
    run_id = json.loads((run / "wandb_run.json").read_text())["id"]
    assert len(folders) == 3
    assert {name.rpartition("-")[2] for name in folders} == {run_id}
