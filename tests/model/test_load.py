"""Models and tokenizers by name: dtype, attention, revision, chat template, and code that nobody asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoTokenizer

from orpo_ds.model.load import use_chat_template
from orpo_ds.trainer import ORPOTrainer
from tests import small_runs
from tests.hub_server import HubServer
from tests.parity.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

SHOUTING = CHAT_TEMPLATE.replace("message['role'] + ': '", "message['role'].upper() + '! '")
CUSTOM_MODEL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).write_text("run")

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""
CUSTOM_TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({marker!r}).write_text("run")

class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """With `model` and `train.jsonl`."""
    small_runs.save_model_folder(tmp_path / "model", "llama")
    small_runs.write_jsonl(tmp_path / "train.jsonl", small_runs.rows(8))
    return tmp_path


def _cli(folder: Path, **flags: Any) -> small_runs.Answer:
    return small_runs.run_cli(small_runs.command_line(folder, **flags), datasets_cache=folder / "hf")


def _trainer(folder: Path, **changes: Any) -> ORPOTrainer:
    return ORPOTrainer(
        str(folder / "model"),
        small_runs.settings(folder / "run", **changes),
        train_dataset=small_runs.dataset(4),
    )


# ---------------------------------------------------------------------- dtype


@pytest.mark.parametrize(
    ("asked", "bf16", "loaded"),
    [
        ("auto", False, torch.float32),  # whatever the file has: that of the training
        ("auto", True, torch.bfloat16),
        ("float32", True, torch.float32),  # the engine rounds its copy, and keeps what was read beside it
        ("bfloat16", True, torch.bfloat16),
    ],
)
def test_weights_are_read_in_the_dtype_asked_for(
    tmp_path: Path, asked: str, bf16: bool, loaded: torch.dtype
) -> None:
    small_runs.model_of("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    trainer = _trainer(tmp_path, bf16=bf16, model_init_kwargs={"dtype": asked})
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {loaded}


def test_dtype_by_flag(saved: Path) -> None:
    """What was trained in bfloat16 is written in bfloat16."""
    assert _cli(saved, dtype="bfloat16", bf16=True).status == 0
    weights = load_file(saved / "run" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_updates_that_would_be_rounded_away_are_told(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    _trainer(saved, model_init_kwargs={"dtype": "bfloat16"})
    assert "the weights are in bfloat16, and neither bf16 nor fp16 is set" in caplog.text
    caplog.clear()
    _trainer(saved, bf16=True, model_init_kwargs={"dtype": "bfloat16"})
    assert "the weights are in" not in caplog.text


# ---------------------------------------------------------------------- attention


@pytest.mark.parametrize("way", ["flag", "python"])
def test_attention_of_the_padded_layout(saved: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The function of that name computes every layer of it."""
    calls: list[int] = []
    own = transformers.models.llama.modeling_llama.eager_attention_forward

    def recorded(module: nn.Module, *tensors: Tensor, **keywords: Any) -> Any:
        calls.append(module.layer_idx)  # type: ignore[arg-type]
        return own(module, *tensors, **keywords)

    monkeypatch.setitem(AttentionInterface._global_mapping, "recorded", recorded)
    if way == "flag":
        answer = _cli(saved, attn_implementation="recorded", layout="padded", max_steps=1)
        assert answer.status == 0, answer.stderr
    else:
        keywords = {"attn_implementation": "recorded"}
        _trainer(saved, model_init_kwargs=keywords, layout="padded", max_steps=1).train()
    assert set(calls) == {0, 1}


def test_attention_that_does_not_exist(saved: Path) -> None:
    answer = _cli(saved, attn_implementation="flash_attention_9")
    assert answer.status == 2
    assert "flash_attention_9" in answer.stderr
    assert "Traceback" not in answer.stderr


# ---------------------------------------------------------------------- code of a model's folder


