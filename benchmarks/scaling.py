"""The page docs/scaling.md: `orpo-ds estimate` carried to 7B, 70B and 405B on 8 to 1,024 GPUs.

    python benchmarks/scaling.py > docs/scaling.md

Nothing in its large table was measured: it is the arithmetic of `orpo_ds.estimate` with the inputs that the page
names. What was measured is quoted from `benchmarks/estimate_measured.md`, which `benchmarks/estimate.py` wrote.
"""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _workload import REPOSITORY

sys.path.insert(0, str(REPOSITORY))

from orpo_ds.config import ORPOConfig
from orpo_ds.estimate import Estimate, Estimator, Pairs, parse_cluster
from orpo_ds.estimate.hardware import CUDA_RESERVE_BYTES, GB, GIB, GPUS
from orpo_ds.estimate.plans import MARGIN
from orpo_ds.estimate.timing import EFFICIENCY

GPU_COUNTS = (8, 64, 256, 1024)
PAIRS = 61_135
MAX_LENGTH, TRUNK = 2048, 512
GLOBAL_BATCH = 128
MEASURED = Path(__file__).with_name("estimate_measured.md")


@dataclass(frozen=True)
class Model:
    """A model of the table, and the fields of its config.json that differ."""

    name: str
    config: dict[str, Any]


MODELS = (
    Model(
        "7B (Llama 2)",
        {
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32_000,
        },
    ),
    Model(
        "70B (Llama 3.1)",
        {
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
        },
    ),
    Model(
        "405B (Llama 3.1)",
        {
            "hidden_size": 16_384,
            "intermediate_size": 53_248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
        },
    ),
)


def page(models: Sequence[Model] = MODELS) -> str:
    """The page as Markdown."""
    return "\n".join([_head(), *_table(models), _foot(), MEASURED.read_text().strip(), _rest()])


def rows(model: Model) -> list[str]:
    """The table's lines of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        common = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "max_position_embeddings": 8192,
        }
        config = common | {"tie_word_embeddings": False} | model.config
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed says what it compiled
            args = ORPOConfig(
                output_dir=scratch,
                bf16=True,
                max_length=MAX_LENGTH,
                per_device_train_batch_size=1,
                report_to="none",
            )
            branch = np.array([MAX_LENGTH - TRUNK])
            estimator = Estimator(scratch, args, pairs=Pairs(np.array([TRUNK]), branch, branch, PAIRS, ""))
            lines = []
            for gpus in GPU_COUNTS:
                args.gradient_accumulation_steps = max(GLOBAL_BATCH // gpus, 1)
                found = estimator.fastest_that_fits(parse_cluster("8xH100", nodes=gpus // 8))
                lines.append(_row(model, gpus, found))
    return lines


def _row(model: Model, gpus: int, found: Estimate | None) -> str:
    if found is None:
        return f"| {model.name} | {gpus:,} | none fits | | | | | | |"
    time = found.time
    assert found.days is not None
    assert found.usd is not None
    preset = found.name + (", recomputes" if found.recomputes else "")
    return (
        f"| {model.name} | {gpus:,} | {preset} | {found.device_bytes / GB:.0f} | {found.host_bytes / GB:,.0f} "
        f"| {time.total:.1f} ({time.compute:.1f}, {time.network:.1f}, {time.update:.1f}) | {time.sent / GB:,.0f} "
        f"| {found.days * 24:.1f} | {found.usd:,.0f} |"
    )


def _head() -> str:
    gpu = GPUS["H100"]
    tokens = 2 * MAX_LENGTH - TRUNK
    return f"""# Scaling

Written by `python benchmarks/scaling.py > docs/scaling.md`. **The first table is computed; no GPU has run it.** What
was measured stands below it.

## 7B, 70B and 405B on 8 to 1,024 GPUs

For each model and number of GPUs, the fastest preset of `ds_configs/` that fits with {MARGIN - 1:.0%} to spare, as
`orpo-ds estimate` finds it. All parameters are trained in bf16 with AdamW; "recomputes" is gradient checkpointing.

Inputs:
- {PAIRS:,} pairs (UltraFeedback, the dataset of the ORPO paper, as HuggingFaceH4/ultrafeedback_binarized has it), one
  epoch, each as long as `max_length` {MAX_LENGTH:,} allows with a shared prompt of {TRUNK}: {tokens:,} tokens a pair.
  {GLOBAL_BATCH} pairs a step, or one pair a GPU where there are more GPUs.
- {gpu.name}, 8 a node: {gpu.flops_per_s / 1e12:.0f} TFLOP/s dense bf16; a GPU and direction
  {gpu.link_bytes_per_s / GB:.0f} GB/s NVLink and {gpu.network_bytes_per_s / GB:.0f} GB/s InfiniBand;
  {gpu.host_bytes * 8 / GIB:,.0f} GiB host memory a node; {gpu.usd_per_hour} USD an hour.
  Sources: {gpu.sources}.
- Arithmetic reaches {EFFICIENCY:.2f} of the peak: Llama 3 405B trained at 0.38 to 0.43 (arXiv:2407.21783, table 4).
- {CUDA_RESERVE_BYTES / GIB:.0f} GiB a GPU for CUDA and NCCL, and 3 GB/s of NVMe a GPU (assumed).
"""


def _table(models: Sequence[Model]) -> list[str]:
    return [
        "| model | GPUs | preset | GB a GPU | GB a host | s a step (arithmetic/network/host) | GB sent | hours | USD |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(line for model in models for line in rows(model)),
    ]


def _foot() -> str:
    return """
Left out, so that the truth is slower: the latency of collectives (it grows with the ranks, and counts most at 1,024),
the holes of torch's caching allocator, evaluation and checkpoints, loading. Tensor and sequence parallelism are not
among what is proposed; zero3_superoffload is counted as plain CPU offload.

## How it is computed
- **Activations** are counted: the model's own forward and backward pass runs on tensors that have shapes and no data,
  and every storage is counted from birth to death (`orpo_ds/estimate/replay.py`).
- **Parameters, gradients, optimizer, buffers** follow DeepSpeed's code, stage by stage (`orpo_ds/estimate/states.py`).
- **Time** is FLOPs over peak times efficiency, and bytes over line rate; they overlap where the preset says so
  (`orpo_ds/estimate/timing.py`). An update on the host waits for PCIe and for the host's memory.

## What was measured
"""


def _rest() -> str:
    return """
`tests/estimate` holds each part to something independent in every run of the suite: the forward and backward pass to
torch's allocator (5%), what an engine holds to the tensors that are really there (3%), for ZeRO-0 to 3, with and
without offload and LoRA."""


if __name__ == "__main__":
    from orpo_ds.distributed import start_process_group

    with contextlib.redirect_stdout(io.StringIO()):
        start_process_group(timeout_s=60)
    written = page()
    print(written)
