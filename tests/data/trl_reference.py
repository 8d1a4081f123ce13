"""TRL 1.16's own text and ids of a row: the functions that its ORPOTrainer maps over a dataset, in its order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.orpo import ORPOTrainer

from orpo_ds.data.preference import Preference


@dataclass(frozen=True)
class TrlIds:
    """Full sequences and the number of leading ids that TRL masks in the labels."""

    chosen: list[int]
    rejected: list[int]
    chosen_start: int
    rejected_start: int


def trl_preference(
    row: Mapping[str, Any], processing_class: PreTrainedTokenizerBase, tools: list[Any] | None = None
) -> Preference:
    """The row as text."""
    extracted = maybe_extract_prompt(dict(row))
    rendered = maybe_apply_chat_template(extracted, processing_class=processing_class, tools=tools)
    return Preference(rendered["prompt"], rendered["chosen"], rendered["rejected"])


def trl_ids(
    preference: Preference, processing_class: PreTrainedTokenizerBase, *, max_length: int = 10**6
) -> TrlIds:
    """The ids of `ORPOTrainer.tokenize_row` for a decoder-only model."""
    row = _tokenize_row(preference, processing_class, is_encoder_decoder=False, max_length=max_length)
    return TrlIds(
        chosen=row["chosen_input_ids"],
        rejected=row["rejected_input_ids"],
        chosen_start=_leading(row["chosen_labels"], -100),
        rejected_start=_leading(row["rejected_labels"], -100),
    )


def trl_encoder_decoder_ids(
    preference: Preference, processing_class: PreTrainedTokenizerBase, *, max_completion_length: int
) -> tuple[list[int], list[int], list[int]]:
    """Ids of prompt, chosen labels and rejected labels of `tokenize_row` for an encoder-decoder model."""
    row = _tokenize_row(
        preference,
        processing_class,
        is_encoder_decoder=True,
        max_length=10**6,
        max_completion_length=max_completion_length,
    )
    return row["prompt_input_ids"], row["chosen_labels"], row["rejected_labels"]


def _tokenize_row(
    preference: Preference, processing_class: PreTrainedTokenizerBase, **attributes: Any
) -> dict[str, list[int]]:
    trainer = ORPOTrainer.__new__(ORPOTrainer)  # tokenize_row reads these attributes and no others
    trainer.__dict__.update(processing_class=processing_class, **attributes)
    logging.getLogger("trl").setLevel(logging.ERROR)
    return trainer.tokenize_row(
        {"prompt": preference.prompt, "chosen": preference.chosen, "rejected": preference.rejected}
    )


def _leading(values: list[int], value: int) -> int:
    return next((index for index, held in enumerate(values) if held != value), len(values))
