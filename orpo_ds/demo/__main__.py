"""`python -m orpo_ds.demo`: train SmolLM2-135M on the project's own preference pairs, and show what changed.

The training is the command that users type (`deepspeed --module orpo_ds train --config …`) on two ranks, under ZeRO-3
with offload to the CPU. Held-out figures before and after come from the run's own `metrics.jsonl`; the answers come
from the two model folders.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from orpo_ds.demo.answers import answers
from orpo_ds.demo.model import smollm2_folder

CONFIG = Path("demo/run.yaml")
RANKS = 2
# Held-out questions, on topics that the training pairs do not touch.
QUESTIONS = (
    "How do I keep warm in a tent?",
    "How do I find the North Star?",
    "How do I clean a paint brush?",
)
ANSWER_TOKENS = 48
FIGURES = {
    "eval_rewards/accuracies": "chosen preferred (accuracy)",
    "eval_rewards/margins": "margin of the rewards",
    "eval_loss": "ORPO loss",
}


def main() -> None:
    """Convert, train, compare; at most a few minutes on two cores."""
    console = Console(highlight=False)
    started = time.monotonic()
    torch.set_num_threads(threads())
    if not CONFIG.is_file():
        raise SystemExit(f"{CONFIG} was not found: run the demo from a checkout's root, with `make demo`.")
    compiling = start_compiling()
    console.rule("SmolLM2-135M-Instruct")
    base = smollm2_folder()
    console.print(f"model folder: {base}")

    console.rule("ORPO under ZeRO-3 with CPU offload, two ranks")
    command = train_command(base)
    console.print(shlex.join(command), soft_wrap=True)
    status = subprocess.run(command, check=False, env=training_environment()).returncode
    compiling.wait()
    if status != 0:
        raise SystemExit(f"The training ended with status {status}; what went wrong stands above.")

    trained = Path(yaml.safe_load(CONFIG.read_text())["output_dir"])
    console.rule("Before and after")
    console.print(held_out_table(trained / "metrics.jsonl"))
    console.print(answer_table(base, trained))
    console.print(whereabouts(trained), soft_wrap=True)
    console.print(f"\n[dim]{time.monotonic() - started:.0f} s from start to end.[/dim]")


def start_compiling() -> subprocess.Popen[bytes]:
    """Compile DeepSpeed's C++ ops while the model is converted; the ranks wait for what is not ready by then."""
    script = "from orpo_ds import native_ops as ops; ops.ready_for_ranks(); ops.ready(ops.CPU_ADAM)"
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def train_command(model: Path) -> list[str]:
    """The launch of the training: the one that the README gives, with a free port."""
    ranks = min(RANKS, torch.cuda.device_count()) if torch.cuda.is_available() else RANKS
    launcher = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        str(ranks),
        "--log_level",
        "warning",
    ]
    return [
        *launcher,
        *("--master_port", str(free_port())),
        *("--module", "orpo_ds", "train", "--config", str(CONFIG)),
        *("--model_name_or_path", str(model)),
    ]


def training_environment() -> dict[str, str]:
    """This process's environment, with one core a rank and a W&B run that needs no account."""
    defaults = {
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",  # DeepSpeed calls collectives by names that torch is renaming
    }
    # DeepSpeed compiles its CPU optimizer with the ninja that was installed beside this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**defaults, "OMP_NUM_THREADS": str(threads()), **os.environ, "PATH": path}


def threads() -> int:
    """Threads of one process: a rank's share of the cores, which leaves one for whatever else runs."""
    return max(1, (os.cpu_count() or 1) // RANKS)


def held_out_table(metrics: Path) -> Table:
    """The first and the last evaluation of a run, side by side."""
    entries: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    before, after = evaluations[0], evaluations[-1]
    table = Table(title="Held-out pairs, on topics that were not trained on", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column(f"after {after['step']} steps", justify="right")
    for name, label in FIGURES.items():
        table.add_row(label, f"{before[name]:.3f}", f"[bold]{after[name]:.3f}[/bold]")
    return table


def answer_table(base: Path, trained: Path) -> Table:
    """What both models answer to the same questions."""
    table = Table(title="Answers (greedy)", title_justify="left", show_lines=True)
    for heading in ("question", "before", "after"):
        table.add_column(heading, ratio=1 if heading == "question" else 3)
    columns = [answers(folder, QUESTIONS, max_new_tokens=ANSWER_TOKENS) for folder in (base, trained)]
    for row in zip(QUESTIONS, *columns, strict=True):
        table.add_row(*row)
    return table


def whereabouts(trained: Path) -> str:
    """Where everything lies, and how to go on."""
    runs = sorted((trained / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    dashboard = f"{runs[-1]}   (wandb sync sends it to your account)" if runs else "on your W&B account"
    return "\n".join(
        [
            f"model folder   {trained}   (AutoModelForCausalLM.from_pretrained loads it)",
            f"metrics        {trained / 'metrics.jsonl'}",
            f"W&B run        {dashboard}",
            "",
            "Train on your own data, a JSONL file with prompt, chosen and rejected:",
            "",
            "  .venv/bin/deepspeed --module orpo_ds train --model_name_or_path MODEL --dataset_name FILE.jsonl \\",
            "      --deepspeed ds_configs/zero3_offload.json --num_train_epochs 1 --output_dir runs/mine",
        ]
    )


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


if __name__ == "__main__":
    main()
