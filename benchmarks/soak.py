"""One training, killed again and again, against the same training left alone: the same bits come out.

    python benchmarks/soak.py [--kills 30] [--steps 400] [--seed 0] [--here]

Two ranks train a tiny model under ZeRO-3 with offload and dropout, `orpo-ds supervise` starts them again. At random
moments one of them is killed (SIGKILL), told to go (SIGTERM), cut off the network, or loses its whole host: virtual
hosts with a network of their own, from `shared/tools` (root). With `--here`, or where these are absent, both ranks are
on this machine and only the first two happen. At the end the model's file must have the same bytes, and
`metrics.jsonl` each step once and with the same numbers, as those of the run that was left alone.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import psutil
from _workload import REPOSITORY

from orpo_ds.cluster.restarts import newest_step
from orpo_ds.monitor.jsonl import read_metrics
from tests import small_runs
from tests.cluster.virtual_hosts import VirtualHosts, environment, run_tool, sole_use, tools_folder
from tests.faults.test_resume import numbers

SAVE_STEPS = 5
LATEST_S = 1.5  # a kill comes at most so long after the first checkpoint of a start
CUT_S = 10.0  # ssh misses a host after 6 s
PATIENCE_S = 400.0  # until a start has written a checkpoint, however busy the machine is
RANK = "orpo_ds --local_rank"  # what stands in the command line of a rank, and of nothing else


class Place(Protocol):
    """Where the two ranks live, and what can happen to them there."""

    happenings: tuple[str, ...]

    def command(self, words: Sequence[str]) -> list[str]:
        """What starts `orpo-ds WORDS` on both ranks."""

    def start(self, words: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
        """Start a command."""

    def strike(self, happening: str, chance: random.Random) -> None:
        """Let it happen, to a rank or host that chance chooses."""


class Here:
    """Two ranks of DeepSpeed's launcher on this machine."""

    happenings: tuple[str, ...] = ("SIGKILL", "SIGTERM")

    def command(self, words: Sequence[str]) -> list[str]:
        """DeepSpeed's launcher."""
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        return [launcher, "--num_accelerators=2", "--master_port=29713", "--module", "orpo_ds", *words]

    def start(self, words: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
        """Start a command."""
        with log.open("wb") as stream:
            self._started = subprocess.Popen(
                words, cwd=REPOSITORY, env=environment(), stdout=stream, stderr=subprocess.STDOUT
            )
        return self._started

    def strike(self, happening: str, chance: random.Random) -> None:
        """Signal a rank."""
        ranks = []
        for process in psutil.Process(self._started.pid).children(recursive=True):
            try:
                if RANK in " ".join(process.cmdline()):
                    ranks.append(process.pid)
            except psutil.Error:
                continue  # it has just ended
        if ranks:
            os.kill(chance.choice(sorted(ranks)), signal.Signals[happening])


class OnHosts:
    """A rank on each of two virtual hosts, started from a third one."""

    happenings: tuple[str, ...] = ("SIGKILL", "SIGTERM", "network cut", "host down")

    def __init__(self) -> None:
        self._hosts = VirtualHosts()

    def command(self, words: Sequence[str]) -> list[str]:
        """`orpo-ds launch`, which says `train` itself."""
        launch = [sys.executable, "-m", "orpo_ds", "launch", str(self._hosts.hostfile), "--no_preflight"]
        return [*launch, *words[1:]]

    def start(self, words: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
        """Start a command on the third host."""
        return self._hosts.start(self._hosts.head, *words, log=log)

    def strike(self, happening: str, chance: random.Random) -> None:
        """Signal a rank, cut off its host for a while, or end the host and bring it back."""
        host = chance.choice(self._hosts.nodes)
        if happening == "network cut":
            self._hosts.kill(host, "--unplug")
            time.sleep(CUT_S)
            self._hosts.kill(host, "--plug")
        elif happening == "host down":
            self._hosts.kill(host)
            self._hosts.revive()
        else:
            self._hosts.run(host, "pkill", f"-{happening.removeprefix('SIG')}", "-f", RANK, timeout_s=60)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", action="store_true", help="both ranks on this machine, no virtual hosts")
    options = parser.parse_args(argv)
    here = options.here or os.geteuid() != 0 or not (tools_folder() / "hosts_up.sh").is_file()
    with tempfile.TemporaryDirectory() as scratch, place_of(here=here) as place:
        folder = Path(scratch)
        small_runs.save_model_folder(folder / "model", attention_dropout=0.1)
        small_runs.write_jsonl(folder / "rows.jsonl", small_runs.rows(23))
        print(f"seed {options.seed}; {options.steps} steps left alone", flush=True)
        left_alone = place.start(
            place.command(words(folder, "alone", options.steps)), log=folder / "alone.log"
        )
        if left_alone.wait():
            sys.exit(f"the run that is left alone failed:\n{(folder / 'alone.log').read_text()[-4000:]}")
        happened = soak(place, folder, steps=options.steps, kills=options.kills, seed=options.seed)
        report(folder, happened, steps=options.steps)


@contextmanager
def place_of(*, here: bool) -> Iterator[Place]:
    """This machine, or virtual hosts that are taken down at the end."""
    if here:
        yield Here()
        return
    with sole_use():
        run_tool("hosts_up.sh", "2")
        yield OnHosts()


def words(folder: Path, name: str, steps: int) -> list[str]:
    """The run's own arguments: rounding must not depend on when it is killed, and dropout shows the generators."""
    return small_runs.command_line(
        folder,
        output_dir=str(folder / name),
        model_name_or_path=str(folder / "model"),
        dataset_name=str(folder / "rows.jsonl"),
        deepspeed="zero3_offload",
        per_device_train_batch_size=2,
        disable_dropout=False,
        full_determinism=True,
        max_steps=steps,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        resume_from_checkpoint="auto",
    )


def soak(place: Place, folder: Path, *, steps: int, kills: int, seed: int) -> Counter[str]:
    """Train under `supervise` and strike `kills` times, each time once a start has written a checkpoint."""
    chance, happened, run = random.Random(seed), Counter[str](), folder / "soaked"
    supervised = place.start(
        [
            *(sys.executable, "-m", "orpo_ds", "supervise", "--output-dir", str(run), "--pause", "1", "--"),
            *place.command(words(folder, run.name, steps)),
        ],
        log=folder / "soaked.log",
    )
    for number in range(kills):
        before = newest_step(run)
        wait_until(lambda: newest_step(run) > before, f"a checkpoint after step {before}", supervised, folder)  # noqa: B023
        time.sleep(chance.uniform(0, LATEST_S))
        happening = chance.choice(place.happenings)
        print(f"  {number + 1:2d}: {happening}, newest checkpoint {newest_step(run)}", flush=True)
        place.strike(happening, chance)
        wait_until(lambda: restarts(folder) > number, "a restart", supervised, folder)  # noqa: B023
        happened[happening] += 1
    if supervised.wait(timeout=PATIENCE_S):
        sys.exit(
            f"supervise ended with {supervised.returncode}:\n{(folder / 'soaked.log').read_text()[-6000:]}"
        )
    return happened


def wait_until(
    happened: Callable[[], bool], what: str, supervised: subprocess.Popen[bytes], folder: Path
) -> None:
    """Wait for something; leave with the log when it does not come, or when the training is over before it."""
    until = time.monotonic() + PATIENCE_S
    while not happened():
        if supervised.poll() is not None or time.monotonic() > until:
            log = (folder / "soaked.log").read_text()[-6000:]
            sys.exit(f"no sign of {what} (supervise: status {supervised.poll()}; more --steps?):\n{log}")
        time.sleep(0.05)


def restarts(folder: Path) -> int:
    """How often `supervise` has started the training again so far."""
    return (folder / "soaked.log").read_text().count("orpo-ds supervise: restart ")


def report(folder: Path, happened: Counter[str], *, steps: int) -> None:
    """Compare the two runs, and fail where they differ."""
    alone, soaked = folder / "alone", folder / "soaked"
    hashes = [hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest() for run in (alone, soaked)]
    logged = [line["step"] for line in read_metrics(soaked / "metrics.jsonl") if "loss" in line]
    counts = ", ".join(f"{count} {name}" for name, count in sorted(happened.items()))
    print(f"happened: {counts}; restarts: {restarts(folder)}")
    checks = {
        "the parameters have the same bytes": hashes[0] == hashes[1],
        f"each of the {steps} steps is logged once": logged == list(range(1, steps + 1)),
        "every logged number is the same": numbers(soaked) == numbers(alone),
    }
    for what, holds in checks.items():
        print(f"{'yes' if holds else 'NO '} {what}")
    if not all(checks.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
