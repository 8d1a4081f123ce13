"""Start both sides' runs, and judge what they did: time, memory, useful work, and whether the losses agree."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from _side import Result, Task, TokenIds
from _workload import REPOSITORY, SHAPES, preference_rows, random_model

from orpo_ds.data.preference import common_prefix_length
from orpo_ds.data.tokenize import PairLengths
from orpo_ds.model.anatomy import find_parts
from orpo_ds.model.size import measure
from orpo_ds.monitor.flops import UsefulFlops
from tests.parity.reference import IGNORED, orpo_from_token_logps, padded_token_logps
from tests.real_tokenizers import tokenizer

BETA = 0.1


@dataclass(frozen=True)
class Inputs:
    """Files that every run of a shape reads."""

    rows: Path
    tokenizer: Path


@dataclass(frozen=True)
class Measured:
    """All runs of one side."""

    side: str
    runs: list[Result]

    @property
    def seconds_a_step(self) -> float:
        """Mean over all timed steps. Every side trains the same rows, so the mean compares."""
        return mean(second for run in self.runs for second in run.seconds)

    @property
    def peak_mib(self) -> float:
        """Largest peak of a run."""
        return max(run.peak_mib for run in self.runs)

    @property
    def losses(self) -> list[float]:
        """Loss of every step."""
        return self.runs[0].losses


def write_inputs(folder: Path, *, shape: str, data: Path, max_length: int, count: int) -> Inputs:
    """The first `count` usable rows of `data`, and the tokenizer of the shape, as files.

    Raises:
        SystemExit: `data` has fewer usable rows.
    """
    tokens = tokenizer(SHAPES[shape].tokenizer)
    rows = preference_rows(data, tokenizer=tokens, max_length=max_length)[:count]
    if len(rows) < count:
        sys.exit(f"{data} has {len(rows)} usable rows and {count} are needed: ask for fewer --steps.")
    inputs = Inputs(folder / f"{shape}-rows.json", folder / f"{shape}-tokenizer")
    inputs.rows.write_text(json.dumps(rows))
    tokens.save_pretrained(inputs.tokenizer)
    return inputs


def take_turns(tasks: Sequence[Task], *, rounds: int) -> list[Measured]:
    """Run the tasks one after the other, `rounds` times over; each in a process of its own."""
    results: list[list[Result]] = [[] for _ in tasks]
    for number in range(rounds):
        for task, runs in zip(tasks, results, strict=True):
            print(f"  {task.shape}, {task.side}, run {number + 1} of {rounds}", file=sys.stderr)
            runs.append(run(task))
    return [Measured(task.side, runs) for task, runs in zip(tasks, results, strict=True)]


def run(task: Task) -> Result:
    """One run under the `deepspeed` launcher, on one device.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    description = Path(task.output).with_suffix(".task.json")
    description.write_text(json.dumps(asdict(task)))
    launcher = Path(sys.executable).with_name("deepspeed")
    script = Path(__file__).with_name("_side.py")
    command = [launcher, "--num_accelerators=1", f"--master_port={_free_port()}", "--no_local_rank", script]
    finished = subprocess.run(
        [*map(str, command), str(description)],
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if finished.returncode != 0:
        sys.exit(f"{task.side} failed on {task.shape}:\n{finished.stdout[-4000:]}")
    return Result(**json.loads(Path(task.output).read_text()))


def useful_flops(shape: str, token_ids: Sequence[TokenIds]) -> float:
    """FLOPs that the model needs for these rows when nothing is computed twice: shared prefixes once, no padding.

    Both sides are given the same count, so that dividing it by their times shows who comes closer to the peak.
    """
    with torch.device("meta"):
        size = measure(find_parts(random_model(shape)))
    trunk, chosen, rejected, start = [], [], [], []
    for row in token_ids:
        shared = common_prefix_length(row["chosen_input_ids"], row["rejected_input_ids"])
        trunk.append(shared)
        chosen.append(len(row["chosen_input_ids"]) - shared)
        rejected.append(len(row["rejected_input_ids"]) - shared)
        start.append(row["chosen_labels"].count(IGNORED))
    lengths = PairLengths(
        *(np.array(values, dtype=np.int32) for values in (trunk, chosen, rejected, start, [0] * len(trunk)))
    )
    return UsefulFlops(size, lengths, nll_on_prompt=True)(range(len(token_ids)))


def float64_loss(shape: str, token_ids: Sequence[TokenIds]) -> float:
    """The loss of these rows as one batch, by the reference in float64; a sequence at a time, as logits are large."""
    model = random_model(shape).double().eval()
    names = ("chosen", "rejected")
    width = max(len(row[f"{name}_input_ids"]) for row in token_ids for name in names) - 1
    logps, nll, response = [], [], []
    for name in names:
        for row in token_ids:
            ids = torch.tensor([row[f"{name}_input_ids"]])
            padding = (0, width - ids.shape[1] + 1)
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[:, :-1]
            logps.append(torch.nn.functional.pad(padded_token_logps(logits, ids[:, 1:]), padding))
            nll.append(torch.nn.functional.pad(torch.ones_like(ids[:, 1:], dtype=torch.bool), padding))
            is_response = torch.tensor([row[f"{name}_labels"]])[:, 1:] != IGNORED
            response.append(torch.nn.functional.pad(is_response, padding))
    reference = orpo_from_token_logps(
        torch.cat(logps), nll=torch.cat(nll[: len(token_ids)]), response=torch.cat(response), beta=BETA
    )
    return reference.loss.item()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
