"""The demo's model folder against the GGUF file it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ds.demo.model import RECORD, gguf_file, is_intact, sha256, smollm2_folder

CONVERSATION = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris. It's on the Seine; 2,102,650 people live there."},
]


@pytest.mark.slow
def test_the_folder_is_the_gguf_files_model() -> None:
    source, folder = gguf_file(), smollm2_folder()
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert ours.dtype == torch.float32
    assert ours.lm_head.weight is ours.model.embed_tokens.weight

    their_tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert text == their_tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    ids = tokenizer(text).input_ids
    assert ids == their_tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer.eos_token_id) == "<|im_end|>"
    assert ours.generation_config.eos_token_id == tokenizer.eos_token_id
    assert ours.generation_config.pad_token_id == tokenizer.pad_token_id

    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
        found = ours(torch.tensor([ids])).logits
    assert torch.equal(found, expected)
    # Guards against a conversion that agrees with itself only: a shuffled head or a wrong rope answers nonsense.
    prompt = tokenizer.apply_chat_template(CONVERSATION[:1], add_generation_prompt=True, return_tensors="pt")
    answer = ours.generate(**prompt, max_new_tokens=10, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_damage_is_noticed(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    assert not is_intact(tmp_path), "a folder without its record is unfinished"
    (tmp_path / RECORD).write_text(json.dumps({"files": {weights.name: sha256(weights)}}))
    assert is_intact(tmp_path)
    weights.write_bytes(b"weighta")
    assert not is_intact(tmp_path)
    weights.unlink()
    assert not is_intact(tmp_path)
