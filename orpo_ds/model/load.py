"""From a name to a model and its tokenizer, with nothing that a hub page could run.

`from_pretrained` sees the run's DeepSpeed config (transformers keeps a reference to it), so under ZeRO-3 each rank
loads only its shard. A model object that the user made is taken as it is.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from orpo_ds.data.processing import ProcessingClass

ADAPTER_CONFIG = "adapter_config.json"  # in a folder of PEFT adapters

logger = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Load a causal, vision-language or encoder-decoder language model by folder or hub id.

    Args:
        name: folder or hub id.
        dtype: of the weights; the dtype of the training, so that ZeRO's fp32 partitions start from what was read.
        revision: branch, tag or commit of a hub model.
        attn_implementation: attention of the padded layout and of generation.
        trust_remote_code: run the code that the repository ships.
        **from_pretrained: further keywords for `from_pretrained` (`model_init_kwargs`).

    Raises:
        ValueError: a path that does not exist, or a folder that is no model.
    """
    _check_path(name)
    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    family = _family(AutoConfig.from_pretrained(name, **shared))
    return family.from_pretrained(
        name, dtype=dtype, attn_implementation=attn_implementation, **shared, **from_pretrained
    )


def empty_model(name: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder or hub id on the meta device: its shapes, its names and its way to save, and no weights."""
    _check_path(name)
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = _family(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model


def _family(config: PreTrainedConfig) -> Any:
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def reads_images(config: PreTrainedConfig) -> bool:
    """Whether this is the config of a model that reads images and text, and writes text."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_processing(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, reads_images: bool = False
) -> ProcessingClass:
    """Load the tokenizer of a model by folder or hub id, or its processor.

    Args:
        name: folder or hub id.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run the code that the repository ships.
        reads_images: load the processor. Where it cannot be had (no files of one, or a package that it needs is
            missing) the tokenizer serves for text.
    """
    _check_path(name)
    keywords = {"revision": revision, "trust_remote_code": trust_remote_code}
    if reads_images:
        try:
            found = AutoProcessor.from_pretrained(name, **keywords)
        except (AttributeError, ImportError, OSError, ValueError) as error:
            logger.warning(
                "the processor of %s cannot be loaded, so it can be trained on text alone. Images mostly need "
                "`pip install orpo-ds[vision]`. The reason: %s",
                name,
                error,
            )
        else:
            if isinstance(found, ProcessorMixin):
                return found
    return AutoTokenizer.from_pretrained(name, **keywords)


def use_chat_template(tokenizer: ProcessingClass, source: str) -> None:
    """Take the chat template from a Jinja file, or from a tokenizer's folder or hub id, without running its code.

    Raises:
        ValueError: there is neither, or the tokenizer has no chat template.
    """
    path = Path(source).expanduser()
    if path.is_file():
        tokenizer.chat_template = path.read_text()
        return
    try:
        _check_path(source)
        template = AutoTokenizer.from_pretrained(source, trust_remote_code=False).chat_template
    except (OSError, ValueError) as error:
        raise ValueError(
            f"chat_template_path={source!r} is no file (in {Path.cwd()}), and no tokenizer can be loaded from there: "
            f"{error}"
        ) from error
    if template is None:
        raise ValueError(f"chat_template_path={source!r}: that tokenizer has no chat template.")
    tokenizer.chat_template = template


def padding_id(tokenizer: PreTrainedTokenizerBase, *, padding_value: int | None) -> int:
    """The id that fills padded rows. It is masked everywhere, so the end-of-text token serves where none is set."""
    for candidate in (padding_value, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    raise ValueError(
        f"tokenizer {tokenizer.name_or_path!r} has neither a pad nor an eos token. Set `padding_value` to a token id."
    )


def own_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, padding_value: int | None, **changes: Any
) -> GenerationConfig:
    """A copy of the model's own generation config that ends and pads, without its limit on the whole length.

    Args:
        model: one that generates.
        tokenizer: of the model; its end-of-text token serves where the config names none.
        padding_value: see `padding_id`.
        changes: further fields.
    """
    config = copy.deepcopy(model.generation_config)
    assert config is not None, "a model that generates has one"
    ends = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
    pad = padding_id(tokenizer, padding_value=padding_value)
    config.update(max_length=None, eos_token_id=ends, pad_token_id=pad, **changes)
    return config


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that can produce ids for which the model has no embedding.

    Raises:
        ValueError: with both sizes and the call that mends it.
    """
    rows = embedding_rows(model)
    if len(tokenizer) > rows:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, but the embedding of "
            f"{model.config.name_or_path or type(model).__name__!r} has {rows} rows. Use the model's own tokenizer, "
            f"or call model.resize_token_embeddings({len(tokenizer)}) before training."
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of token ids that the model knows, also where ranks have sharded the weight."""
    weight: Any = model.get_input_embeddings().weight
    for mark in ("whole_shape", "ds_shape"):  # of tensor parallelism, of ZeRO-3
        if hasattr(weight, mark):
            return int(getattr(weight, mark)[0])
    return int(weight.shape[0])


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to zero, as TRL does: ORPO compares two passes of one policy.

    Dropout modules are zeroed, and so are the probabilities that attention layers read from plain attributes.
    LoRA's own dropout (inside `lora_dropout`) is the user's regulariser and stays.
    """
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("attention_dropout", "attn_dropout", "dropout", "activation_dropout"):
            if isinstance(module.__dict__.get(attribute), float):
                setattr(module, attribute, 0.0)


def not_here(name: str) -> str:
    """What to say of a name that no hub knows: that no folder has it either, and which one is nearest."""
    path = Path(name).expanduser()
    return "" if path.exists() else f"There is no folder {name!r} in {Path.cwd()} either.{_nearest(path)}"


def _nearest(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def _check_path(name: str) -> None:
    """A name that looks like a path must be one: from_pretrained would ask a hub for it and blame the network."""
    path = Path(name).expanduser()
    if path.exists() or not (name.startswith((".", "/", "~")) or name.count("/") > 1):
        return
    raise ValueError(f"{name!r}: no such folder.{_nearest(path)}")
