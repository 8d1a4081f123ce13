"""What can be said about a config's values before anything is started: choices, ranges, refusals, contradictions.

Each message names the field, the value and what to write instead. What needs the DeepSpeed JSON or the process group
is checked by `ORPOConfig` itself.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal, get_args, get_origin

import torch

from orpo_ds import distributed
from orpo_ds.settings.dropped import defaults_of
from orpo_ds.settings.table import refusal

AT_LEAST_ONE = (
    "max_length",
    "max_prompt_length",
    "max_completion_length",
    "max_tokens_per_micro_batch",
    "mlp_tile_tokens",
    "sequence_parallel_size",
    "tensor_parallel_size",
    "dataset_shuffle_buffer",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "generate_num_prompts",
    "generate_max_new_tokens",
    "gradient_accumulation_steps",
)
TOKENS_SEEN = (True, False, "all", "non_padding", "no")


def check_values(config: Any) -> None:
    """Check an `ORPOConfig` whose values are those that the user gave, with old names taken over.

    Raises:
        ValueError: for the first value that cannot be.
    """
    for name, allowed in _choices(type(config)).items():
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown. Use one of: {', '.join(map(str, allowed))}.")
    for name in AT_LEAST_ONE:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    for name in ("logits_cache_mib", "beta"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}={getattr(config, name)} must not be negative.")
    for name, default in defaults_of(config).items():
        refused = refusal(name, getattr(config, name), default=default)
        if refused is not None:
            raise ValueError(refused)
    _check_best(config)
    _check_place(config)
    _check_trackio(config)


def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """The fields that have a list of values: of ours by their type, of transformers' by their metadata."""
    types = typing.get_type_hints(kind)
    choices = {
        item.name: tuple(item.metadata["choices"])
        for item in dataclasses.fields(kind)
        if "choices" in item.metadata
    }
    literals = {name: get_args(hint) for name, hint in types.items() if get_origin(hint) is Literal}
    return choices | literals | {"include_num_input_tokens_seen": TOKENS_SEEN}


def _check_best(config: Any) -> None:
    if config.save_strategy == "best" and config.eval_strategy == "no":
        raise ValueError("save_strategy='best' needs evaluations to choose by: set eval_strategy.")
    if config.save_only_model and config.load_best_model_at_end:
        raise ValueError(
            "save_only_model=True and load_best_model_at_end=True exclude each other, as in transformers with "
            "DeepSpeed: the engine loads its own state, which such checkpoints lack. Leave one of them out."
        )


def _check_place(config: Any) -> None:
    if config.use_cpu and torch.cuda.is_available():
        raise ValueError(
            "use_cpu=True on a machine with GPUs: libraries have chosen the device by now. Start the job with "
            "CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu in its environment."
        )
    if config.local_rank not in (-1, distributed.local_rank()):
        raise ValueError(
            f"local_rank={config.local_rank}, but the launcher's LOCAL_RANK says {distributed.local_rank()}. "
            "Leave it out."
        )


def _check_trackio(config: Any) -> None:
    wanted = config.report_to if isinstance(config.report_to, list) else [config.report_to]
    if {"trackio", "all"} & set(wanted):
        return
    for name in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name}={getattr(config, name)!r} needs report_to='trackio'.")
