"""`orpo-ds plot`: the curves of `metrics.jsonl`, all runs, train and evaluation, in PNG and SVG."""

from __future__ import annotations

import json
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from orpo_ds import cli
from orpo_ds.monitor.history import read_history
from orpo_ds.monitor.plot import PANELS, run_labels, smoothed


def write_run(run_dir: Path, entries: list[dict[str, Any]], *, tail: str = "") -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)
    return run_dir


def entries(steps: int) -> list[dict[str, Any]]:
    trained = [
        {"step": step, **{plan.metric: 1.0 + number + 1 / step for number, plan in enumerate(PANELS)}}
        for step in range(1, steps + 1)
    ]
    return [*trained, {"step": steps, "eval_loss": 1.5, "eval_nll_loss": 99.0}]


def texts(path: Path) -> list[str]:
    """The words in an SVG."""
    tree = ElementTree.parse(path)
    return ["".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_several_runs_in_one_svg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "sweep" / "beta01", entries(5), tail='{"step": 6, "lo')
    second = write_run(tmp_path / "sweep" / "beta03", entries(80))
    output = tmp_path / "pictures" / "curves.svg"
    cli.main(["plot", str(first), str(second / "metrics.jsonl"), "--output", str(output)])
    assert capsys.readouterr().out.strip() == str(output)
    words = texts(output)
    for word in ("beta01", "beta03", "training", "evaluation", "optimizer step"):
        assert word in words
    for plan in PANELS:
        assert plan.title in words
        assert plan.unit in words


def test_a_png_has_the_curve_where_it_belongs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", entries(200))
    cli.main(["plot", str(run), "--output", str(tmp_path / "curves.png")])
    pixels = image.imread(tmp_path / "curves.png")[..., :3]
    height, width, _ = pixels.shape
    assert width > height > 500
    blue = (abs(pixels - [0.0, 0x72 / 255, 0xB2 / 255]) < 0.02).all(axis=-1)
    for row in range(2):
        for column in range(3):
            panel = blue[
                row * height // 2 : (row + 1) * height // 2, column * width // 3 : (column + 1) * width // 3
            ]
            assert panel.sum() > 100, f"nothing is drawn in panel {row}, {column}"


def test_series_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        [
            {"step": 1, "loss": 2.0},
            {"step": 2, "loss": None},
            {"step": 2, "eval_math_loss": 1.0},
            {"step": 3, "loss": 1.0},
        ],
    )
    history = read_history(run)
    assert history.series("loss") == ([1, 3], [2.0, 1.0])
    assert history.gaps("loss") == [2]
    assert history.evaluation_names("loss") == ["eval_math_loss"]


def test_the_smoothed_curve_is_a_centred_mean() -> None:
    values = [float(number % 7) for number in range(100)]
    found = smoothed(values)
    assert found[50] == pytest.approx(statistics.fmean(values[48:53]))
    assert (found[0], found[-1]) == (values[0], values[-1])
    assert smoothed([float(number) for number in range(90)]) == pytest.approx(list(range(90)))


def test_labels_are_what_paths_do_not_share(tmp_path: Path) -> None:
    assert run_labels([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert run_labels([tmp_path / "one"]) == ["one"]
