"""The user's model without its weights: from its config alone, on tensors that have shapes and no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from orpo_ds.adapters import add_adapters, align_dtypes, has_adapters
from orpo_ds.config import ORPOConfig
from orpo_ds.model.load import disable_dropout, not_here, reads_images
from orpo_ds.prepare import recompute_activations


def read_config(name: str, *, args: ORPOConfig) -> PreTrainedConfig:
    """The config of a model folder or hub id.

    Raises:
        ValueError: there is none, or the model cannot be estimated.
    """
    keywords = args.model_keywords
    if keywords.get("quantization_config") is not None:
        raise ValueError(
            "estimate does not know what a model in 4 or 8 bits takes: leave load_in_4bit and load_in_8bit out for an "
            "upper bound, or try one step with --dry_run."
        )
    try:
        config = AutoConfig.from_pretrained(
            name, revision=keywords.get("revision"), trust_remote_code=args.trust_remote_code
        )
    except OSError as error:
        raise ValueError(f"model {name!r} has no config: {error}\n{not_here(name)}".rstrip()) from error
    if reads_images(config):
        raise ValueError(
            f"{name}: estimate counts text alone, and this model reads images. Try one step with --dry_run."
        )
    return config


def model_of_shapes(
    config: PreTrainedConfig, *, args: ORPOConfig, dtype: torch.dtype, peft_config: Any | None
) -> tuple[PreTrainedModel, FakeTensorMode]:
    """The model as the trainer would prepare it, and the mode that its tensors belong to.

    Args:
        config: of the model.
        args: the run's settings.
        dtype: of the training.
        peft_config: adapters, or None.
    """
    family: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"), _without_zero3(args.hf_deepspeed_config):
        model = family.from_config(config, dtype=dtype, trust_remote_code=args.trust_remote_code)
        model.config.use_cache = False
        if peft_config is not None:
            model = add_adapters(model, peft_config)
        if has_adapters(model):
            align_dtypes(model, dtype)
    if args.disable_dropout:
        disable_dropout(model)
    recompute_activations(model, args)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _onto_cpu(model, fake)
    return model.train(), fake


def _onto_cpu(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace tensors of the meta device, which kernels take for a device of its own, by those of a CPU."""
    made: dict[int, Any] = {}  # a tied weight is one tensor in two modules
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with fake:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = (
                            nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
                        )
                held[name] = made[id(tensor)]


@contextmanager
def _without_zero3(settings: HfDeepSpeedConfig) -> Iterator[None]:
    """Let transformers make a model as a whole; the settings of the run would have it sharded at birth."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(settings)
