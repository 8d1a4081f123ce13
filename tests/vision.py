"""Tiny random vision-language models with their processors, and preference rows with pictures. No hub, no torchvision.

    qwen2_vl   images as a grid of patches of any size, positions in three dimensions (Qwen2-VL, Qwen2.5-VL, …)
    idefics3   images cut into tiles and a small whole, padded to the most tiles of a batch (Idefics3, SmolVLM)

transformers' `Qwen2VLProcessor` wants a video processor, which cannot be made without torchvision. The one here is the
same class without that part.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.parity.rows import conversation
from tests.parity.tokenizer import tiny_tokenizer
from tests.tiny_models import INITIALIZER_RANGE

QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPARE_IDS = 3


def _template(image: str) -> str:
    return (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + image + "{% else %}"
        "{{ part['text'] }}{% endif %}{% endfor %}"
        "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )


class ImageOnlyQwen2VLProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without videos."""

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen2_vl_processor() -> ProcessorMixin:
    """Patches of 4 x 4 pixels, 4 of them a token; an image has at most 16 tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_TOKENS})
    return ImageOnlyQwen2VLProcessor(
        Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
        ),
        tokenizer,
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def idefics3_processor(tokenizer: PreTrainedTokenizerBase | None = None) -> ProcessorMixin:
    """Tiles of 16 x 16 pixels, 4 tokens each; an image is at most 2 x 2 tiles and the whole."""
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<global-img>", *tiles]})
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=_template("<image>"))


def _text_config(vocab_size: int, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": INITIALIZER_RANGE,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def _qwen2_vl(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    ids = tokenizer.convert_tokens_to_ids(QWEN_TOKENS)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config=_text_config(len(tokenizer) + SPARE_IDS, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": INITIALIZER_RANGE,
        },
        vision_start_token_id=ids[0],
        vision_end_token_id=ids[1],
        image_token_id=ids[2],
        video_token_id=ids[3],
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config)


def _idefics3(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = Idefics3Config(
        text_config=_text_config(len(tokenizer) + SPARE_IDS, model_type="llama"),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "initializer_range": INITIALIZER_RANGE,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return Idefics3ForConditionalGeneration(config)


PROCESSORS: dict[str, Callable[[], ProcessorMixin]] = {
    "qwen2_vl": qwen2_vl_processor,
    "idefics3": idefics3_processor,
}
_MODELS: dict[str, Callable[[PreTrainedTokenizerBase], PreTrainedModel]] = {
    "qwen2_vl": _qwen2_vl,
    "idefics3": _idefics3,
}


def vision_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model of `family` (a key of PROCESSORS) for the ids of its processor."""
    tokenizer = PROCESSORS[family]().tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _MODELS[family](tokenizer).float().train()


def picture(number: int) -> Image.Image:
    """A picture of noise; its size and pixels follow from the number."""
    noise = random.Random(number)
    size = (noise.choice([12, 20, 28]), noise.choice([12, 16, 24]))
    return Image.frombytes("RGB", size, noise.randbytes(3 * size[0] * size[1]))


def rows(count: int, *, without: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Questions about one or two pictures; rows `without` have none.

    A row takes at most 170 tokens.
    """
    made = []
    for number in range(count):
        row = conversation(
            f"What is {number}?", f"It is {2 * number + 1}." + " Sure." * (number % 2), f"No idea {number}."
        )
        images = [picture(10 * number + place) for place in range(1 + number % 2)]
        made.append({**row, "images": [] if number in without else images})
    return made


def dataset(count: int, *, without: tuple[int, ...] = ()) -> Dataset:
    """The rows as a dataset."""
    return Dataset.from_list(rows(count, without=without))
