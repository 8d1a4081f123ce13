"""Speed and memory against TRL 1.16 under ZeRO-3, on real preference pairs; and that both compute the same loss.

    python benchmarks/vs_trl.py [--steps 4] [--rounds 2] [--shapes qwen2-43m smollm2-135m] [--data pairs.jsonl]

Each run is a process of its own under the `deepspeed` launcher, and the two sides take turns (TRL, ours, TRL, ours):
a machine that slows down slows down both, and a memory peak is one side's alone. Both train the same weights on the
same ids in the same order with the same DeepSpeed JSON. Every model is measured with the gradient checkpointing that
TRL switches on by default, and without: the ratios to quote compare the same setting on both sides.

The losses of all steps must agree, and that of the first batch with the float64 reference of the parity tests.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from _runs import Inputs, Measured, float64_loss, take_turns, useful_flops, write_inputs
from _side import Task
from _workload import DEMO_DATA, REPOSITORY, SHAPES, SHARED_DATA

from orpo_ds.monitor.peak import matmul_flops_per_second

SIDES = ("trl", "packed")
NAMES = {"trl": "TRL 1.16", "packed": "orpo_ds"}
PAIRS_A_STEP = 2
# fp32 rounds at 6e-8; a loss is a sum of some hundred token log-probs, each from as many products.
SAME_LOSS = 1e-5


def main() -> None:
    """Measure and print the table."""
    options = _options()
    peak = matmul_flops_per_second(torch.device("cpu"), torch.float32, max_seconds=5.0)
    print(
        f"{options.data}, max_length {options.max_length}, {PAIRS_A_STEP} pairs a step, fp32, ZeRO-3, one rank"
    )
    print(
        f"{options.rounds} runs a side, taking turns; {options.steps} steps a run, the first of them not timed"
    )
    print(f"matrix-product peak of this device in fp32: {peak / 1e9:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes:
            print(f"\n{SHAPES[shape].about} (random weights)")
            inputs = write_inputs(
                Path(folder),
                shape=shape,
                data=options.data,
                max_length=options.max_length,
                count=options.steps * PAIRS_A_STEP,
            )
            for checkpointing in (True, False):
                tasks = [_task(side, shape, inputs, Path(folder), options, checkpointing) for side in SIDES]
                trl, ours = take_turns(tasks, rounds=options.rounds)
                default = " (TRL's default)" if checkpointing else ""
                print(f"\ngradient checkpointing {'on' if checkpointing else 'off'}{default}")
                _print_table(trl, ours, shape=shape, peak=peak)


def _task(
    side: str, shape: str, inputs: Inputs, folder: Path, options: argparse.Namespace, checkpointing: bool
) -> Task:
    return Task(
        side=side,
        shape=shape,
        rows=str(inputs.rows),
        tokenizer=str(inputs.tokenizer),
        output=str(folder / f"{side}.json"),
        steps=options.steps,
        pairs=PAIRS_A_STEP,
        max_length=options.max_length,
        gradient_checkpointing=checkpointing,
        bf16=False,
        deepspeed=json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text()),
    )


def _print_table(trl: Measured, ours: Measured, *, shape: str, peak: float) -> None:
    token_ids = trl.runs[0].token_ids
    timed = token_ids[PAIRS_A_STEP:]
    flops_a_step = useful_flops(shape, timed) * PAIRS_A_STEP / len(timed)
    print("| side | s/step | peak MiB | useful FLOPs fraction | loss of the first batch |")
    print("| --- | --- | --- | --- | --- |")
    for measured in (trl, ours):
        useful = flops_a_step / measured.seconds_a_step / peak
        print(
            f"| {NAMES[measured.side]} | {measured.seconds_a_step:.2f} | {measured.peak_mib:.0f} | {useful:.2f} "
            f"| {measured.losses[0]:.6f} |"
        )
    faster = trl.seconds_a_step / ours.seconds_a_step
    print(f"| ratio | {faster:.2f}x faster | {ours.peak_mib / trl.peak_mib:.2f} of the memory | | |")

    apart = max(abs(b / a - 1) for a, b in zip(trl.losses, ours.losses, strict=True))
    exact = float64_loss(shape, token_ids[:PAIRS_A_STEP])
    verdict = "same loss" if max(apart, abs(ours.losses[0] / exact - 1)) <= SAME_LOSS else "NOT THE SAME LOSS"
    print(f"{verdict}: {apart:.1e} apart over {len(trl.losses)} steps; float64 reference {exact:.6f}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed, memory and loss against TRL 1.16 under ZeRO-3.")
    parser.add_argument(
        "--data", type=Path, help="JSONL of conversations (default: the shared dpo_en_demo.jsonl)"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen2-43m", "smollm2-135m"])
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps a run, at least 2")
    parser.add_argument("--rounds", type=int, default=2, help="runs a side")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and response")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is not timed")
    if options.data is None:
        options.data = SHARED_DATA
        if not SHARED_DATA.is_file():
            options.data = DEMO_DATA
            print(
                f"{SHARED_DATA} is not there; its numbers cannot be compared with those of {DEMO_DATA}",
                file=sys.stderr,
            )
    return options


if __name__ == "__main__":
    main()
