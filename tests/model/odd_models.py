"""Tiny random models beyond the tested families: odd heads, and layers that cannot be packed.

Each is built on demand under the caller's seed, and knows the ids below ODD_VOCAB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

ODD_VOCAB = 97
LONG = 512  # a window or chunk that no short probe reaches the end of

_SHAPE = {
    "vocab_size": ODD_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}


def _make(name: str, architecture: str = "ForCausalLM", **config: Any) -> Callable[[], PreTrainedModel]:
    """`transformers.<name>ForCausalLM(<name>Config(...))`."""

    def build() -> PreTrainedModel:
        model_class = getattr(transformers, name + architecture)
        return model_class(model_class.config_class(**config)).float()

    return build


def _llama_like(name: str, **config: Any) -> Callable[[], PreTrainedModel]:
    return _make(name, **{**_SHAPE, **config})


# Something lies between the last hidden state and the logits, and `anatomy` knows it.
ODD_HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    "cohere: logit_scale": _llama_like("Cohere", logit_scale=0.3),
    "granite: divided": _llama_like("Granite", logits_scaling=3.0),
    "minicpm3: divided, a property": _llama_like("MiniCPM3", **_LATENT, dim_model_base=16),
    "hyperclovax: multiplied": _llama_like("HyperCLOVAX", logits_scaling=3.0),
    "falcon_h1: multiplied": _llama_like(
        "FalconH1",
        lm_head_multiplier=0.5,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_d_ssm=128,
    ),
    "recurrent_gemma: its own soft-cap": _make(
        "RecurrentGemma",
        vocab_size=ODD_VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        lru_width=64,
        logits_soft_cap=0.5,
    ),
    "phi: bias": _llama_like("Phi"),
    "gptj: bias": _make("GPTJ", vocab_size=ODD_VOCAB, n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
    "llama4: get_decoder finds nothing": _make(
        "Llama4",
        **_SHAPE,
        intermediate_size_mlp=96,
        head_dim=16,
        num_local_experts=2,
        attention_chunk_size=LONG,
        no_rope_layers=[1, 0],
    ),
}

# A packed row would give other numbers, or might on a longer row. With a part of the reason that must be
# named.
UNPACKABLE: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mamba2": (
        _make(
            "Mamba2",
            vocab_size=ODD_VOCAB,
            hidden_size=64,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=16,
            state_size=16,
            n_groups=1,
        ),
        "0 of its 2 layers call an attention function",
    ),
    "bamba": (
        _llama_like(
            "Bamba",
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_d_state=16,
            mamba_n_groups=1,
            attn_layer_indices=[1],
        ),
        "linear_attention",
    ),
    "qwen3_next": (
        _llama_like(
            "Qwen3Next",
            head_dim=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            layer_types=["linear_attention", "full_attention"],
        ),
        "1 of its 2 layers call an attention function",
    ),
    "rwkv": (
        _make("Rwkv", vocab_size=ODD_VOCAB, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64),
        "code of its own",
    ),
    "bloom (ALiBi)": (
        _make("Bloom", vocab_size=ODD_VOCAB, hidden_size=64, n_layer=2, n_head=4),
        "code of its own",
    ),
    "gpt_oss": (
        _llama_like("GptOss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        "attention sinks",
    ),
    "phimoe (window in the mask only)": (
        _llama_like(
            "Phimoe",
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=LONG,
            router_jitter_noise=0.0,
            input_jitter_noise=0.0,
        ),
        "sliding window of 512 tokens in 2 layers, but only 0",
    ),
    "llama4 (chunks in the mask only)": (
        ODD_HEADS["llama4: get_decoder finds nothing"],
        "chunks of 512 tokens",
    ),
    "bart": (
        _make(
            "Bart",
            "ForConditionalGeneration",
            vocab_size=ODD_VOCAB,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
        ),
        "encoder-decoder",
    ),
}

MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": _llama_like("Mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True),
    "qwen2_moe": _llama_like(
        "Qwen2Moe", **_EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "qwen3_moe": _llama_like("Qwen3Moe", **_EXPERTS, moe_intermediate_size=32, head_dim=16),
    "olmoe": _llama_like("Olmoe", **_EXPERTS),
    "granite_moe": _llama_like(
        "GraniteMoe", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
    ),
}


def modern_bert_decoder() -> PreTrainedModel:
    """A model whose head is a network (dense, activation, norm, projection): not known to `anatomy`."""
    return _make(
        "ModernBertDecoder",
        vocab_size=ODD_VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )()


def spread_bias(model: PreTrainedModel, *, generator: torch.Generator) -> None:
    """Fill the head's bias, which starts at zero, in place."""
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias, generator=generator)
