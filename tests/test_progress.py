"""Progress in a log file: a line now and then; nothing on other ranks, or with `disable_tqdm`."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from tqdm.auto import tqdm

from orpo_ds import progress
from orpo_ds.monitor.bars import of_libraries
from tests import small_runs

LINE = re.compile(r"(Training|Evaluating): +(\d+)% (\d+)/(\d+) \[")


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each step took half a minute."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "WORTH_SHOWING_SECONDS", 0.0)


def run(folder: Path, **changes: Any) -> None:
    trainer = small_runs.trainer(
        folder / "run",
        disable_tqdm=False,
        eval_dataset=small_runs.dataset(3),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=1,
        save_strategy="steps",
        save_steps=2,
        max_steps=4,
        **changes,
    )
    trainer.train()


@pytest.mark.usefixtures("every_line")
def test_a_log_file_gets_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    run(tmp_path)
    text = capfd.readouterr().err
    assert "\r" not in text
    found = [match.groups() for line in text.splitlines() if (match := LINE.match(line))]
    training = [(int(done), int(total)) for kind, _, done, total in found if kind == "Training"]
    assert training[:4] == [(step, 4) for step in range(1, 5)]
    evaluating = [int(done) for kind, _, done, _ in found if kind == "Evaluating"]
    assert evaluating[:3] == [1, 2, 3]
    for work in ("Tokenising", "Saving checkpoint-2", "Saving checkpoint-4"):
        assert re.search(rf"^{work}: done in \d+ s$", text, re.MULTILINE), work


def test_a_fast_run_writes_no_line_a_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "WORTH_SHOWING_SECONDS", 600.0)  # this machine may be slow
    run(tmp_path)
    assert not [line for line in capfd.readouterr().err.splitlines() if LINE.match(line)]


@pytest.mark.usefixtures("every_line")
def test_disable_tqdm_leaves_no_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = small_runs.trainer(tmp_path / "run", disable_tqdm=True, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    text = capfd.readouterr().err
    assert "\r" not in text
    assert not re.search(r"\d+/\d+ \[|Tokenising|Saving|Gathering", text)


@pytest.mark.usefixtures("every_line")
def test_the_bars_of_libraries_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    progress.show(True)
    was = datasets.is_progress_bar_enabled()
    with of_libraries("Dividing"):
        assert not datasets.is_progress_bar_enabled()
    assert datasets.is_progress_bar_enabled() == was
    assert capfd.readouterr().err.splitlines()[-1] == "Dividing: done in 0 s"


def test_long_work_says_so_before_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WORTH_SHOWING_SECONDS", 0.01)
    # Read while another thread writes, which pytest's own captures are not made for.
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress.show(True)
    began = time.monotonic()
    with progress.timed("Saving"):
        while "\n" not in sys.stderr.getvalue() and time.monotonic() - began < 30:
            time.sleep(0.001)
        assert sys.stderr.getvalue() == "Saving …\n"
    assert re.fullmatch(r"Saving …\nSaving: done in \d+ s\n", sys.stderr.getvalue())


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    progress.show(True)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress.bar(range(3), total=3, desc="Reading") as shown:
            assert isinstance(shown, tqdm)
            assert not shown.disable
        with progress.bar(range(3), total=3, desc="Reading", shown=False) as hidden:
            assert hidden.disable
    os.close(ours)


def test_lines_are_apart_in_time(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    clock = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    with progress.Lines(total=100, desc="Reading", seconds=30.0, unit="B", unit_scale=True) as lines:
        for _ in range(100):
            clock += 1.0
            lines.update(1)
    written = capfd.readouterr().err.splitlines()
    assert [float(line.split("/")[0].split()[-1]) for line in written] == [30, 60, 90, 100]
