"""`orpo-ds status RUN`: how a run stands, from the files in its output folder alone.

It works for a run that is going on, that has ended, that failed, and that was killed, from any host that sees the
folder. `--follow` looks again every few seconds until the run is over.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orpo_ds.monitor.history import History, find_run, read_history
from orpo_ds.monitor.run_state import RunState, is_alive, read_run_state

Phase = Literal["running", "finished", "preempted", "failed", "dead", "unknown"]

COLORS: dict[Phase, str] = {
    "running": "green",
    "finished": "blue",
    "preempted": "yellow",
    "failed": "red",
    "dead": "red",
    "unknown": "yellow",
}
# Metric, its label, and how its numbers are written.
ROWS = (
    ("loss", "loss", ".4f"),
    ("nll_loss", "nll a token", ".4f"),
    ("rewards/accuracies", "accuracy", ".1%"),
    ("rewards/margins", "margin", ".4f"),
    ("log_odds_chosen", "log odds", ".4f"),
    ("grad_norm", "gradient norm", ".3g"),
    ("learning_rate", "learning rate", ".3g"),
    ("tokens_per_s", "tokens/s", ",.0f"),
    ("pairs_per_s", "pairs/s", ",.2f"),
    ("step_time_s", "seconds a step", ",.2f"),
    ("peak_memory_mib", "peak memory MiB", ",.0f"),
    ("skipped_steps", "skipped steps", ",.0f"),
)
BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 24
RECENT = 10  # logs that the speed is taken from
EVERY_SECONDS = 2.0


@dataclass(frozen=True)
class Checkpoint:
    """The newest checkpoint.

    Attributes:
        name: of its folder.
        problems: what is wrong with it; empty for a good one.
        hashed: whether every byte was compared with the manifest, or the sizes only.
    """

    name: str
    problems: list[str]
    hashed: bool


@dataclass(frozen=True)
class Status:
    """How a run stands.

    Attributes:
        run_dir: of the run.
        phase: what it is doing.
        step: optimizer steps done.
        total_steps: of the training; None where no `run.json` says it.
        epoch: None before the first log.
        seconds_left: of training steps, without evaluations and saves; None where unknown or over.
        figures: the newest value of every metric.
        checkpoint: the newest; None before the first.
        error: what the run failed with.
        seconds_silent: since the last sign of life.
    """

    run_dir: str
    phase: Phase
    step: int
    total_steps: int | None
    epoch: float | None
    seconds_left: float | None
    figures: dict[str, float]
    checkpoint: Checkpoint | None
    error: str | None
    seconds_silent: float | None


def read_status(run_dir: Path, history: History, *, now: float, verify: bool) -> Status:
    """Look at a run once.

    Args:
        run_dir: of the run.
        history: its metrics.
        now: seconds since 1970.
        verify: read the newest checkpoint whole and compare it with its manifest.
    """
    run = read_run_state(run_dir)
    steps, times = history.series("step_time_s")
    step = max([*steps[-1:], run.step if run else 0], default=0)
    phase = _phase(run, now=now)
    left = None
    if run is not None and phase == "running" and times:
        recent = times[-RECENT:]
        left = max(run.total_steps - step, 0) * sum(recent) / len(recent)
    names = {name for entry in history.entries for name in entry}
    return Status(
        run_dir=str(run_dir),
        phase=phase,
        step=step,
        total_steps=run.total_steps if run else None,
        epoch=history.last("epoch"),
        seconds_left=left,
        figures={name: value for name in sorted(names) if (value := history.last(name)) is not None},
        checkpoint=newest_checkpoint(run_dir, verify=verify),
        error=run.error if run else None,
        seconds_silent=max(now - run.updated, 0.0) if run else None,
    )


def _phase(run: RunState | None, *, now: float) -> Phase:
    if run is None:
        return "unknown"
    return "dead" if run.state == "running" and not is_alive(run, now=now) else run.state


def newest_checkpoint(run_dir: Path, *, verify: bool) -> Checkpoint | None:
    """The newest `checkpoint-<step>` of a run, and whether it can be trusted."""
    from orpo_ds.checkpoint import manifest, store

    folders = store.numbered_folders(run_dir)
    if not folders:
        return None
    check = manifest.verify if verify else manifest.problems_by_size
    return Checkpoint(folders[0].name, check(folders[0]), hashed=verify)


def render(status: Status, history: History) -> RenderableType:
    """The status as a panel for a terminal."""
    color = COLORS[status.phase]
    parts: list[RenderableType] = [_headline(status, color)]
    if status.total_steps:
        parts.append(ProgressBar(total=status.total_steps, completed=status.step, complete_style=color))
    parts.append(_figures(history) if history.entries else Text("no metrics yet", style="dim"))
    parts.append(_checkpoint_line(status.checkpoint))
    if status.error is not None:
        parts.append(Text(status.error, style="red"))
    if status.phase == "preempted":
        parts.append(
            Text("A signal stopped it, and it was saved. Continue it with --resume_from_checkpoint true.")
        )
    if status.phase == "dead":
        parts.append(
            Text(
                "Its process is gone, and it neither finished nor said why: killed, or the machine went down. "
                "Continue it with --resume_from_checkpoint true.",
                style="red",
            )
        )
    return Panel(Group(*parts), title=status.run_dir, title_align="left", border_style=color, padding=(0, 1))


def _headline(status: Status, color: str) -> Text:
    text = Text()
    text.append(f"● {status.phase}", style=f"bold {color}")
    text.append(f"   step {status.step:,}")
    if status.total_steps:
        text.append(f" of {status.total_steps:,} ({status.step / status.total_steps:.0%})")
    if status.epoch is not None:
        text.append(f"   epoch {status.epoch:.2f}")
    if status.seconds_left is not None:
        text.append(f"   {duration(status.seconds_left)} left")
    if status.seconds_silent is not None and status.phase in ("running", "dead"):
        text.append(f"   last sign {duration(status.seconds_silent)} ago", style="dim")
    return text


def _figures(history: History) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    table.add_column("last", justify="right")
    table.add_column("so far")
    sets = [name.removesuffix("_loss") for name in history.evaluation_names("loss")]
    sets = [name for name in sets if not name.endswith("_nll")]
    for name in sets:
        table.add_column(name.replace("_", " ", 1), justify="right")
    for name, label, spec in ROWS:
        _, values = history.series(name)
        evaluated = [history.last(f"{prefix}_{name}") for prefix in sets]
        if not values and not any(value is not None for value in evaluated):
            continue
        last = format(values[-1], spec) if values else ""
        if history.gaps(name)[-1:] and (not values or history.gaps(name)[-1] > history.series(name)[0][-1]):
            last = "not finite"
        table.add_row(
            label,
            last,
            sparkline(values),
            *("" if value is None else format(value, spec) for value in evaluated),
        )
    return table


def _checkpoint_line(checkpoint: Checkpoint | None) -> Text:
    if checkpoint is None:
        return Text("no checkpoint yet", style="dim")
    if checkpoint.problems:
        more = f" (and {len(checkpoint.problems) - 1} more)" if len(checkpoint.problems) > 1 else ""
        return Text(f"{checkpoint.name} is not good: {checkpoint.problems[0]}{more}", style="red")
    how = "every byte is as written" if checkpoint.hashed else "all files are there, in their sizes"
    return Text(f"{checkpoint.name}: {how}")


def sparkline(values: Sequence[float], *, width: int = SPARK_WIDTH) -> str:
    """A curve of at most `width` characters, from the lowest value to the highest; nothing if they are all the same."""
    if not values:
        return ""
    count = min(len(values), width)
    edges = [len(values) * number // count for number in range(count + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return ""
    scale = (len(BLOCKS) - 1) / (high - low)
    return "".join(BLOCKS[round((value - low) * scale)] for value in means)


def duration(seconds: float) -> str:
    """`2 d 3 h`, `4 h 05 min`, `6 min`, `7 s`."""
    whole = round(seconds)
    if whole >= 86_400:
        return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min" if whole >= 60 else f"{whole} s"


def main(words: Sequence[str]) -> None:
    """Show how a run stands.

    Args:
        words: the command's arguments.

    Raises:
        ValueError: there is no run.
    """
    parser = argparse.ArgumentParser(prog="orpo-ds status", description="Show how a run stands.")
    parser.add_argument("run", help="output_dir of the run")
    parser.add_argument("--follow", action="store_true", help="look again until the run is over")
    parser.add_argument(
        "--verify", action="store_true", help="read the newest checkpoint whole and compare its hashes"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(list(words))
    run_dir = find_run(options.run)

    def look() -> tuple[Status, History]:
        history = read_history(run_dir)
        return read_status(run_dir, history, now=time.time(), verify=options.verify), history

    status, history = look()
    if options.json:
        print(json.dumps(asdict(status)))
        return
    console = Console()
    if not options.follow:
        console.print(render(status, history))
        return
    with Live(render(status, history), console=console, auto_refresh=False) as live:
        try:
            while status.phase in ("running", "unknown"):
                time.sleep(EVERY_SECONDS)
                status, history = look()
                live.update(render(status, history), refresh=True)
        except KeyboardInterrupt:  # how one stops looking
            return
