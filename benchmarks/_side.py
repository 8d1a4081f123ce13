"""One training run of one side, in a process of its own so that its memory peak is its own.

Started by the `deepspeed` launcher from `vs_trl.py` and `gpu.py` with the path of a `Task` in JSON; rank 0 writes a
`Result` next to it. Both sides get the same rows in the same order, the same weights, DeepSpeed JSON and optimizer.
"""

import importlib
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _workload import random_model
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_ds.monitor.peak import peak_memory_mib

SIDES = ("trl", "packed", "padded")
TokenIds = dict[str, list[int]]  # TRL's columns of one row


@dataclass(frozen=True)
class Task:
    """What to run. `side` is one of SIDES: TRL, or this project in one of its layouts."""

    side: str
    shape: str
    rows: str
    tokenizer: str
    output: str
    steps: int
    pairs: int
    max_length: int
    gradient_checkpointing: bool
    bf16: bool
    deepspeed: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What it took. `seconds` leaves out the first step, which warms up; `losses` has them all.

    `token_ids`, from TRL's side only: the ids and labels that TRL made of every row.
    """

    losses: list[float]
    seconds: list[float]
    peak_mib: float
    token_ids: list[TokenIds]


class _Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next: data, step, logging, everything a user waits for."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def run(task: Task) -> Result:
    """Train `task.steps` steps and measure them."""
    # Only the side that runs is imported: its modules would count in the other's memory.
    if task.side == "trl":
        library = importlib.import_module("trl.experimental.orpo")
        keywords: dict[str, Any] = {"use_cpu": not torch.cuda.is_available()}
    else:
        library = importlib.import_module("orpo_ds")
        # TRL 1.16 never cuts a prompt; see `preference_rows`.
        keywords = {"layout": task.side, "max_prompt_length": task.max_length - 1}
    # TRL 1.16 cannot load a model by name under ZeRO-3: it sets a `device_map`. Made before ORPOConfig tells
    # transformers about ZeRO-3, its random weights are those that the float64 reference makes.
    model = random_model(task.shape, dtype=torch.bfloat16 if task.bf16 else torch.float32)
    args = library.ORPOConfig(
        output_dir=tempfile.mkdtemp(dir=Path(task.output).parent),
        per_device_train_batch_size=task.pairs,
        max_steps=task.steps,
        max_length=task.max_length,
        gradient_checkpointing=task.gradient_checkpointing,
        bf16=task.bf16,
        deepspeed=task.deepspeed,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **keywords,
    )
    clock = _Clock()
    trainer = library.ORPOTrainer(
        model=model,
        args=args,
        processing_class=AutoTokenizer.from_pretrained(task.tokenizer),
        train_dataset=Dataset.from_list(json.loads(Path(task.rows).read_text())),
        callbacks=[clock],
    )
    trainer.train()
    return Result(
        losses=[line["loss"] for line in trainer.state.log_history if "loss" in line],
        seconds=[end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)],
        peak_mib=peak_memory_mib(args.device),
        token_ids=[] if task.side != "trl" else _token_ids(trainer.train_dataset),
    )


def _token_ids(rows: Dataset) -> list[TokenIds]:
    names = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
    return [{name: row[name] for name in names} for row in rows]


if __name__ == "__main__":
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    result = run(task)
    if torch.distributed.get_rank() == 0:
        Path(task.output).write_text(json.dumps(asdict(result)))
