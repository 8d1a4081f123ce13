"""What a vision-language model is given beside the ids, and the padded layout that carries it.

    tokenising   prompt + images -> processor -> ids of the prompt, placeholders expanded     (kept)
    batch        prompt + images -> processor -> pixel_values, image_grid_thw, ...            (made again)

The processor is deterministic and runs in the background thread that builds micro-batches. A hash of the pixels is kept
with the ids: an image file that has changed since is an error that names the row.

**Every micro-batch runs the vision tower.** A rank whose pairs have no image would skip it, and wait forever for the
others, who gather its weights (ZeRO-3) or reduce its gradients. Such a micro-batch, an empty one too, gets one more
row, the shortest prompt with an image, that no target row points to: it adds exact zeros to every gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import ProcessorMixin

from orpo_ds.data.images import digest, split_images
from orpo_ds.data.packing import MicroBatch, without_labels
from orpo_ds.data.padding import pad
from orpo_ds.data.preference import to_preference
from orpo_ds.data.truncate import TokenPair
from orpo_ds.data.vision import image_token_ids, process

# Outputs of a processor that go with the ids and not with the images.
TEXT_OUTPUTS = frozenset({"input_ids", "attention_mask", "text_replacement_offsets"})
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # which tokens stand for an image, where a model asks


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """The images of a dataset's pairs, as model inputs.

    Attributes:
        rows: the dataset that was tokenised.
        row_numbers: int64 [N], the row of every pair.
        image_tokens: int32 [N], tokens of every prompt that stand for an image; 0 without one.
        processor: that of the model.
    """

    rows: datasets.Dataset
    row_numbers: NDArray[np.int64]
    image_tokens: NDArray[np.int32]
    processor: ProcessorMixin

    @cached_property
    def token_ids(self) -> list[int]:
        """Ids that stand for an image."""
        return image_token_ids(self.processor)

    @cached_property
    def companion(self) -> int:
        """The pair with the smallest image, for micro-batches that have none."""
        having = np.flatnonzero(self.image_tokens)
        return int(having[np.argmin(self.image_tokens[having])])

    def read(self, pairs: Sequence[int], kept: Sequence[TokenPair]) -> dict[str, Any]:
        """What the processor makes of the images of these pairs, each with at least one.

        Args:
            pairs: dataset indices.
            kept: the pairs themselves, which know a hash of their images.

        Returns:
            Model inputs; their first dimension runs over images or pairs, in order. Under one of TOKEN_TYPES an
            unfilled entry where the model asks for it.

        Raises:
            ValueError: an image is not what it was when the dataset was tokenised.
        """
        numbers = [int(self.row_numbers[pair]) for pair in pairs]
        texts, images = [], []
        for number, pair in zip(numbers, kept, strict=True):
            row, found = split_images(self.rows[number], row_number=number)
            if digest(found) != pair.images:
                raise ValueError(
                    f"row {number}: its images are not those that were tokenised. Has a file been changed since? Clear "
                    "dataset_cache_dir and start again"
                )
            texts.append(to_preference(row, processing_class=self.processor, row_number=number).prompt)
            images.append(found)
        outputs = process(texts, images, processor=self.processor, row_numbers=numbers, tensors=True)
        return {name: value for name, value in outputs.items() if name not in TEXT_OUTPUTS}

    def token_types(self, input_ids: Tensor) -> Tensor:
        """1 for a token that stands for an image and 0 for text, int64 [B, S]."""
        return torch.tensor(self.processor.create_mm_token_type_ids(input_ids.tolist()))


def pad_with_images(
    pairs: Sequence[TokenPair],
    *,
    pair_ids: Sequence[int],
    images: ImageInputs,
    companion: TokenPair,
    pad_token_id: int,
    nll_on_prompt: bool,
) -> MicroBatch:
    """Lay pairs side by side as `pad` does, with the images that both rows of a pair need.

    The nll does not count tokens that stand for an image: nothing is to be learned about what comes next in a photo.

    Args:
        pairs: the pairs.
        pair_ids: dataset index of every pair.
        images: of the dataset.
        companion: the pair `images.companion`.
        pad_token_id: see `pad`.
        nll_on_prompt: see `pad`.
    """
    seeing = [place for place, pair in enumerate(pair_ids) if images.image_tokens[pair] > 0]
    batch = pad(
        pairs,
        pair_ids=pair_ids,
        pad_token_id=pad_token_id,
        nll_on_prompt=nll_on_prompt,
        companion=None if seeing else companion.chosen[: companion.chosen_start],
    )
    if seeing:
        inputs = images.read([pair_ids[place] for place in seeing], [pairs[place] for place in seeing])
        inputs = {name: _twice(value) for name, value in inputs.items()}
    else:
        inputs = images.read([images.companion], [companion])
    for name in TOKEN_TYPES:
        if name in inputs:
            inputs[name] = images.token_types(batch.input_ids)
    return replace(batch, rows=without_labels(batch.rows, images.token_ids), image_inputs=inputs)


def without_ids(pair: TokenPair, ids: Sequence[int]) -> TokenPair:
    """The pair as text alone, for checks that show the model no image."""
    known = set(ids)
    before = sum(id_ in known for id_ in pair.chosen[: pair.trunk])
    return TokenPair(
        [id_ for id_ in pair.chosen if id_ not in known],
        [id_ for id_ in pair.rejected if id_ not in known],
        pair.chosen_start - before,
        pair.rejected_start - before,
        pair.trunk - before,
    )


def _twice(value: Any) -> Any:
    """Images of the chosen sequences, then the same of the rejected ones."""
    return torch.cat((value, value)) if isinstance(value, Tensor) else [*value, *value]
