"""What a user of `ORPOTrainer` relies on, beyond the numbers of a single step (`tests/parity`, `tests/distributed`)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback, get_scheduler
from transformers.trainer_utils import SchedulerType

from orpo_ds import ORPOTrainer
from orpo_ds.export import full_state
from orpo_ds.monitor.jsonl import read_metrics
from orpo_ds.plan import training_batches
from tests import small_runs
from tests.parity.orpo_side import token_pairs
from tests.parity.reference import pad_pairs, reference_step
from tests.parity.tokenizer import tiny_tokenizer
from tests.trainer_worker import (
    LORA,
)

TOLERANCE = 1e-5  # fp32 sums in another order, against float64

TRL_METRICS = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "log_odds_chosen",
    "log_odds_ratio",
    "nll_loss",
}
TRAINING_ONLY = {
    "grad_norm",
    "learning_rate",
    "step_time_s",
    "pairs_per_s",
    "tokens_per_s",
    "packing_efficiency",
    "trunk_saving",
    "useful_flops_fraction",
    "peak_memory_mib",
    "skipped_steps",
}


def parameters(trainer: ORPOTrainer) -> dict[str, Tensor]:
    state = full_state(trainer.model)
    assert state is not None
    return state


def largest_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Over all parameters, the largest difference relative to the largest entry of that parameter."""
    assert first.keys() == second.keys()
    return max(
        ((first[name] - value).abs().max() / value.abs().max()).item() for name, value in second.items()
    )


def test_nothing_to_evaluate_or_train_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass eval_dataset"):
        small_runs.trainer(tmp_path / "run").evaluate()
    with pytest.raises(ValueError, match="train_dataset is missing"):
        small_runs.trainer(tmp_path / "run", train_dataset=None).train()


# ---------------------------------------------------------------------- metrics


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_metrics_have_every_name(tmp_path: Path, stage: int) -> None:
    trainer = small_runs.trainer(
        tmp_path / "run",
        eval_dataset=small_runs.dataset(3),
        eval_strategy="steps",
        eval_steps=2,
        deepspeed=f"zero{stage}",
    )
    trainer.train()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2]
    for line in lines[:2]:
        assert line.keys() == TRL_METRICS | TRAINING_ONLY | {"step", "epoch"}
        assert all(math.isfinite(value) for value in line.values())
        assert line["grad_norm"] > 0
    assert lines[2].keys() >= {f"eval_{name}" for name in TRL_METRICS} | {"step", "epoch", "eval_runtime"}
    assert [*lines, trainer.state.log_history[-1]] == trainer.state.log_history
    assert trainer.state.log_history[-1].keys() >= {"train_runtime", "train_loss", "step", "epoch"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_grad_norm_is_that_before_clipping(tmp_path: Path, stage: int) -> None:
    """Against the float64 gradient of the same global batch; with a limit far below it, and several micro-batches."""
    tokenizer = tiny_tokenizer()
    pairs = token_pairs(small_runs.rows(4), tokenizer=tokenizer)
    exact = reference_step(
        small_runs.model_of(), pad_pairs(pairs, pad_token_id=tokenizer.pad_token_id), beta=0.1
    )
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in exact.gradients.values()))
    trainer = small_runs.trainer(
        tmp_path / "run",
        pairs=4,
        max_steps=1,
        max_grad_norm=0.01,
        max_tokens_per_micro_batch=130,
        deepspeed=f"zero{stage}",
    )
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=TOLERANCE)


@pytest.mark.parametrize(("limit", "moves_less"), [(0.5, True), (0.0, False), (1e6, False)])
def test_the_gradient_is_clipped(tmp_path: Path, limit: float, moves_less: bool) -> None:
    """Plain gradient descent moves by the learning rate times the gradient, or by what is left of it."""
    trainer = small_runs.trainer(
        tmp_path / "run", max_steps=1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=limit
    )
    before = [value.detach().clone() for value in trainer.model.parameters()]
    trainer.train()
    pairs = zip(trainer.model.parameters(), before, strict=True)
    moved = math.sqrt(sum((now - then).double().square().sum().item() for now, then in pairs))
    norm = min(trainer.state.log_history[0]["grad_norm"], limit if moves_less else math.inf)
    assert moved == pytest.approx(1e-3 * norm, rel=1e-3)


