"""transformers' callbacks see here what they see in transformers' own Trainer, event by event.

Both train the same tiny model for as many steps; what a callback is told, at which step, and what its answers do is
compared as lists.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests import small_runs

PAIRS = 8
EPOCH = 2  # steps: 8 pairs in batches of 4
Event = tuple[str, int, float]


class Recorder(TrainerCallback):
    """Writes down every event: its name, the step and the epoch at which it came."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **details: Any) -> None:
            # A substep follows each micro-batch but the last, and how many there are is each trainer's own business.
            if name not in ("on_init_end", "on_prediction_step", "on_substep_end"):
                self.events.append((name, state.global_step, round(state.epoch or 0.0, 9)))

        return note


class StopEpoch(TrainerCallback):
    """Ends the first epoch after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        control.should_epoch_stop = state.global_step == 1


class StopTraining(TrainerCallback):
    """Ends the training after its third step, in the middle of an epoch."""

    def on_step_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        control.should_training_stop = state.global_step == 3


class Whims(TrainerCallback):
    """Asks for things at odd times."""

    def on_step_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        control.should_evaluate |= state.global_step == 1
        control.should_log |= state.global_step == 3

    def on_epoch_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        control.should_save = True


def events_of_transformers(folder: Path, *callbacks: TrainerCallback, **settings: Any) -> list[Event]:
    """Those of a Trainer of language modelling, without DeepSpeed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.randint(3, 90, (PAIRS, 6))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    recorder = Recorder()
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )
    Trainer(
        model=small_runs.model_of(),
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        callbacks=[*callbacks, recorder],
    ).train()
    return recorder.events


def events_of_ours(folder: Path, *callbacks: TrainerCallback, **settings: Any) -> list[Event]:
    recorder = Recorder()
    small_runs.trainer(
        folder,
        pairs=PAIRS,
        eval_dataset=small_runs.dataset(2),
        callbacks=[*callbacks, recorder],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **settings,
    ).train()
    return recorder.events


@pytest.mark.parametrize(
    ("callbacks", "settings"),
    [
        (
            (),
            {
                "max_steps": 4,
                "logging_steps": 2,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "save_strategy": "steps",
            }
            | {"save_steps": 2, "eval_on_start": True},
        ),
        (
            (),
            {"num_train_epochs": 2, "max_steps": -1, "logging_strategy": "epoch", "eval_strategy": "epoch"}
            | {"save_strategy": "epoch", "eval_delay": 2},
        ),
        (
            (StopEpoch,),
            {"num_train_epochs": 2, "max_steps": -1, "logging_steps": 1, "save_strategy": "epoch"},
        ),
        (
            (StopTraining,),
            {"max_steps": 4, "logging_steps": 1, "eval_strategy": "epoch", "save_strategy": "no"},
        ),
        ((Whims,), {"max_steps": 4, "logging_steps": 4, "save_strategy": "no"}),
        (
            (),
            {"max_steps": 4, "logging_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.5}
            | {"save_strategy": "steps", "save_steps": 0.5, "eval_delay": 3},
        ),
    ],
    ids=["steps", "epochs", "stop an epoch", "stop the training", "whims", "shares of the steps"],
)
def test_events_are_those_of_transformers(
    tmp_path: Path, callbacks: tuple[type[TrainerCallback], ...], settings: dict[str, Any]
) -> None:
    ours = events_of_ours(tmp_path / "ours", *(kind() for kind in callbacks), **settings)
    theirs = events_of_transformers(tmp_path / "theirs", *(kind() for kind in callbacks), **settings)
    assert ours == theirs
    assert len(ours) > 10


def test_a_substep_ends_after_each_micro_batch_but_the_last(tmp_path: Path) -> None:
    ended: list[int] = []

    class Substeps(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
            ended.append(state.global_step)

    trainer = small_runs.trainer(tmp_path / "run", callbacks=[Substeps], max_tokens_per_micro_batch=130)
    pushed: list[int] = []
    trainer.policy.register_forward_hook(lambda *_: pushed.append(trainer.state.global_step))
    trainer.train()
    forwards = [step for step in pushed if trainer.policy.training]
    assert forwards.count(0) > 1, "one micro-batch only: nothing to see"
    assert ended.count(0) == forwards.count(0) - 1
    assert ended.count(1) == forwards.count(1) - 1


def test_a_trial_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hyperparameter search is not offered"):
        small_runs.trainer(tmp_path / "run").train(trial={"learning_rate": 1.0})
