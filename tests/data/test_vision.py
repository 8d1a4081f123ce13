"""Ids of prompts with pictures, and the pixels that belong to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from orpo_ds.data.image_inputs import pad_with_images
from orpo_ds.data.packing import count_targets
from orpo_ds.data.token_dataset import TokenDataset
from orpo_ds.data.tokenize import TokenizeOptions, tokenize_dataset, tokenize_rows
from orpo_ds.data.truncate import TokenPair
from tests import vision
from tests.parity.tokenizer import tiny_tokenizer

FAMILIES = list(vision.PROCESSORS)
PLACEHOLDER = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "idefics3": "<image>"}
IMAGE_TOKEN = {"qwen2_vl": "<|image_pad|>", "idefics3": "<image>"}


def _texts(family: str, row: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, prompt + chosen and prompt + rejected, written by hand."""
    images = PLACEHOLDER[family] * len(row["images"])
    prompt = f"<s>user: {images}{row['prompt'][0]['content']}\nassistant: "
    return prompt, *(f"{prompt}{row[side][0]['content']}</s>" for side in ("chosen", "rejected"))


def _own_ids(processor: ProcessorMixin, text: str, images: list[Any]) -> list[int]:
    pictures = {"images": [images]} if images else {}
    return processor(text=[text], **pictures, add_special_tokens=False)["input_ids"][0]


def _tokenize(rows: list[dict[str, Any]], folder: Path, family: str, **keywords: Any) -> TokenDataset:
    keywords = {"options": TokenizeOptions(), "unusable": "error"} | keywords
    processor = vision.PROCESSORS[family]()
    return tokenize_dataset(Dataset.from_list(rows), processing_class=processor, cache_dir=folder, **keywords)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_processors_own(family: str, tmp_path: Path) -> None:
    """Prompt and response in one piece, every image expanded; they come back from the files as they went in."""
    processor = vision.PROCESSORS[family]()
    rows = vision.rows(5, without=(2,))
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN[family])
    found = _tokenize(rows, tmp_path, family)
    for pair, row in zip(found, rows, strict=True):
        prompt, chosen, rejected = (_own_ids(processor, text, row["images"]) for text in _texts(family, row))
        assert (pair.chosen, pair.rejected) == (chosen, rejected)
        assert (pair.chosen_start, pair.rejected_start) == (len(prompt), len(prompt))
        assert pair.image_tokens == prompt.count(image_id)
    assert found.lengths.image_tokens.tolist() == [pair.image_tokens for pair in found]
    assert found.lengths.nll_tokens(nll_on_prompt=True).tolist() == [
        count_targets(pair, True) for pair in found
    ]


def test_a_tokenizer_that_merges_over_the_border() -> None:
    """The prompt's last letter and the answer's first become one token, which is the answer's."""
    rules = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    merged = rules["model"]["vocab"]["an"] = len(rules["model"]["vocab"])
    rules["model"]["merges"] = [["a", "n"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    processor = vision.idefics3_processor(tokenizer)
    row = {"prompt": "<image> is a", "chosen": "nt.", "rejected": "rm.", "images": [vision.picture(1)]}
    [pair] = tokenize_rows([row], numbers=[0], processing_class=processor, options=TokenizeOptions())
    assert isinstance(pair, TokenPair)
    own = _own_ids(processor, row["prompt"] + row["chosen"], row["images"])
    assert merged in own
    assert pair.chosen == [1, *own, 2]  # BOS and EOS, which the text does not have
    assert pair.chosen[pair.chosen_start] == merged
    assert pair.rejected_start == pair.chosen_start + 1


def _only(rows: list[dict[str, Any]], family: str, **options: Any) -> Any:
    [one] = tokenize_rows(
        rows,
        numbers=[3],
        processing_class=vision.PROCESSORS[family](),
        options=TokenizeOptions(**options),
    )
    return one


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_a_prompt_with_pictures_is_never_cut(family: str, mode: Any) -> None:
    row = vision.rows(2)[1]
    whole = _only([row], family, max_length=None)
    start = whole.chosen_start
    cut = _only([row], family, max_length=start + 3, max_prompt_length=4, truncation_mode=mode)
    assert cut.chosen == whole.chosen[: start + 3]
    assert cut.rejected == whole.rejected[: start + 3]
    assert cut.image_tokens == whole.image_tokens > 0
    refused = _only([row], family, max_length=start, max_prompt_length=4, truncation_mode=mode)
    assert refused.reason == "no_room_for_response"
    assert "a prompt with images is never cut: raise max_length" in refused.detail


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "no place", "chosen": "a", "rejected": "b"}, "image_mismatch"),
        ({"prompt": "{token}{token}", "chosen": "a", "rejected": "b"}, "image_mismatch"),
        ({"prompt": "{token} what?", "chosen": "a {token}", "rejected": "b"}, "image_in_response"),
        ({"prompt": "{token}", "chosen": "a", "rejected": "b", "images": []}, "image_mismatch"),
    ],
    ids=["no placeholder", "two placeholders", "in a response", "no image"],
)
def test_text_and_images_that_do_not_belong_together(
    family: str, change: dict[str, Any], reason: str
) -> None:
    """Qwen's processor takes some of these without a word, and its model fails in the middle of a training."""
    row = {
        name: value.format(token=IMAGE_TOKEN[family]) if isinstance(value, str) else value
        for name, value in change.items()
    }
    refused = _only([{"images": [vision.picture(0)], **row}], family)
    assert refused.reason == reason
    assert refused.row == 3


