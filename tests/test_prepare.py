"""A model is made ready as the settings say."""

from pathlib import Path

import pytest

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
