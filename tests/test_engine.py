"""From settings to an engine: which parameters decay, which optimizer steps them, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from transformers import Trainer

from orpo_ds.engine import build_engine, deepspeed_settings, gradient_norm, make_optimizer
from orpo_ds.policy import OrpoPolicy
from tests import small_runs
from tests.tiny_models import FAMILIES


def policy_of(family: str = "qwen2") -> OrpoPolicy:
    return OrpoPolicy(small_runs.model_of(family), beta=0.1, logits_cache_mib=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_decayed_parameters_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    policy = policy_of(family)
    names = set(Trainer.get_decay_parameter_names(None, policy.model))
    named = policy.model.named_parameters(remove_duplicate=False)  # a tied weight has two names
    wanted = {id(value) for name, value in named if name in names}
    optimizer = make_optimizer(policy, small_runs.settings(tmp_path, weight_decay=0.1), offloaded=False)
    decayed = {
        id(value) for group in optimizer.param_groups if group["weight_decay"] for value in group["params"]
    }
    assert decayed == wanted
    assert 0 < len(wanted) < len(list(policy.model.parameters()))
    held = [id(value) for group in optimizer.param_groups for value in group["params"]]
    assert sorted(held) == sorted(id(value) for value in policy.parameters())


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    policy = policy_of()
    policy.model.get_input_embeddings().weight.requires_grad_(False)
    optimizer = make_optimizer(policy, small_runs.settings(tmp_path), offloaded=False)
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    assert held == {id(value) for value in policy.parameters() if value.requires_grad}


@pytest.mark.parametrize(
    ("preset", "optim", "kind"),
    [
        ("zero2", "adamw_torch", torch.optim.AdamW),
        ("zero2_offload", "adamw_torch", DeepSpeedCPUAdam),
        ("zero2_offload", "sgd", torch.optim.SGD),
    ],
)
def test_offloaded_adamw_is_deepspeeds(
    tmp_path: Path, preset: str, optim: str, kind: type[torch.optim.Optimizer]
) -> None:
    args = small_runs.settings(
        tmp_path, deepspeed=preset, optim=optim, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1
    )
    engine = build_engine(policy_of(), args=args, total_steps=3)
    assert type(engine.optimizer) is kind
    if optim == "adamw_torch":
        group = engine.optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.95), 1e-6)
        assert group["weight_decay"] == 0.1
    engine.deepspeed.destroy()


@pytest.mark.parametrize(
    ("optim", "words", "reads"),
    [
        ("sgd", "momentum=0.9, nesterov=true", {"momentum": 0.9, "nesterov": True}),
        ("rmsprop", "alpha=0.8", {"alpha": 0.8}),
        ("adagrad", "lr_decay=0.1", {"lr_decay": 0.1}),
    ],
)
def test_optim_args(tmp_path: Path, optim: str, words: str, reads: dict[str, Any]) -> None:
    args = small_runs.settings(tmp_path, optim=optim, optim_args=words)
    [group, *_] = make_optimizer(policy_of(), args, offloaded=False).param_groups
    assert group.items() >= reads.items()


@pytest.mark.parametrize(
    ("optim", "words", "message"),
    [
        ("adamw_torch", "momentum=0.9", "optim='adamw_torch' does not read 'momentum'"),
        ("sgd", "momentum=0.9,alpha=0.8", "optim='sgd' does not read 'alpha'"),
        ("sgd", "momentum", "write `key=value,key=value`"),
        ("stable_adamw", "rank=4", "optim='stable_adamw' needs a package that is not here"),
    ],
)
@pytest.mark.parametrize("offloaded", [False, True])
def test_optim_args_that_nobody_reads(
    tmp_path: Path, optim: str, words: str, message: str, offloaded: bool
) -> None:
    args = small_runs.settings(tmp_path, optim=optim, optim_args=words)
    with pytest.raises(ValueError) as raised:
        make_optimizer(policy_of(), args, offloaded=offloaded)
    assert message in str(raised.value)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_first_layer_that_overflows_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    model = small_runs.model_of()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    trainer = small_runs.trainer(
        tmp_path / "run", model=model, debug="underflow_overflow", layout="padded", deepspeed=f"zero{stage}"
    )
    with pytest.raises(ValueError, match="inf/nan"):
        trainer.train()
    assert "layers.1.mlp.up_proj" in capsys.readouterr().out


def test_the_json_is_filled(tmp_path: Path) -> None:
    args = small_runs.settings(tmp_path, gradient_accumulation_steps=3, max_grad_norm=0.7, deepspeed="zero3")
    config = deepspeed_settings(args, policy_of().model, total_steps=10)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"] == {"enabled": False}
    assert "auto" not in str(config)


def test_a_json_that_says_nothing_is_zero0(tmp_path: Path) -> None:
    engine = build_engine(policy_of(), args=small_runs.settings(tmp_path, deepspeed={}), total_steps=1)
    assert engine.deepspeed.zero_optimization_stage() == 0
    engine.deepspeed.destroy()


def test_json_schedule_and_optimizer_are_used(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 4}},
    }
    args = small_runs.settings(
        tmp_path / "run", deepspeed=settings, weight_decay=0.2, warmup_steps=4, learning_rate=1e-3
    )
    engine = build_engine(policy_of(), args=args, total_steps=10)
    assert type(engine.optimizer) is torch.optim.AdamW
    assert engine.optimizer.param_groups[0]["weight_decay"] == 0.2
    assert type(engine.scheduler).__name__ == "WarmupLR"
    engine.deepspeed.destroy()


@pytest.mark.parametrize("preset", ["zero3", "zero3_offload"])
def test_fp32_weights_have_no_second_copy(tmp_path: Path, preset: str) -> None:
    policy = policy_of()
    count = sum(value.numel() for value in policy.parameters())
    engine = build_engine(policy, args=small_runs.settings(tmp_path, deepspeed=preset), total_steps=1)
    zero = engine.deepspeed.optimizer
    shards = [weights.untyped_storage().data_ptr() for weights in zero.fp16_partitioned_groups_flat]
    assert [value.untyped_storage().data_ptr() for value in zero.fp32_partitioned_groups_flat] == shards
    assert sum(weights.numel() for weights in zero.fp16_partitioned_groups_flat) == count
    engine.deepspeed.destroy()


def test_bf16_weights_keep_their_fp32_copy(tmp_path: Path) -> None:
    policy = OrpoPolicy(small_runs.model_of().bfloat16(), beta=0.1, logits_cache_mib=0)
    args = small_runs.settings(tmp_path, deepspeed="zero3", bf16=True)
    zero = build_engine(policy, args=args, total_steps=1).deepspeed.optimizer
    kinds = [
        (zero.fp16_partitioned_groups_flat, torch.bfloat16),
        (zero.fp32_partitioned_groups_flat, torch.float32),
    ]
    assert all(value.dtype == dtype for values, dtype in kinds for value in values)


def test_no_norm_before_the_first_step(tmp_path: Path) -> None:
    engine = build_engine(policy_of(), args=small_runs.settings(tmp_path, deepspeed="zero0"), total_steps=1)
    assert gradient_norm(engine.deepspeed) is None
    engine.deepspeed.destroy()