def test_a_file_that_cannot_be_decoded_is_a_row_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    rows = vision.rows(3)
    good = Dataset.from_list(rows)
    broken = [
        {**row, "images": [str(tmp_path / "broken.png")]} if n == 1 else row for n, row in enumerate(rows)
    ]
    dataset = Dataset.from_list(broken, features=good.features)
    found = tokenize_dataset(
        dataset,
        processing_class=vision.PROCESSORS["qwen2_vl"](),
        options=TokenizeOptions(),
        unusable="drop",
        cache_dir=tmp_path / "cache",
    )
    assert found.refused == {"unreadable_image": [1]}
    assert found.row_numbers.tolist() == [0, 2]


def test_images_for_a_tokenizer_are_refused(tmp_path: Path) -> None:
    """A text model would train on questions about pictures that it cannot see."""
    options = TokenizeOptions()
    with pytest.raises(
        ValueError, match="images in the column 'images', and processing_class is a tokenizer"
    ):
        tokenize_dataset(
            vision.dataset(2), processing_class=tiny_tokenizer(), options=options, unusable="error"
        )
    prompt = [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]
    row = {**vision.rows(1)[0], "prompt": prompt}
    with pytest.raises(ValueError, match="row 5 has an image in a message"):
        tokenize_rows([row], numbers=[5], processing_class=tiny_tokenizer(), options=options)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_rows_of_a_pair_have_its_pictures(family: str, tmp_path: Path) -> None:
    processor = vision.PROCESSORS[family]()
    rows = vision.rows(4, without=(1,))
    dataset = _tokenize(rows, tmp_path, family)
    assert dataset.images is not None
    pairs = [2, 1, 3]
    batch = pad_with_images(
        [dataset[index] for index in pairs],
        pair_ids=pairs,
        images=dataset.images,
        companion=dataset[dataset.images.companion],
        pad_token_id=0,
        nll_on_prompt=True,
    )
    texts = [_texts(family, rows[index])[side] for side in (1, 2) for index in (2, 3)]
    images = [rows[index]["images"] for index in (2, 3)] * 2
    expected = processor(
        text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=False
    )
    assert batch.image_inputs is not None
    for name, value in batch.image_inputs.items():
        if name != "mm_token_type_ids":
            assert torch.equal(value, expected[name]), name
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN[family])
    assert image_id not in batch.rows.label
    assert int(batch.rows.nll.sum()) == dataset.lengths.of(pairs).nll_tokens(nll_on_prompt=True).sum()
    if family == "qwen2_vl":
        assert torch.equal(batch.image_inputs["mm_token_type_ids"], (batch.input_ids == image_id).long())


@pytest.mark.parametrize("pairs", [[1], []], ids=["no picture", "no pair"])
def test_a_companion_brings_pictures_and_no_targets(pairs: list[int], tmp_path: Path) -> None:
    dataset = _tokenize(vision.rows(3, without=(1,)), tmp_path, "qwen2_vl")
    images = dataset.images
    assert images is not None
    assert images.companion == int(np.argmin([pair.image_tokens or 1000 for pair in dataset]))
    companion = dataset[images.companion]
    batch = pad_with_images(
        [dataset[index] for index in pairs],
        pair_ids=pairs,
        images=images,
        companion=companion,
        pad_token_id=0,
        nll_on_prompt=True,
    )
    assert len(batch.input_ids) == 2 * len(pairs) + 1
    assert batch.image_inputs is not None
    assert len(batch.image_inputs["image_grid_thw"]) == 1
    assert batch.rows.index.max() < 2 * len(pairs) * batch.input_ids.shape[1] or not pairs
    assert not batch.rows.nll.any() or pairs
    assert not batch.token_weight[-1].any()
    assert batch.real_tokens == sum(len(dataset[i].chosen) + len(dataset[i].rejected) for i in pairs)


def test_a_picture_that_changed_since_is_an_error(tmp_path: Path) -> None:
    """One pixel is enough, of which the tokens know nothing; the row is named."""
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for number, file in enumerate(files):
        vision.picture(number).resize((12, 12)).save(file)
    rows = [{**row, "images": [str(file)]} for row, file in zip(vision.rows(2), files, strict=True)]
    dataset = _tokenize(rows, tmp_path / "cache", "qwen2_vl")
    assert dataset.images is not None
    assert dataset.images.read([1], [dataset[1]])
    changed = vision.picture(1).resize((12, 12))
    changed.putpixel((3, 4), (1, 2, 3))
    changed.save(files[1])
    with pytest.raises(ValueError, match="row 1: its images are not those that were tokenised"):
        dataset.images.read([1], [dataset[1]])


def test_the_image_settings_are_in_the_cache_key(tmp_path: Path) -> None:
    """The same rows through a processor of another resolution are other ids."""
    rows = vision.rows(2)
    first = _tokenize(rows, tmp_path, "qwen2_vl")
    small = vision.PROCESSORS["qwen2_vl"]()
    small.image_processor.size = {"shortest_edge": 64, "longest_edge": 256}
    second = tokenize_dataset(
        Dataset.from_list(rows),
        processing_class=small,
        options=TokenizeOptions(),
        unusable="error",
        cache_dir=tmp_path,
    )
    assert first.lengths.image_tokens.sum() > second.lengths.image_tokens.sum()