@pytest.fixture
def odd_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[Path, Path]]:
    """Makes a folder whose model or tokenizer is code in it, and a file that this code writes when it runs."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(kind: str) -> tuple[Path, Path]:
        folder, marker = saved / "model", tmp_path / "marker"
        if kind == "model":
            (folder / "odd.py").write_text(CUSTOM_MODEL.format(marker=str(marker)))
            maps = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
            _change(folder / "config.json", model_type="odd", auto_map=maps)
        else:
            (folder / "odd_tokenizer.py").write_text(CUSTOM_TOKENIZER.format(marker=str(marker)))
            maps_to = {"AutoTokenizer": [None, "odd_tokenizer.OddTokenizer"]}
            _change(folder / "tokenizer_config.json", tokenizer_class="OddTokenizer", auto_map=maps_to)
        return folder, marker

    return make


def _change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_in_a_folder_is_not_run_unless_asked_for(
    saved: Path, odd_folder: Callable[[str], tuple[Path, Path]], kind: str
) -> None:
    _, marker = odd_folder(kind)
    answer = _cli(saved)
    assert answer.status == 2, answer.stderr
    assert "trust_remote_code=True" in answer.stderr
    assert str(saved / "model") in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not marker.exists()
    answer = _cli(saved, trust_remote_code=True, max_steps=1)
    assert answer.status == 0, answer.stderr
    assert marker.exists()


def test_a_chat_template_is_taken_without_running_code(
    odd_folder: Callable[[str], tuple[Path, Path]],
) -> None:
    folder, marker = odd_folder("tokenizer")
    with pytest.raises(ValueError, match="trust_remote_code"):
        use_chat_template(tiny_tokenizer(), str(folder))
    assert not marker.exists()


# ---------------------------------------------------------------------- chat template


@pytest.mark.parametrize("source", ["file", "folder"])
def test_the_chat_template_of_a_path_is_used(saved: Path, source: str) -> None:
    """In the ids that are trained on, and in the folder that is written."""
    path = saved / "loud.jinja"
    path.write_text(SHOUTING)
    if source == "folder":
        other = tiny_tokenizer()
        other.chat_template = SHOUTING
        path = saved / "loud"
        other.save_pretrained(path)
    trainer = _trainer(saved, chat_template_path=str(path))
    text = trainer.processing_class.decode(trainer.train_dataset[0].chosen)
    assert text.startswith("<s>USER! What is 0")
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(saved / "run").chat_template == SHOUTING


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{folder}/loud.jinja", ("{folder}/loud.jinja", "is no file", "no such folder")),
        ("somebody/nothing", ("'somebody/nothing'", "no tokenizer can be loaded")),
        ("{folder}/plain", ("'{folder}/plain'", "that tokenizer has no chat template")),
    ],
    ids=["no file", "no tokenizer", "no template"],
)
def test_a_chat_template_that_is_not_there(saved: Path, name: str, words: tuple[str, ...]) -> None:
    plain = tiny_tokenizer()
    plain.chat_template = None
    plain.save_pretrained(saved / "plain")
    answer = _cli(saved, chat_template_path=name.format(folder=saved))
    assert answer.status == 2
    for word in words:
        assert word.format(folder=saved) in answer.stderr
    assert "Traceback" not in answer.stderr


# ---------------------------------------------------------------------- revision


HUB_SCRIPT = """
import sys
from orpo_ds import cli

words = sys.argv[1:]
try:
    cli.main([*words, "--model_revision", "none-such"])
except SystemExit as stop:
    print("status", stop.code)
cli.main([*words, "--model_revision", "other"])
"""


@pytest.mark.slow
def test_revision_of_model_and_tokenizer(tmp_path: Path) -> None:
    main = small_runs.save_model_folder(tmp_path / "main", "qwen2")
    other = small_runs.save_model_folder(tmp_path / "other", "llama")
    loud = tiny_tokenizer()
    loud.chat_template = SHOUTING
    loud.save_pretrained(other)
    small_runs.write_jsonl(tmp_path / "train.jsonl", small_runs.rows(4))
    with HubServer() as hub:
        hub.add_model("user/model", main)
        hub.add_model("user/model", other, revision="other")
        words = small_runs.command_line(tmp_path, model_name_or_path="user/model", max_steps=1)
        answer = hub.run(HUB_SCRIPT, *words, cache=tmp_path / "cache")
    assert answer.returncode == 0, answer.stderr
    assert "status 2" in answer.stdout
    assert "none-such" in answer.stderr
    assert AutoConfig.from_pretrained(tmp_path / "run").model_type == "llama"
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == SHOUTING
