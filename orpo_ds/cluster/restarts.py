"""When a run that ended is started again, and when to give up.

A chain is one training over all its starts. A run that ends before its training is done is started again, whatever
ended it: it was preempted and has saved, it crashed, its machine died. It is given up when restarts bring nothing, and
the only thing that counts is a newer checkpoint:

    start        checkpoint-0..40    crash at step 47
    restart 1    checkpoint-60       crash: 60 is newer than 40, so all is well
    restart 2    -                   crash at step 62, without progress
    restart 3    -                   crash at step 62, without progress
    ...

Where the chain stands is kept in the run's output folder, because the process that counts may die with its machine:
SLURM starts a job again whose node is gone, and nobody had a chance to write down how it ended. So `begin` judges the
start before by what it left behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orpo_ds.preemption import REQUEUE_EXIT_CODE

USAGE_ERROR = 2  # the exit status of a run that refuses its settings
DEFAULT_LIMIT = 3
CHAIN_FILE = ".orpo_ds.restarts.json"
DEFAULT_OUTPUT_DIR = "trainer_output"  # of transformers' TrainingArguments


class GivenUpError(RuntimeError):
    """The chain ends although the training is not done; says why, and what to do."""


@dataclass(frozen=True)
class Chain:
    """Where a chain stands, at its latest start.

    Attributes:
        name: tells chains in one output folder apart: the SLURM job, or the supervising process.
        starts: so far.
        newest: step of the newest checkpoint at the latest start; 0 without one.
        fruitless: starts before this one, in a row, that left no newer checkpoint.
    """

    name: str
    starts: int
    newest: int
    fruitless: int


@dataclass(frozen=True)
class Ended:
    """How a start ended, in words, and whether it left a new checkpoint."""

    text: str
    progress: bool


class Restarts:
    """Counts the starts of one chain."""

    def __init__(self, run_dir: Path, *, name: str, limit: int = DEFAULT_LIMIT) -> None:
        """Nothing is written before `begin`.

        Args:
            run_dir: the run's output folder.
            name: of the chain: another name in the same folder begins to count anew.
            limit: restarts without progress, in a row, after which the chain is given up.

        Raises:
            ValueError: a negative limit.
        """
        if limit < 0:
            raise ValueError(f"--max-restarts-without-progress={limit}: must be 0 or more.")
        self.run_dir = run_dir
        self.limit = limit
        self._name = name
        self._path = run_dir / CHAIN_FILE

    def begin(self) -> Chain:
        """Note a start; the first of the chain, or one more.

        Raises:
            GivenUpError: the start before this one was the last that the limit allows.
        """
        before = self._read()
        newest = newest_step(self.run_dir)
        if before is None:
            chain = Chain(self._name, starts=1, newest=newest, fruitless=0)
        else:
            fruitless = 0 if newest > before.newest else before.fruitless + 1
            if fruitless > self.limit:
                raise self._given_up(self._no_progress(newest))
            chain = replace(before, starts=before.starts + 1, newest=newest, fruitless=fruitless)
        self._write(chain)
        return chain

    def judge(self, status: int) -> Ended:
        """What became of a start that ended before the training was done, and is to be followed by another.

        Args:
            status: its exit status, not 0.

        Raises:
            GivenUpError: it is not to be started again.
        """
        chain = self._read()
        assert chain is not None, "begin comes first"
        newest = newest_step(self.run_dir)
        how = "was preempted" if status == REQUEUE_EXIT_CODE else f"ended with exit status {status}"
        if newest > chain.newest:
            return Ended(f"the run {how}; its newest checkpoint is {checkpoint_name(newest)}", progress=True)
        if status == USAGE_ERROR and chain.starts == 1:
            raise self._given_up(
                f"the run was refused (exit status {USAGE_ERROR}; its message stands above): a restart would not "
                "help. Mend it and start again."
            )
        if chain.fruitless + 1 > self.limit:
            raise self._given_up(f"the run {how}. {self._no_progress(newest)}")
        left = self.limit - chain.fruitless
        return Ended(
            f"the run {how}, without a new checkpoint (there is {checkpoint_name(newest)}); {left} more such starts "
            "are made",
            progress=False,
        )

    def _no_progress(self, newest: int) -> str:
        return (
            f"Given up: {self.limit} restarts in a row brought no new checkpoint ({self.run_dir} has "
            f"{checkpoint_name(newest)}). Look for the first error above, mend it, start it again: it goes on there."
        )

    def _given_up(self, why: str) -> GivenUpError:
        self._path.unlink()  # whoever starts it again, by the same job, has mended something
        return GivenUpError(why)

    def _read(self) -> Chain | None:
        """The chain of this name that the folder knows of."""
        if not self._path.is_file():
            return None
        chain = Chain(**json.loads(self._path.read_text(encoding="utf-8")))
        return chain if chain.name == self._name else None

    def _write(self, chain: Chain) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".tmp")
        partial.write_text(json.dumps(asdict(chain)) + "\n", encoding="utf-8")
        partial.replace(self._path)


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint with all its files in their sizes; 0 where there is none.

    The bytes are not read: that takes minutes for a large model, and the ranks of the next start do it together.
    """
    from orpo_ds.checkpoint.manifest import problems_by_size
    from orpo_ds.checkpoint.store import numbered_folders, step_of

    for folder in numbered_folders(run_dir):
        if not problems_by_size(folder):
            return step_of(folder)
    return 0


def checkpoint_name(step: int) -> str:
    """`checkpoint-20` for 20, and `no checkpoint` for 0."""
    return f"checkpoint-{step}" if step else "no checkpoint"


def run_dir_of(command: Sequence[str]) -> Path:
    """The output folder of `… train …`, from its words and the YAML file that they name.

    Args:
        command: the whole command line of a training, launcher and all.

    Raises:
        ValueError: the file cannot be read, or the run would refuse its own output at the second start.
    """
    from orpo_ds.cli import read_yaml

    config = option(command, "config")
    fields: Mapping[str, Any] = {} if config is None else read_yaml(config)
    resume = option(command, "resume_from_checkpoint") or fields.get("resume_from_checkpoint")
    if str(resume).lower() != "auto":
        raise ValueError(
            f"resume_from_checkpoint={resume!r}: the first start and every restart are the same command, so it must be "
            "`auto` (continue, or start where there is no checkpoint yet). Add --resume_from_checkpoint auto to the "
            "command. For a script of your own that does so itself, give its folder as --output-dir."
        )
    output_dir = option(command, "output_dir") or fields.get("output_dir") or DEFAULT_OUTPUT_DIR
    return Path(output_dir).expanduser()


def option(command: Sequence[str], name: str) -> str | None:
    """The last value of `--name value` or `--name=value` in a command line, the one that `argparse` takes as well."""
    found = None
    for place, word in enumerate(command):
        if word.startswith(f"--{name}="):
            found = word.partition("=")[2]
        elif word == f"--{name}" and place + 1 < len(command):
            found = command[place + 1]
    return found
