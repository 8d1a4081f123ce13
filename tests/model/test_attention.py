"""The attention function as transformers sees it: what it refuses, and what it leaves behind in a model."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from orpo_ds.data.packing import pack
from orpo_ds.model.attention import (
    ATTENTION_NAME,
    AttentionCall,
    UnsupportedAttentionError,
    packed_attention,
    packed_attention_enabled,
    register,
)
from tests.model.pairs import random_pairs
from tests.tiny_models import WINDOW, tiny_model

REFUSED = {
    "attention mask": ({"attention_mask": torch.zeros(1, 1, 9, 9)}, "an attention mask"),
    "dropout": ({"dropout": 0.1}, "attention dropout of 0.1"),
    "empty window": ({"sliding_window": 0}, "sliding window of 0 tokens"),
    "sinks": ({"s_aux": torch.zeros(4)}, "attention sinks"),
    "position bias": ({"position_bias": torch.zeros(1, 4, 9, 9)}, "a position bias"),
    "alibi": ({"alibi": torch.zeros(4)}, "ALiBi"),
    "attention weights": ({"output_attentions": True}, "output_attentions"),
    "not causal": ({"is_causal": False}, "not causal"),
    "second packing": ({"cu_seq_lens_q": torch.tensor([0, 9])}, "second description of the packing"),
    "unknown": ({"block_indices": torch.zeros(2)}, "not known here (block_indices)"),
    "no layout": ({"layout": None}, "without a layout"),
}


class NamedLayer(nn.Module):
    """An attention layer as far as the attention function looks at it."""


def _call(**changes: Any) -> tuple[torch.Tensor, None]:
    batch = pack(random_pairs([(4, 3, 2)], vocab_size=50, seed=0), pair_ids=[0])
    heads = {name: torch.randn(1, count, 9, 8) for name, count in (("query", 4), ("key", 2), ("value", 2))}
    arguments: dict[str, Any] = {"attention_mask": None, "layout": batch.layout, **heads, **changes}
    return packed_attention(NamedLayer(), **arguments)


@pytest.mark.parametrize(("changes", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_it_cannot_do_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedAttentionError) as refusal:
        _call(**changes)
    assert named in str(refusal.value)
    assert "NamedLayer" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("query", (2, 4, 9, 8)), ("query", (1, 4, 7, 8)), ("key", (1, 2, 12, 8))],
    ids=["two rows", "another row", "cached keys"],
)
def test_tensors_that_are_not_the_row_of_the_layout_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedAttentionError) as refusal:
        _call(**{name: torch.randn(shape)})
    assert str(shape) in str(refusal.value)


def test_an_encoder_layer_is_refused() -> None:
    layer = NamedLayer()
    layer.is_causal = False
    batch = pack(random_pairs([(4, 3, 2)], vocab_size=50, seed=0), pair_ids=[0])
    heads = torch.randn(1, 4, 9, 8)
    with pytest.raises(UnsupportedAttentionError, match="not causal"):
        packed_attention(layer, heads, heads, heads, None, layout=batch.layout)


def test_neutral_arguments_change_nothing() -> None:
    torch.manual_seed(0)
    plain, weights = _call()
    torch.manual_seed(0)
    with_neutral, _ = _call(
        position_ids=torch.arange(9), use_cache=False, output_attentions=False, s_aux=None, is_causal=True
    )
    assert weights is None
    assert plain.shape == (1, 9, 4, 8)
    assert torch.equal(plain, with_neutral)


def test_default_scaling_is_that_of_the_head_size() -> None:
    torch.manual_seed(0)
    default, _ = _call()
    torch.manual_seed(0)
    explicit, _ = _call(scaling=8**-0.5)
    assert torch.equal(default, explicit)


def test_registering_twice_is_harmless() -> None:
    register()
    register()
    assert AttentionInterface()[ATTENTION_NAME] is packed_attention


def test_layers_report_what_they_asked_for() -> None:
    model = tiny_model("gemma3")
    batch = pack(random_pairs([(4, 3, 2)], vocab_size=97, seed=0), pair_ids=[0])
    calls: list[AttentionCall] = []
    with packed_attention_enabled(model):
        model.model(
            batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            layout=batch.layout,
            attention_calls=calls,
        )
    assert calls == [AttentionCall("Gemma3Attention", WINDOW), AttentionCall("Gemma3Attention", None)]


def _vision_language_model() -> PreTrainedModel:
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


def test_every_config_of_a_composed_model_goes_back_to_what_it_was() -> None:
    model = _vision_language_model()
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    configs = (model.config, model.config.text_config, model.config.vision_config)
    before = [config._attn_implementation for config in configs]
    assert before == ["sdpa", "eager", "sdpa"]
    within = []
    with contextlib.suppress(KeyError), packed_attention_enabled(model):
        within = [config._attn_implementation for config in configs]
        raise KeyError("an error on the way")
    assert within == [ATTENTION_NAME] * 3
    assert [config._attn_implementation for config in configs] == before


def test_a_wrapped_model_is_found() -> None:
    model = tiny_model("llama")
    wrapped = nn.ModuleDict({"policy": nn.Sequential(model)})
    with packed_attention_enabled(wrapped):
        assert model.config._attn_implementation == ATTENTION_NAME
    assert model.config._attn_implementation == "sdpa"


def test_a_model_with_attention_of_its_own_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedAttentionError, match="BloomForCausalLM"), packed_attention_enabled(model):
        pass
