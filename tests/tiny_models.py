"""Tiny random models, one a family, that every test may build: two layers, hidden size 64, fp32, seeded.

Each keeps what makes its family hard: fewer key than query heads, a sliding window short enough to bite in a
test sentence, soft-capped attention and logits, learned positions, a tied head, a router. Weights are drawn
several times wider than the families' initialisers would: with those, attention is so close to uniform that a
wrong mask hardly moves a log-prob.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

HIDDEN = 64
WINDOW = 8  # tokens; the pairs of the tests are longer
MAX_POSITIONS = 512
INITIALIZER_RANGE = 0.15


def _shape(vocab_size: int) -> dict[str, int | float]:
    """What the decoder-only families with Llama's field names have in common."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": INITIALIZER_RANGE,
    }


def _special_tokens() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _llama(vocab_size: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_shape(vocab_size), **_special_tokens()))


def _qwen2(vocab_size: int) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_shape(vocab_size), **_special_tokens(), tie_word_embeddings=True))


def _qwen3(vocab_size: int) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_shape(vocab_size), **_special_tokens(), head_dim=32))


def _mistral(vocab_size: int) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_shape(vocab_size), **_special_tokens(), sliding_window=WINDOW))


def _gemma2(vocab_size: int) -> PreTrainedModel:
    config = Gemma2Config(
        **_shape(vocab_size),
        **_special_tokens(),
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    )
    return Gemma2ForCausalLM(config)


def _gemma3(vocab_size: int) -> PreTrainedModel:
    config = Gemma3TextConfig(
        **_shape(vocab_size),
        **_special_tokens(),
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    )
    return Gemma3ForCausalLM(config)


def _phi3(vocab_size: int) -> PreTrainedModel:
    config = Phi3Config(
        **_shape(vocab_size),
        **_special_tokens(),
        original_max_position_embeddings=MAX_POSITIONS,
        sliding_window=WINDOW,
    )
    return Phi3ForCausalLM(config)


def _gpt_neox(vocab_size: int) -> PreTrainedModel:
    shape = _shape(vocab_size)
    del shape["num_key_value_heads"]
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **_special_tokens()))


def _gpt2(vocab_size: int) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=MAX_POSITIONS,
        initializer_range=INITIALIZER_RANGE,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_special_tokens(),
    )
    return GPT2LMHeadModel(config)


def _mixtral(vocab_size: int) -> PreTrainedModel:
    config = MixtralConfig(
        **_shape(vocab_size),
        **_special_tokens(),
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
    )
    return MixtralForCausalLM(config)


def _t5(vocab_size: int) -> PreTrainedModel:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=1.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


DECODER_ONLY: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
}
FAMILIES: dict[str, Callable[[int], PreTrainedModel]] = {**DECODER_ONLY, "t5": _t5}


def tiny_model(family: str, *, vocab_size: int = 97, seed: int = 0) -> PreTrainedModel:
    """A random model of `family` (a key of FAMILIES), fp32, on the CPU, in train mode without dropout.

    The same family, vocabulary and seed give the same weights; the caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[family](vocab_size).float().train()
