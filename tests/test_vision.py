"""Training on prompts with pictures: the numbers are those of the model's own forward, one sequence at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations import unset_hf_deepspeed_config

from orpo_ds.data.tokenize import TokenizeOptions, tokenize_dataset
from orpo_ds.export import full_state
from orpo_ds.layout import RunLayout
from orpo_ds.trainer import ORPOTrainer
from tests import vision, vision_worker
from tests.parity.compare import gradient_errors, metric_errors
from tests.parity.reference import OrpoReference, orpo_from_token_logps, padded_token_logps
from tests.small_runs import dataset, launch, settings, step_lines

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
CHANGE_TOLERANCE = 1e-3  # of two steps of SGD: float32 against float32
SETTINGS = {"max_length": 512, "max_prompt_length": 256}


@pytest.fixture(autouse=True)
def _no_zero3_left_behind() -> Iterator[None]:
    """Transformers makes sharded models for as long as a run's ZeRO-3 config lives, and here a cycle holds it."""
    yield
    unset_hf_deepspeed_config()


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


# ---------------------------------------------------------------------- two ranks under ZeRO-3


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two_ranks")
    finished = launch("tests.vision_worker", str(folder))
    assert finished.returncode == 0, finished.stdout[-6000:]
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_with_and_without_pictures_train_as_one_rank(
    two_ranks: dict[str, Any], family: str, tmp_path: Path
) -> None:
    alone = vision_worker.trained(tmp_path, family, per_device_train_batch_size=2, deepspeed="zero0")
    together = two_ranks[family]
    # The change is compared, so a step that does nothing cannot pass.
    expected, found = (
        {name: value - alone["before"][name] for name, value in run["after"].items()}
        for run in (alone, together)
    )
    errors = gradient_errors(found, expected, tolerance=CHANGE_TOLERANCE)
    assert {name: error for name, error in errors.items() if error > CHANGE_TOLERANCE} == {}
    assert max(value.abs().max() for name, value in expected.items() if "vis" in name) > 1e-5
    errors = metric_errors(
        together["evaluated"],
        {k: v for k, v in alone["evaluated"].items() if "_per_" not in k and "runtime" not in k},
    )
    assert max(errors.values()) < 1e-4, errors


# ---------------------------------------------------------------------- whole runs


def test_a_frozen_tower_with_lora_on_the_text(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    trainer = _trainer(
        "qwen2_vl", tmp_path / "run", peft_config=lora, deepspeed="zero3", gradient_checkpointing=True
    )
    before = {name: value.clone() for name, value in full_state(trainer.model.get_base_model()).items()}
    trainer.train()
    after = full_state(trainer.model.get_base_model())
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name and "visual" not in name for name in moved)
    assert len(step_lines(trainer)) == 2


def test_a_folder_is_trained_and_written_as_a_vision_model(tmp_path: Path) -> None:
    """By name: the class for images and text, and the processor beside it, which is saved with its template."""
    folder = tmp_path / "model"
    vision.vision_model("idefics3").save_pretrained(folder)
    vision.PROCESSORS["idefics3"]().save_pretrained(folder)
    trainer = ORPOTrainer(
        str(folder),
        settings(tmp_path / "run", deepspeed="zero3", **SETTINGS),
        train_dataset=vision.dataset(4),
    )
    assert isinstance(trainer.model, Idefics3ForConditionalGeneration)
    assert isinstance(trainer.processing_class, Idefics3Processor)
    trainer.train()
    trainer.save_model()
    before, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "run"))
    assert before.keys() == saved.keys()
    trained = full_state(trainer.model)
    assert all(torch.equal(saved[name], value) for name, value in trained.items())
    vision_weights = [name for name in saved if "vision_model" in name and name.endswith("weight")]
    assert all(not torch.equal(saved[name], before[name]) for name in vision_weights)
    assert AutoConfig.from_pretrained(tmp_path / "run").architectures == ["Idefics3ForConditionalGeneration"]
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert processor.chat_template == vision.PROCESSORS["idefics3"]().chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_packed(family: str, tmp_path: Path, seed: int) -> None:
    """A vision model on rows without pictures: packed where that is exact, to the numbers of the padded layout."""
    logged = {}
    for layout in ("packed", "padded"):
        trainer = ORPOTrainer(
            vision.vision_model(family, seed=seed),
            settings(tmp_path / layout, layout=layout, **SETTINGS),
            train_dataset=dataset(8),
            processing_class=vision.PROCESSORS[family](),
        )
        trainer.train()
        logged[layout] = trainer.state.log_history[1]
    assert logged["packed"]["trunk_saving"] > 0 == logged["padded"]["trunk_saving"]
    for name in ("loss", "nll_loss", "log_odds_ratio", "grad_norm"):
        assert logged["packed"][name] == pytest.approx(logged["padded"][name], rel=1e-4)


def test_the_log_says_why_pictures_are_padded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _trainer("qwen2_vl", tmp_path / "run", max_steps=1).train()
    assert "Training in the padded layout: The prompts have images." in caplog.text


def test_packing_is_refused_for_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layout='packed': The prompts have images\."):
        _trainer("qwen2_vl", tmp_path / "run", layout="packed").train()


def test_pictures_for_a_packed_run_are_refused(tmp_path: Path) -> None:
    trainer = ORPOTrainer(
        vision.vision_model("idefics3"),
        settings(tmp_path / "run", **SETTINGS),
        train_dataset=dataset(4),
        processing_class=vision.PROCESSORS["idefics3"](),
    )
    trainer.train()
    with pytest.raises(ValueError, match="this dataset has images, and the run is in the packed layout"):
        trainer.evaluate(vision.dataset(3))


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    whole = _trainer("idefics3", tmp_path / "whole", max_steps=3, save_strategy="steps", save_steps=2)
    whole.train()
    again = _trainer("idefics3", tmp_path / "again", max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = whole.model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in again.model.state_dict().items())


def test_other_pictures_are_another_dataset(tmp_path: Path) -> None:
    """The ids are the same and the pixels are not: a resume would go on with other data."""
    rows = vision.rows(3)
    changed = copy.deepcopy(rows)
    changed[1]["images"][0].putpixel((0, 0), (1, 2, 3))
    processor = vision.PROCESSORS["idefics3"]()
    first, second = (
        tokenize_dataset(
            Dataset.from_list(some),
            processing_class=processor,
            options=TokenizeOptions(),
            unusable="error",
            cache_dir=tmp_path,
        )
        for some in (rows, changed)
    )
    assert [pair.chosen for pair in first] == [pair.chosen for pair in second]
    assert first.fingerprint != second.fingerprint
