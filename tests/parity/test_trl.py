"""One training step equals TRL's, and a float64 reference's, for every family of models.

The same rows go three ways: through TRL's own trainer, through our tokenisation, packing and policy, and through the
equations of the paper in float64. The tolerances are the project's promise: 1e-5 on the loss and the metrics, 1e-4 on
every gradient.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.parity.orpo_side import OrpoStep, one_step, token_pairs
from tests.parity.reference import ReferenceStep, encoder_decoder_step, pad_pairs, reference_step
from tests.parity.tokenizer import tiny_tokenizer
from tests.parity.trl_side import METRICS, TrlStep, train_one_step
from tests.tiny_models import DECODER_ONLY, FAMILIES, tiny_model

BETA = 0.1
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

# An entry of a gradient is a sum of terms that may each be as large as the largest gradient of the model, and float32
# rounds every one of them. No gradient can be asked to be more exact than that, however small it is.
GRADIENT_FLOOR = torch.finfo(torch.float32).eps / GRADIENT_TOLERANCE

# A difference is as exact as what it is the difference of.
SCALE_OF = {"rewards/margins": "rewards/chosen", "log_odds_chosen": "logps/chosen"}


def conversation(prompt: str, chosen: str, rejected: str, *, system: str | None = None) -> dict[str, Any]:
    """A row in TRL's conversational format."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return {
        "prompt": [*messages, {"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


ROWS = [
    conversation("Name a warm colour.", "Red is warm.", "Blue, I think, is the warmest of them all."),
    # The responses begin alike: these tokens lie in the trunk and count for both.
    conversation("2+2?", "It is 4.", "It is 5, or 22.", system="Be brief."),
    # The rejected response begins with the whole chosen one.
    conversation("Say yes", "yes", "yes yes yes"),
    conversation("A longer question about the weather in the north of the country?", "Rain.", "No."),
]
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
    for name, value in theirs.items():
        scale = abs(theirs[SCALE_OF.get(name, name)])
        assert ours[name] == pytest.approx(value, rel=0, abs=LOSS_TOLERANCE * scale), name


def gradient_errors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference in each parameter's gradient, over the largest entry of that gradient."""
    assert ours.keys() == theirs.keys()
    largest = {name: gradient.abs().max().item() for name, gradient in theirs.items()}
    floor = GRADIENT_FLOOR * max(largest.values())
    return {
        name: (ours[name].double() - gradient.double()).abs().max().item() / max(largest[name], floor)
        for name, gradient in theirs.items()
    }


def assert_same_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    errors = gradient_errors(ours, theirs)
    too_large = {name: error for name, error in errors.items() if error > GRADIENT_TOLERANCE}
    assert not too_large


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
