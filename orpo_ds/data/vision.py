"""Prompts with images become ids.

A processor writes as many placeholder tokens for an image as the model makes features of it. The ids of such a prompt
are kept with those of the responses like any others, because they are small and say how long a pair is. The pixels are
not: an image of a few hundred kilobytes becomes megabytes of floats. `orpo_ds.data.image_inputs` makes them again from
the row, when its pair is laid out.

A prompt with images is never cut: a placeholder token without its feature would be an error in the model. What is too
long loses the end of its response, and a pair whose prompt alone is too long is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import datasets
from transformers import ProcessorMixin

from orpo_ds.data.images import Image, digest, split_images
from orpo_ds.data.preference import Preference, RowError, common_prefix_length, to_preference
from orpo_ds.data.processing import tokenizer_of
from orpo_ds.data.truncate import TokenPair

# Ids of (prompt, chosen, rejected): the full texts for a decoder-only model, the three parts for an
# encoder-decoder.
Encoded: TypeAlias = tuple[list[int], list[int], list[int]]

# What processors raise when text and images do not belong together.
PROCESSOR_ERRORS = (AssertionError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError)


@dataclass(frozen=True)
class SeenImages:
    """What is kept of a row's images.

    Attributes:
        prompt: ids of the prompt with the images expanded; None without images.
        token_ids: that stand for an image.
        digest: hash of the pixels; None without images.
    """

    prompt: list[int] | None
    token_ids: list[int]
    digest: str | None

    def expand(self, encoded: Encoded) -> Encoded:
        """The ids of a row, tokenised with a placeholder an image, with its images in their places."""
        if self.prompt is None:
            return encoded
        plain, chosen, rejected = encoded
        return (
            self.prompt,
            join_response(self.prompt, plain, chosen),
            join_response(self.prompt, plain, rejected),
        )

    def note(self, pair: TokenPair) -> TokenPair:
        """The row's pair with what is known of its images."""
        return replace(
            pair,
            image_tokens=sum(id_ in self.token_ids for id_ in pair.chosen[1:]),
            images=self.digest,
        )


def look_at(
    rows: Sequence[Mapping[str, Any]] | datasets.Dataset,
    place: int,
    *,
    processor: ProcessorMixin,
    row_number: int,
) -> tuple[Preference, SeenImages]:
    """Text and images of one row.

    Args:
        rows: read at `place` only; `datasets` decodes images when it reads.
        place: of the row in `rows`.
        processor: of the model.
        row_number: of the row in the dataset, for messages.

    Raises:
        RowError: see `orpo_ds.data.images` and `to_preference`; also text and images that do not belong together.
        ValueError: see `to_preference` and `image_token_ids`.
    """
    try:
        row = rows[place]
    except OSError as error:  # from Pillow, which `datasets` decodes with
        raise RowError(
            reason="unreadable_image", row=row_number, detail=f"an image cannot be decoded: {error}"
        ) from error
    row, images = split_images(row, row_number=row_number)
    preference = to_preference(row, processing_class=processor, row_number=row_number)
    _check_placeholders(preference, len(images), processor=processor, row_number=row_number)
    prompt = None
    if images:
        outputs = process([preference.prompt], [images], processor=processor, row_numbers=[row_number])
        prompt = list(outputs["input_ids"][0])
    return preference, SeenImages(prompt, image_token_ids(processor), digest(images))


def image_token(processor: ProcessorMixin) -> str:
    """What a chat template writes where an image stands.

    Raises:
        ValueError: the processor names none, so it is not known how its prompts hold images.
    """
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        raise ValueError(
            f"{type(processor).__name__} names no image token, so prompts with images cannot be read with it. "
            "Pass its tokenizer to train on text alone"
        )
    return token


def image_token_ids(processor: ProcessorMixin) -> list[int]:
    """Ids that stand for an image in a prompt, in ascending order."""
    tokenizer = tokenizer_of(processor)
    # Gemma's processor writes another token into a prompt than it expands an image to.
    found = {
        tokenizer.convert_tokens_to_ids(image_token(processor)),
        *processor.image_token_ids,
        getattr(tokenizer, "image_token_id", None),
    }
    return sorted(number for number in found if isinstance(number, int))


def join_response(prompt: list[int], plain_prompt: list[int], plain_full: list[int]) -> list[int]:
    """Ids of prompt + response in one piece, with the images of the prompt expanded.

    A tokenizer may merge the last tokens of a prompt with the first of the response. Placeholders are special tokens,
    which nothing merges with, so what comes after the last image is the same in both forms of the prompt.

    Args:
        prompt: ids with images expanded.
        plain_prompt: ids of the same text, a placeholder an image.
        plain_full: ids of prompt + response in one piece, a placeholder an image.
    """
    kept = common_prefix_length(plain_prompt, plain_full)
    merged = len(plain_prompt) - kept
    return prompt[: len(prompt) - merged] + plain_full[kept:]


def process(
    texts: Sequence[str],
    images: Sequence[Sequence[Image]],
    *,
    processor: ProcessorMixin,
    row_numbers: Sequence[int],
    tensors: bool = False,
) -> Mapping[str, Any]:
    """Run the processor on prompts with images; ids stay lists, because they are not padded here.

    Args:
        texts: a prompt a row, with a placeholder an image.
        images: of every row.
        processor: of the model.
        row_numbers: for messages.
        tensors: whether the pixels are wanted.

    Raises:
        RowError: it does not take them.
    """
    try:
        return processor(
            text=list(texts),
            images=[list(some) for some in images],
            text_kwargs={"add_special_tokens": False},
            images_kwargs={"return_tensors": "pt"} if tensors else {},
        )
    except PROCESSOR_ERRORS as error:
        raise RowError(
            reason="image_mismatch",
            row=row_numbers[0],
            detail=f"{type(processor).__name__} does not take its text and images together: "
            f"{type(error).__name__}: {error}",
        ) from error


def _check_placeholders(
    preference: Preference, images: int, *, processor: ProcessorMixin, row_number: int
) -> None:
    """Hold the text of a row against its images, before the model would.

    Raises:
        RowError: the prompt does not have one placeholder an image, or a response has the text of one.
    """
    token = image_token(processor)
    count = preference.prompt.count(token)
    if count != images:
        raise RowError(
            reason="image_mismatch",
            row=row_number,
            detail=f"the prompt's text has {count} image tokens {token!r} for {images} images. Does the chat "
            "template write one for every image?",
        )
    for name, response in (("chosen", preference.chosen), ("rejected", preference.rejected)):
        if token in response:
            raise RowError(
                reason="image_in_response", row=row_number, detail=f"{name} has the image token {token!r}"
            )
