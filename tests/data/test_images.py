"""Where the images of a row are, whatever its shape: as TRL puts them, and in the order of their placeholders."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as pillow
from trl.data_utils import prepare_multimodal_messages

from orpo_ds.data.images import split_images
from orpo_ds.data.preference import RowError
from tests.parity.rows import conversation
from tests.vision import picture

IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What is it?"}
ONE, TWO, THREE = picture(1), picture(2), picture(3)


def _row(prompt: Any, **columns: Any) -> dict[str, Any]:
    return {**conversation("", "A cat.", "A dog."), "prompt": prompt, **columns}


def _user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]


def _png(image: pillow.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _same(found: tuple[Any, ...], expected: list[pillow.Image]) -> bool:
    return [(image.size, image.tobytes()) for image in found] == [
        (image.size, image.tobytes()) for image in expected
    ]


@pytest.mark.parametrize(
    ("prompt", "images"),
    [
        (_user("What is it?"), [ONE, TWO]),
        (_user(IMAGE, TEXT, IMAGE), [ONE, TWO]),
        ([{"role": "system", "content": "Be brief."}, *_user("What is it?")], [ONE]),
        ([*_user("Look."), {"role": "assistant", "content": "I do."}, *_user("And?")], [ONE]),
        ([*_user(IMAGE, TEXT), {"role": "assistant", "content": "A cat."}, *_user(IMAGE, TEXT)], [ONE, TWO]),
        (_user("What is it?"), []),
    ],
    ids=["text", "placeholders", "system", "first user message", "two turns", "none"],
)
def test_images_stand_where_trl_puts_them(prompt: Any, images: list[pillow.Image]) -> None:
    expected = prepare_multimodal_messages(prompt, images=images)
    row, found = split_images(_row(prompt, images=images), row_number=0)
    placed = [part["image"] for message in expected for part in message["content"] if part["type"] == "image"]
    assert _same(found, placed)
    bare = [
        {
            **message,
            "content": [IMAGE if part["type"] == "image" else part for part in message["content"]],
        }
        for message in expected
    ]
    assert row["prompt"] == bare
    assert row["chosen"] == prepare_multimodal_messages(_row("")["chosen"])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": ONE},
        {"type": "image", "image": {"bytes": _png(ONE), "path": None}},
        {"type": "image", "base64": base64.b64encode(_png(ONE)).decode()},
        {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(_png(ONE)).decode()},
        },
    ],
    ids=["pillow", "bytes", "base64", "openai"],
)
def test_images_inside_messages(part: dict[str, Any]) -> None:
    """Beside one that a bare placeholder takes from the column."""
    row, found = split_images(_row(_user(IMAGE, part, TEXT), images=[TWO]), row_number=0)
    assert _same(found, [TWO, ONE])
    assert row["prompt"] == _user(IMAGE, IMAGE, TEXT)


def test_an_image_as_a_file(tmp_path: Path) -> None:
    ONE.save(tmp_path / "one.png")
    _, found = split_images(
        _row(_user({"type": "image", "path": str(tmp_path / "one.png")}, TEXT)), row_number=0
    )
    assert _same(found, [ONE])


def test_the_column_image_holds_one(tmp_path: Path) -> None:
    _, found = split_images(_row(_user("What is it?"), image=ONE), row_number=0)
    assert _same(found, [ONE])


def test_an_implicit_prompt_has_the_images() -> None:
    """A prompt inside chosen and rejected, as many datasets have it."""
    turn = _user(IMAGE, TEXT)
    row = {
        "chosen": [*turn, {"role": "assistant", "content": "A cat."}],
        "rejected": [*turn, {"role": "assistant", "content": "A dog."}],
        "images": [ONE],
    }
    found_row, found = split_images(row, row_number=0)
    assert _same(found, [ONE])
    assert found_row["prompt"] == turn
    assert found_row["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]


def test_text_rows_keep_their_placeholders() -> None:
    row, found = split_images(
        {"prompt": "<image> What?", "chosen": "A cat.", "rejected": "A dog.", "images": [ONE]}, row_number=0
    )
    assert row["prompt"] == "<image> What?"
    assert _same(found, [ONE])


def test_a_column_that_datasets_decodes(tmp_path: Path) -> None:
    """Grey pictures become RGB, as the processors want them."""
    grey = ONE.convert("L")
    grey.save(tmp_path / "grey.png")
    features = Features({"images": List(Image()), "number": Value("int64")})
    rows = Dataset.from_list([{"images": [str(tmp_path / "grey.png")], "number": 1}], features=features)
    _, found = split_images(_row(_user("What?"), images=rows[0]["images"]), row_number=0)
    assert _same(found, [grey.convert("RGB")])


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        (_row(_user(IMAGE, IMAGE, TEXT), images=[ONE]), "image_mismatch", "more image placeholders"),
        (_row(_user(IMAGE, TEXT), images=[ONE, TWO]), "image_mismatch", "1 of the row's 2 images"),
        (_row(_user(IMAGE, TEXT), images=[{"bytes": b"no image"}]), "unreadable_image", "cannot be opened"),
        (_row(_user(IMAGE, TEXT), images=["/no/such.png"]), "unreadable_image", "/no/such.png"),
        (_row(_user({"type": "video", "path": "a.mp4"}, TEXT)), "wrong_type", "'video'"),
        (
            {**_row(_user("Draw.")), "chosen": [{"role": "assistant", "content": [IMAGE]}]},
            "image_in_response",
            "chosen has an image",
        ),
    ],
    ids=["too few", "too many", "no image", "no file", "video", "in a response"],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], reason: str, words: str) -> None:
    with pytest.raises(RowError, match=words) as refused:
        split_images(row, row_number=7)
    assert refused.value.reason == reason
    assert refused.value.row == 7
