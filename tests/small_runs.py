"""Whole runs that take a second or two: rows, a model folder, settings, and a trainer of them.

The tokenizer is one of bytes and the models are `tests.tiny_models`, so nothing comes from a hub. Run in a script
that the `deepspeed` launcher starts, it gives the same run on several ranks (`launch`).
"""

import contextlib
import dataclasses
import inspect
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel

from orpo_ds import ORPOConfig, ORPOTrainer, cli
from tests.parity.rows import conversation
from tests.parity.tokenizer import tiny_tokenizer
from tests.tiny_models import tiny_model

REPOSITORY = Path(__file__).resolve().parent.parent
SPARE_IDS = 5
LAUNCH_TIMEOUT_S = 420  # of a whole script on two ranks, however busy the machine is


def rows(count: int) -> list[dict[str, Any]]:
    """Preference rows of differing lengths, no two alike; a row takes at most 110 tokens of `tiny_tokenizer`."""
    return [
        conversation(
            f"What is {number} and {number + 1}?" + " Be quick." * (number % 3),
            f"It is {2 * number + 1}." + " Sure." * (number % 2),
            f"No idea, {'maybe ' * (number % 4)}{3 * number}.",
        )
        for number in range(count)
    ]


def dataset(count: int) -> Dataset:
    """The rows as a dataset."""
    return Dataset.from_list(rows(count))


def write_jsonl(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as a JSONL file; returns its path."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def model_of(family: str = "qwen2", *, seed: int = 0) -> PreTrainedModel:
    """A tiny model with an embedding for each id of `tiny_tokenizer` and, as real ones, a few to spare."""
    return tiny_model(family, vocab_size=len(tiny_tokenizer()) + SPARE_IDS, seed=seed)


def save_model_folder(folder: Path, family: str = "qwen2", **config: Any) -> str:
    """A Hugging Face folder with model, tokenizer and generation config.

    Args:
        folder: where.
        family: of `tests.tiny_models`.
        config: fields of the model's config to change in the folder.

    Returns:
        The folder's path, as `model_name_or_path` takes it.
    """
    model = model_of(family)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(max_new_tokens=7, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def settings(output_dir: Path, **changes: Any) -> ORPOConfig:
    """Settings of a quiet fp32 run that logs each step and saves nothing unless told."""
    fields: dict[str, Any] = {
        "output_dir": str(output_dir),
        "dataset_cache_dir": str(output_dir.parent / "tokens"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "max_length": 256,
        "max_prompt_length": 128,
        "learning_rate": 1e-3,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "deepspeed": "zero2",
    }
    return ORPOConfig(**fields | changes)


def trainer(output_dir: Path, *, pairs: int = 11, **keywords: Any) -> ORPOTrainer:
    """A trainer of `pairs` rows.

    Args:
        output_dir: of the run.
        pairs: rows of the training set.
        keywords: those of `ORPOTrainer` by their names; all others are fields of `ORPOConfig`.
    """
    fields = {field.name for field in dataclasses.fields(ORPOConfig)}
    own = inspect.signature(ORPOTrainer).parameters.keys() - {"args", "processing_class"} - fields
    passed = {name: keywords.pop(name) for name in own & keywords.keys()}
    if "model" not in passed and "model_init" not in passed:
        passed["model"] = model_of()
    return ORPOTrainer(
        args=settings(output_dir, **keywords),
        processing_class=tiny_tokenizer(),
        **{"train_dataset": dataset(pairs), **passed},
    )


def step_lines(trainer: ORPOTrainer) -> list[dict[str, Any]]:
    """What the trainer logged of its steps; not its evaluations, and not the summary at the end."""
    return [line for line in trainer.state.log_history if "loss" in line]


@dataclass(frozen=True)
class Answer:
    """What a command ended with: its exit status, and what it wrote to stderr."""

    status: int
    stderr: str


def command_line(folder: Path, **flags: Any) -> list[str]:
    """The words of a quiet `orpo-ds train` of two steps; a flag that is None is left out.

    Args:
        folder: holds `model`, `train.jsonl`, and what the run writes: `run` and `tokens`.
        flags: of `ScriptArguments` and `ORPOConfig`.
    """
    fields: dict[str, Any] = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "train.jsonl",
        "output_dir": folder / "run",
        "dataset_cache_dir": folder / "tokens",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "max_length": 256,
        "max_prompt_length": 128,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "deepspeed": "zero2",
    }
    words = ["train"]
    for name, value in (fields | flags).items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


def run_cli(words: Sequence[str], *, datasets_cache: Path) -> Answer:
    """Run `orpo-ds` in this process; what `datasets` reads is cached in `datasets_cache`."""
    stderr = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(stderr),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets_cache)
        try:
            cli.main(words)
            status: Any = 0
        except SystemExit as stop:
            status = stop.code
    return Answer(status, stderr.getvalue())


def launch(
    module: str,
    *words: str,
    ranks: int = 2,
    cache: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a module on several ranks through the real `deepspeed` launcher, and wait for it.

    Args:
        module: what `python -m` would run.
        words: its arguments.
        ranks: processes.
        cache: folder for what `datasets` reads; by default the user's own.
        environment: of the launcher; by default this process's.

    Returns:
        The output of all ranks in `stdout`; the exit status is for the caller to judge.
    """
    environment = {**(os.environ if environment is None else environment), "OMP_NUM_THREADS": "1"}
    if cache is not None:
        environment["HF_DATASETS_CACHE"] = str(cache)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    return subprocess.run(
        [
            str(launcher),
            f"--num_accelerators={ranks}",
            f"--master_port={port}",
            "--module",
            module,
            *words,
        ],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LAUNCH_TIMEOUT_S,
    )
