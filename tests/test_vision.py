"""Training on prompts with pictures: the numbers are those of the model's own forward, one sequence at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from orpo_ds.layout import RunLayout
from orpo_ds.trainer import ORPOTrainer
from tests import vision
from tests.parity.compare import gradient_errors
from tests.parity.reference import OrpoReference, orpo_from_token_logps, padded_token_logps
from tests.small_runs import settings

FAMILIES = list(vision.PROCESSORS)
PLACEHOLDER = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "idefics3": "<image>"}
IMAGE_TOKEN = {"qwen2_vl": "<|image_pad|>", "idefics3": "<image>"}
PAIRS, WITHOUT = 7, (1, 4)
MICRO_BATCHES = (
    [0, 2, 3],
    [1],
    [4, 5],
    [6],
    [],
)  # with pictures, without, mixed; the last of a rank without work
BETA = 0.1
# As in tests/parity: float32 against float64, each entry relative to the largest of its parameter.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
SETTINGS = {"max_length": 512, "max_prompt_length": 256}


def _trainer(family: str, folder: Path, *, seed: int = 0, **keywords: Any) -> ORPOTrainer:
    passed = {name: keywords.pop(name) for name in ("model", "peft_config") if name in keywords}
    return ORPOTrainer(
        **{"model": vision.vision_model(family, seed=seed), **passed},
        args=settings(folder, **SETTINGS | keywords),
        train_dataset=vision.dataset(PAIRS, without=WITHOUT),
        processing_class=vision.PROCESSORS[family](),
    )


def _layout(trainer: ORPOTrainer) -> RunLayout:
    return RunLayout(
        packed=False,
        parts=trainer.policy.parts,
        args=trainer.args,
        processing_class=trainer.processing_class,
    )


def _reference(family: str, model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> OrpoReference:
    """Every sequence on its own, without padding, through processor and model as a user would call them."""
    processor = vision.PROCESSORS[family]()
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN[family])
    logps: list[Tensor] = []
    nll: list[Tensor] = []
    response: list[Tensor] = []
    for side in ("chosen", "rejected"):
        for row in rows:
            prompt = f"<s>user: {PLACEHOLDER[family] * len(row['images'])}{row['prompt'][0]['content']}\nassistant: "
            start = len(_inputs(processor, prompt, row["images"])["input_ids"][0])
            inputs = _inputs(processor, f"{prompt}{row[side][0]['content']}</s>", row["images"])
            ids = inputs["input_ids"][:, 1:]
            logps.append(padded_token_logps(model(**inputs).logits[:, :-1], ids)[0])
            nll.append(ids[0] != image_id)
            response.append(torch.arange(1, ids.shape[1] + 1) >= start)
    return orpo_from_token_logps(
        torch.nn.utils.rnn.pad_sequence(logps, batch_first=True),
        nll=torch.nn.utils.rnn.pad_sequence(nll, batch_first=True)[: len(rows)],
        response=torch.nn.utils.rnn.pad_sequence(response, batch_first=True),
        beta=BETA,
    )


def _inputs(processor: ProcessorMixin, text: str, images: Sequence[Any]) -> dict[str, Any]:
    pictures = {"images": [list(images)]} if images else {}
    inputs = processor(text=[text], **pictures, return_tensors="pt", add_special_tokens=False)
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_one_sequence_at_a_time(
    family: str, tmp_path: Path, seed: int
) -> None:
    """Also of the vision tower; in micro-batches some of which have no picture, so that a companion joins them."""
    rows = vision.rows(PAIRS, without=WITHOUT)
    trainer = _trainer(family, tmp_path / "run", seed=seed, beta=BETA)
    double = copy.deepcopy(trainer.model).double()
    reference = _reference(family, double, rows)
    reference.loss.backward()
    expected = {n: p.grad for n, p in double.named_parameters() if p.grad is not None}
    assert any("vision" in name or "visual" in name for name in expected)

    feed = _layout(trainer).feed(trainer.train_dataset, max_tokens=None)
    plan, loss = feed.plan(range(PAIRS)), 0.0
    for pairs in MICRO_BATCHES:
        sums = trainer.policy(feed.build(pairs), nll_tokens_total=plan.nll_tokens, pairs_total=plan.pairs)
        sums["loss"].backward()
        loss += sums["loss"].item()
    found = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert abs(loss - reference.loss.item()) < LOSS_TOLERANCE * abs(reference.loss.item())
    errors = gradient_errors(found, expected, tolerance=GRADIENT_TOLERANCE)
    assert {name: error for name, error in errors.items() if error > GRADIENT_TOLERANCE} == {}
