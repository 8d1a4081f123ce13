"""Every shipped DeepSpeed preset: found by name, completed by ORPOConfig, at the stage and offload that it names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orpo_ds.config import ORPOConfig
from orpo_ds.deepspeed_json import read_deepspeed_config
from orpo_ds.engine import deepspeed_settings
from orpo_ds.shipped import shipped_folder
from tests.tiny_models import tiny_model

PRESETS = sorted(shipped_folder("ds_configs").glob("*.json"))


def unfilled(settings: dict[str, Any], path: str = "") -> Iterator[str]:
    """The settings that still say `auto`, by their dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from unfilled(value, f"{path}{name}.")
        elif value == "auto":
            yield f"{path}{name}"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_orpo_config_fills_a_preset(preset: Path, tmp_path: Path) -> None:
    args = ORPOConfig(
        output_dir=str(tmp_path),
        deepspeed=preset.stem,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        bf16=False,
        report_to="none",
    )
    settings = deepspeed_settings(args, tiny_model("llama"), total_steps=10)
    # Where the drive is, only the user knows; the engine asks for it by name.
    left = {name for name in unfilled(settings) if not name.endswith("nvme_path")}
    assert not left
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"] == settings["fp16"] == {"enabled": False}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_what_its_name_says(preset: Path) -> None:
    zero = json.loads(preset.read_text())["zero_optimization"]
    stage, _, offload = preset.stem.removeprefix("zero").partition("_")
    device = {"": None, "offload": "cpu", "nvme": "nvme"}[offload]
    assert zero["stage"] == int(stage)
    assert zero.get("offload_optimizer", {}).get("device") == device
    assert zero.get("offload_param", {}).get("device") == (device if zero["stage"] == 3 else None)


def test_a_preset_is_found_by_name_path_and_file_name() -> None:
    by_name = read_deepspeed_config("zero3_offload")
    assert by_name == read_deepspeed_config("ds_configs/zero3_offload.json")
    assert by_name == read_deepspeed_config(str(shipped_folder("ds_configs") / "zero3_offload.json"))
