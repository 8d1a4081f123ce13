r"""What one GPU makes of it: packed against padded against TRL, in bf16 with flash-attn. It has not run yet.

    python benchmarks/gpu.py [--shape qwen2-0.5b] [--pairs 8] [--steps 20] [--rounds 2]
    python benchmarks/gpu.py --ultrafeedback

The first command trains random weights of Qwen2-0.5B's shape on real pairs, on one GPU under ZeRO-2: seconds a step,
peak of allocated memory, share of the device's matrix-product peak, with gradient checkpointing as TRL switches it on
by default, and without. The three sides take turns in processes of their own, as in `vs_trl.py`. TRL pads, and so does
the padded layout: what lies between these two is the head and the loop; between padded and packed, the packing.

The second is the run of TRL's ORPO page, which takes it half an hour on 8 GPUs (`examples/scripts/orpo.py` with
Qwen2-0.5B-Instruct on UltraFeedback), on all GPUs of this machine. It needs the Hugging Face hub:

    deepspeed --num_gpus 8 --module orpo_ds train \
        --model_name_or_path Qwen/Qwen2-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized \
        --num_train_epochs 1 --output_dir Qwen2-0.5B-ORPO
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _runs import Inputs, Measured, take_turns, useful_flops, write_inputs
from _side import SIDES, Task
from _workload import REPOSITORY, SHAPES, SHARED_DATA

from orpo_ds.monitor.jsonl import read_metrics
from orpo_ds.monitor.peak import matmul_flops_per_second

NAMES = {"trl": "TRL 1.16", "padded": "orpo_ds, padded", "packed": "orpo_ds, packed"}
# bf16 keeps 8 bits. Both sides round every activation so; the mean over thousands of tokens is closer than one of them.
SAME_LOSS = 2**-8


def main() -> None:
    """Measure and print, or say why not."""
    options = _options()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu.py needs a CUDA device, and torch sees none. On a CPU: benchmarks/vs_trl.py."
        )
    if options.ultrafeedback:
        train_on_ultrafeedback(Path(options.output_dir))
    else:
        compare_sides(options)


def compare_sides(options: argparse.Namespace) -> None:
    """TRL, padded and packed on one GPU."""
    peak = matmul_flops_per_second(torch.device("cuda"), torch.bfloat16, max_seconds=5.0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, ZeRO-2, one rank")
    print(f"{options.data}, max_length {options.max_length}, {options.pairs} pairs a step")
    print(
        f"{options.rounds} runs a side, taking turns; {options.steps} steps a run, the first of them not timed"
    )
    print(f"matrix-product peak of this device in bf16: {peak / 1e12:.0f} TFLOP/s")
    print(f"\n{SHAPES[options.shape].about} (random weights)")
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(
            Path(folder),
            shape=options.shape,
            data=options.data,
            max_length=options.max_length,
            count=options.steps * options.pairs,
        )
        for checkpointing in (True, False):
            tasks = [_task(side, inputs, Path(folder), options, checkpointing) for side in SIDES]
            default = " (TRL's default)" if checkpointing else ""
            print(f"\ngradient checkpointing {'on' if checkpointing else 'off'}{default}")
            _print_table(take_turns(tasks, rounds=options.rounds), options, peak=peak)


def train_on_ultrafeedback(output_dir: Path) -> None:
    """TRL's example on all GPUs, and what it took."""
    command = [str(Path(sys.executable).with_name("deepspeed")), f"--num_gpus={torch.cuda.device_count()}"]
    command += ["--module", "orpo_ds", "train", "--model_name_or_path", "Qwen/Qwen2-0.5B-Instruct"]
    command += ["--dataset_name", "trl-lib/ultrafeedback_binarized", "--num_train_epochs", "1"]
    command += ["--output_dir", str(output_dir)]
    print(" ".join(command))
    start = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, check=True)
    minutes = (time.perf_counter() - start) / 60
    last = [line for line in read_metrics(output_dir / "metrics.jsonl") if "loss" in line][-1]
    print(f"{minutes:.1f} minutes on {torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    print(json.dumps(last, indent=2))


def _task(side: str, inputs: Inputs, folder: Path, options: argparse.Namespace, checkpointing: bool) -> Task:
    return Task(
        side=side,
        shape=options.shape,
        rows=str(inputs.rows),
        tokenizer=str(inputs.tokenizer),
        output=str(folder / f"{side}.json"),
        steps=options.steps,
        pairs=options.pairs,
        max_length=options.max_length,
        gradient_checkpointing=checkpointing,
        bf16=True,
        deepspeed=json.loads((REPOSITORY / "ds_configs" / "zero2.json").read_text()),
    )


def _print_table(measured: list[Measured], options: argparse.Namespace, *, peak: float) -> None:
    trl = measured[0]
    timed = trl.runs[0].token_ids[options.pairs :]
    flops_a_step = useful_flops(options.shape, timed) * options.pairs / len(timed)
    print("| side | s/step | against TRL | peak MiB | against TRL | useful FLOPs fraction | first loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for side in measured:
        useful = flops_a_step / side.seconds_a_step / peak
        faster = trl.seconds_a_step / side.seconds_a_step
        print(
            f"| {NAMES[side.side]} | {side.seconds_a_step:.3f} | {faster:.2f}x faster "
            f"| {side.peak_mib:.0f} | {side.peak_mib / trl.peak_mib:.2f} | {useful:.2f} | {side.losses[0]:.5f} |"
        )
        if abs(side.losses[0] / trl.losses[0] - 1) > SAME_LOSS:
            print(f"{NAMES[side.side]}: NOT THE SAME LOSS as TRL's {trl.losses[0]:.5f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Packed against padded against TRL on one GPU, in bf16.")
    parser.add_argument("--data", type=Path, default=SHARED_DATA, help="JSONL of conversations")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps a run, at least 2")
    parser.add_argument("--rounds", type=int, default=2, help="runs a side")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and response")
    parser.add_argument("--ultrafeedback", action="store_true", help="TRL's example on all GPUs instead")
    parser.add_argument("--output-dir", default="Qwen2-0.5B-ORPO", help="of --ultrafeedback")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is not timed")
    return options


if __name__ == "__main__":
    main()
