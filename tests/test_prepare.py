"""A model is made ready as the settings say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, set_seed

from tests import small_runs


@pytest.mark.parametrize(("family", "wrong"), [("qwen2", True), ("t5", False)])
def test_a_model_of_the_other_kind(tmp_path: Path, family: str, wrong: bool) -> None:
    def make() -> object:
        return small_runs.model_of(family)

    small_runs.trainer(
        tmp_path / "run", model_init=make, is_encoder_decoder=not wrong, max_completion_length=64
    )
    with pytest.raises(
        ValueError, match=f"is_encoder_decoder={wrong}, but the model's config says {not wrong}"
    ):
        small_runs.trainer(tmp_path / "run", model_init=make, is_encoder_decoder=wrong)


@pytest.mark.parametrize("disabled", [True, False])
def test_dropout_of_the_model_and_of_lora(tmp_path: Path, disabled: bool) -> None:
    from peft import LoraConfig
    from torch import nn

    model = small_runs.model_of("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    trainer = small_runs.trainer(
        tmp_path / "run",
        model=model,
        disable_dropout=disabled,
        peft_config=LoraConfig(r=2, lora_dropout=0.25, target_modules=["c_attn"], fan_in_fan_out=True),
    )
    found = {
        ("lora" if "lora_" in name else "model"): module.p
        for name, module in trainer.model.named_modules()
        if isinstance(module, nn.Dropout)
    }
    assert found == {"lora": 0.25, "model": 0.0 if disabled else 0.1}


def test_keywords_reach_from_pretrained(tmp_path: Path) -> None:
    name = small_runs.save_model_folder(tmp_path / "model")
    for attention in ("eager", "sdpa"):
        trainer = small_runs.trainer(
            tmp_path / "run", model=name, model_init_kwargs={"attn_implementation": attention}
        )
        assert trainer.model.config._attn_implementation == attention
    with pytest.raises(
        ValueError, match=r"model_init_kwargs=.* has no effect on a model that is made already"
    ):
        small_runs.trainer(tmp_path / "run", model_init_kwargs={"attn_implementation": "eager"})


CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

class OddModel(Qwen2ForCausalLM):
    config_class = Qwen2Config
"""


def test_code_of_a_model_folder_runs_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    name = small_runs.save_model_folder(tmp_path / "model")
    (tmp_path / "model" / "odd.py").write_text(CODE)
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text()) | {"auto_map": {"AutoModelForCausalLM": "odd.OddModel"}}
    file.write_text(json.dumps(config | {"model_type": "qwen2"}))
    assert type(small_runs.trainer(tmp_path / "run", model=name).model).__name__ == "Qwen2ForCausalLM"
    asked = small_runs.trainer(tmp_path / "run", model=name, trust_remote_code=True)
    assert type(asked.model).__name__ == "OddModel"


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_both_names(tmp_path: Path, name: str) -> None:
    def layers(keywords: dict[str, object] | None) -> list[tuple[bool, object]]:
        trainer = small_runs.trainer(tmp_path / "run", **{name: True, f"{name}_kwargs": keywords})
        return [
            (layer.gradient_checkpointing, layer._gradient_checkpointing_func.keywords["use_reentrant"])
            for layer in trainer.model.model.layers
        ]

    count = len(small_runs.model_of().model.layers)
    assert layers(None) == [(True, False)] * count
    assert layers({"use_reentrant": True}) == [(True, True)] * count
    assert [on for on, _ in layers({"every_n_layers": 2})] == [number % 2 == 0 for number in range(count)]


def test_a_model_is_made_once_from_the_seed(tmp_path: Path) -> None:
    """TRL's Trainer makes it again when the training begins, from the same seed: the same weights."""
    trials: list[Any] = []

    def make(trial: Any) -> PreTrainedModel:
        trials.append(trial)
        return LlamaForCausalLM(small_runs.model_of("llama").config)

    trainer = small_runs.trainer(tmp_path / "run", model_init=make, seed=7, max_steps=1, learning_rate=0.0)
    set_seed(7)
    wanted = LlamaForCausalLM(small_runs.model_of("llama").config)
    trainer.train()
    assert trials == [None]
    for (name, value), theirs in zip(trainer.model.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(value, theirs), name
    with pytest.raises(ValueError, match="model_init takes 2 arguments"):
        small_runs.trainer(tmp_path / "other", model_init=lambda first, second: wanted)
