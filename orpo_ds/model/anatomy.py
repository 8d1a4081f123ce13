"""Take a language model apart: the backbone, the head, and what lies between hidden states and logits.

The loss needs log-probs of some rows, never the [T, V] logits, so it calls the backbone and reads the head's
weight itself. Between the two, families differ: a soft-cap (Gemma), a factor (Cohere, Granite, T5), a bias
(Phi, BART). What follows was read off the `forward` of every `*ForCausalLM` in transformers 5.23. A model
that does something else is not guessed at: `orpo_ds.model.selfcheck` compares the log-probs with the model's
own logits before the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedConfig, PreTrainedModel

from orpo_ds.data.packing import MicroBatch
from orpo_ds.model.attention import AttentionCall
from orpo_ds.model.router import Router, find_router
from orpo_ds.model.ulysses import SequenceGroup

# `config.logits_scaling` divides the logits (Granite) or the hidden states (MiniCPM3). It multiplies here:
LOGITS_SCALING_MULTIPLIES = frozenset({"hyperclovax"})


@dataclass(frozen=True, eq=False)
class ModelParts:
    """A language model taken apart.

    logits = scale * hidden @ head.weight.T + bias, then softcap * tanh(logits / softcap) where there is one.

    Attributes:
        model: the transformers model, without the PEFT wrapper (adapters inside its layers are part of it).
        backbone: gives `last_hidden_state` [B, S, H]. For an encoder-decoder model the decoder.
        head: the output embedding, weight [V, H]. ZeRO-3 gathers its parameters when it is called; whoever
            reads `head.weight` directly registers it (DeepSpeed: `zero.register_external_parameter`).
        scale: factor on the logits before the bias.
        softcap: bound of the logits; None for none.
        router: a mixture of experts whose config asks for `output_router_logits`; else None.
    """

    model: PreTrainedModel
    backbone: PreTrainedModel
    head: nn.Linear
    scale: float
    softcap: float | None
    router: Router | None

    @property
    def bias(self) -> Tensor | None:
        """[V], or None. Read it where it is used: moving the model to a device replaces a buffer."""
        buffers = dict(self.model.named_buffers(recurse=False))
        if "final_logits_bias" in buffers:  # BART and its relatives, [1, V]
            return buffers["final_logits_bias"].squeeze(0)
        return self.head.bias

    @property
    def vocab_group(self) -> ProcessGroup | None:
        """The ranks that share the head's rows (AutoTP's vocabulary-parallel head); None where it is whole."""
        return None if isinstance(self.head, nn.Linear) else self.head.mp_group

    @property
    def vocab_start(self) -> int:
        """The token id of this rank's first row of the head."""
        return 0 if isinstance(self.head, nn.Linear) else self.head.vocab_start_index

    @property
    def aux_coefficient(self) -> float:
        """Weight of the router's balance in the loss; 0 where there is none to compute."""
        return 0.0 if self.router is None else self.router.coefficient

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether hidden states need an encoder first."""
        return bool(self.model.config.is_encoder_decoder)


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model in `model`, which may be a PeftModel around it.

    Raises:
        ValueError: neither, or a PeftModel that changes more than the weights.
    """
    if isinstance(model, PreTrainedModel):
        return model
    from peft import PeftModel  # only a user who has it can bring such a model

    if not isinstance(model, PeftModel):
        raise ValueError(f"{type(model).__name__} is neither a transformers PreTrainedModel nor a PeftModel")
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{model.peft_type} puts virtual tokens before the prompt, which the packed layout has no place "
            "for: use an adapter that changes weights (LoRA, IA3, ...)"
        )
    return transformers_model(model.get_base_model())


def find_parts(model: nn.Module) -> ModelParts:
    """Take `model`, a transformers causal or encoder-decoder language model or its PeftModel, apart.

    Raises:
        ValueError: naming what this model has that its log-probs cannot be computed from a plain head.
    """
    base = transformers_model(model)
    config = base.config.get_text_config(decoder=True)
    return ModelParts(
        model=base,
        backbone=_find_backbone(base),
        head=_find_head(base),
        scale=_logit_scale(base, config),
        softcap=_final_softcap(config),
        router=find_router(base, config),
    )


