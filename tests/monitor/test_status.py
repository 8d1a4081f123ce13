"""`orpo-ds status`: what it says of runs that go on, ended, failed, were killed, or never wrote anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import TrainerCallback

from orpo_ds import cli
from orpo_ds.checkpoint import CheckpointStore, one_rank
from orpo_ds.monitor.run_state import RunState, is_alive, read_run_state
from orpo_ds.monitor.status import duration, sparkline
from tests import small_runs
from tests.checkpoint.folders import metadata, writer


def status(run_dir: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    cli.main(["status", str(run_dir), *flags])
    return capsys.readouterr().out


def as_json(run_dir: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(status(run_dir, "--json", *flags, capsys=capsys))
    return found


def state_of(**changes: Any) -> RunState:
    """A run of this very process."""
    now = time.time()
    run = RunState(
        state="running",
        step=40,
        total_steps=100,
        host=os.uname().nodename,
        pid=os.getpid(),
        process_started=psutil.Process().create_time(),
        world_size=2,
        started=now,
        first_step=0,
        updated=now,
    )
    return replace(run, **changes)


def write_run(run_dir: Path, run: RunState | None, entries: list[dict[str, Any]], *, tail: str = "") -> Path:
    run_dir.mkdir()
    if run is not None:
        (run_dir / "run.json").write_text(json.dumps(asdict(run)))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)
    return run_dir


def entry(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step / 50, "loss": 3.0 - step / 100, "step_time_s": 2.0, **changes}


def test_a_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    trainer = small_runs.trainer(
        run, save_strategy="steps", save_steps=2, eval_dataset=small_runs.dataset(3), eval_strategy="epoch"
    )
    trainer.train()
    found = as_json(run, "--verify", capsys=capsys)
    assert (found["phase"], found["step"], found["total_steps"], found["error"]) == ("finished", 2, 2, None)
    assert found["checkpoint"] == {"name": "checkpoint-2", "problems": [], "hashed": True}
    last = [item for item in trainer.state.log_history if "grad_norm" in item][-1]
    assert found["figures"]["loss"] == last["loss"]
    text = status(run, capsys=capsys)
    assert "finished" in text
    assert f"{last['loss']:.4f}" in text
    assert "checkpoint-2: all files are there" in text


def test_a_failed_run_says_why_and_no_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no luck with hf_FAKEFAKEFAKEFAKEFAKEFAKE")

    trainer = small_runs.trainer(tmp_path / "run", callbacks=[Fails()])
    with pytest.raises(RuntimeError, match="no luck"):
        trainer.train()
    found = as_json(tmp_path / "run", capsys=capsys)
    assert found["phase"] == "failed"
    assert found["error"] == "RuntimeError: no luck with <redacted>"


def test_a_killed_run_is_dead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = psutil.Process(child.pid).create_time()
    run = write_run(tmp_path / "run", state_of(pid=child.pid, process_started=began), [entry(40)])
    assert as_json(run, capsys=capsys)["phase"] == "running"
    child.kill()
    child.wait()
    assert as_json(run, capsys=capsys)["phase"] == "dead"
    assert "--resume_from_checkpoint true" in status(run, capsys=capsys)


def test_another_process_of_that_number_is_not_the_run() -> None:
    assert is_alive(state_of(), now=time.time())
    assert not is_alive(state_of(process_started=psutil.Process().create_time() - 3600), now=time.time())


def test_on_another_host_silence_decides() -> None:
    run = state_of(host="elsewhere", updated=1000.0, pause=600.0)
    assert is_alive(run, now=1000.0 + 5 * 600 - 1)
    assert not is_alive(run, now=1000.0 + 5 * 600 + 1)
    assert is_alive(replace(run, pause=0.0), now=1000.0 + 299)


def test_the_time_left_is_that_of_the_steps_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", state_of(), [entry(step) for step in range(10, 41, 10)])
    assert as_json(run, capsys=capsys)["seconds_left"] == 60 * 2.0
    assert "step 40 of 100 (40%)" in status(run, capsys=capsys)


def test_a_torn_last_line_and_a_resume_are_nothing_special(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [entry(10), entry(20), {"step": 20, "epoch": 0.4, "eval_loss": 2.5}, entry(30, loss=None)]
    run = write_run(tmp_path / "run", state_of(step=30, first_step=20), entries, tail='{"step": 40, "lo')
    found = as_json(run, capsys=capsys)
    assert (found["step"], found["figures"]["loss"], found["figures"]["eval_loss"]) == (30, 2.8, 2.5)
    assert "not finite" in status(run, capsys=capsys)


def test_a_run_without_metrics_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", state_of(step=0), [])
    assert "no metrics yet" in status(run, capsys=capsys)
    (run / "metrics.jsonl").unlink()
    assert as_json(run, capsys=capsys)["phase"] == "running"
    (run / "run.json").unlink()
    (run / "metrics.jsonl").write_text(json.dumps(entry(10)) + "\n")
    assert as_json(run, capsys=capsys)["phase"] == "unknown"


def test_a_broken_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", state_of(), [entry(10)])
    folder = CheckpointStore(run, save_total_limit=None, ranks=one_rank()).save(writer(), metadata(10))
    victim = max(
        (path for path in folder.rglob("*") if path.name != "manifest.json"), key=lambda p: p.stat().st_size
    )
    content = victim.read_bytes()
    victim.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert as_json(run, capsys=capsys)["checkpoint"]["problems"] == []  # the sizes are right
    (problem,) = as_json(run, "--verify", capsys=capsys)["checkpoint"]["problems"]
    assert problem.startswith(victim.relative_to(folder).as_posix())
    victim.write_bytes(content[:-1])
    assert f"{folder.name} is not good" in status(run, capsys=capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "nowhere"], r"nowhere: there is no such folder"),
        (["status", "."], r"\. is not the output_dir of a run: .* There are runs in it: run\."),
        (["plot", "run", "--output", "curves.jpg"], r"--output curves.jpg: end its name with \.png"),
        (["plot", "run"], r"run has no metrics yet"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    write_run(tmp_path / "run", None, [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == cli.USAGE_ERROR
    assert re.search(message, capsys.readouterr().err)


def test_a_run_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        read_run_state(tmp_path)


def test_following_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", state_of(state="finished", step=100), [entry(100)])
    assert "finished" in status(run, "--follow", capsys=capsys)


def test_small_words() -> None:
    assert [duration(value) for value in (7, 360, 4 * 3600 + 300, 2 * 86400 + 3 * 3600)] == [
        "7 s",
        "6 min",
        "4 h 05 min",
        "2 d 3 h",
    ]
    assert sparkline([1.0, 2.0, 3.0, 8.0]) == "▁▂▃█"
    assert sparkline([5.0] * 3) == sparkline([]) == ""
    assert sparkline([float(value) for value in range(800)], width=8) == "▁▂▃▄▅▆▇█"


def test_status_waits_for_no_large_library(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", state_of(), [entry(10)])
    CheckpointStore(run, save_total_limit=None, ranks=one_rank()).save(writer(), metadata(10))
    script = (
        f"import sys; from orpo_ds import cli; cli.main(['status', {str(run)!r}]); "
        "print([name for name in ('datasets', 'deepspeed', 'transformers', 'wandb') if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=small_runs.REPOSITORY
    )
    assert answer.stdout.splitlines()[-1] == "[]"
