"""One training step equals TRL's, and a float64 reference's, for every family of models.

The same rows go three ways: through TRL's own trainer, through our tokenisation, packing and policy, and through the
equations of the paper in float64. The tolerances are the project's promise: 1e-5 on the loss and the metrics, 1e-4 on
every gradient.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from tests.parity.compare import gradient_errors, metric_errors
from tests.parity.orpo_side import OrpoStep, one_step, token_pairs
from tests.parity.reference import ReferenceStep, encoder_decoder_step, pad_pairs, reference_step
from tests.parity.rows import ROWS
from tests.parity.tokenizer import tiny_tokenizer
from tests.parity.trl_side import METRICS, TrlStep, train_one_step
from tests.tiny_models import DECODER_ONLY, FAMILIES, tiny_model

BETA = 0.1
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

STANDARD_ROWS = [
    {"prompt": "the sky is", "chosen": " blue and wide", "rejected": " green"},
    {"prompt": "two and two", "chosen": " make four", "rejected": " make five or so"},
]


class Step(NamedTuple):
    """One family's step, the three ways."""

    ours: OrpoStep
    trl: TrlStep
    reference: ReferenceStep


@functools.cache
def family_step(family: str, seed: int) -> Step:
    """The step of ROWS in the layout that training uses; kept, as three tests look at it."""
    return take_step(family, ROWS, seed=seed)


def take_step(family: str, rows: list[dict[str, Any]], *, seed: int, layout: str = "packed") -> Step:
    """The same rows and weights through TRL, through ours, and through the reference."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer), seed=seed)
    trl = train_one_step(model, tokenizer=tokenizer, rows=rows, beta=BETA)
    if family in DECODER_ONLY:
        pairs = token_pairs(rows, tokenizer=tokenizer)
        reference = reference_step(model, pad_pairs(pairs, pad_token_id=tokenizer.pad_token_id), beta=BETA)
    else:
        layout = "encoder-decoder"
        pairs = token_pairs(rows, tokenizer=tokenizer, is_encoder_decoder=True)
        responses = [pair.chosen[pair.chosen_start :] for pair in pairs]
        responses += [pair.rejected[pair.rejected_start :] for pair in pairs]
        prompts = [pair.chosen[: pair.chosen_start] for pair in pairs]
        reference = encoder_decoder_step(model, prompts, responses, beta=BETA)
    return Step(one_step(model, pairs, layout=layout, beta=BETA), trl, reference)


def assert_same_metrics(ours: Mapping[str, float], theirs: Mapping[str, float]) -> None:
    errors = metric_errors(ours, theirs)
    assert {name: error for name, error in errors.items() if error > LOSS_TOLERANCE} == {}


def assert_same_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    errors = gradient_errors(ours, theirs, tolerance=GRADIENT_TOLERANCE)
    assert {name: error for name, error in errors.items() if error > GRADIENT_TOLERANCE} == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_metrics_are_those_of_trl(family: str, seed: int) -> None:
    step = family_step(family, seed)
    assert step.ours.loss == pytest.approx(step.trl.loss, rel=LOSS_TOLERANCE)
    assert_same_metrics(step.ours.metrics, {name: step.trl.logged[name] for name in METRICS})


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_trl(family: str, seed: int) -> None:
    step = family_step(family, seed)
    assert_same_gradients(step.ours.gradients, step.trl.gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_metrics_and_gradients_are_those_of_the_reference(family: str, seed: int) -> None:
    step = family_step(family, seed)
    assert step.ours.loss == pytest.approx(step.reference.loss, rel=LOSS_TOLERANCE)
    assert_same_metrics(step.ours.metrics, step.reference.metrics)
    assert_same_gradients(step.ours.gradients, step.reference.gradients)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_the_padded_layout_gives_the_same_step(family: str, seed: int) -> None:
    step = take_step(family, ROWS, seed=seed, layout="padded")
    assert step.ours.loss == pytest.approx(step.trl.loss, rel=LOSS_TOLERANCE)
    assert_same_gradients(step.ours.gradients, step.trl.gradients)


def test_rows_of_plain_text_give_the_same_step(seed: int) -> None:
    step = take_step("llama", STANDARD_ROWS, seed=seed)
    assert step.ours.loss == pytest.approx(step.trl.loss, rel=LOSS_TOLERANCE)
    assert_same_metrics(step.ours.metrics, {name: step.trl.logged[name] for name in METRICS})


def test_the_nll_of_responses_only_is_that_of_the_reference(seed: int) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), seed=seed)
    pairs = token_pairs(ROWS, tokenizer=tokenizer)
    padded = pad_pairs(pairs, pad_token_id=tokenizer.pad_token_id)
    reference = reference_step(model, padded, beta=BETA, nll_on_prompt=False)
    ours = one_step(model, pairs, layout="packed", beta=BETA, nll_on_prompt=False)
    assert ours.loss == pytest.approx(reference.loss, rel=LOSS_TOLERANCE)
    assert_same_metrics(ours.metrics, reference.metrics)
    assert_same_gradients(ours.gradients, reference.gradients)
