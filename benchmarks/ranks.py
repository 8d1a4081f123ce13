"""Step time and bytes over 1, 2 and 4 ranks, for each ZeRO stage, at the same global batch.

    python benchmarks/ranks.py [--ranks 1 2 4] [--presets zero0 zero2 zero3]

All ranks share this machine, one thread each: with more ranks than cores a step takes longer, and the times say what
the communication costs here, not how GPUs would scale. Calls and bytes are those of any machine: `tests/distributed/
test_collectives.py` holds their formulas. Ratios are against one rank under the first preset.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _watch import Watched, read
from _workload import DEMO_DATA, REPOSITORY
from growth import small_model

GLOBAL_BATCH = 8
TOKENS_A_MICRO_BATCH = 1024
STEPS = 5


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--presets", nargs="+", default=["zero0", "zero2", "zero3"])
    options = parser.parse_args(argv)
    print(f"22M parameters, {GLOBAL_BATCH} pairs a step; {os.cpu_count()} cores, one thread a rank")
    heads = ("preset", "ranks", "s/step", "ratio", "micro", "calls", "MB sent a rank", "per parameter")
    print("{:>8} {:>6} {:>8} {:>6} {:>6} {:>6} {:>15} {:>14}".format(*heads))
    first: Watched | None = None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = small_model(folder / "model")
        parameters = (model / "model.safetensors").stat().st_size / 4
        for preset in options.presets:
            for ranks in options.ranks:
                seen = train(folder, model, preset=preset, ranks=ranks)
                first = first or seen
                sent, ratio = seen.sent_by_collectives, seen.seconds_a_step / first.seconds_a_step
                print(
                    f"{preset:>8} {ranks:>6} {seen.seconds_a_step:>8.2f} {ratio:>6.2f} "
                    f"{seen.micro_steps:>6} {len(seen.calls):>6} {sent / 1e6:>15.1f} {sent / parameters:>12.2f} B"
                )


def train(folder: Path, model: Path, *, preset: str, ranks: int) -> Watched:
    """One run under the `deepspeed` launcher."""
    result = folder / f"{preset}-{ranks}.json"
    fields = {
        "model_name_or_path": model,
        "dataset_name": DEMO_DATA,
        "dataset_cache_dir": folder / "cache",
        "output_dir": result.with_suffix(""),
        "deepspeed": preset,
        "per_device_train_batch_size": GLOBAL_BATCH // ranks,
        "max_tokens_per_micro_batch": TOKENS_A_MICRO_BATCH,
        "max_steps": STEPS,
        "logging_steps": 1,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        f"--num_accelerators={ranks}",
        f"--master_port={port}",
    ]
    command += ["--module", "benchmarks._watched", str(result)]
    command += [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{preset} on {ranks} ranks failed:\n{done.stdout[-4000:]}")
    return read(result)


if __name__ == "__main__":
    main()
