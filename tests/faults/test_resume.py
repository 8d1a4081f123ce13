"""A run that was killed and resumed ends where the run that was left alone ends: nothing differs by one bit."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from orpo_ds import ORPOTrainer
from orpo_ds.checkpoint.lock import LOCK_NAME
from orpo_ds.export import full_state
from orpo_ds.monitor.jsonl import read_metrics
from tests import small_runs
from tests.faults.resume_worker import KILLED_STEP, SAVE_STEPS, STEPS

# What two runs of the same numbers may differ in: times, and memory.
MEASURED = {
    "step_time_s",
    "pairs_per_s",
    "tokens_per_s",
    "useful_flops_fraction",
    "peak_memory_mib",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
}


def numbers(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` without what was measured with a clock."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def differences(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """Paths at which two nested structures of tensors and plain values are not equal, bit for bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.dtype != second.dtype or not torch.equal(first, second):
            yield path
    elif isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in first:
            yield from differences(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from differences(one, other, f"{path}/{number}")
    elif hasattr(first, "__dict__") and type(first) is type(second):
        yield from differences(vars(first), vars(second), path)
    elif first != second:
        yield f"{path}: {first!r} and {second!r}"


def checkpoint_differences(first: Path, second: Path) -> list[str]:
    """Differences between what two checkpoints hold, file by file; of their manifests, only the step counts."""
    names = [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*.pt")} for folder in (first, second)
    ]
    assert names[0] == names[1]
    assert any("optim_states" in name for name in names[0]) or any(
        "model_states" in name for name in names[0]
    )
    found = []
    for name in sorted(names[0]):
        loaded = [torch.load(folder / name, weights_only=False) for folder in (first, second)]
        found += differences(*loaded, path=name)
    return found


# ---------------------------------------------------------------------- two ranks, ZeRO-3, offload, SIGKILL


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `resume_worker.py` after both of its starts."""
    folder = tmp_path_factory.mktemp("two_ranks")
    small_runs.save_model_folder(folder / "model", "gpt2", embd_pdrop=0.1)
    killed = small_runs.launch("tests.faults.resume_worker", "first", str(folder))
    assert (folder / "whole.pt").is_file(), killed.stdout[-6000:]
    assert killed.returncode != 0, "the second run was to be killed"
    assert not (folder / "killed.pt").exists()
    resumed = small_runs.launch("tests.faults.resume_worker", "second", str(folder))
    assert resumed.returncode == 0, resumed.stdout[-6000:]
    return folder


def seen(folder: Path, process: str, rank: int) -> list[tuple[int, Any]]:
    """(step, input ids) of every micro-batch that a rank pushed through the model, in order."""
    lines = (folder / f"{process}-{rank}.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


@pytest.mark.distributed
@pytest.mark.slow
class TestTwoRanks:
    def test_parameters(self, killed_and_resumed: Path) -> None:
        whole, resumed = (
            torch.load(killed_and_resumed / f"{process}.pt") for process in ("whole", "resumed")
        )
        assert list(differences(whole, resumed)) == []

    def test_optimizer_states_schedule_and_random_generators(self, killed_and_resumed: Path) -> None:
        last = f"checkpoint-{STEPS}"
        assert (
            checkpoint_differences(killed_and_resumed / "whole" / last, killed_and_resumed / "broken" / last)
            == []
        )

    def test_metrics_have_each_step_once_with_the_same_numbers(self, killed_and_resumed: Path) -> None:
        whole, broken = numbers(killed_and_resumed / "whole"), numbers(killed_and_resumed / "broken")
        assert [line["step"] for line in broken] == list(range(1, STEPS + 1))
        assert broken == whole

    @pytest.mark.parametrize("rank", [0, 1])
    def test_order_of_the_data(self, killed_and_resumed: Path, rank: int) -> None:
        whole = seen(killed_and_resumed, "whole", rank)
        killed = seen(killed_and_resumed, "killed", rank)
        resumed = seen(killed_and_resumed, "resumed", rank)
        saved = KILLED_STEP - 1
        assert saved % SAVE_STEPS == 0
        assert [line for line in killed if line[0] <= saved] == [line for line in whole if line[0] <= saved]
        assert resumed == [line for line in whole if line[0] > saved]
        assert len([line for line in whole if line[0] == KILLED_STEP]) > 1, "the step is one micro-batch"
        assert len([line for line in killed if line[0] == KILLED_STEP]) == 1, (
            "it was not killed within the step"
        )


# ---------------------------------------------------------------------- one rank, in this process

SETTINGS: dict[str, dict[str, Any]] = {
    "zero0": {"deepspeed": "zero0"},
    "zero2": {"deepspeed": "zero2"},
    "zero2, optimizer of the JSON": {
        "deepspeed": {
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        }
    },
    "zero2, adafactor, schedule that follows the evaluations": {
        "deepspeed": "zero2",
        "optim": "adafactor",
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.9},
        "eval_steps": 1,
    },
    "zero3": {"deepspeed": "zero3"},
}


class CrashError(Exception):
    """The end of a run that nobody expected."""


class Crash(TrainerCallback):
    """Ends the run as step 5 begins."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **details: Any
    ) -> None:
        if state.global_step == KILLED_STEP - 1:
            raise CrashError


def make_trainer(run: Path, *, callbacks: tuple[TrainerCallback, ...] = (), **changes: Any) -> ORPOTrainer:
    """A trainer of the run that this file interrupts: dropout, accumulation, a schedule, an evaluation."""
    model = small_runs.model_of("gpt2")
    model.transformer.drop.p = 0.1
    fields: dict[str, Any] = {
        "pairs": 11,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_tokens_per_micro_batch": 130,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "disable_dropout": False,
    }
    return small_runs.trainer(
        run,
        model=model,
        eval_dataset=small_runs.dataset(5),
        callbacks=callbacks,
        **(fields | changes),
    )


