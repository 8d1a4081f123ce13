"""Backbone, head and what lies between them give the logits of the model's own forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedModel

from orpo_ds.data.padding import pad, pad_encoder_decoder
from orpo_ds.model.anatomy import ModelParts, find_parts, hidden_states
from tests.model.odd_models import ODD_HEADS, ODD_VOCAB, UNPACKABLE, spread_bias
from tests.model.pairs import random_pairs
from tests.tiny_models import DECODER_ONLY, tiny_model

PAIRS = [(6, 5, 4), (3, 2, 7)]


def _logits(parts: ModelParts, hidden: Tensor) -> Tensor:
    """The formula of ModelParts, in float64."""
    logits = parts.scale * hidden.double() @ parts.head.weight.double().T
    if parts.bias is not None:
        logits = logits + parts.bias
    return logits if parts.softcap is None else parts.softcap * torch.tanh(logits / parts.softcap)


def _assert_logits_are_the_models_own(model: PreTrainedModel, seed: int) -> None:
    model.eval()
    parts = find_parts(model)
    pairs = random_pairs(PAIRS, vocab_size=ODD_VOCAB, seed=seed)
    batch = pad(pairs, pair_ids=range(2), pad_token_id=0)
    with torch.no_grad():
        hidden, _ = hidden_states(parts, batch)
        own = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.flatten(
            0, 1
        )
    assert own.std() > 1e-2, "flat logits would hide a wrong factor"
    torch.testing.assert_close(_logits(parts, hidden), own.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_logits_of_the_families(family: str, seed: int) -> None:
    _assert_logits_are_the_models_own(tiny_model(family, vocab_size=ODD_VOCAB, seed=seed), seed)


@pytest.mark.parametrize("build", ODD_HEADS.values(), ids=ODD_HEADS.keys())
def test_logits_of_models_with_an_odd_head(build: Callable[[], PreTrainedModel], seed: int) -> None:
    model = build()
    spread_bias(model, generator=torch.Generator().manual_seed(seed))
    _assert_logits_are_the_models_own(model, seed)


@pytest.mark.parametrize("name", ["t5, tied", "t5, untied", "bart"])
def test_logits_of_encoder_decoder_models(name: str, seed: int) -> None:
    if name == "bart":
        model = UNPACKABLE["bart"][0]()
        model.final_logits_bias.normal_()
    else:
        model = tiny_model("t5", vocab_size=ODD_VOCAB, seed=seed)
        model.config.scale_decoder_outputs = name == "t5, tied"
    model.eval()
    parts = find_parts(model)
    pairs = random_pairs(PAIRS, vocab_size=ODD_VOCAB, seed=seed)
    batch = pad_encoder_decoder(pairs, pair_ids=range(2), pad_token_id=0, decoder_start_token_id=0)
    with torch.no_grad():
        hidden, _ = hidden_states(parts, batch)
        own = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=batch.decoder_input_ids,
        ).logits
    torch.testing.assert_close(_logits(parts, hidden), own.flatten(0, 1).double(), rtol=1e-5, atol=1e-5)


def test_the_bias_of_bart_follows_the_model_to_another_dtype() -> None:
    model = UNPACKABLE["bart"][0]()
    parts = find_parts(model)
    model.to(torch.bfloat16)
    assert parts.bias is not None
    assert parts.bias.dtype == torch.bfloat16


def test_a_lora_model_is_taken_apart_below_its_wrapper() -> None:
    model = tiny_model("llama")
    parts = find_parts(get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))
    assert parts.model is model
    assert parts.backbone is model.model
    assert parts.head is model.lm_head
    assert type(model.model.layers[0].self_attn.q_proj).__module__.startswith("peft.")


def test_the_trained_copy_of_the_head_is_the_head() -> None:
    model = tiny_model("llama")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    parts = find_parts(get_peft_model(model, config))
    assert isinstance(parts.head, nn.Linear)
    assert parts.head.weight.requires_grad
    assert parts.head.weight is not model.lm_head.original_module.weight


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"), "modules_to_save"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "virtual tokens"),
    ],
    ids=["LoRA on the head", "prompt tuning"],
)
def test_adapters_that_change_more_than_the_backbones_weights_are_refused(
    config: PeftConfig, named: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        find_parts(get_peft_model(tiny_model("llama"), config))
    assert named in str(refusal.value)


def test_a_model_without_a_head_is_refused() -> None:
    backbone = tiny_model("llama").model
    assert isinstance(backbone, LlamaModel)
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        find_parts(backbone)


def test_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is neither"):
        find_parts(nn.Linear(2, 2))
