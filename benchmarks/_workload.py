"""What the benchmarks train: models by shape, with random weights (speed does not depend on them), and real pairs."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(
    0, str(REPOSITORY)
)  # a script's own folder is on the path, and `tests` is no installed package
SHARED_DATA = REPOSITORY.parent / "shared" / "data" / "dpo_en_demo.jsonl"
DEMO_DATA = REPOSITORY / "demo" / "data" / "train.jsonl"

SPARE_TOKENS = 8

Row = dict[str, str]


@dataclass(frozen=True)
class Shape:
    """A model of the benchmarks: a sentence for the table's caption, whose tokenizer it reads, and its config."""

    about: str
    tokenizer: str
    config: Callable[[], PretrainedConfig]


def _qwen2_43m() -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def _smollm2_135m() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )


def _qwen2_05b() -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )


SHAPES = {
    "qwen2-43m": Shape(
        "43M Qwen2 shape: 6 layers, hidden 256, MLP 688, 8 query and 2 key heads, 151,936 tied vocabulary",
        "qwen2",
        _qwen2_43m,
    ),
    "smollm2-135m": Shape(
        "SmolLM2-135M: 30 layers, hidden 576, MLP 1536, 9 query and 3 key heads, 49,152 tied vocabulary",
        "smollm2",
        _smollm2_135m,
    ),
    "qwen2-0.5b": Shape(
        "Qwen2-0.5B: 24 layers, hidden 896, MLP 4864, 14 query and 2 key heads, 151,936 tied vocabulary",
        "qwen2",
        _qwen2_05b,
    ),
}


def random_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The model of that shape (a key of SHAPES); the same seed gives the same weights in every process."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(SHAPES[name].config(), dtype=dtype)


def preference_rows(path: Path, *, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Usable rows of a JSONL file of conversations, as texts that TRL and this project read alike.

    TRL 1.16 and this project differ in two deliberate ways, and neither may blur a comparison of speed:

    * TRL adds a second EOS to a turn that ends with EOS and a line break, as ChatML's does. The texts end with EOS.
    * TRL never cuts a prompt; where one fills `max_length` it cuts the response down to nothing and skips the update
      on a NaN loss. Rows whose prompt leaves a response less than SPARE_TOKENS are left out.
    """
    with path.open() as lines:
        conversations = [json.loads(line) for line in lines]
    prompts = [
        str(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True))
        for row in conversations
    ]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    return [
        {
            "prompt": prompt,
            "chosen": row["chosen"][-1]["content"] + tokenizer.eos_token,
            "rejected": row["rejected"][-1]["content"] + tokenizer.eos_token,
        }
        for row, prompt, length in zip(conversations, prompts, lengths, strict=True)
        if length + SPARE_TOKENS <= max_length
    ]
