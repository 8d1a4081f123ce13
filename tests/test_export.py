"""The model folder: what `from_pretrained` reads back is what was in memory, whatever the family."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from orpo_ds.export import full_state, save_pretrained
from tests import small_runs
from tests.parity.tokenizer import tiny_tokenizer
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path: Path, family: str) -> None:
    model = small_runs.model_of(family, seed=3)
    save_pretrained(model, tmp_path, tokenizer=tiny_tokenizer())
    kind = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path).state_dict()
    state = model.state_dict()
    assert loaded.keys() == state.keys()
    assert {name for name in state if not torch.equal(state[name], loaded[name])} == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_state_is_the_state_dict(family: str) -> None:
    model = small_runs.model_of(family)
    state = full_state(model)
    assert state is not None
    wanted = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_full_state_is_a_copy_that_keeps_ties() -> None:
    model = small_runs.model_of("gpt2")
    state = full_state(model)
    assert state is not None
    assert state["lm_head.weight"] is state["transformer.wte.weight"]
    before = state["lm_head.weight"].clone()
    with torch.no_grad():
        model.lm_head.weight += 1
    assert torch.equal(state["lm_head.weight"], before)


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    model = small_runs.model_of()
    model.generation_config = GenerationConfig(max_new_tokens=9)
    model.config.use_cache = False  # as training sets it
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(model, tmp_path, tokenizer=tiny_tokenizer())
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tiny_tokenizer().chat_template
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 9
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.use_cache is True
    assert model.config.use_cache is False
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    save_pretrained(small_runs.model_of("qwen2"), tmp_path / "tied", tokenizer=None)
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    save_pretrained(small_runs.model_of("llama"), tmp_path / "untied", tokenizer=None)
    assert "lm_head.weight" in load_file(tmp_path / "untied" / "model.safetensors")


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    for seed in (1, 2):
        save_pretrained(small_runs.model_of(seed=seed), tmp_path, tokenizer=tiny_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(
        torch.equal(value, loaded[name]) for name, value in small_runs.model_of(seed=2).state_dict().items()
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize(
    "family", ["qwen2", "gpt2", "mixtral", "t5"]
)  # tied, conv1d, fused experts, two stacks
def test_shards_hold_what_transformers_would_write(tmp_path: Path, family: str) -> None:
    model = small_runs.model_of(family)
    limit = 60_000  # bytes; a tenth of the model
    names = save_pretrained(model, tmp_path / "ours", tokenizer=None, max_shard_bytes=limit)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    ours, theirs = weights_of(tmp_path / "ours"), weights_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    index, wanted = (
        json.loads((tmp_path / side / "model.safetensors.index.json").read_text())
        for side in ("ours", "theirs")
    )
    assert index["metadata"] == wanted["metadata"]
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "ours" / file)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for file in (tmp_path / "ours").glob("*.safetensors"):
        tensors = load_file(file)
        size = sum(value.numel() * value.element_size() for value in tensors.values())
        assert size <= limit or len(tensors) == 1, file
    kind = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_weights_of_an_earlier_save_do_not_stay(tmp_path: Path) -> None:
    """`from_pretrained` prefers model.safetensors to an index: an old one would be loaded instead of the shards."""
    for seed, limit in ((1, 10**9), (2, 60_000), (3, 10**9)):
        save_pretrained(small_runs.model_of(seed=seed), tmp_path, tokenizer=None, max_shard_bytes=limit)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        wanted = small_runs.model_of(seed=seed).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in wanted.items())
    assert len(list(tmp_path.glob("*.safetensors*"))) == 1


def peak_rss() -> int:
    """Bytes of this process's peak of resident memory since the last reset."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) * 1024


def test_the_host_never_holds_a_second_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    model = empty.to_empty(device="cpu")
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(0.5)  # pages that nobody has written are not resident
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    layer = sum(value.numel() * value.element_size() for value in model.model.layers[0].parameters())
    shard = layer // 2
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_rss()
    save_pretrained(model, tmp_path, tokenizer=None, max_shard_bytes=shard)
    # One shard that is not yet full, the layer that comes next, and what the file system's calls hold of a tensor.
    assert peak_rss() - before < 2 * (layer + shard) < 0.6 * size
