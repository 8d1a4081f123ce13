"""Parameters and optimizer state on a drive train as those in host memory do, where libaio is there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from orpo_ds.config import read_deepspeed_config
from tests import small_runs
from tests.parity.tokenizer import tiny_tokenizer

pytestmark = pytest.mark.skipif(
    not AsyncIOBuilder().is_compatible(verbose=False),
    reason="DeepSpeed's asynchronous IO needs libaio's headers (Debian: libaio-dev)",
)


def on_drive(folder: Path) -> dict[str, Any]:
    settings = read_deepspeed_config("zero3_nvme")
    for part in ("offload_param", "offload_optimizer"):
        settings["zero_optimization"][part]["nvme_path"] = str(folder)
    return settings


def large_enough() -> Qwen2ForCausalLM:
    """A model that DeepSpeed swaps: it leaves what is smaller than 1 MiB (MIN_AIO_BYTES) in memory."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=128,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Qwen2ForCausalLM(config)


def trained(folder: Path, deepspeed: Any) -> tuple[list[float], dict[str, Any]]:
    trainer = small_runs.trainer(folder, deepspeed=deepspeed, model=large_enough())
    trainer.train()
    trainer.save_model()
    return [line["loss"] for line in small_runs.step_lines(trainer)], load_file(folder / "model.safetensors")


def test_as_in_host_memory(tmp_path: Path) -> None:
    losses, weights = trained(tmp_path / "memory", "zero3_offload")
    drive = tmp_path / "drive"
    drive.mkdir()
    found, stored = trained(tmp_path / "nvme", on_drive(drive))
    swapped = {path.parent.parent.name for path in drive.rglob("*.swp")}
    assert len(swapped) == 2, f"only {swapped} was ever on the drive"
    assert found == losses
    assert stored.keys() == weights.keys()
    assert all(stored[name].equal(value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"save_strategy": "steps"}, "save_strategy='steps'"),
        ({"resume_from_checkpoint": "checkpoint-2"}, "resume_from_checkpoint"),
    ],
)
def test_what_deepspeed_would_not_restore_is_refused(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    trainer = small_runs.trainer(tmp_path / "run", deepspeed=on_drive(tmp_path), **settings)
    with pytest.raises(ValueError, match=f"{named}.* on nvme"):
        trainer.train()
