"""T5 and BART in a run: what `max_completion_length` cuts is not trained on."""

from pathlib import Path

import pytest

from tests import small_runs
from tests.data.trl_reference import trl_encoder_decoder_ids, trl_preference
from tests.parity.reference import encoder_decoder_step
from tests.parity.tokenizer import tiny_tokenizer

PAIRS, LIMIT = 4, 5


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_run_trains_on_responses_that_are_cut(tmp_path: Path, family: str) -> None:
    """Loss and step are those of float64 on the ids that TRL makes with this limit."""
    tokenizer, model = tiny_tokenizer(), small_runs.model_of(family)
    texts = [trl_preference(row, tokenizer) for row in small_runs.rows(PAIRS)]
    ids = [trl_encoder_decoder_ids(text, tokenizer, max_completion_length=LIMIT) for text in texts]
    responses = [chosen for _, chosen, _ in ids] + [rejected for _, _, rejected in ids]
    assert max(map(len, responses)) == LIMIT
    whole = [trl_encoder_decoder_ids(text, tokenizer, max_completion_length=10**6) for text in texts]
    assert all(len(chosen) > LIMIT for _, chosen, _ in whole)
    prompts = [prompt for prompt, _, _ in ids]
    exact = encoder_decoder_step(model, prompts, responses, beta=0.1)
    uncut = encoder_decoder_step(
        model, prompts, [one[1] for one in whole] + [one[2] for one in whole], beta=0.1
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    rate = 0.05
    trainer = small_runs.trainer(
        tmp_path / "run",
        model=model,
        pairs=PAIRS,
        max_completion_length=LIMIT,
        max_steps=1,
        optim="sgd",
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    trainer.train()
    [line] = small_runs.step_lines(trainer)
    assert line["loss"] == pytest.approx(exact.loss, rel=1e-5)
    assert line["loss"] != pytest.approx(uncut.loss, rel=1e-3)
    # A bias of the keys has no gradient but the rounding of the others'.
    largest = max(gradient.abs().max() for gradient in exact.gradients.values())
    for name, value in model.named_parameters():
        moved, gradient = (before[name] - value).double() / rate, exact.gradients[name]
        # The difference of two weights has their rounding, 2^-23 of their size, which the rate divides.
        rounding = before[name].abs().max() * 2**-23 / rate
        assert (moved - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6 * largest + rounding, name
