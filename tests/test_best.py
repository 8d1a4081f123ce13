"""The best checkpoint: noted, kept, loaded, and what comes of `save_only_model` and the states of callbacks."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback

from orpo_ds import ORPOTrainer
from orpo_ds.checkpoint import CheckpointSaveError, read_manifest, verify
from orpo_ds.checkpoint.engine_state import checkpoint_bytes
from orpo_ds.export import full_state
from tests import small_runs

# A learning rate so high that the evaluation is best in the middle, and worse at the end.
HIGH = {
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "max_steps": 6,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
}


class WeightsAtEachEvaluation(TrainerCallback):
    """Keeps a copy of all weights of each evaluation, with the loss that was found."""

    def __init__(self) -> None:
        self.trainer: ORPOTrainer | None = None
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.losses: dict[int, float] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **details: Any) -> None:
        assert self.trainer is not None
        self.weights[state.global_step] = full_state(self.trainer.model) or {}
        self.losses[state.global_step] = metrics["eval_loss"]

    @property
    def best_step(self) -> int:
        return min(self.losses, key=lambda step: self.losses[step])


def run(
    folder: Path, *callbacks: TrainerCallback, **changes: Any
) -> tuple[ORPOTrainer, WeightsAtEachEvaluation]:
    """A trained trainer, and what its evaluations saw."""
    seen = WeightsAtEachEvaluation()
    trainer = small_runs.trainer(
        folder, eval_dataset=small_runs.dataset(3), callbacks=[*callbacks, seen], **HIGH | changes
    )
    seen.trainer = trainer
    trainer.train()
    return trainer, seen


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def holds(folder: Path, weights: dict[str, Tensor]) -> bool:
    """Whether a model folder has these weights; the head is tied to the embedding, and stored once."""
    saved = load_file(folder / "model.safetensors")
    return saved.keys() == weights.keys() - {"lm_head.weight"} and all(
        torch.equal(value, weights[name]) for name, value in saved.items()
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, stage: int) -> None:
    trainer, seen = run(
        tmp_path / "run", load_best_model_at_end=True, save_total_limit=1, deepspeed=f"zero{stage}"
    )
    best = seen.best_step
    assert 1 < best < 6, f"the losses {seen.losses} have their best at an end: nothing to see"
    state = trainer.state
    assert (state.best_global_step, state.best_metric) == (best, seen.losses[best])
    assert state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{best}")
    loaded = full_state(trainer.model)
    assert loaded is not None
    assert same(loaded, seen.weights[best])
    assert not same(loaded, seen.weights[6])
    trainer.save_model(str(tmp_path / "model"))
    assert holds(tmp_path / "model", seen.weights[best])
    # The newest checkpoint stays while the training runs; with a limit of one only the best stays at its end.
    assert checkpoints(tmp_path / "run") == [best]
    assert verify(tmp_path / "run" / f"checkpoint-{best}") == []
    # The engine itself is there, not only the model's weights.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(seen.losses[best], rel=1e-6)


def test_without_it_the_last_model_stays(tmp_path: Path) -> None:
    trainer, seen = run(tmp_path / "run", metric_for_best_model="loss", save_total_limit=2)
    assert seen.best_step not in (5, 6)
    loaded = full_state(trainer.model)
    assert loaded is not None
    assert same(loaded, seen.weights[6])
    assert checkpoints(tmp_path / "run") == [seen.best_step, 6], "the best one was pruned"


@pytest.mark.parametrize(
    ("metric", "greater_is_better"),
    [("eval_logps/rejected", False), ("rewards/margins", None), ("eval_loss", None)],
)
def test_save_strategy_best(tmp_path: Path, metric: str, greater_is_better: bool | None) -> None:
    """A checkpoint whenever the metric is better than ever; against the logged history."""
    trainer, _ = run(
        tmp_path / "run",
        save_strategy="best",
        metric_for_best_model=metric,
        greater_is_better=greater_is_better,
    )
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    sign = 1 if metric == "rewards/margins" else -1
    records, best = [], -float("inf")
    for line in trainer.state.log_history:
        if name in line and sign * line[name] > best:
            best = sign * line[name]
            records.append(line["step"])
    assert checkpoints(tmp_path / "run") == records
    assert trainer.state.best_global_step == records[-1]


def test_early_stopping_as_transformers_has_it(tmp_path: Path) -> None:
    patience = 2
    trainer, seen = run(
        tmp_path / "run", EarlyStoppingCallback(early_stopping_patience=patience), load_best_model_at_end=True
    )
    losses = list(seen.losses.values())
    worse = 0
    for stop, loss in enumerate(losses, start=1):
        worse = 0 if loss == min(losses[:stop]) else worse + 1
        if worse == patience:
            break
    assert worse == patience, f"{losses}: it never had to stop"
    assert trainer.state.global_step == stop < 6
    loaded = full_state(trainer.model)
    assert loaded is not None
    assert same(loaded, seen.weights[seen.best_step])


def test_an_unknown_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'eval_accuracy' was not evaluated. There is: eval_loss"):
        run(tmp_path / "run", metric_for_best_model="accuracy")


@pytest.mark.parametrize("stage", [2, 3])
def test_save_only_model(tmp_path: Path, stage: int) -> None:
    settings = {
        "save_only_model": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "deepspeed": f"zero{stage}",
    }
    trainer = small_runs.trainer(tmp_path / "run", **settings)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-2"
    assert verify(folder) == []
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer_config.json", "trainer_state.json"}
    assert not names & {"engine", "rank_state", "scheduler.pt"}
    trained = full_state(trainer.model)
    assert trained is not None
    assert holds(folder, trained)
    with pytest.raises(ValueError, match="was written with save_only_model=True"):
        small_runs.trainer(tmp_path / "run", **settings).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="exclude each other"):
        small_runs.settings(tmp_path / "x", **HIGH, save_only_model=True, load_best_model_at_end=True)


class KillAt(TrainerCallback):
    """Fails at the begin of a step, as a process that is killed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Data(TrainerCallback):
    """Which pairs each step trained on."""

    def __init__(self) -> None:
        self.pairs: dict[int, list[int]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **details: Any) -> None:
        def note(module: Any, words: tuple[Any, ...]) -> None:
            if module.training:
                self.pairs.setdefault(state.global_step, []).extend(words[0].pair_ids)

        self.state = state
        self.policy.register_forward_pre_hook(note)