@pytest.mark.parametrize(("wish", "layout"), [(True, "padded"), ("non_padding", "padded"), ("all", "packed")])
def test_tokens_seen(tmp_path: Path, wish: bool | str, layout: str) -> None:
    """Against the lengths of the pairs of each step; 11 pairs in batches of 4, each batch one micro-batch."""
    changes = {"include_num_input_tokens_seen": wish, "layout": layout, "max_steps": 4}
    trainer = small_runs.trainer(
        tmp_path / "run", save_strategy="steps", save_steps=2, logging_steps=2, **changes
    )
    assert trainer.train_dataset is not None
    batches = training_batches(trainer.args, trainer.train_dataset)
    seen = 0
    expected = {}
    for step in range(4):
        pairs = [trainer.train_dataset[index] for index in batches.pairs(step)]
        both = [len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
        if layout == "packed":
            seen += sum(both) - sum(pair.trunk for pair in pairs)
        else:
            seen += sum(both) if wish == "non_padding" else len(both) * max(both)
        expected[step + 1] = seen
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    logged = {line["step"]: line["num_input_tokens_seen"] for line in lines}
    assert logged == {step: expected[step] for step in (2, 4)}
    resumed = small_runs.trainer(tmp_path / "run", logging_steps=2, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.num_input_tokens_seen == expected[4]


def test_means_are_over_all_steps_since_the_last_log(tmp_path: Path) -> None:
    each = small_runs.trainer(tmp_path / "each", max_steps=3)
    each.train()
    once = small_runs.trainer(tmp_path / "once", max_steps=3, logging_steps=3)
    summary = once.train()
    losses = [line["loss"] for line in small_runs.step_lines(each)]
    assert once.state.log_history[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert summary.training_loss == pytest.approx(sum(losses) / 3, rel=1e-6)


# ---------------------------------------------------------------------- when things happen


@pytest.mark.parametrize(
    ("changes", "logged", "evaluated", "saved"),
    [
        # 11 pairs in batches of 4: 3 steps an epoch.
        ({"max_steps": 5, "logging_steps": 2}, [2, 4, 5], [], []),
        (
            {
                "max_steps": 5,
                "logging_steps": 3,
                "logging_first_step": True,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "save_strategy": "steps",
                "save_steps": 4,
            },
            [1, 3, 5],
            [2, 4, 5],
            [4, 5],
        ),
        (
            {
                "max_steps": -1,
                "num_train_epochs": 2,
                "logging_strategy": "epoch",
                "eval_strategy": "epoch",
                "save_strategy": "epoch",
            },
            [3, 6],
            [3, 6],
            [3, 6],
        ),
        ({"max_steps": -1, "num_train_epochs": 0.5, "logging_steps": 1}, [1, 2], [], []),
        ({"max_steps": 4, "logging_steps": 0.5, "eval_strategy": "no"}, [2, 4], [], []),
        ({"max_steps": 1, "eval_on_start": True, "eval_strategy": "epoch"}, [1], [0, 1], []),
    ],
    ids=["steps", "steps of each kind", "epochs", "half an epoch", "share of the steps", "on start"],
)
def test_strategies(
    tmp_path: Path, changes: dict[str, Any], logged: list[int], evaluated: list[int], saved: list[int]
) -> None:
    trainer = small_runs.trainer(tmp_path / "run", eval_dataset=small_runs.dataset(2), **changes)
    result = trainer.train()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == logged
    assert [line["step"] for line in lines if "eval_loss" in line] == evaluated
    assert sorted(int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*")) == saved
    assert result.global_step == trainer.state.max_steps == logged[-1]
    assert lines[-1]["epoch"] == pytest.approx(logged[-1] / 3)


class Recorder(TrainerCallback):
    """Writes down every event, with the step at which it came."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **details: Any) -> None:
            if name != "on_init_end":
                assert details["model"] is not None
                self.events.append((name, state.global_step))

        return note


def test_callbacks_see_the_events_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    small_runs.trainer(
        tmp_path / "run",
        pairs=8,
        callbacks=[recorder],
        eval_dataset=small_runs.dataset(2),
        max_steps=3,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    ).train()
    # The step's metrics, then the evaluation and its metrics.
    closing = ["on_log", "on_prediction_step", "on_log", "on_evaluate", "on_save"]
    assert recorder.events == [
        ("on_train_begin", 0),
        ("on_epoch_begin", 0),
        ("on_step_begin", 0),
        ("on_pre_optimizer_step", 0),
        ("on_optimizer_step", 0),
        ("on_step_end", 1),
        ("on_step_begin", 1),
        ("on_pre_optimizer_step", 1),
        ("on_optimizer_step", 1),
        ("on_step_end", 2),
        *((name, 2) for name in closing),
        ("on_epoch_end", 2),
        ("on_epoch_begin", 2),
        ("on_step_begin", 2),
        ("on_pre_optimizer_step", 2),
        ("on_optimizer_step", 2),
        ("on_step_end", 3),
        *((name, 3) for name in closing[1:]),
        ("on_epoch_end", 3),
        ("on_log", 3),  # the last step, which no interval would have logged
        ("on_log", 3),  # the summary
        ("on_train_end", 3),
    ]


class Stop(TrainerCallback):
    """Ends the training after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        control.should_training_stop = True


def test_a_callback_may_stop_the_training(tmp_path: Path) -> None:
    trainer = small_runs.trainer(tmp_path / "run", callbacks=[Stop])
    assert trainer.train().global_step == 1


# ---------------------------------------------------------------------- the arithmetic of a step


def test_accumulation_equals_a_bigger_batch(tmp_path: Path) -> None:
    """Global normalisation: batches of 4 as 4 x 1, 2 x 2 or 1 x 4 give the same parameters."""
    states = {}
    for batch_size in (4, 2, 1):
        trainer = small_runs.trainer(
            tmp_path / str(batch_size),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_tokens_per_micro_batch=130 if batch_size == 1 else None,
            max_steps=3,
            optim="sgd",
            learning_rate=0.05,
        )
        trainer.train()
        states[batch_size] = parameters(trainer)
    assert largest_difference(states[2], states[4]) <= TOLERANCE
    assert largest_difference(states[1], states[4]) <= TOLERANCE


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, stage: int) -> None:
    states = []
    for on in (False, True):
        trainer = small_runs.trainer(
            tmp_path / str(on),
            gradient_checkpointing=on,
            optim="sgd",
            learning_rate=0.05,
            deepspeed=f"zero{stage}",
        )
        assert trainer.model.is_gradient_checkpointing == on
        trainer.train()
        states.append(parameters(trainer))
    assert largest_difference(*states) <= TOLERANCE


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "reduce_lr_on_plateau": {"patience": 0, "threshold": 0.5},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "greedy": {"patience": 1},
}


def test_every_schedule_is_listed() -> None:
    assert {kind.value for kind in SchedulerType} == SCHEDULES.keys()


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    """Against the schedule itself, stepped by hand; those that look at a metric move after each evaluation."""
    trainer = small_runs.trainer(
        tmp_path / "run",
        eval_dataset=small_runs.dataset(3),
        eval_strategy="steps",
        eval_steps=1,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=SCHEDULES[kind],
        warmup_steps=2,
        max_steps=6,
    )
    trainer.train()
    history = trainer.state.log_history
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler(
        kind, optimizer, num_warmup_steps=2, num_training_steps=6, scheduler_specific_kwargs=SCHEDULES[kind]
    )
    expected = []
    for line in (line for line in history if "eval_loss" in line):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*([line["eval_loss"]] if kind in ("reduce_lr_on_plateau", "greedy") else []))
    assert [line["learning_rate"] for line in history if "learning_rate" in line] == expected
    assert len(set(expected)) > 1 or kind == "constant"


@pytest.mark.parametrize(
    ("kind", "changes", "factors"),
    [
        ("linear", {"warmup_steps": 2}, [0, 1 / 2, 1, 2 / 3, 1 / 3]),
        ("cosine", {}, [(1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]),
        ("constant_with_warmup", {"warmup_steps": 2}, [0, 1 / 2, 1, 1, 1]),
        ("linear", {"warmup_steps": 0.4}, [0, 1 / 2, 1, 2 / 3, 1 / 3]),
    ],
)
def test_learning_rates(tmp_path: Path, kind: str, changes: dict[str, Any], factors: list[float]) -> None:
    """`learning_rate` of a line is the one that its step was taken with."""
    trainer = small_runs.trainer(
        tmp_path / "run", lr_scheduler_type=kind, max_steps=5, learning_rate=1e-3, **changes
    )
    trainer.train()
    logged = [line["learning_rate"] for line in small_runs.step_lines(trainer)]
    assert logged == pytest.approx([1e-3 * factor for factor in factors], abs=1e-12)


@pytest.mark.parametrize(
    ("optim", "kind"),
    [("adamw_torch", "AdamW"), ("adafactor", "Adafactor"), ("sgd", "SGD")],
)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_optimizers_by_name(tmp_path: Path, optim: str, kind: str, stage: int) -> None:
    trainer = small_runs.trainer(
        tmp_path / "run", optim=optim, max_steps=3, learning_rate=5e-3, deepspeed=f"zero{stage}"
    )
    before = parameters(trainer)
    trainer.train()
    assert trainer.engine is not None
    assert type(trainer.engine.optimizer).__name__ == kind
    assert all(not torch.equal(before[name], value) for name, value in parameters(trainer).items())
    losses = [line["loss"] for line in small_runs.step_lines(trainer)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [0, 2])
def test_adamw_takes_the_step_of_the_paper(tmp_path: Path, stage: int) -> None:
    """One step of AdamW (arXiv:1711.05101) from the float64 gradient: decay, bias corrections, no decay of norms."""
    lr, decay, eps = 1e-2, 0.1, 1e-8
    tokenizer, model = tiny_tokenizer(), small_runs.model_of()
    pairs = token_pairs(small_runs.rows(4), tokenizer=tokenizer)
    exact = reference_step(model, pad_pairs(pairs, pad_token_id=tokenizer.pad_token_id), beta=0.1)
    expected = {}
    for name, value in model.named_parameters():
        gradient = exact.gradients[name]
        decayed = 0.0 if "norm" in name or name.endswith("bias") else decay
        # After one step both moments' corrected means are the gradient itself.
        expected[name] = value.double() * (1 - lr * decayed) - lr * gradient / (gradient.abs() + eps)
    trainer = small_runs.trainer(
        tmp_path / "run",
        model=model,
        pairs=4,
        max_steps=1,
        learning_rate=lr,
        weight_decay=decay,
        adam_epsilon=eps,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        deepspeed=f"zero{stage}",
    )
    trainer.train()
    for name, value in trainer.model.named_parameters():
        # Where a gradient is no more than fp32 rounding, its sign, and so the step, is not determined.
        sure = exact.gradients[name].abs() > 1e-5
        error = (value.double() - expected[name]).abs()[sure]
        assert sure.float().mean() > 0.2
        assert error.max() <= 1e-3 * lr, name


def test_ones_own_optimizer_and_schedule(tmp_path: Path) -> None:
    model = small_runs.model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    scheduler = get_scheduler("constant", optimizer)
    trainer = small_runs.trainer(
        tmp_path / "run", model=model, optimizers=(optimizer, scheduler), max_steps=2, deepspeed="zero0"
    )
    trainer.train()
    assert trainer.engine is not None
    assert trainer.engine.optimizer is optimizer
    assert trainer.engine.scheduler is scheduler
    assert [line["learning_rate"] for line in small_runs.step_lines(trainer)] == [0.25, 0.25]


def test_an_optimizer_and_one_in_the_json_exclude_each_other(tmp_path: Path) -> None:
    model = small_runs.model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    settings = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    trainer = small_runs.trainer(
        tmp_path / "run", model=model, optimizers=(optimizer, None), deepspeed=settings
    )
    with pytest.raises(ValueError, match=r"optimizers=SGD.*`optimizer` \(AdamW\)"):
        trainer.train()


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bf16_is_close_to_fp32(tmp_path: Path, stage: int) -> None:
    history = {}
    for bf16 in (False, True):
        model = small_runs.model_of()
        trainer = small_runs.trainer(
            tmp_path / str(bf16),
            model=model.bfloat16() if bf16 else model,
            bf16=bf16,
            max_steps=3,
            deepspeed=f"zero{stage}",
        )
        trainer.train()
        history[bf16] = small_runs.step_lines(trainer)
    for exact, rounded in zip(history[False], history[True], strict=True):
        # bf16 keeps 8 bits; a loss is a mean over hundreds of tokens, each within a few roundings.
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=2**-6)
        assert rounded["loss"] != exact["loss"]
        assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)


