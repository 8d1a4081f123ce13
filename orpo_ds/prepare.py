"""From what the user passed to what the loop needs: a model with its tokenizer. `prepare_data.py` does the datasets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import enable_full_determinism, number_of_arguments

from orpo_ds.adapters import (
    add_adapters,
    align_dtypes,
    check_quantization,
    has_adapters,
    keep_quantised_weights,
)
from orpo_ds.config import ORPOConfig
from orpo_ds.data.processing import ProcessingClass, tokenizer_of
from orpo_ds.model.compiled import use_liger_layers
from orpo_ds.model.load import (
    check_vocabulary,
    disable_dropout,
    load_model,
    load_processing,
    not_here,
    reads_images,
    use_chat_template,
)
from orpo_ds.monitor.bars import of_libraries
from orpo_ds.zero_options import check_zero_options

logger = logging.getLogger(__name__)


def prepare_model(
    model: PreTrainedModel | str | None,
    *,
    args: ORPOConfig,
    model_init: Callable[..., PreTrainedModel] | None,
    peft_config: Any | None,
) -> PreTrainedModel:
    """Load, make or take the model, and set it up for training.

    Args:
        model: object, folder or hub id; None with `model_init`.
        args: the run's settings.
        model_init: makes the model.
        peft_config: a `peft.PeftConfig` or its dict; None trains all parameters.

    Raises:
        ValueError: neither or both of `model` and `model_init`, `model_init_kwargs` for a ready-made model, or a model
            that cannot be loaded; an option of ZeRO that cannot train here.
    """
    if (model is None) == (model_init is None):
        raise ValueError("pass either `model` (an object, a folder or a hub id) or `model_init`.")
    check_zero_options(args.deepspeed_settings.get("zero_optimization", {}), world_size=args.world_size)
    if args.full_determinism:
        enable_full_determinism(args.seed)
    else:
        set_seed(args.seed)
    keywords = args.model_keywords
    check_quantization(keywords, zero_stage=args.zero_stage)
    if isinstance(model, str):
        dtype = keywords.pop("dtype", "auto")
        try:
            with of_libraries(f"Loading {model}"):
                made = load_model(
                    model,
                    dtype=training_dtype(args) if dtype in ("auto", None) else dtype,
                    trust_remote_code=args.trust_remote_code,
                    **keywords,
                )
        except OSError as error:
            raise ValueError(
                f"model {model!r} cannot be loaded: {error}\n{not_here(model)}".rstrip()
            ) from error
    elif keywords:
        raise ValueError(
            f"model_init_kwargs={keywords} has no effect on a model that is made already: pass the model by name."
        )
    else:
        made = model if model is not None else _call(model_init)
    if args.is_encoder_decoder not in (None, made.config.is_encoder_decoder):
        raise ValueError(
            f"is_encoder_decoder={args.is_encoder_decoder}, but the model's config says "
            f"{made.config.is_encoder_decoder}. Leave it out."
        )
    made.config.use_cache = False
    _warn_of_rounding(made, args)
    if peft_config is not None:
        made = add_adapters(made, peft_config)
    if has_adapters(made):
        align_dtypes(made, training_dtype(args))
        keep_quantised_weights(made)
    if args.disable_dropout:
        disable_dropout(made)
    if args.use_liger_kernel:
        use_liger_layers(made, args.liger_kernel_config)
    recompute_activations(made, args)
    return made


def recompute_activations(model: PreTrainedModel, args: ORPOConfig) -> None:
    """Turn gradient checkpointing on, if the run wants it."""
    if not args.gradient_checkpointing:
        return
    keywords = dict(args.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]  # parsed by now
    # Two of them are transformers' own, as in its Trainer; the others go to torch.utils.checkpoint.
    own = {name: keywords.pop(name) for name in ("every_n_layers", "offload") if name in keywords}
    model.activation_checkpointing_enable(keywords or None, **own)
    model.enable_input_require_grads()


def _call(model_init: Callable[..., PreTrainedModel] | None) -> PreTrainedModel:
    """Make a model as transformers' Trainer does: the function may take the trial of a search, and there is none."""
    assert model_init is not None
    count = number_of_arguments(model_init)
    if count > 1:
        raise ValueError(
            f"model_init takes {count} arguments: give it none, or one for the trial, which is None."
        )
    return model_init(None) if count else model_init()


def _warn_of_rounding(model: PreTrainedModel, args: ORPOConfig) -> None:
    """Say so where weights of few digits are updated in place: an update of 1e-6 is lost in bfloat16."""
    if training_dtype(args) == torch.float32 and model.dtype in (torch.bfloat16, torch.float16):
        logger.warning(
            "the weights are in %s, and neither bf16 nor fp16 is set: each update is rounded to that, and small ones "
            "are lost. Set bf16=True, which keeps float32 weights beside them, or dtype='float32'",
            str(model.dtype).removeprefix("torch."),
        )


def training_dtype(args: ORPOConfig) -> torch.dtype:
    """Return the dtype of the weights that forward and backward use."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32


def prepare_processing(
    processing_class: ProcessingClass | None, *, model: PreTrainedModel, args: ORPOConfig
) -> ProcessingClass:
    """The user's tokenizer or processor, or the model's own, with the chat template of the run.

    Raises:
        ValueError: it knows ids that the model has no embedding for, there is none, or it cannot be loaded.
    """
    if processing_class is None:
        name = model.config.name_or_path
        if not name:
            raise ValueError(
                "pass `processing_class`: the model was not loaded by name, so its tokenizer is unknown."
            )
        revision = args.model_keywords.get("revision")
        try:
            processing_class = load_processing(
                name,
                revision=revision,
                trust_remote_code=args.trust_remote_code,
                reads_images=reads_images(model.config),
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the tokenizer of model {name!r} cannot be loaded: {error}\nPass `processing_class`, or put the "
                "tokenizer's files beside the model's."
            ) from error
    if args.chat_template_path is not None:
        use_chat_template(processing_class, args.chat_template_path)
    check_vocabulary(model, tokenizer_of(processing_class))
    return processing_class
