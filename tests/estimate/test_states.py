"""What an engine holds, against the tensors that are really there after a step."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from orpo_ds import ORPOTrainer
from orpo_ds.deepspeed_json import read_deepspeed_config
from orpo_ds.estimate.memory import Subject
from orpo_ds.estimate.shapes import model_of_shapes
from orpo_ds.estimate.states import ModelCount, ZeroPlan, states
from tests import small_runs
from tests.tiny_models import tiny_model

VOCAB = (
    20_000  # a model of 1.4M parameters: what else a run holds (a batch, a random state) is below 1% of it
)
PRESETS = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


def alive() -> dict[int, int]:
    """Bytes of every storage that some tensor of this process uses."""
    found = {}
    for thing in gc.get_objects():
        if (
            isinstance(thing, torch.Tensor)
            and thing.device.type == "cpu"
            and type(thing).__name__ != "FakeTensor"
        ):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


class Census(TrainerCallback):
    """Counts between the first step and the second, where no gradient and no activation is alive."""

    def __init__(self) -> None:
        gc.collect()
        self.before = alive()
        self.held = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            gc.collect()
            self.held = sum(size for place, size in alive().items() if self.before.get(place) != size)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_an_engine_holds(tmp_path: Path, preset: str, lora: bool) -> None:
    census = Census()
    model = tiny_model("llama", vocab_size=VOCAB)
    peft = LoraConfig(r=64, target_modules="all-linear") if lora else None
    trainer: ORPOTrainer = small_runs.trainer(
        tmp_path / "run", model=model, peft_config=peft, deepspeed=preset, callbacks=[census]
    )
    trainer.train()
    parameters = list(trainer.policy.parameters())
    sizes = [getattr(value, "ds_numel", value.numel()) for value in parameters]
    trained = [size for size, value in zip(sizes, parameters, strict=True) if value.requires_grad]
    count = ModelCount(sum(sizes), sum(trained), max(trained), (), itemsize=4)
    plan = ZeroPlan.of(read_deepspeed_config(preset), hidden_size=64)
    held = states(count, plan, ranks=1, optim="adamw_torch", micro_steps=1, host_is_device=True)
    # Buckets of ZeRO-1 and 2 are made in each backward pass.
    buckets = held.device.get("buckets", 0) if plan.stage < 3 else 0
    assert held.device_total + held.host_total - buckets == pytest.approx(census.held, rel=0.03)


def test_page_locked_memory_is_rounded_up_on_a_gpu() -> None:
    """5 GB of gradients lie in 8 GiB; Adam's state is not page-locked."""
    count = ModelCount(5 * 10**9 // 4, 5 * 10**9 // 4, 10**6, (), itemsize=4)
    plan = ZeroPlan.of(read_deepspeed_config("zero2_offload"), hidden_size=64)
    held = states(count, plan, ranks=1, optim="adamw_torch", micro_steps=1, host_is_device=False)
    assert held.host["fp32 gradients"] == 8 * 2**30
    assert held.host["optimizer"] == 10 * 10**9


def test_what_is_sharded_shrinks_with_the_ranks() -> None:
    count = ModelCount(8_000_000, 8_000_000, 1000, ((1000, 8000),), itemsize=2)
    by_stage = {}
    for stage in range(4):
        plan = ZeroPlan.of(read_deepspeed_config(f"zero{stage}"), hidden_size=8)
        by_stage[stage] = states(
            count, plan, ranks=8, optim="adamw_torch", micro_steps=1, host_is_device=False
        ).device
    assert by_stage[0]["fp32 weights"] == 32_000_000
    assert by_stage[0]["optimizer"] == 64_000_000
    for stage in (1, 2, 3):
        assert by_stage[stage]["fp32 weights"] == 4_000_000
        assert by_stage[stage]["optimizer"] == 8_000_000
    assert by_stage[2]["parameters"] == 16_000_000
    assert by_stage[3]["parameters"] == 2_000_000


def test_an_unknown_optimizer_is_refused_by_name() -> None:
    count = ModelCount(10, 10, 10, (), itemsize=2)
    plan = ZeroPlan.of(read_deepspeed_config("zero2"), hidden_size=8)
    with pytest.raises(ValueError, match="optim='adafactor': estimate does not know"):
        states(count, plan, ranks=1, optim="adafactor", micro_steps=1, host_is_device=False)


def test_a_model_of_shapes_has_the_parameters_of_the_real_one(tmp_path: Path) -> None:
    args = small_runs.settings(tmp_path / "run", deepspeed="zero3")
    real = tiny_model("llama")
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    shapes, _ = model_of_shapes(real.config, args=args, dtype=torch.float32, peft_config=peft)
    subject = Subject.of(real.config, args=args, dtype=torch.float32, peft_config=None)
    assert subject.count.elements == sum(value.numel() for value in real.parameters())
    trained = {name for name, value in shapes.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
