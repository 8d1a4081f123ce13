"""Cost grows as it should: tokens/s and memory over the size of the dataset, and over the pairs of a batch.

    python benchmarks/growth.py [--copies 1 10 100] [--pairs 2 4 8 16]

Every row of the tables is the `train` command, in a process of its own, on a model of 22M parameters and the real
pairs repeated; figures are those of its `metrics.jsonl`, and ratios are against the first row. Flat means 1.00.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from _workload import DEMO_DATA, REPOSITORY, SHARED_DATA
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(REPOSITORY))  # for `tests`, which is no installed package

from tests.real_tokenizers import tokenizer

TOKENS_A_MICRO_BATCH = 4096
STEPS = 6  # the first logs alone, and is left out: it warms up


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=SHARED_DATA if SHARED_DATA.is_file() else DEMO_DATA)
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 10, 100], help="of the data, a run each")
    parser.add_argument("--pairs", type=int, nargs="+", default=[2, 4, 8, 16], help="of a batch, a run each")
    options = parser.parse_args(argv)
    rows = options.data.read_text().splitlines()
    print(f"{options.data.name}, {len(rows)} pairs; {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = small_model(folder / "model")
        for count in options.copies:
            path = folder / f"{count}.jsonl"
            path.write_text("".join(f"{row}\n" for _ in range(count) for row in rows))
        table(
            "rows",
            [
                (count * len(rows), train(folder, model, f"{count}.jsonl", pairs=4))
                for count in options.copies
            ],
        )
        table(
            "pairs a batch",
            [
                (pairs, train(folder, model, f"{options.copies[0]}.jsonl", pairs=pairs))
                for pairs in options.pairs
            ],
        )


def small_model(folder: Path) -> Path:
    """A random Llama of 22M parameters with SmolLM2's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer("smollm2").save_pretrained(folder)
    return folder


def train(folder: Path, model: Path, rows: str, *, pairs: int) -> dict[str, float]:
    """Run the `train` command; the last line of its metrics."""
    output = Path(tempfile.mkdtemp(dir=folder))
    settings = {
        "model_name_or_path": model,
        "dataset_name": folder / rows,
        "dataset_cache_dir": folder / "cache",
        "output_dir": output,
        "per_device_train_batch_size": pairs,
        "max_tokens_per_micro_batch": TOKENS_A_MICRO_BATCH,
        "max_steps": STEPS,
        "logging_steps": STEPS - 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "orpo_ds", "train", *flags]
    finished = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stdout[-3000:]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["step"] == STEPS - 1)


def table(heading: str, measured: Sequence[tuple[int, dict[str, float]]]) -> None:
    """Print a run a line, with ratios against the first."""
    _, first = measured[0]
    print(f"\n{heading:>14} {'tokens/s':>10} {'ratio':>6} {'peak MiB':>9} {'ratio':>6}")
    for value, line in measured:
        speed, peak = line["tokens_per_s"], line["peak_memory_mib"]
        print(
            f"{value:>14,} {speed:>10,.0f} {speed / first['tokens_per_s']:>6.2f} "
            f"{peak:>9,.0f} {peak / first['peak_memory_mib']:>6.2f}"
        )


if __name__ == "__main__":
    main()
