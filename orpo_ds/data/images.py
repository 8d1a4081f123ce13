"""The images of a preference row, and where in its prompt they stand.

A row of a vision dataset has its images in a column `images` (a list) or `image` (one), as TRL documents, or in the
parts of its prompt's messages:

    images: [photo]    prompt: [{"role": "user", "content": "What is this?"}]
    images: [photo]    prompt: [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What …?"}]}]
                       prompt: [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", …}]}]
    images: [photo]    prompt: "User: <image> What is this?"       the placeholder is the processor's

All of them end here as a row whose messages are lists of parts, with bare `{"type": "image"}` placeholders that a
template knows, and the images apart, in the order of the placeholders. A photo is a PIL image, what `datasets.Image`
stores (`bytes`, `path`), or anything that transformers loads: a path, a URL, base64.

Responses are text: ORPO asks for their log-probs, and an image has none.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from transformers.image_utils import load_image

from orpo_ds.data.preference import Message, RowError, prompt_and_responses

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Image: TypeAlias = "PillowImage"  # only who has images needs Pillow

IMAGE_COLUMNS = ("images", "image")
PAYLOADS = ("image", "url", "path", "base64")  # where transformers looks for the image of a part
IMAGE_PARTS = ("image", "image_url")  # the second is OpenAI's name


def split_images(row: Mapping[str, Any], *, row_number: int) -> tuple[dict[str, Any], tuple[Image, ...]]:
    """Take the images out of a row.

    Args:
        row: in any shape of `orpo_ds.data.preference`, with images as above or without any.
        row_number: number of the row in the dataset, for messages.

    Returns:
        The row with an explicit prompt and without images, and the images as RGB.

    Raises:
        RowError: a placeholder without an image, or an image without a placeholder; an image that cannot be opened;
            one in a response.
    """
    prompt, chosen, rejected = prompt_and_responses(row, row_number)
    images = _column_images(row)
    if isinstance(prompt, list):
        prompt, images = _place(prompt, images, row_number=row_number)
    texts: dict[str, Any] = {"prompt": prompt}
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(response, list):
            response = [_in_parts(message, row_number=row_number) for message in response]
            if any(_is_image(part) for message in response for part in _parts(message)):
                raise RowError(
                    reason="image_in_response",
                    row=row_number,
                    detail=f"{name} has an image, and only a prompt may have some",
                )
        texts[name] = response
    opened = tuple(_open(image, row_number=row_number) for image in images)
    return {**row, **texts}, opened


def has_image_parts(row: Mapping[str, Any]) -> bool:
    """Whether a message of the row holds an image, for a tokenizer that could not see it."""
    messages = [message for value in row.values() if isinstance(value, list) for message in value]
    return any(
        _is_image(part) for message in messages if isinstance(message, dict) for part in _parts(message)
    )


def digest(images: Sequence[Image]) -> str | None:
    """Hash of the pixels, for the fingerprint of a dataset; None for no image."""
    if not images:
        return None
    found = hashlib.sha256()
    for image in images:
        found.update(repr(image.size).encode() + image.tobytes())
    return found.hexdigest()


def _column_images(row: Mapping[str, Any]) -> list[Any]:
    """What the columns `images` and `image` hold."""
    found: list[Any] = []
    for name in IMAGE_COLUMNS:
        value = row.get(name)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return found


def _place(messages: list[Message], images: list[Any], *, row_number: int) -> tuple[list[Message], list[Any]]:
    """Messages as parts with bare placeholders, and the images that stand there, in that order.

    Where no message has a placeholder, the images come before the text of the first user message, as TRL puts them.
    """
    structured = [_in_parts(message, row_number=row_number) for message in messages]
    if images and not any(_is_image(part) for message in structured for part in _parts(message)):
        for number, message in enumerate(structured):
            if message["role"] == "user":
                placeholders = [{"type": "image"} for _ in images]
                structured[number] = {**message, "content": [*placeholders, *_parts(message)]}
                break
    waiting, found = list(images), []
    for number, message in enumerate(structured):
        parts = []
        for part in _parts(message):
            if _is_image(part):
                payload = _payload(part)
                if payload is None and not waiting:
                    raise RowError(
                        reason="image_mismatch",
                        row=row_number,
                        detail=f"the prompt has more image placeholders than the row has images ({len(images)})",
                    )
                found.append(waiting.pop(0) if payload is None else payload)
                part = {"type": "image"}
            parts.append(part)
        if parts:
            structured[number] = {**message, "content": parts}
    if waiting:
        raise RowError(
            reason="image_mismatch",
            row=row_number,
            detail=f"{len(waiting)} of the row's {len(images)} images have no placeholder in the prompt",
        )
    return structured, found


def _in_parts(message: Message, *, row_number: int) -> Message:
    """The message with its content as a list of parts: what the templates of processors are written for."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    for part in _parts(message):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", *IMAGE_PARTS):
            raise RowError(
                reason="wrong_type",
                row=row_number,
                detail=f"a message has a part of type {kind!r}: text and images can be trained on",
            )
    return message


def _parts(message: Message) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in IMAGE_PARTS


def _payload(part: Mapping[str, Any]) -> Any | None:
    """The image inside a part, or None for a bare placeholder."""
    if "image_url" in part:
        url = part["image_url"]
        return url.get("url") if isinstance(url, dict) else url
    return next((part[key] for key in PAYLOADS if part.get(key) is not None), None)


def _open(image: Any, *, row_number: int) -> Image:
    """The image as RGB, upright."""
    from PIL import Image as pillow  # only who has images needs it
    from PIL import UnidentifiedImageError

    try:
        if isinstance(image, dict):  # as `datasets.Image` stores it
            image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
            image = image if isinstance(image, str) else pillow.open(image)
        return load_image(image)
    except (KeyError, OSError, TypeError, UnidentifiedImageError, ValueError) as error:
        raise RowError(
            reason="unreadable_image", row=row_number, detail=f"an image cannot be opened: {error}"
        ) from error