def pairs_by_step(
    folder: Path, *callbacks: TrainerCallback, resume: bool = False, **changes: Any
) -> list[list[int]]:
    """The pairs of each step of a run of two epochs of three steps, sorted."""
    data = Data()
    trainer = small_runs.trainer(
        folder, callbacks=[*callbacks, data], max_steps=6, save_strategy="steps", save_steps=2, **changes
    )
    data.policy = trainer.policy
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume)
    return [sorted(pairs) for _, pairs in sorted(data.pairs.items())]


def test_ignore_data_skip_begins_the_epoch_again(tmp_path: Path) -> None:
    whole = pairs_by_step(tmp_path / "whole")
    assert len(whole) == 6
    assert pairs_by_step(tmp_path / "run", KillAt(2)) == whole[:2]
    resumed = pairs_by_step(tmp_path / "run", resume=True, ignore_data_skip=True)
    # transformers' rule: the epoch under way from its begin, and no more epochs than there were to be.
    assert resumed == whole[0:3] + whole[3:4]


def test_an_epoch_that_was_stopped_is_resumed_after_its_end(tmp_path: Path) -> None:
    class StopEpoch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
            control.should_epoch_stop = state.global_step == 2

    planned = pairs_by_step(tmp_path / "planned")
    whole = pairs_by_step(tmp_path / "whole", StopEpoch())
    assert whole == planned[:2] + planned[3:6]
    assert pairs_by_step(tmp_path / "run", StopEpoch(), KillAt(2)) == whole[:2]
    assert pairs_by_step(tmp_path / "run", StopEpoch(), resume=True) == whole[2:]


@pytest.mark.parametrize("restore", [True, False])
def test_states_of_callbacks_are_restored(tmp_path: Path, restore: bool) -> None:
    settings = HIGH | {"metric_for_best_model": "loss", "max_steps": 6, "learning_rate": 1e-3}
    settings |= {"greater_is_better": True}  # so that each evaluation but the first is worse
    keywords = {"eval_dataset": small_runs.dataset(3)}
    trainer = small_runs.trainer(
        tmp_path / "run", callbacks=[EarlyStoppingCallback(4), KillAt(3)], **keywords, **settings
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = small_runs.trainer(
        tmp_path / "run",
        callbacks=[EarlyStoppingCallback(4)],
        restore_callback_states_from_checkpoint=restore,
        **keywords,
        **settings,
    )
    steps = trainer.train(resume_from_checkpoint=True).global_step
    # Evaluations 2, 3, 4 and 5 are worse. Without the saved counter the patience starts again at 4.
    assert steps == (5 if restore else 6)


@pytest.mark.parametrize(
    "changes", [{"deepspeed": f"zero{stage}"} for stage in range(4)] + [{"save_only_model": True}]
)
def test_the_size_of_the_first_checkpoint_is_foreseen(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Tiny files have a relatively large frame (names of parameters, the tokenizer): at most 100 kB a checkpoint."""
    trainer = small_runs.trainer(
        tmp_path / "run", save_strategy="steps", save_steps=1, max_steps=1, **changes
    )
    trainer.train()
    assert trainer.engine is not None
    foreseen = checkpoint_bytes(trainer.engine.deepspeed, only_model=bool(trainer.args.save_only_model))
    written = read_manifest(tmp_path / "run" / "checkpoint-1").total_bytes
    assert foreseen > 300_000, "the weights alone are more"
    assert foreseen <= written <= foreseen + 100_000


def test_a_first_checkpoint_that_does_not_fit_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = small_runs.trainer(tmp_path / "run", save_strategy="steps", save_steps=1, max_steps=1)
    monkeypatch.setattr("orpo_ds.checkpoint.store.free_bytes", lambda folder: 500_000)
    with pytest.raises(CheckpointSaveError, match=r"it needs about [\d,]+ bytes, which .* does not have"):
        trainer.train()
    assert not list((tmp_path / "run").glob("*checkpoint*"))
