"""The model folder: what `from_pretrained` reads back is what was in memory, whatever the family."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from orpo_ds.export import full_state, save_pretrained
from tests import small_runs
from tests.parity.tokenizer import tiny_tokenizer
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path: Path, family: str) -> None:
    model = small_runs.model_of(family, seed=3)
    save_pretrained(model, tmp_path, tokenizer=tiny_tokenizer())
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
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
