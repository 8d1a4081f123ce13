"""The trained model as a Hugging Face folder that `from_pretrained` and serving tools load."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orpo_ds import distributed


def save_pretrained(
    model: PreTrainedModel, folder: str | Path, *, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write weights (safetensors), config, generation config, and the tokenizer with its chat template.

    All ranks call it; the main process writes. Under ZeRO-3 one parameter at a time is gathered and copied to the main
    process's host memory, so no GPU ever holds the model. A PEFT model writes its adapter only.

    Args:
        model: inside or outside an engine.
        folder: created if it does not exist.
        tokenizer: saved beside the weights.
    """
    state = full_state(model)
    if distributed.is_main():
        use_cache, model.config.use_cache = model.config.use_cache, True
        model.save_pretrained(folder, state_dict=state)
        model.config.use_cache = use_cache
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    distributed.barrier()


def full_state(model: torch.nn.Module) -> dict[str, Tensor] | None:
    """The state dict on the CPU of the main process; None on the others. Tied weights share one tensor."""
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    adapters_only = hasattr(model, "peft_config")
    for name, value in model.named_parameters(remove_duplicate=False):
        if adapters_only and not value.requires_grad:
            continue
        if id(value) not in copies:
            copies[id(value)] = _gathered(value)
        state[name] = copies[id(value)]
    persistent = set(model.state_dict(keep_vars=True)) - set(state)
    state.update({name: value.detach().cpu() for name, value in model.named_buffers() if name in persistent})
    return state if distributed.is_main() else None


def _gathered(parameter: torch.nn.Parameter) -> Tensor:
    partitioned = hasattr(parameter, "ds_id")
    with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
        # A plain parameter is copied too: the file must not change while training goes on.
        return parameter.detach().to("cpu", copy=True) if distributed.is_main() else torch.empty(0)
