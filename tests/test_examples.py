"""What TRL's ORPO page tells a reader to run: its quick start and its example script, with the page's own arguments.

The page's model and dataset lie on a hub of ours under their names (`tests/hub_server.py`): a tiny model, and rows in
the dataset's shape. All runs share one process, which costs ten seconds to start.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import small_runs
from tests.hub_server import HubServer

MODEL, DATASET = "Qwen/Qwen2-0.5B-Instruct", "trl-lib/ultrafeedback_binarized"
PAIRS = 24  # three global batches of the default eight
# https://huggingface.co/docs/trl/orpo_trainer, "Quick start"; the import is what changes.
QUICK_START = """
# train_orpo.py
from datasets import load_dataset
from orpo_ds import ORPOConfig, ORPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
train_dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

training_args = ORPOConfig(output_dir="Qwen2-0.5B-ORPO-quick-start")
trainer = ORPOTrainer(model=model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset)
trainer.train()
"""
# The page's "Example script".
PAGE = (
    f"--model_name_or_path {MODEL} --dataset_name {DATASET} --num_train_epochs 1 --output_dir Qwen2-0.5B-ORPO"
)
# "peft:" in the docstring of TRL's examples/scripts/orpo.py, with this model and two of its thousand steps.
PEFT = (
    f"--model_name_or_path={MODEL} --dataset_name {DATASET} --per_device_train_batch_size 4 --max_steps 2 "
    "--learning_rate 8e-5 --gradient_accumulation_steps 1 --logging_steps 10 --eval_steps 500 "
    "--output_dir=gpt2-lora-aligned-orpo --optim rmsprop --warmup_steps 150 --report_to wandb --bf16 "
    "--logging_first_step --no_remove_unused_columns --use_peft --lora_r=16 --lora_alpha=16"
)
DRIVER = """
import runpy, sys

script, *commands = sys.argv[1:]
runpy.run_path("train_orpo.py", run_name="__main__")
for command in commands:
    sys.argv = [script, *command.split()]
    runpy.run_path(script, run_name="__main__")
"""


def ultrafeedback_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row in the shape of trl-lib/ultrafeedback_binarized: the prompt opens both conversations, and scores."""
    return {
        "chosen": row["prompt"] + row["chosen"],
        "rejected": row["prompt"] + row["rejected"],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which quick start and example script have run."""
    folder = tmp_path_factory.mktemp("examples")
    rows = [json.dumps(ultrafeedback_row(row)).encode() for row in small_runs.rows(PAIRS + 2)]
    (folder / "train_orpo.py").write_text(QUICK_START)
    with HubServer() as hub:
        hub.add_model(MODEL, small_runs.save_model_folder(folder / "model"))
        files = {
            "data/train-0.jsonl": b"\n".join(rows[:PAIRS]),
            "data/test-0.jsonl": b"\n".join(rows[PAIRS:]),
        }
        hub.add_dataset(DATASET, files)
        answer = subprocess.run(
            [sys.executable, "-c", DRIVER, str(small_runs.REPOSITORY / "examples" / "orpo.py"), PAGE, PEFT],
            cwd=folder,
            env=hub.environment(cache=folder / "cache")
            | {"PYTHONPATH": str(small_runs.REPOSITORY), "WANDB_MODE": "offline"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_quick_start_trains(runs: Path) -> None:
    lines = metrics(runs / "Qwen2-0.5B-ORPO-quick-start")
    assert lines[-1]["step"] == 3 * PAIRS // 8  # the defaults: three epochs of eight pairs a step
    assert {"rewards/margins", "log_odds_chosen", "nll_loss"} <= lines[-1].keys()


def test_the_example_script_with_the_pages_arguments(runs: Path) -> None:
    folder = runs / "Qwen2-0.5B-ORPO"
    assert metrics(folder)[-1]["step"] == PAIRS // 8
    before, after = load_file(runs / "model" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert re.search(rf"base_model: {MODEL}$", (folder / "README.md").read_text(), re.MULTILINE)


def test_the_example_script_with_adapters(runs: Path) -> None:
    folder = runs / "gpt2-lora-aligned-orpo"
    assert metrics(folder)[-1]["step"] == 2
    adapter = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapter)
    assert any(name.endswith("lora_B.weight") and value.any() for name, value in adapter.items())
    assert {value.dtype for value in adapter.values()} == {torch.bfloat16}
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16
