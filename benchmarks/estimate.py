"""`orpo-ds estimate` against processes that train: memory of a rank, computed and measured.

    python benchmarks/estimate.py [--cases zero0 zero3+checkpointing ...]

A Llama of 82M parameters, most of them in embedding and head, trains three steps of two long pairs a rank in fp32,
under the `deepspeed` launcher. On a CPU the device is the host, so one figure has both: the most memory that the
process holds during the steps (VmHWM, reset at the begin of each). The process itself (Python, torch, DeepSpeed, its
66 MiB of shared memory for collectives, the dataset) is measured in the same run, as what the same command holds with a
model of next to nothing, and counted as an input. No constant of the arithmetic was fitted to these figures.

What it leaves out on a CPU are the holes of the C library's heap (`orpo_ds/host_memory.py`), which depend on the order
in which layers free their tensors. So each case runs twice: with every block mapped by itself (glibc's
MALLOC_MMAP_THRESHOLD_), where a process holds what its tensors hold, and as everybody runs it.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _workload import DEMO_DATA, REPOSITORY, SHARED_DATA
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

sys.path.insert(0, str(REPOSITORY))  # for `tests`, which is no installed package

from tests.real_tokenizers import tokenizer

MIB = 2**20
STEPS = 3
PAIRS = 2  # a rank and step
SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 10, "num_attention_heads": 8}
NOTHING = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@dataclass(frozen=True)
class Case:
    """One way to train: a preset, and what is added to it."""

    preset: str
    ranks: int = 1
    checkpointing: bool = False
    lora: bool = False

    def __str__(self) -> str:
        words = [
            self.preset,
            *(["checkpointing"] if self.checkpointing else []),
            *(["lora"] if self.lora else []),
        ]
        return "+".join(words) + (f" x{self.ranks}" if self.ranks > 1 else "")

    @property
    def flags(self) -> dict[str, Any]:
        """Of `orpo-ds train`."""
        return {
            "deepspeed": self.preset,
            "gradient_checkpointing": self.checkpointing,
            "use_peft": self.lora,
            "lora_target_modules": "all-linear",
            "lora_dropout": 0.0,
        }


CASES = [
    *(Case(f"zero{stage}") for stage in range(4)),
    Case("zero2_offload"),
    Case("zero3_offload"),
    Case("zero2", checkpointing=True),
    Case("zero3", checkpointing=True),
    Case("zero3_offload", checkpointing=True),
    Case("zero2", lora=True),
    Case("zero3", lora=True),
    Case("zero3", lora=True, checkpointing=True),
    *(Case(preset, ranks=2) for preset in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")),
]


class Phases(TrainerCallback):
    """Writes what this process holds before the steps, and its peak within them."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.peaks: list[float] = []
        self.before = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to measure a step."""
        self.before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here (man 5 proc)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note its peak."""
        self.peaks.append(status("VmHWM"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the figures."""
        if state.is_world_process_zero:
            self.output.write_text(json.dumps({"before": self.before, "peak": max(self.peaks)}))


def status(name: str) -> float:
    """MiB of a line of /proc/self/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def worker(output: str, words: Sequence[str]) -> None:
    """Train as `orpo-ds train` does, and save nothing."""
    from orpo_ds.cli import parse_train_arguments
    from orpo_ds.script_data import load_script_rows
    from orpo_ds.trainer import ORPOTrainer

    script, args = parse_train_arguments(words)
    rows = load_script_rows(script, seed=args.seed, evaluates=False)
    ORPOTrainer(
        script.model_name_or_path,
        args,
        train_dataset=rows.train,
        peft_config=script.peft_config(),
        callbacks=[Phases(Path(output))],
    ).train()


def words_of(case: Case, *, model: Path, folder: Path) -> list[str]:
    """The words of `orpo-ds train` for a case."""
    fields = {
        "model_name_or_path": model,
        "dataset_name": folder / "rows.jsonl",
        "dataset_cache_dir": folder / "tokens",
        "output_dir": tempfile.mkdtemp(dir=folder),
        "per_device_train_batch_size": PAIRS,
        "max_length": 1024,
        "max_steps": STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "layout": "packed",
        "bf16": False,
    } | case.flags
    return [text for name, value in fields.items() for text in (f"--{name}", str(value))]


def measure(case: Case, *, model: Path, folder: Path, mapped: bool) -> dict[str, float]:
    """Run a case under the launcher; MiB before a step and at its peak.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"} if mapped else {}
    output = folder / "figures.json"
    output.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        launcher,
        f"--num_accelerators={case.ranks}",
        f"--master_port={port}",
        "--no_local_rank",
        __file__,
    ]
    finished = subprocess.run(
        [*map(str, command), "--worker", str(output), *words_of(case, model=model, folder=folder)],
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if finished.returncode or not output.is_file():
        sys.exit(f"{case} failed:\n{finished.stdout[-3000:]}")
    found: dict[str, float] = json.loads(output.read_text())
    return found


def computed(case: Case, *, model: Path, folder: Path) -> float:
    """MiB that the arithmetic says, without the process itself."""
    from orpo_ds.cli import parse_train_arguments
    from orpo_ds.estimate.command import lengths_of
    from orpo_ds.estimate.memory import Subject, rank_memory
    from orpo_ds.estimate.shapes import read_config
    from orpo_ds.estimate.states import ZeroPlan
    from orpo_ds.estimate.workload import workload

    script, args = parse_train_arguments(words_of(case, model=model, folder=folder))
    subject = Subject.of(
        read_config(script.model_name_or_path, args=args),
        args=args,
        dtype=torch.float32,
        peft_config=script.peft_config(),
    )
    plan = ZeroPlan.of(args.deepspeed_settings, hidden_size=subject.hidden_size)
    work = workload(args, lengths_of(script, args), subject.size, ranks=case.ranks)
    found = rank_memory(subject, plan, work, ranks=case.ranks, device="cpu")
    return (found.device + found.host) / MIB


def write_inputs(folder: Path, data: Path) -> None:
    """A model, one of next to nothing, and a long pair as often as any case needs it."""
    for name, shape in (("model", SHAPE), ("nothing", NOTHING)):
        set_seed(0)
        config = LlamaConfig(
            vocab_size=49_152, max_position_embeddings=4096, tie_word_embeddings=False, **shape
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer("smollm2").save_pretrained(folder / name)
    rows = data.read_text().splitlines()
    long = rows[int(np.argsort([len(row) for row in rows])[len(rows) * 3 // 4])]
    (folder / "rows.jsonl").write_text(f"{long}\n" * (STEPS * PAIRS * max(case.ranks for case in CASES)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=SHARED_DATA if SHARED_DATA.is_file() else DEMO_DATA)
    parser.add_argument("--cases", nargs="+", help="some of them only, by name")
    options = parser.parse_args()
    cases = [case for case in CASES if options.cases is None or str(case) in options.cases]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder, options.data)
        process = [
            measure(Case("zero2"), model=folder / "nothing", folder=folder, mapped=mapped)["before"]
            for mapped in (True, False)
        ]
        print(
            f"the process itself: {process[0]:.0f} MiB with its blocks mapped, {process[1]:.0f} MiB without\n"
        )
        print(
            "| case | computed MiB | measured, blocks mapped | computed / measured | measured | computed / measured |"
        )
        print("| --- | --- | --- | --- | --- | --- |")
        for case in cases:
            tensors = computed(case, model=folder / "model", folder=folder)
            cells = []
            for mapped, own in zip((True, False), process, strict=True):
                peak = measure(case, model=folder / "model", folder=folder, mapped=mapped)["peak"]
                cells.append(f"{peak:.0f} | {(own + tensors) / peak:.2f}")
            print(f"| {case} | {process[0] + tensors:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3:])
    else:
        main()
