"""Evaluation is exact: every pair counts once, whatever batch size, layout and (in `test_trainer`) number of ranks."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from orpo_ds.export import full_state
from tests import small_runs
from tests.parity.compare import metric_errors
from tests.parity.orpo_side import token_pairs
from tests.parity.reference import pad_pairs, reference_step
from tests.parity.tokenizer import tiny_tokenizer
from tests.trainer_worker import BATCH_SIZES, EVAL_PAIRS

TOLERANCE = 1e-5  # fp32 sums in another order, against float64


def evaluation_errors(found: Mapping[str, float]) -> dict[str, float]:
    """Errors of `eval_` metrics of this file's evaluation set, against float64 and one padded batch."""
    tokenizer = tiny_tokenizer()
    pairs = token_pairs(small_runs.rows(EVAL_PAIRS), tokenizer=tokenizer)
    padded = pad_pairs(pairs, pad_token_id=tokenizer.pad_token_id)
    exact = reference_step(small_runs.model_of(), padded, beta=0.1)
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


def test_several_evaluation_sets_have_names_of_their_own(tmp_path: Path) -> None:
    sets = {"short": small_runs.dataset(3), "long": small_runs.dataset(EVAL_PAIRS)}
    trainer = small_runs.trainer(tmp_path / "run", eval_dataset=sets)
    found = trainer.evaluate()
    assert found["eval_short_loss"] != found["eval_long_loss"]
    alone = trainer.evaluate(small_runs.dataset(3), metric_key_prefix="test")
    assert alone["test_loss"] == found["eval_short_loss"]


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