@pytest.fixture
def fp16_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed offers fp16 on few CPUs, because it is slow there; torch computes it on all of them."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


@pytest.mark.usefixtures("fp16_anywhere")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_finds_its_loss_scale(tmp_path: Path, stage: int) -> None:
    """A scale that is too large overflows: the step is skipped and counted, the schedule waits, the scale halves."""
    exact = small_runs.trainer(tmp_path / "fp32", max_steps=1)
    exact.train()
    trainer = small_runs.trainer(
        tmp_path / "fp16",
        model=small_runs.model_of().half(),
        fp16=True,
        max_steps=6,
        deepspeed={
            "zero_optimization": {"stage": stage},
            "fp16": {"enabled": "auto", "initial_scale_power": 20, "hysteresis": 1},
        },
    )
    trainer.train()
    lines = small_runs.step_lines(trainer)
    # fp16 keeps 11 bits; a loss is a mean over hundreds of tokens, each within a few roundings.
    assert lines[0]["loss"] == pytest.approx(exact.state.log_history[0]["loss"], rel=2**-8)
    skipped = lines[-1]["skipped_steps"]
    assert 1 <= skipped < 5, "the test wants both kinds of steps"
    assert [line["skipped_steps"] for line in lines] == [min(step, skipped) for step in range(1, 7)]
    assert [math.isinf(line["grad_norm"]) for line in lines] == [step <= skipped for step in range(1, 7)]
    taken = [line["learning_rate"] for line in lines[skipped:]]
    assert {line["learning_rate"] for line in lines[: skipped + 1]} == {1e-3}
    assert taken == pytest.approx([1e-3 * (1 - step / 6) for step in range(6 - skipped)])
    assert lines[skipped]["grad_norm"] == pytest.approx(exact.state.log_history[0]["grad_norm"], rel=0.5)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.usefixtures("fp16_anywhere")
def test_fp16_needs_zero(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fp16=True needs a zero_optimization\.stage of 1 to 3"):
        small_runs.settings(tmp_path / "run", fp16=True, deepspeed="zero0")


def test_lora_on_one_rank_trains_the_adapters_alone(tmp_path: Path) -> None:
    trainer = small_runs.trainer(
        tmp_path / "run",
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        learning_rate=0.5,
        optim="sgd",
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(before[name], value)}
    assert moved
    assert all("lora_" in name for name in moved)