def parameters(trainer: ORPOTrainer) -> dict[str, torch.Tensor] | None:
    return full_state(trainer.model)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, setting: str) -> None:
    whole = make_trainer(tmp_path / "whole", **SETTINGS[setting])
    whole.train()
    broken = make_trainer(tmp_path / "broken", callbacks=(Crash(),), **SETTINGS[setting])
    with pytest.raises(CrashError):
        broken.train()
    assert list(differences(parameters(whole), parameters(broken))) != []

    torch.manual_seed(99)
    resumed = make_trainer(tmp_path / "broken", **SETTINGS[setting])
    resumed.train(resume_from_checkpoint=True)

    assert list(differences(parameters(whole), parameters(resumed))) == []
    last = f"checkpoint-{STEPS}"
    assert checkpoint_differences(tmp_path / "whole" / last, tmp_path / "broken" / last) == []
    lines = numbers(tmp_path / "broken")
    assert lines == numbers(tmp_path / "whole")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    evaluated = [3, 6] if "eval_steps" not in SETTINGS[setting] else list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == evaluated


def test_dropout_is_really_on(tmp_path: Path) -> None:
    """Else the tests above would say nothing about random generators."""
    losses = [
        make_trainer(tmp_path / str(seed), seed=seed, data_seed=1, max_steps=1).train().training_loss
        for seed in (1, 2)
    ]
    assert losses[0] != losses[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 2, 4 and 6, and its parameters beside it in `parameters.pt`."""
    run = tmp_path_factory.mktemp("finished") / "run"
    trainer = make_trainer(run)
    trainer.train()
    torch.save(parameters(trainer), run.parent / "parameters.pt")
    return run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def spoil(checkpoint: Path) -> str:
    """Change one byte of a checkpoint's largest file; returns the file's path in the checkpoint."""
    largest = max(checkpoint.rglob("*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return largest.relative_to(checkpoint).as_posix()


def test_a_finished_run_has_nothing_left_to_do(copied: Path, finished: Path) -> None:
    trainer = make_trainer(copied)
    assert trainer.train(resume_from_checkpoint=True).global_step == STEPS
    assert list(differences(parameters(trainer), torch.load(finished.parent / "parameters.pt"))) == []
    assert numbers(copied) == numbers(finished)


def test_a_broken_newest_checkpoint_is_skipped_and_named(
    copied: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoiled = spoil(copied / "checkpoint-6")
    trainer = make_trainer(copied)
    with caplog.at_level(logging.WARNING, "orpo_ds"):
        trainer.train(resume_from_checkpoint=True)
    [warning] = [record.message for record in caplog.records if "skipping" in record.message]
    assert str(copied / "checkpoint-6") in warning
    assert spoiled in warning
    # It went on from step 4, and came to the same end.
    assert list(differences(parameters(trainer), torch.load(finished.parent / "parameters.pt"))) == []
    assert checkpoint_differences(copied / "checkpoint-6", finished / "checkpoint-6") == []
    assert numbers(copied) == numbers(finished)


def test_a_broken_checkpoint_asked_for_by_name_is_refused(copied: Path) -> None:
    spoiled = spoil(copied / "checkpoint-4")
    with pytest.raises(ValueError, match=spoiled):
        make_trainer(copied).train(resume_from_checkpoint=str(copied / "checkpoint-4"))


@pytest.mark.parametrize("named", [False, True])
def test_nothing_to_resume(tmp_path: Path, named: bool) -> None:
    trainer = make_trainer(tmp_path / "run")
    wanted = tmp_path / "run" / "checkpoint-3"
    with pytest.raises(ValueError, match=str(wanted if named else tmp_path / "run")):
        trainer.train(resume_from_checkpoint=str(wanted) if named else True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 7}, ["seed: 42 in the checkpoint, 7 in this run"]),
        ({"pairs": 10}, ["dataset_fingerprint: '"]),
        ({"per_device_train_batch_size": 1}, ["global_batch_size: 4 in the checkpoint, 2 in this run"]),
        ({"learning_rate": 2e-3}, ["learning_rate: 0.001 in the checkpoint, 0.002 in this run"]),
        (
            {"beta": 0.3, "lr_scheduler_type": "linear"},
            ["beta: 0.1 in the checkpoint, 0.3", "lr_scheduler_type: 'cosine' in the checkpoint, 'linear'"],
        ),
    ],
)
def test_a_run_of_other_settings_is_refused(copied: Path, changes: dict[str, Any], words: list[str]) -> None:

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.name != LOCK_NAME}

    before = written()
    with pytest.raises(ValueError, match="belongs to a run with other settings") as raised:
        make_trainer(copied, **changes).train(resume_from_checkpoint=True)
    assert [word for word in words if word not in str(raised.value)] == []
    assert written() == before


@pytest.mark.distributed
@pytest.mark.slow
def test_another_number_of_ranks_finds_the_same_parameters(killed_and_resumed: Path, tmp_path: Path) -> None:
    """Bit for bit; how such a run goes on is in tests/checkpoint/test_elastic.py."""
    trainer = make_trainer(tmp_path / "run", pairs=11, deepspeed="zero3_offload", weight_decay=0.01)
    trainer.train(resume_from_checkpoint=str(killed_and_resumed / "whole" / f"checkpoint-{STEPS}"))
    assert trainer.state.global_step == STEPS
    assert list(differences(parameters(trainer), torch.load(killed_and_resumed / "whole.pt"))) == []