def hidden_states(
    parts: ModelParts,
    batch: MicroBatch,
    *,
    sequence: SequenceGroup | None = None,
    attention_calls: list[AttentionCall] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Push a micro-batch through the backbone, and through the encoder before it where there is one.

    Args:
        parts: of the model; it must use the packed attention when the micro-batch is packed.
        batch: packed, padded, or padded for an encoder-decoder model.
        sequence: the ranks that share the row, of which `batch` is this rank's part; packed only.
        attention_calls: packed only, see `packed_attention`.

    Returns:
        The last hidden states [N, H] of all N tokens that `batch.rows.index` counts, and the router's logits
        where `parts.router` wants them, else None.
    """
    keywords: dict[str, Any] = {"use_cache": False}
    if batch.decoder_input_ids is not None:
        encoder = parts.model.get_encoder()
        encoded = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        keywords.update(encoder_hidden_states=encoded, encoder_attention_mask=batch.attention_mask)
        return parts.backbone(batch.decoder_input_ids, **keywords).last_hidden_state.flatten(0, 1), None
    if batch.layout is None:
        keywords["attention_mask"] = (
            batch.attention_mask
        )  # positions are the default: padding is on the right
    else:
        keywords.update(position_ids=batch.position_ids, layout=batch.layout)
        if sequence is not None:
            keywords["sequence"] = sequence
        if attention_calls is not None:
            keywords["attention_calls"] = attention_calls
    if parts.router is not None:
        keywords["output_router_logits"] = True
    backbone: nn.Module = parts.backbone
    if batch.image_inputs is not None:
        backbone = parts.model.base_model  # with the vision tower, whose features go into the prompt
        keywords.update(batch.image_inputs)
    output = backbone(batch.input_ids, **keywords)
    return output.last_hidden_state.flatten(0, 1), output.router_logits if parts.router is not None else None


def _find_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model below the head. `get_decoder` is a best effort, and in a few families a head or the model itself."""
    for candidate in (model.get_decoder(), model.base_model, dict(model.named_children()).get("model")):
        if isinstance(candidate, PreTrainedModel) and candidate is not model:
            return candidate
    raise ValueError(
        f"{type(model).__name__} has no head on top of a backbone: load the model with AutoModelForCausalLM"
    )


def _find_head(model: PreTrainedModel) -> nn.Linear:
    """The module that owns the output embedding, or the full copy that PEFT trains instead of it."""
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no output embedding: load the model with AutoModelForCausalLM")
    if not isinstance(head, nn.Linear) and not hasattr(head, "vocab_start_index"):
        from peft.utils import ModulesToSaveWrapper

        if not isinstance(head, ModulesToSaveWrapper):
            raise ValueError(
                f"the head of {name} is a {type(head).__module__}.{type(head).__name__}, not one linear map: "
                "leave it out of LoRA's target_modules and of trainable_token_indices, or train all of it "
                "with modules_to_save=['lm_head']"
            )
        head = head.modules_to_save[head.active_adapters[0]]
    if not head.weight.is_floating_point():
        raise ValueError(
            f"the head of {name} is quantised ({head.weight.dtype}): keep it in floating point "
            "(llm_int8_skip_modules=['lm_head'])"
        )
    return head


def _logit_scale(model: PreTrainedModel, config: PreTrainedConfig) -> float:
    """Product of all factors between the last hidden state and the logits.

    Configs are asked with a default: some of these settings are properties of one family's config class.
    """
    scaling = getattr(config, "logits_scaling", 1.0)
    scale = scaling if config.model_type in LOGITS_SCALING_MULTIPLIES else 1.0 / scaling
    for factor in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        scale *= getattr(config, factor, None) or 1.0
    scale /= getattr(config, "logits_mup_width_multiplier", None) or 1.0  # Inkling
    tied_t5 = getattr(config, "scale_decoder_outputs", False)  # T5 and LongT5; Switch asks for the tie itself
    if tied_t5 or (config.model_type == "switch_transformers" and model.config.tie_word_embeddings):
        scale *= config.d_model**-0.5
    return float(scale)


def _final_softcap(config: PreTrainedConfig) -> float | None:
    """Gemma 2 to 4 and their relatives; RecurrentGemma has a name of its own for it."""
    softcap: float | None = getattr(config, "final_logit_softcapping", None)
    return getattr(config, "logits_soft_cap", None) if softcap is None else softcap
