"""One pair of up to 131,072 tokens trains in memory that grows with its tokens, and not with their square.

    python benchmarks/long_context.py [--tokens 8192 16384 32768 65536 131072] [--ranks 1] [--layers 2] [--whole-mlps]

Every line of the table is a training of two steps in a process of its own: a pair of 256 tokens that warms up, then one
of so many (half of it trunk, a quarter each branch), with ZeRO-3, gradient checkpointing and MLPs in tiles. Memory is
what a rank holds at the peak of the long step above what it held before it. The model is a Llama of hidden size 256
with 2 heads of 32; with `--ranks 2` two ranks share the row. Attention's work grows with the square of the length:
131,072 tokens take some minutes on two idle cores.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _workload import REPOSITORY
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

sys.path.insert(0, str(REPOSITORY))  # for `tests`, which is no installed package

from orpo_ds import ORPOConfig, ORPOTrainer, distributed
from orpo_ds.monitor.peak import peak_memory_mib
from tests.parity.tokenizer import tiny_tokenizer

HIDDEN, INTERMEDIATE = 256, 1024
SHORT = 256
MLP_TILE = 2048
BEFORE = "before.txt"
# Otherwise glibc keeps freed tensors of up to 32 MiB in its heap, and the peak is that of their leftovers.
HONEST_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


@dataclass(frozen=True)
class Point:
    """One line of the table: tokens of the pair's row, ranks that share it, the model's layers, the run's folder."""

    tokens: int
    ranks: int
    layers: int
    mlp_tile_tokens: int | None
    folder: str


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**power for power in range(13, 18)])
    parser.add_argument("--ranks", type=int, default=1, help="that share the row")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    parser.add_argument("--whole-mlps", action="store_true", help="do not tile them, to see what that saves")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.train:
        train(Point(**json.loads(options.train)))
        return
    kept = 4 * HIDDEN * options.layers // options.ranks
    print(f"{torch.get_num_threads()} threads, {options.ranks} ranks, {options.layers} layers")
    print(f"inputs of layers, kept for backward: {kept:,} bytes a token and rank")
    print(
        f"{'tokens':>9} {'loss':>8} {'us/token':>9} {'ratio':>6} {'MiB added':>9} {'bytes a token':>13} {'ratio':>6}"
    )
    first: tuple[float, float] | None = None
    for tokens in options.tokens:
        loss, seconds, mib = measure(options, tokens)
        time, memory = seconds / tokens * 1e6, mib * 2**20 / tokens
        first = first or (time, memory)
        print(
            f"{tokens:>9,} {loss:>8.4f} {time:>9.1f} {time / first[0]:>6.2f} {mib:>9,.0f} "
            f"{memory:>13,.0f} {memory / first[1]:>6.2f}",
            flush=True,
        )


def measure(options: argparse.Namespace, tokens: int) -> tuple[float, float, float]:
    """Of the step on a pair of `tokens`: its loss, seconds, and MiB at the peak above those before it."""
    ranks = options.ranks
    with tempfile.TemporaryDirectory() as folder:
        point = Point(tokens, ranks, options.layers, None if options.whole_mlps else MLP_TILE, folder)
        words = [str(Path(__file__).resolve()), "--train", json.dumps(asdict(point))]
        command = [sys.executable, *words]
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            launcher = str(Path(sys.executable).with_name("deepspeed"))
            command = [
                launcher,
                f"--num_accelerators={ranks}",
                f"--master_port={port}",
                "--no_local_rank",
                *words,
            ]
        finished = subprocess.run(
            command, env=os.environ | HONEST_HEAP, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if finished.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{finished.stdout[-3000:]}")
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        before = float(Path(folder, BEFORE).read_text())
    return lines[1]["loss"], lines[1]["step_time_s"], lines[1]["peak_memory_mib"] - before


class _FreshPeak(TrainerCallback):
    """After the short step: let Linux measure the peak anew (proc(5), clear_refs), and note where it begins."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **details: Any
    ) -> None:
        if state.global_step == 1:
            Path("/proc/self/clear_refs").write_text("5")
            if distributed.is_main():
                self._path.write_text(str(peak_memory_mib(torch.device("cpu"))))


def train(point: Point) -> None:
    """Two steps: a short pair, and one of `point.tokens`."""
    args = ORPOConfig(
        output_dir=f"{point.folder}/run",
        dataset_cache_dir=f"{point.folder}/cache",
        per_device_train_batch_size=1,
        max_steps=2,
        max_length=point.tokens,
        max_prompt_length=point.tokens // 2,
        train_sampling_strategy="sequential",
        gradient_checkpointing=True,
        mlp_tile_tokens=point.mlp_tile_tokens,
        sequence_parallel_size=point.ranks,
        deepspeed="zero3",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=point.layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=point.tokens,
    )
    trainer = ORPOTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        processing_class=tokenizer,
        callbacks=[_FreshPeak(Path(point.folder, BEFORE))],
        train_dataset=Dataset.from_list([row(SHORT, tokenizer), row(point.tokens, tokenizer)]),
    )
    sizes = [
        len(pair.chosen) + len(pair.rejected) - pair.trunk
        for pair in map(trainer.train_dataset.__getitem__, (0, 1))
    ]
    assert sizes == [SHORT, point.tokens], sizes
    trainer.train()
    assert distributed.world_size() == point.ranks


def row(tokens: int, tokenizer) -> dict[str, str]:  # type: ignore[no-untyped-def]
    """A preference row whose packed row has exactly so many tokens, BOS and both EOS among them."""
    draw = random.Random(0)

    def words(count: int, first: str) -> str:
        return first + "".join(draw.choice("abcdefgh") for _ in range(count - 1))

    branch = tokens // 4 - 1
    return {
        "prompt": words(tokens // 2 - 1, "a"),
        "chosen": words(branch, "b"),
        "rejected": words(branch, "c"),
    }


if __name__ == "__main__":
    main()
