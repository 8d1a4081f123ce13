"""The trained model as a Hugging Face folder that `from_pretrained` and serving tools load."""

from __future__ import annotations

import shutil
from pathlib import Path

import deepspeed
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from orpo_ds import distributed
from orpo_ds.checkpoint import CheckpointSaveError, job_ranks
from orpo_ds.checkpoint.ranks import TogetherError, free_bytes, on_main
from orpo_ds.data.processing import ProcessingClass

PARTIAL_NAME = ".tmp-model"


def save_pretrained(model: PreTrainedModel, folder: str | Path, *, tokenizer: ProcessingClass | None) -> None:
    """Write weights (safetensors), config, generation config, and the tokenizer with its chat template.

    All ranks call it; the main process writes. Under ZeRO-3 one parameter at a time is gathered and copied to the main
    process's host memory, so no GPU ever holds the model. A PEFT model writes its adapter only. Files appear in
    `folder` when all of them are complete.

    Args:
        model: inside or outside an engine.
        folder: created if it does not exist.
        tokenizer: or processor; saved beside the weights.

    Raises:
        CheckpointSaveError: on all ranks, when the files could not be written; what `folder` held is untouched.
    """
    state = full_state(model)
    target = Path(folder)
    try:
        on_main(job_ranks(), lambda: _write(model, target, state=state, tokenizer=tokenizer))
    except TogetherError as error:
        raise CheckpointSaveError(
            f"the model was not saved in {target}: {error} ({free_bytes(target):,} bytes are free there)"
        ) from None


def _write(
    model: PreTrainedModel,
    target: Path,
    *,
    state: dict[str, Tensor] | None,
    tokenizer: ProcessingClass | None,
) -> None:
    partial = target / PARTIAL_NAME
    use_cache, model.config.use_cache = model.config.use_cache, True
    try:
        partial.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(partial, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for path in partial.iterdir():
            path.replace(target / path.name)
    except SafetensorError as error:
        raise OSError(f"{partial}: {error}") from error
    finally:
        model.config.use_cache = use_cache
        shutil.rmtree(partial, ignore_errors=True)


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
