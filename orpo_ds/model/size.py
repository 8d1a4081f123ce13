"""How much arithmetic a token costs: the numbers behind balancing ranks and behind `useful_flops_fraction`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from orpo_ds.model.anatomy import ModelParts
from orpo_ds.model.router import expert_share


@dataclass(frozen=True)
class ModelSize:
    """What multiplies a token on its way through a model.

    Attributes:
        body_parameters: parameters that every token meets: no embedding, no head, of experts only the chosen ones.
        head_parameters: vocabulary size x hidden size.
        layers: layers with attention.
        attention_width: query heads x head size.
        head_frozen: whether the head's weight gets no gradient (LoRA).
        body_frozen: whether nearly all of the body gets none.
    """

    body_parameters: int
    head_parameters: int
    layers: int
    attention_width: int
    head_frozen: bool
    body_frozen: bool


def measure(parts: ModelParts) -> ModelSize:
    """Count a model's parameters, also where ranks have sharded them."""
    config = parts.model.config.get_text_config(decoder=True)
    embeddings = {id(parts.model.get_input_embeddings().weight), id(parts.head.weight)}
    share = expert_share(config)
    body, trainable = 0.0, 0
    for name, parameter in parts.model.named_parameters():
        if id(parameter) in embeddings:
            continue
        count = numel(parameter)
        trainable += count if parameter.requires_grad else 0
        body += count * share if ".experts." in name else count
    heads = getattr(config, "num_attention_heads", 0)  # a state-space model has none
    head_size = (
        config.head_dim if "head_dim" in config and config.head_dim else config.hidden_size // max(heads, 1)
    )
    return ModelSize(
        body_parameters=int(body),
        head_parameters=numel(parts.head.weight),
        layers=config.num_hidden_layers,
        attention_width=heads * head_size,
        head_frozen=not parts.head.weight.requires_grad,
        body_frozen=trainable < 0.5 * body,
    )


def numel(parameter: Tensor) -> int:
    """Elements of a parameter as a whole; a rank may hold none or a part of it (ZeRO-3, tensor parallelism)."""
    if hasattr(parameter, "whole_shape"):
        return int(parameter.whole_shape.numel())
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else parameter.numel()
