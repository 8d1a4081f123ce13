"""From the rows that the user passed to the token pairs that the loop trains on and evaluates."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TypeAlias

import datasets
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from orpo_ds import distributed
from orpo_ds.config import ORPOConfig
from orpo_ds.data.processing import ProcessingClass
from orpo_ds.data.token_stream import TokenStream, read_whole
from orpo_ds.data.tokenize import TokenDataset, TokenizeOptions, tokenize_dataset
from orpo_ds.model.load import embedding_rows
from orpo_ds.monitor.bars import of_libraries
from orpo_ds.progress import is_shown

Rows: TypeAlias = Dataset | IterableDataset

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_LENGTH = 128  # TRL's default for encoder-decoder models


def prepare_training_set(
    rows: Rows | None,
    *,
    processing_class: ProcessingClass,
    model: PreTrainedModel,
    args: ORPOConfig,
) -> TokenDataset | TokenStream | None:
    """Tokenise the rows now, or open a stream that is tokenised as it is read. All ranks call it.

    Raises:
        ValueError: rows that cannot be trained on; for a stream also settings that need its length, or ranks that do
            not read the same rows.
    """
    if rows is None:
        return None
    if not isinstance(rows, IterableDataset):
        return prepare_dataset(rows, processing_class=processing_class, model=model, args=args)
    _check_stream_settings(args)
    stream = TokenStream(
        rows,
        processing_class=processing_class,
        options=_options_for(args, model),
        unusable=args.unusable_rows,
        global_batch_size=args.global_batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        block_rows=args.dataset_shuffle_buffer,
        shuffle=args.train_sampling_strategy != "sequential",
        steps=args.max_steps,
    )
    if len(set(distributed.gather_objects(stream.fingerprint))) > 1:
        raise ValueError(
            "the ranks do not read the same rows: pass the whole stream to every rank (no split_dataset_by_node), "
            "orpo_ds deals the pairs itself."
        )
    return stream


def prepare_dataset(
    rows: Rows,
    *,
    processing_class: ProcessingClass,
    model: PreTrainedModel,
    args: ORPOConfig,
) -> TokenDataset:
    """Tokenise a dataset, or open what an earlier start or another rank has tokenised; a stream is read to its end."""
    if isinstance(rows, IterableDataset):
        cache = Path(args.dataset_cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "orpo_ds")
        rows = read_whole(rows, folder=cache / "streamed")
    with of_libraries("Tokenising"):
        tokenized = tokenize_dataset(
            rows,
            processing_class=processing_class,
            options=_options_for(args, model),
            unusable=args.unusable_rows,
            cache_dir=args.dataset_cache_dir,
            num_proc=args.dataset_num_proc,
        )
    if is_shown():
        source = "read from" if tokenized.was_kept else "tokenised into"
        print(f"{len(tokenized):,} token pairs {source} {tokenized.folder}", file=sys.stderr, flush=True)
    return tokenized


def _options_for(args: ORPOConfig, model: PreTrainedModel) -> TokenizeOptions:
    return tokenize_options(
        args, is_encoder_decoder=bool(model.config.is_encoder_decoder), vocab_size=embedding_rows(model)
    )


def tokenize_options(
    args: ORPOConfig, *, is_encoder_decoder: bool, vocab_size: int | None
) -> TokenizeOptions:
    """What decides the ids, from the settings and what is known of the model."""
    prompt_limit = args.max_prompt_length
    if prompt_limit is not None and args.max_length is not None and prompt_limit >= args.max_length:
        logger.warning(
            "max_prompt_length=%d leaves a response no room in max_length=%d: half of max_length is used",
            prompt_limit,
            args.max_length,
        )
        prompt_limit = None
    return TokenizeOptions(
        max_length=args.max_length,
        max_prompt_length=prompt_limit,
        truncation_mode=args.truncation_mode,
        is_encoder_decoder=is_encoder_decoder,
        max_completion_length=args.max_completion_length or DEFAULT_COMPLETION_LENGTH,
        vocab_size=vocab_size,
    )


def _check_stream_settings(args: ORPOConfig) -> None:
    """Refuse settings that need to know how long the dataset is."""
    if args.max_steps <= 0:
        raise ValueError("a dataset that is streamed has no known length: set max_steps.")
    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        value = str(getattr(args, name).value)
        if value == "epoch":
            raise ValueError(f"{name}='epoch': a dataset that is streamed has no epochs. Use 'steps'.")
