"""Every shipped DeepSpeed preset: found by name, completed by ORPOConfig, at the stage and offload that it names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from orpo_ds import ORPOTrainer
from orpo_ds.config import ORPOConfig
from orpo_ds.deepspeed_json import read_deepspeed_config, settle_host_groups
from orpo_ds.engine import deepspeed_settings
from orpo_ds.shipped import shipped_folder
from tests import small_runs
from tests.tiny_models import tiny_model

PRESETS = sorted(shipped_folder("ds_configs").glob("*.json"))
# Where a preset's optimizer and parameters lie, by what follows the stage in its name.
OFFLOADED: dict[str, tuple[str | None, str | None]] = {
    "": (None, None),
    "offload": ("cpu", "cpu"),
    "nvme": ("nvme", "nvme"),
    "hpz": (None, None),
    "zeropp": (None, None),
    "superoffload": ("cpu", None),
    "zenflow": ("cpu", None),
}
KINDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "hpz": lambda zero: "zero_hpz_partition_size" in zero and "zero_quantized_weights" not in zero,
    "zeropp": lambda zero: bool(zero.get("zero_quantized_weights") and zero.get("zero_quantized_gradients")),
    "superoffload": lambda zero: bool(zero.get("offload_optimizer", {}).get("super_offload")),
    "zenflow": lambda zero: "zenflow" in zero,
}
NEEDS_CUDA = {
    "zero3_zeropp": "zero_quantized_weights",
    "zero3_superoffload": "super_offload",
    "zero3_zenflow": "zenflow",
}
STEPS = 3
# The presets differ in the order of sums and in the kernel of Adam. Both are some ulps of the gradient, relatively
# some 1e-7 * sqrt(sum length); a loss after three updates of 1e-3 differs by less than a tenth of that.
TOLERANCE = 1e-6


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
    stage, _, kind = preset.stem.removeprefix("zero").partition("_")
    optimizer, parameters = OFFLOADED[kind]
    assert zero["stage"] == int(stage)
    assert zero.get("offload_optimizer", {}).get("device") == optimizer
    assert zero.get("offload_param", {}).get("device") == (parameters if zero["stage"] == 3 else None)
    assert [name for name in KINDS if KINDS[name](zero)] == ([kind] if kind in KINDS else [])


def losses(folder: Path, settings: dict[str, Any]) -> list[float]:
    """Of STEPS updates by the AdamW that goes with these settings."""
    # Near a gradient of zero Adam is a sign, which rounding decides. With this epsilon it is linear there.
    trainer = small_runs.trainer(folder, deepspeed=settings, max_steps=STEPS, adam_epsilon=1e-2)
    trainer.train()
    return [line["loss"] for line in small_runs.step_lines(trainer)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(tmp_path_factory.mktemp("plain") / "run", {"zero_optimization": {"stage": 0}})


@pytest.mark.parametrize("preset", [path.stem for path in PRESETS if path.stem not in NEEDS_CUDA])
def test_a_preset_trains_as_no_preset(preset: str, plain: list[float], tmp_path: Path) -> None:
    settings = read_deepspeed_config(preset)
    for part in ("offload_optimizer", "offload_param"):
        target = settings["zero_optimization"].get(part, {})
        if "nvme_path" in target:
            if not AsyncIOBuilder().is_compatible(verbose=False):
                pytest.skip("DeepSpeed's asynchronous IO needs libaio's headers (Debian: libaio-dev)")
            target["nvme_path"] = str(tmp_path)
    found = losses(tmp_path / "run", settings)
    assert plain[0] != plain[-1]
    assert found == pytest.approx(plain, rel=TOLERANCE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused without a CUDA device")
@pytest.mark.parametrize(("preset", "option"), NEEDS_CUDA.items())
def test_a_preset_for_cuda_is_refused_before_a_model_is_loaded(
    preset: str, option: str, tmp_path: Path
) -> None:
    settings = small_runs.settings(tmp_path / "run", deepspeed=preset)
    with pytest.raises(ValueError, match=f"{option}: .*CUDA device.* here"):
        ORPOTrainer(str(tmp_path / "there is no model here"), settings)


def test_two_hosts_fill_the_group_of_hpz() -> None:
    def filled(*ranks: int) -> Any:
        settings = read_deepspeed_config("zero3_hpz")
        settle_host_groups(settings, lambda: list(ranks))
        return settings["zero_optimization"]["zero_hpz_partition_size"]

    assert (filled(8, 8), filled(8), filled(1, 1)) == (8, 1, 1)
    with pytest.raises(ValueError, match=r"hosts have \[8, 4\] ranks"):
        filled(8, 4)


@pytest.mark.distributed
@pytest.mark.slow
def test_hpz_is_zero3_bit_for_bit(tmp_path: Path) -> None:
    finished = small_runs.launch("tests.presets_worker", str(tmp_path), ranks=4)
    assert finished.returncode == 0, finished.stdout[-8000:]
    runs = torch.load(tmp_path / "results.pt", weights_only=True)
    # A second partition of half a parameter on each rank: the gathers of backward stay within two ranks.
    assert all(second is None for _, second in runs["zero3"]["second"])
    assert all(numel <= 2 * second < numel + 4 for numel, second in runs["hpz"]["second"])
    # Nothing but where a parameter is gathered from has changed, so nothing is rounded otherwise.
    assert runs["hpz"]["losses"] == runs["zero3"]["losses"]
    assert runs["resumed"]["losses"] == runs["zero3"]["losses"]
    for run in ("hpz", "resumed"):
        for name, value in runs["zero3"]["parameters"].items():
            assert runs[run]["parameters"][name].equal(value), (run, name)


def test_a_preset_is_found_by_name_path_and_file_name() -> None:
    by_name = read_deepspeed_config("zero3_offload")
    assert by_name == read_deepspeed_config("ds_configs/zero3_offload.json")
    assert by_name == read_deepspeed_config(str(shipped_folder("ds_configs") / "zero3_offload.json"))
