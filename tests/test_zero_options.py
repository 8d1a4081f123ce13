"""What this DeepSpeed, or this machine, cannot do with ZeRO is refused by name; two refusals rest on its own code."""

from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfigError, _reject_removed_config_keys
from deepspeed.runtime.zenflow import zenflow_utils
from torch._utils import _flatten_dense_tensors

from orpo_ds.zero_options import check_zero_options, keeps_adam_to_itself

CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    "zero",
    [
        {},
        {"offload_optimizer": CPU},
        {"offload_param": None},
        {"stage": 3, "zero_hpz_partition_size": 2},
        {"stage": 2, "zero_hpz_partition_size": 1, "zero_quantized_weights": False},
    ],
)
def test_what_needs_nothing(zero: dict[str, Any]) -> None:
    check_zero_options(zero, world_size=4)


@pytest.mark.parametrize("path", [{}, {"nvme_path": None}, {"nvme_path": "auto"}])
def test_nvme_needs_a_folder(path: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"offload_param\.nvme_path"):
        check_zero_options({"offload_param": {"device": "nvme", **path}}, world_size=1)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3, "mics_shard_size": 8}, "mics_shard_size: DeepSpeed 0.19 has no MiCS any more"),
        ({"stage": 3, "zero_hpz_partition_size": 3}, "zero_hpz_partition_size=3 does not divide the 4 ranks"),
        ({"stage": 2, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size=2 at stage 2"),
        ({"stage": 1, "zero_quantized_weights": True}, "zero_quantized_weights=True at stage 1"),
        ({"stage": 2, "offload_optimizer": {**CPU, "super_offload": True}}, "super_offload at stage 2"),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "zenflow at stage 2: .* scrambled weights"),
    ],
)
def test_what_is_refused_on_every_machine(zero: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_zero_options(zero, world_size=4)


@pytest.mark.parametrize(
    ("zero", "option"),
    [
        ({}, None),
        ({"offload_optimizer": CPU}, None),
        ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer on nvme"),
        ({"offload_optimizer": {**CPU, "super_offload": True}}, "offload_optimizer.super_offload"),
        ({"offload_optimizer": CPU, "zenflow": {"topk_ratio": 0.1}}, "zenflow"),
    ],
)
def test_whose_checkpoints_lack_the_optimizer(zero: dict[str, Any], option: str | None) -> None:
    assert keeps_adam_to_itself(zero) == option


def test_deepspeed_has_no_mics() -> None:
    with pytest.raises(DeepSpeedConfigError, match="MiCS ZeRO-3 sharding has been removed"):
        _reject_removed_config_keys({"zero_optimization": {"mics_shard_size": 2}})


def test_zenflow_flattens_other_than_stage_2_reads() -> None:
    """Stage 2 views the flat weights in their own shapes (`_update_model_bit16_weights`)."""
    matrix = torch.arange(6.0).view(2, 3)
    assert _flatten_dense_tensors([matrix]).view(2, 3).equal(matrix)
    assert not zenflow_utils._flatten_dense_tensors([matrix]).view(2, 3).equal(matrix)
