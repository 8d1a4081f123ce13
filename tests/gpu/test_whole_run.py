"""Whole runs on a CUDA device, in bf16 with its kernels, held against the float64 reference on the CPU.

Written before there was a device to run them on, and collected everywhere: `pytest -m gpu`.
"""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from orpo_ds import ORPOConfig, ORPOTrainer
from orpo_ds.config import LayoutName
from tests.parity.compare import gradient_errors
from tests.parity.orpo_side import OrpoStep, one_step, token_pairs
from tests.parity.reference import ReferenceStep, pad_pairs, reference_step
from tests.parity.rows import ROWS
from tests.parity.tokenizer import tiny_tokenizer
from tests.tiny_models import DECODER_ONLY, tiny_model

pytestmark = pytest.mark.gpu

STEPS = 20


def steps(model: PreTrainedModel, *, dtype: torch.dtype) -> tuple[OrpoStep, OrpoStep, ReferenceStep]:
    """The same step packed and padded on the device, and in float64 on the CPU."""
    tokenizer = tiny_tokenizer()
    pairs = token_pairs(ROWS, tokenizer=tokenizer)
    packed, padded = (
        one_step(model, pairs, layout=n, device="cuda", dtype=dtype) for n in ("packed", "padded")
    )
    reference = reference_step(model, pad_pairs(pairs, pad_token_id=tokenizer.pad_token_id), beta=0.1)
    return packed, padded, reference


def train(folder: Path, *, layout: LayoutName, seed: int) -> list[dict[str, float]]:
    """What a run of STEPS steps in bf16 under ZeRO-2 logs."""
    tokenizer = tiny_tokenizer()
    args = ORPOConfig(
        output_dir=str(folder),
        layout=layout,
        bf16=True,
        per_device_train_batch_size=len(ROWS),
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        deepspeed={"zero_optimization": {"stage": 2}},
        dataset_cache_dir=str(folder / "cache"),
    )
    trainer = ORPOTrainer(
        model=tiny_model("llama", vocab_size=len(tokenizer), seed=seed).bfloat16(),
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(ROWS),
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history[:STEPS]


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_a_step_in_fp32_is_that_of_the_reference(family: str, seed: int) -> None:
    model = tiny_model(family, vocab_size=len(tiny_tokenizer()), seed=seed)
    packed, padded, exact = steps(model, dtype=torch.float32)
    for ours in (packed, padded):
        assert ours.loss == pytest.approx(exact.loss, rel=1e-5)
        assert max(gradient_errors(ours.gradients, exact.gradients, tolerance=1e-4).values()) <= 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2"])
def test_a_packed_step_in_bf16_is_as_exact_as_a_padded_one(family: str, seed: int) -> None:
    model = tiny_model(family, vocab_size=len(tiny_tokenizer()), seed=seed)
    packed, padded, reference = steps(model.bfloat16().float(), dtype=torch.bfloat16)
    # How exact bf16 is on this model, the padded layout tells: it uses the device's own attention and no packing.
    allowed = 2 * abs(padded.loss - reference.loss) + torch.finfo(torch.bfloat16).eps * reference.loss
    assert abs(packed.loss - reference.loss) <= allowed


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_training_in_bf16_learns_and_leaves_a_model(layout: LayoutName, tmp_path: Path, seed: int) -> None:
    lines = train(tmp_path, layout=layout, seed=seed)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["rewards/accuracies"] == 1.0
    assert all(line["peak_memory_mib"] > 0 for line in lines)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16


def test_packing_takes_less_memory_than_padding(seed: int) -> None:
    tokenizer = tiny_tokenizer()
    pairs = token_pairs(ROWS * 64, tokenizer=tokenizer)
    model = tiny_model("llama", vocab_size=len(tokenizer), seed=seed)
    peaks = {}
    for layout in ("packed", "padded"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        one_step(model, pairs, layout=layout, device="cuda", dtype=torch.bfloat16)
        peaks[layout] = torch.cuda.max_memory_allocated()
    assert peaks["packed"] < peaks["padded"]
