"""The `train` command, watched: seconds and network bytes of each step, and the collectives of the last one.

    deepspeed … --module benchmarks._watched RESULT.json --config run.yaml [--any_field value …]

Rank 0 writes RESULT.json. The last step is slower than the others, because every operator passes the counter.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from orpo_ds import ORPOTrainer, distributed
from orpo_ds.cli import parse_train_arguments
from orpo_ds.script_data import load_script_rows
from tests.collectives import Collectives


class Watch(TrainerCallback):
    """Looks at the clock and at the interfaces' counters at the end of each step."""

    def __init__(self) -> None:
        self.clock: list[float] = []
        self.sent: list[int] = []
        self.losses: list[float] = []
        self.seen = Collectives()
        self.micro_steps = 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.clock:
            self._look()
        self.micro_steps = 1
        if state.global_step == args.max_steps - 1:
            self.seen.__enter__()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.micro_steps += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look()
        if state.global_step == args.max_steps:
            self.seen.__exit__(None, None, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def _look(self) -> None:
        self.clock.append(time.monotonic())
        self.sent.append(bytes_sent())


def bytes_sent() -> int:
    """Bytes that left this host's network interfaces so far; the loopback's too, on which ranks of one host meet."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.partition(":")[2].split()[8]) for line in lines)


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    result = Path(words[0])
    script, args = parse_train_arguments(words[1:])
    watch = Watch()
    rows = load_script_rows(script, seed=args.seed, evaluates=False)
    trainer = ORPOTrainer(script.model_name_or_path, args, train_dataset=rows.train, callbacks=[watch])
    trainer.train()
    if distributed.is_main():
        facts = {
            "seconds": [after - before for before, after in zip(watch.clock, watch.clock[1:], strict=False)],
            "sent": [after - before for before, after in zip(watch.sent, watch.sent[1:], strict=False)],
            "losses": watch.losses,
            "calls": [dataclasses.asdict(call) for call in watch.seen.calls],
            "micro_steps": watch.micro_steps,
            "ranks": distributed.world_size(),
        }
        result.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
