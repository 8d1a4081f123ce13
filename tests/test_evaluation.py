"""Evaluation is exact: every pair counts once, whatever batch size, layout and (in `test_trainer`) number of ranks."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import EvalPrediction, ProgressCallback

from orpo_ds.export import full_state
from orpo_ds.monitor.jsonl import read_metrics
from tests import small_runs
from tests.parity.compare import metric_errors
from tests.parity.orpo_side import token_pairs
from tests.parity.reference import pad_pairs, reference_step
from tests.parity.tokenizer import tiny_tokenizer
from tests.trainer_worker import BATCH_SIZES, EVAL_PAIRS

TOLERANCE = 1e-5  # fp32 sums in another order, against float64


def evaluation_errors(found: Mapping[str, float], *, family: str = "qwen2") -> dict[str, float]:
    """Errors of `eval_` metrics of this file's evaluation set, against float64 and one padded batch."""
    tokenizer = tiny_tokenizer()
    pairs = token_pairs(small_runs.rows(EVAL_PAIRS), tokenizer=tokenizer)
    padded = pad_pairs(pairs, pad_token_id=tokenizer.pad_token_id)
    exact = reference_step(small_runs.model_of(family), padded, beta=0.1)
    plain = {name.removeprefix("eval_"): value for name, value in found.items()}
    return metric_errors(plain, {**exact.metrics, "loss": exact.loss})


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_evaluation_is_exact_on_one_rank(tmp_path: Path, batch_size: int, layout: str) -> None:
    trainer = small_runs.trainer(
        tmp_path / "run",
        eval_dataset=small_runs.dataset(EVAL_PAIRS),
        train_dataset=None,
        per_device_eval_batch_size=batch_size,
        layout=layout,
    )
    found = trainer.evaluate()
    assert max(evaluation_errors(found).values()) <= TOLERANCE
    assert trainer.state.log_history == [{"step": 0, "epoch": 0, **found}]


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_the_balance_of_experts_is_that_of_the_whole_set(tmp_path: Path, batch_size: int) -> None:
    trainer = small_runs.trainer(
        tmp_path / "run",
        model=small_runs.model_of("mixtral"),
        eval_dataset=small_runs.dataset(EVAL_PAIRS),
        train_dataset=None,
        per_device_eval_batch_size=batch_size,
        max_tokens_per_micro_batch=130,
    )
    found = trainer.evaluate()
    assert "eval_aux_loss" in found
    assert max(evaluation_errors(found, family="mixtral").values()) <= TOLERANCE


def test_several_evaluation_sets_have_names_of_their_own(tmp_path: Path) -> None:
    sets = {"short": small_runs.dataset(3), "long": small_runs.dataset(EVAL_PAIRS)}
    trainer = small_runs.trainer(tmp_path / "run", eval_dataset=sets)
    found = trainer.evaluate()
    assert found["eval_short_loss"] != found["eval_long_loss"]
    alone = trainer.evaluate(small_runs.dataset(3), metric_key_prefix="test")
    assert alone["test_loss"] == found["eval_short_loss"]


def test_one_of_the_trainers_sets_by_name(tmp_path: Path) -> None:
    sets = {"short": small_runs.dataset(3), "long": small_runs.dataset(EVAL_PAIRS)}
    trainer = small_runs.trainer(tmp_path / "run", eval_dataset=sets)
    both = trainer.evaluate()
    assert trainer.evaluate("short")["eval_loss"] == both["eval_short_loss"]
    with pytest.raises(ValueError, match=r"'shrot'.*It has: short, long"):
        trainer.evaluate("shrot")


def test_several_sets_while_training(tmp_path: Path) -> None:
    """The names in the metrics are those of transformers, and one of them may drive what follows a metric."""
    sets = {"short": small_runs.dataset(3), "long": small_runs.dataset(EVAL_PAIRS)}
    trainer = small_runs.trainer(
        tmp_path / "run",
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=1,
        lr_scheduler_type="reduce_lr_on_plateau",
        metric_for_best_model="eval_short_loss",
    )
    trainer.train()
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_short_loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(
        {"eval_long_loss", "eval_long_rewards/margins", "eval_long_runtime"} <= line.keys() for line in lines
    )
    best = trainer.engine.scheduler.best if trainer.engine else None
    assert best == min(line["eval_short_loss"] for line in lines)


def test_the_users_metrics_are_prefixed_logged_and_followed(tmp_path: Path) -> None:
    """`compute_metrics` is asked at every evaluation of the training, and its figure is what the schedule follows."""
    values = iter((3.0, 2.0, 5.0))

    def quality(found: EvalPrediction) -> dict[str, float]:
        return {"quality": next(values), "eval_has_prefix": 1.0}

    trainer = small_runs.trainer(
        tmp_path / "run",
        eval_dataset=small_runs.dataset(3),
        compute_metrics=quality,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
        lr_scheduler_type="reduce_lr_on_plateau",
        metric_for_best_model="quality",
    )
    trainer.train()
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert [line["eval_quality"] for line in lines] == [3.0, 2.0, 5.0]
    assert {line["eval_has_prefix"] for line in lines} == {1.0}
    assert trainer.engine is not None
    assert trainer.engine.scheduler.best == 2.0


def test_the_users_metric_decides_which_model_is_kept(tmp_path: Path) -> None:
    """Step 1 is the best by the user's figure, though the loss goes on falling; its weights are those in the end."""
    values = iter((9.0, 2.0, 5.0))
    trainer = small_runs.trainer(
        tmp_path / "run",
        eval_dataset=small_runs.dataset(3),
        compute_metrics=lambda found: {"quality": next(values)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        greater_is_better=True,
    )
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses == sorted(losses, reverse=True)
    assert trainer.state.best_global_step == 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")
    trainer.evaluator.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == losses[0]


def test_the_progress_bar_of_transformers_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = small_runs.trainer(
        tmp_path / "run",
        train_dataset=None,
        eval_dataset=small_runs.dataset(EVAL_PAIRS),
        per_device_eval_batch_size=4,
        callbacks=[ProgressCallback],
    )
    trainer.evaluate()
    assert "3/3" in capsys.readouterr().err


def test_an_evaluation_in_half_precision(tmp_path: Path) -> None:
    """It needs the training's precision to be the same one, which is said."""
    trainer = small_runs.trainer(
        tmp_path / "run", bf16=True, bf16_full_eval=True, eval_dataset=small_runs.dataset(2)
    )
    seen = set()
    trainer.policy.parts.backbone.register_forward_hook(
        lambda module, _, __: seen.update(value.dtype for value in module.parameters())
    )
    trainer.evaluate()
    assert seen == {torch.bfloat16}
    for precision in ("bf16", "fp16"):
        with pytest.raises(ValueError, match=f"{precision}_full_eval=True: .* Set {precision}=True"):
            small_runs.settings(tmp_path / "run", **{f"{precision}_full_eval": True})


def test_evaluation_changes_nothing_of_the_training(tmp_path: Path) -> None:
    states = []
    for strategy in ("no", "steps"):
        trainer = small_runs.trainer(
            tmp_path / strategy,
            eval_dataset=small_runs.dataset(3),
            eval_strategy=strategy,
            eval_steps=1,
            max_steps=3,
        )
        trainer.train()
        states.append(full_state(trainer.model))
    without, with_evaluations = states
    assert without is not None
    assert with_evaluations is not None
    assert all(torch.equal(value, with_evaluations[name]) for name, value in without.items())
