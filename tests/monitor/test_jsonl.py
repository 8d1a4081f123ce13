"""metrics.jsonl: valid JSON, each step once, nothing lost, whatever the disk does."""

from __future__ import annotations

import json
import logging
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from orpo_ds.monitor.jsonl import MetricsFile, read_metrics


def entries(*steps: int, run: str = "first") -> list[dict[str, object]]:
    return [{"step": step, "loss": 1 / step, "run": run} for step in steps]


def write(file: MetricsFile, lines: list[dict[str, object]]) -> None:
    for line in lines:
        file.append(line)


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    for number, entry in enumerate(entries(10, 20, 30), start=1):
        file.append(entry)
        assert read_metrics(file.path) == entries(10, 20, 30)[:number]


def test_what_json_lacks_is_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.append(
        {"step": 1, "loss": math.nan, "grad_norm": math.inf, "nested": [{"low": -math.inf}], "ok": 0.5}
    )

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    (line,) = file.path.read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "nested": [{"low": None}],
        "ok": 0.5,
    }


def test_after_a_resume_each_step_is_there_once(tmp_path: Path) -> None:
    write(MetricsFile(tmp_path), entries(10, 20, 30, 40))
    resumed = MetricsFile(tmp_path)
    resumed.rewind(20, entries(10, 20))
    write(resumed, entries(30, 40, 50, run="second"))
    assert read_metrics(resumed.path) == entries(10, 20) + entries(30, 40, 50, run="second")
    assert read_metrics(tmp_path / "metrics.superseded.jsonl") == entries(30, 40)

    again = MetricsFile(tmp_path)
    again.rewind(40, entries(40, run="second"))
    assert read_metrics(tmp_path / "metrics.superseded.jsonl") == entries(30, 40) + entries(50, run="second")


def test_a_line_that_a_crash_cut_off_is_taken_back(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    write(file, entries(10, 20))
    with file.path.open("a") as torn:
        torn.write('{"step": 30, "lo')
    assert read_metrics(file.path) == entries(10, 20)
    file.rewind(20, entries(10, 20))
    write(file, entries(30))
    assert read_metrics(file.path) == entries(10, 20, 30)
    assert (tmp_path / "metrics.superseded.jsonl").read_text() == '{"step": 30, "lo\n'


def test_a_resume_at_the_end_changes_nothing(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.rewind(20, [])
    write(file, entries(10, 20))
    before = file.path.read_bytes()
    file.rewind(20, entries(10, 20))
    assert file.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_evaluation_after_the_save_of_its_step_is_taken_back(tmp_path: Path) -> None:
    """The resumed run evaluates again, because its checkpoint does not know that it was done."""
    file = MetricsFile(tmp_path)
    write(file, [*entries(10, 20), {"step": 20, "eval_loss": 1.0}])
    file.rewind(20, entries(10, 20))
    assert read_metrics(file.path) == entries(10, 20)


@pytest.fixture
def tiny_disk(disk_of: Callable[[str], Path]) -> Path:
    """A file system of 64 KiB."""
    return disk_of("64k")


def test_a_full_disk_is_said_once_and_loses_no_line(
    tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = MetricsFile(tiny_disk)
    lines = [{"step": step, "text": "x" * 500} for step in range(1, 301)]
    with caplog.at_level(logging.WARNING):
        write(file, lines[:150])
        write(file, lines[150:200])
        on_disk = read_metrics(file.path)
        assert on_disk == lines[: len(on_disk)]
        assert len(on_disk) < 200, "the disk never was full"
        assert file.path.read_text().endswith("\n"), "half a line was left"
    assert sum("training goes on" in record.getMessage() for record in caplog.records) == 1
    subprocess.run(["mount", "-o", "remount,size=1m", str(tiny_disk)], check=True)
    write(file, lines[200:])
    assert read_metrics(file.path) == lines
