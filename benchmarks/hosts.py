"""Two hosts against one, and what a slow network between them costs.

    python benchmarks/hosts.py [--steps 4] [--rates 1gbit 100mbit] [--model FOLDER]

SmolLM2-135M (`orpo_ds/demo`) under ZeRO-3 with parameters and optimizer offloaded: one process alone; two virtual
hosts (`shared/tools`, root) through `launch/deepspeed/train.sh` without a limit; the same at each rate. The losses are
compared, and every time is a ratio against the unlimited two hosts of the same run. What a rate costs is also computed,
from the bytes that left the host; so is latency, because this kernel cannot delay packets.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _watch import Watched, read
from _workload import DEMO_DATA, REPOSITORY

from orpo_ds.demo.model import smollm2_folder
from tests.cluster.virtual_hosts import VirtualHosts, environment, run_tool, sole_use

GLOBAL_BATCH = 4
ROUND_TRIPS_S = (50e-6, 500e-6)  # of a good switch; of a routed network
UNITS = {"gbit": 1e9, "mbit": 1e6}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=4, help="of each run; the first and the last are not timed"
    )
    parser.add_argument("--rates", nargs="*", default=["1gbit", "100mbit"], help="of the network, a run each")
    parser.add_argument("--model", type=Path, help="by default SmolLM2-135M")
    options = parser.parse_args(argv)
    if options.steps < 3:
        sys.exit("--steps: at least 3, because the first and the last are not timed.")
    model = options.model or smollm2_folder()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        alone = run_alone(folder, model, steps=options.steps)
        with sole_use():
            run_tool("hosts_up.sh", "2")
            hosts = VirtualHosts()
            runs = {
                rate: run_on_hosts(hosts, folder, model, steps=options.steps, rate=rate)
                for rate in [None, *options.rates]
            }
    report(model, alone, runs)


def words(folder: Path, model: Path, *, name: str, steps: int, pairs: int) -> list[str]:
    """The run's own arguments."""
    fields = {
        "model_name_or_path": model,
        "dataset_name": DEMO_DATA,
        "dataset_cache_dir": folder / "cache",
        "output_dir": folder / name,
        "deepspeed": "zero3_offload",
        "per_device_train_batch_size": pairs,
        "max_length": 256,
        "max_prompt_length": 128,
        "max_steps": steps,
        "logging_steps": 1,
        "learning_rate": 1e-5,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return [
        str(folder / f"{name}.json"),
        *(text for key, value in fields.items() for text in (f"--{key}", str(value))),
    ]


def run_alone(folder: Path, model: Path, *, steps: int) -> Watched:
    """One process, one thread, as each of the two hosts has."""
    print("  one process", file=sys.stderr)
    command = [sys.executable, "-m", "benchmarks._watched"]
    command += words(folder, model, name="alone", steps=steps, pairs=GLOBAL_BATCH)
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment({"HF_HUB_OFFLINE": "1"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"one process failed:\n{done.stdout[-4000:]}")
    return read(folder / "alone.json")


def run_on_hosts(hosts: VirtualHosts, folder: Path, model: Path, *, steps: int, rate: str | None) -> Watched:
    """Two hosts, one rank each, with the network at a rate."""
    print(f"  two hosts, {rate or 'no limit'}", file=sys.stderr)
    name = rate or "unlimited"
    hosts.limit("node2", rate=rate)
    done = hosts.run(
        "head",
        *(
            REPOSITORY / "launch/deepspeed/train.sh",
            hosts.hostfile,
            "--no_preflight",
            "--module",
            "benchmarks._watched",
        ),
        *words(folder, model, name=name, steps=steps, pairs=GLOBAL_BATCH // 2),
        changes={"HF_HUB_OFFLINE": "1"},
        timeout_s=3600,
    )
    hosts.limit("node2")
    if done.returncode:
        sys.exit(f"two hosts failed:\n{done.stdout[-4000:]}")
    return read(folder / f"{name}.json")


def report(model: Path, alone: Watched, runs: dict[str | None, Watched]) -> None:
    """Print what was measured, and what is computed from it."""
    free = runs[None]
    print(
        f"{model.name}, ZeRO-3 with offload, {GLOBAL_BATCH} pairs a step; {os.cpu_count()} cores, one thread a rank"
    )
    apart = max(
        abs(ours - theirs) / abs(theirs)
        for run in runs.values()
        for ours, theirs in zip(run.losses, alone.losses, strict=True)
    )
    print(
        f"losses of {len(alone.losses)} steps: two hosts are at most {apart:.1e} (relative) from one process"
    )
    print(
        f"a step of one process takes {alone.seconds_a_step / free.seconds_a_step:.2f} of the time of two hosts "
        "without a limit"
    )
    print(
        f"a step of two hosts: {len(free.calls)} collectives in {free.micro_steps} micro-steps, which send "
        f"{free.sent_by_collectives / 1e6:.0f} MB by the ring's formula; {free.sent_a_step / 1e6:.0f} MB left the host"
    )
    print(f"\n{'network':>10} {'s/step':>8} {'ratio':>7} {'computed':>9}")
    for rate, run in runs.items():
        extra = run.sent_a_step * 8 / bits(rate) if rate else 0.0
        computed = (free.seconds_a_step + extra) / free.seconds_a_step
        print(
            f"{rate or 'no limit':>10} {run.seconds_a_step:>8.2f} {run.seconds_a_step / free.seconds_a_step:>7.2f} "
            f"{computed:>9.2f}"
        )
    for trip in ROUND_TRIPS_S:
        print(
            f"latency, computed: a round trip of {trip * 1e6:.0f} us adds {len(free.calls) * trip:.4f} s to a step, "
            f"{len(free.calls) * trip / free.seconds_a_step:.1e} of it"
        )


def bits(rate: str) -> float:
    """Bits a second of `100mbit`."""
    unit = rate.lstrip("0123456789.")
    return float(rate.removesuffix(unit)) * UNITS[unit]


if __name__ == "__main__":
    main()
