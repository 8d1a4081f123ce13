"""`orpo-ds plot RUN [RUN…]`: curves of one or several runs as a PNG or SVG, from their `metrics.jsonl`.

One panel a question, the same in every picture: does it learn (loss), does it prefer what it should (accuracy, margin,
log odds), is it stable (gradient norm), is it fast (tokens a second). Runs keep their colour over all panels;
evaluations are points on a dashed line.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_ds.monitor.history import History, find_run, read_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT_OUTPUT = "plot.png"
FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind readers can tell apart, darkest first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SMOOTH_FROM = 30  # points; fewer are drawn as they are


@dataclass(frozen=True)
class PanelPlan:
    """One question, one panel.

    Attributes:
        metric: its name in `metrics.jsonl`; evaluations are `eval_<metric>`.
        title: what it tells.
        unit: of the vertical axis.
        scale: factor to that unit.
        zero: draw the line where nothing is preferred; None without such a line.
        from_zero: begin the axis at 0, so that heights compare.
    """

    metric: str
    title: str
    unit: str
    scale: float = 1.0
    zero: float | None = None
    from_zero: bool = False


PANELS = (
    PanelPlan("loss", "Loss", "nats"),
    PanelPlan("rewards/accuracies", "Accuracy: chosen before rejected", "% of pairs", scale=100.0, zero=50.0),
    PanelPlan("rewards/margins", "Reward margin, β × Δ mean log-prob", "β × nats a token", zero=0.0),
    PanelPlan("log_odds_chosen", "Log odds ratio, chosen over rejected", "nats", zero=0.0),
    PanelPlan("tokens_per_s", "Throughput", "1,000 tokens / s", scale=1e-3, from_zero=True),
    PanelPlan("grad_norm", "Gradient norm before clipping", "norm"),
)


def main(words: Sequence[str]) -> None:
    """Draw the curves of runs.

    Args:
        words: the command's arguments.

    Raises:
        ValueError: a run that is not there or has no metrics, a picture format that is unknown, or no matplotlib.
    """
    parser = argparse.ArgumentParser(prog="orpo-ds plot", description="Draw the curves of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run")
    parser.add_argument(
        "--output",
        default=DEFAULT_OUTPUT,
        help=f"picture to write, {' or '.join(FORMATS)} (default: %(default)s)",
    )
    options = parser.parse_args(list(words))
    output = Path(options.output).expanduser()
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"--output {options.output}: end its name with {' or '.join(FORMATS)}.")
    histories = [read_history(find_run(run)) for run in options.runs]
    for history in histories:
        if not history.entries:
            raise ValueError(
                f"{history.run_dir} has no metrics yet: nothing to draw. Try again after a logging step."
            )
    draw(histories, output)
    print(output)


def draw(histories: Sequence[History], output: Path) -> None:
    """Write the picture.

    Args:
        histories: of the runs, each with entries.
        output: file whose ending says the format; its folder is made.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError("orpo-ds plot needs matplotlib: run `pip install orpo-ds[plot]`.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "svg.fonttype": "none",
    }
    with pyplot.rc_context(style):
        figure, grid = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained", sharex=True)
        for place, (axes, plan) in enumerate(zip(grid.flat, PANELS, strict=True)):
            _panel(axes, plan, histories, bottom=place >= 3)
        handles, labels = _legend(histories)
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(handles), 5), frameon=False)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
        pyplot.close(figure)


def _panel(axes: Axes, plan: PanelPlan, histories: Sequence[History], *, bottom: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(plan.title)
    axes.set_ylabel(plan.unit)
    if bottom:
        axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn = False
    for number, history in enumerate(histories):
        color = COLORS[number % len(COLORS)]
        steps, values = history.series(plan.metric)
        scaled = [value * plan.scale for value in values]
        drawn |= bool(values)
        if len(scaled) >= SMOOTH_FROM:
            axes.plot(steps, scaled, color=color, alpha=0.2, linewidth=0.8)
            axes.plot(steps, smoothed(scaled), color=color, linewidth=1.8)
        else:
            axes.plot(steps, scaled, color=color, linewidth=1.8, marker="." if len(scaled) == 1 else None)
        for step in history.gaps(plan.metric):  # NaN or infinite
            axes.axvline(step, color=color, linewidth=0.8, linestyle=":")
        for name in history.evaluation_names(plan.metric):
            # `nll_loss` ends in `_loss` as well; its evaluation is not that of the loss.
            if plan.metric == "loss" and name.endswith("_nll_loss"):
                continue
            steps, values = history.series(name)
            scaled = [value * plan.scale for value in values]
            axes.plot(steps, scaled, color=color, linewidth=1, linestyle="--", marker="o", markersize=4)
            drawn |= bool(values)
    if not drawn:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="#888888")
    elif plan.zero is not None:
        axes.axhline(plan.zero, color="#888888", linewidth=0.8)
    axes.margins(x=0.02)
    if plan.from_zero:
        axes.set_ylim(bottom=0)


def _legend(histories: Sequence[History]) -> tuple[list[Any], list[str]]:
    """A line for each run, and what solid and dashed mean."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLORS[number % len(COLORS)], linewidth=2.5) for number in range(len(histories))
    ]
    labels = run_labels([history.run_dir for history in histories])
    handles.append(Line2D([], [], color="#555555", linewidth=1.8))
    labels.append("training")
    if any(history.evaluation_names("loss") for history in histories):
        handles.append(Line2D([], [], color="#555555", linewidth=1, linestyle="--", marker="o", markersize=4))
        labels.append("evaluation")
    return handles, labels


def run_labels(folders: Sequence[Path]) -> list[str]:
    """Short names of the runs: what their paths do not share."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < 2:
        return [folder.name for folder in resolved]
    shared = os.path.commonpath(resolved)
    return [os.path.relpath(folder, shared) for folder in resolved]


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the points, centred, with shorter windows at the ends."""
    reach = max(len(values) // 40, 1)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for place in range(len(values)):
        # As far to the left as to the right, or the ends would lean.
        half = min(reach, place, len(values) - 1 - place)
        means.append((sums[place + half + 1] - sums[place - half]) / (2 * half + 1))
    return means
