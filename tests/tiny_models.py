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
    BartConfig,
    BartForConditionalGeneration,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
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


def _qwen3_moe(vocab_size: int) -> PreTrainedModel:
    config = Qwen3MoeConfig(
        **_shape(vocab_size),
        **_special_tokens(),
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.05,
    )
    return Qwen3MoeForCausalLM(config)


def _olmoe(vocab_size: int) -> PreTrainedModel:
    config = OlmoeConfig(
        **_shape(vocab_size),
        **_special_tokens(),
        num_experts=8,
        num_experts_per_tok=3,
        output_router_logits=True,
        router_aux_loss_coef=0.05,
    )
    return OlmoeForCausalLM(config)


def _deepseek_v3(vocab_size: int) -> PreTrainedModel:
    """Latent attention, whose values are narrower than its queries and keys; a dense layer before the experts."""
    shape = _shape(vocab_size) | {"num_key_value_heads": 4}
    config = DeepseekV3Config(
        **shape,
        **_special_tokens(),
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=14,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
    )
    return DeepseekV3ForCausalLM(config)


def _cohere(vocab_size: int) -> PreTrainedModel:
    config = CohereConfig(**_shape(vocab_size), **_special_tokens(), logit_scale=0.3, use_qk_norm=True)
    return CohereForCausalLM(config)


def _granite(vocab_size: int) -> PreTrainedModel:
    config = GraniteConfig(
        **_shape(vocab_size),
        **_special_tokens(),
        logits_scaling=3.0,
        attention_multiplier=0.1,
        embedding_multiplier=4.0,
        residual_multiplier=0.5,
        tie_word_embeddings=True,
    )
    return GraniteForCausalLM(config)


def _bart(vocab_size: int) -> PreTrainedModel:
    """Learned positions, and a bias of the logits that is no parameter."""
    config = BartConfig(
        vocab_size=vocab_size,
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=MAX_POSITIONS,
        init_std=INITIALIZER_RANGE,
        dropout=0.0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **_special_tokens(),
    )
    model = BartForConditionalGeneration(config)
    torch.nn.init.normal_(model.final_logits_bias)  # zero in a new model: nobody would miss it
    return model


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
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "cohere": _cohere,
    "granite": _granite,
}
FAMILIES: dict[str, Callable[[int], PreTrainedModel]] = {**DECODER_ONLY, "t5": _t5, "bart": _bart}


def tiny_model(family: str, *, vocab_size: int = 97, seed: int = 0) -> PreTrainedModel:
    """A random model of `family` (a key of FAMILIES), fp32, on the CPU, in train mode without dropout.

    The same family, vocabulary and seed give the same weights; the caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[family](vocab_size).float().train()
