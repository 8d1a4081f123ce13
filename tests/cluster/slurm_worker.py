"""`python -m orpo_ds train` with a place where it waits for what a test does to it.

    GATE=STEP:PLACE GATES=FOLDER python -m tests.cluster.slurm_worker --config run.yaml …

Takes the words of `orpo-ds train`. At that step and place (`step`: between forward and backward; `save`: in the middle
of a save) every rank leaves the file FOLDER/STEP:PLACE-RANK and waits until it gets SIGUSR1 or SIGTERM, or is killed.
The gate of a start is read from FOLDER/gate, which the test writes; without that file nothing waits.
"""

import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_ds import ORPOTrainer, cli, distributed, saving
from orpo_ds.preemption import leave_on_signals
from orpo_ds.script_data import load_script_rows

LONGEST_WAIT_S = 300


class Gate(TrainerCallback):
    """Waits where the file `gate` says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        file = folder / "gate"
        self._place = file.read_text() if file.exists() else ""
        self._step = 0
        self._waited = False
        self._heard, writes = os.pipe()
        os.set_blocking(writes, False)
        signal.set_wakeup_fd(writes)  # gets a byte whenever a handler of Python's takes a signal

    def at(self, place: str) -> None:
        """Wait, if this is the place, until a signal was taken note of."""
        if f"{self._step}:{place}" != self._place or self._waited:
            return
        self._waited = True
        (self._folder / f"{self._place}-{distributed.rank()}").touch()
        select.select([self._heard], [], [], LONGEST_WAIT_S)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **details: Any
    ) -> None:
        self._step = state.global_step + 1

    def watch(self, trainer: ORPOTrainer) -> None:
        """Stand in the forward of the model, and in the save of a rank's own state."""
        trainer.policy.register_forward_hook(lambda *_: self.at("step") if trainer.policy.training else None)
        save_rank_state = saving.save_rank_state

        def save(*words: Any) -> None:
            self.at("save")
            save_rank_state(*words)

        saving.save_rank_state = save  # type: ignore[assignment]


def main(words: list[str]) -> None:
    """See the module."""
    leave_on_signals()
    script, args = cli.parse_train_arguments(words)
    rows = load_script_rows(script, seed=args.seed, evaluates=False)
    gate = Gate(Path(os.environ["GATES"]))
    trainer = ORPOTrainer(script.model_name_or_path, args, train_dataset=rows.train, callbacks=[gate])
    gate.watch(trainer)
    cli._train_and_save(trainer)


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if not word.startswith("--local_rank=")])
