"""`orpo-ds chat`, driven through its input: what it answers is what the model generates for the conversation so far."""

import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from orpo_ds.chat import chat
from tests import small_runs
from tests.environment import without_rendezvous
from tests.parity.tokenizer import tiny_tokenizer

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models that differ, the second without a chat template."""
    folder = tmp_path_factory.mktemp("models")
    first = small_runs.save_model_folder(folder / "trained", "llama")
    other = small_runs.model_of("llama", seed=5)
    other.generation_config = GenerationConfig(eos_token_id=2)
    other.save_pretrained(folder / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "base")
    return first, str(folder / "base")


def generated(model: Any, turns: Sequence[tuple[str, str]]) -> str:
    """The greedy continuation of a conversation, as the chat template of the tiny tokenizer writes it."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=2, pad_token_id=0)
    output = model.generate(ids, generation_config=config)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def said(words: Sequence[str], lines: Sequence[str], *, is_terminal: bool = False) -> str:
    """What the command writes when these lines are typed."""
    page = io.StringIO()
    console = Console(file=page, force_terminal=is_terminal, width=100, color_system=None)
    flags = ["--max_new_tokens", str(NEW_TOKENS), "--temperature", "0"]
    chat([*words, *flags], source=io.StringIO("".join(f"{line}\n" for line in lines)), console=console)
    return page.getvalue()


def test_it_answers_and_remembers(folders: tuple[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    first = generated(model, [("user", "Hello")])
    second = generated(model, [("user", "Hello"), ("assistant", first), ("user", "And now?")])
    anew = generated(model, [("user", "And now?")])
    brief = generated(model, [("system", "Be brief."), ("user", "And now?")])
    lines = [
        "Hello",
        "",
        "And now?",
        "/reset",
        "And now?",
        "/system Be brief.",
        "And now?",
        "/quit",
        "never asked",
    ]
    assert said([folders[0]], lines).rstrip("\n") == "\n".join((first, second, anew, brief)).rstrip("\n")
    assert len({first, second, anew, brief}) == 4


def test_two_models_answer_the_same_question(folders: tuple[str, str]) -> None:
    """The base model gets the chat template of the other."""
    written = said([folders[0], "--compare", folders[1]], ["Hello"])
    models = {Path(name).name: AutoModelForCausalLM.from_pretrained(name) for name in folders}
    assert written == "".join(
        f"{name}: {generated(model, [('user', 'Hello')])}\n" for name, model in models.items()
    )


def test_boxes_side_by_side_on_a_terminal(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    page = said([folders[0], "--compare", folders[1]], [], is_terminal=True)
    titles = [line for line in page.splitlines() if "trained" in line]
    assert titles
    assert all("base" in line for line in titles)
    assert "/reset" in page


def test_a_command_that_is_not_known(folders: tuple[str, str]) -> None:
    assert "there is no /clear" in said([folders[0]], ["/clear", "/quit"])


def test_a_conversation_that_is_too_long(folders: tuple[str, str], tmp_path: Path) -> None:
    """The question is forgotten, and the conversation goes on."""
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    hello = generated(model, [("user", "Hello")])
    again = generated(model, [("user", "Hello"), ("assistant", hello), ("user", "Hi")])
    long = "a" * model.config.max_position_embeddings
    lines = said([folders[0]], ["Hello", long, "Hi"])
    assert lines.startswith(f"{hello}\n")
    assert "/reset begins anew" in lines
    assert lines.rstrip("\n").endswith(again)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_adapters_with_the_base_that_they_name(
    folders: tuple[str, str], tmp_path: Path, with_tokenizer: bool
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders[0])
    torch.manual_seed(3)
    adapted = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapters")
    if with_tokenizer:
        tiny_tokenizer().save_pretrained(tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders[0]), tmp_path / "adapters"
    )
    expected = generated(loaded, [("user", "Hello")])
    assert expected != generated(AutoModelForCausalLM.from_pretrained(folders[0]), [("user", "Hello")])
    assert said([str(tmp_path / "adapters")], ["Hello"]).rstrip("\n") == expected


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        said([str(tmp_path / "nothing")], ["Hello"])


@pytest.mark.slow
def test_questions_through_a_pipe(folders: tuple[str, str]) -> None:
    """The command as it is typed, with its own standard input and output."""
    flags = ["--max_new_tokens", str(NEW_TOKENS), "--temperature", "0"]
    answer = subprocess.run(
        [sys.executable, "-m", "orpo_ds", "chat", folders[0], *flags],
        input="Hello\n/quit\n",
        capture_output=True,
        text=True,
        cwd=small_runs.REPOSITORY,
        env=without_rendezvous() | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    assert answer.stdout.rstrip("\n").endswith(generated(model, [("user", "Hello")]).rstrip("\n"))


def test_the_trained_folder_chats_with_transformers_alone(folders: tuple[str, str], tmp_path: Path) -> None:
    """What `save_model` writes: template, generation config and cache are there for transformers' own chat pipeline."""
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    trainer = small_runs.trainer(tmp_path / "run", model=model)
    trainer.train()
    trainer.save_model()
    folder = str(tmp_path / "run")
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_tokenizer().chat_template
    saved = GenerationConfig.from_pretrained(folder)
    assert (saved.eos_token_id, saved.max_new_tokens) == (2, 7)
    talk = pipeline("text-generation", model=folder, device="cpu")
    assert talk.model.config.use_cache is True
    turns = [{"role": "user", "content": "Hello"}]
    reply = talk(turns, max_new_tokens=NEW_TOKENS, do_sample=False)[0]["generated_text"]
    assert reply[:-1] == turns
    assert reply[-1]["role"] == "assistant"
    assert said([folder], ["Hello"]).rstrip("\n") == reply[-1]["content"].strip()
