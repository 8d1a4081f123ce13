"""Which options of `zero_optimization` work with this DeepSpeed on this machine.

What does not is refused with its name and the way out before a model is loaded. DeepSpeed says some of it minutes
later, when all ranks have loaded theirs, and some of it never. `docs/presets.md` says which option to take when.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from orpo_ds import native_ops

QUANTISED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")


def check_zero_options(zero: dict[str, Any], *, world_size: int) -> None:
    """Refuse what cannot train here.

    Args:
        zero: `zero_optimization` of the DeepSpeed JSON.
        world_size: ranks that share the parameters.

    Raises:
        ValueError: names the JSON's key.
    """
    _check_drives(zero)
    _check_hierarchy(zero, world_size=world_size)
    _check_quantisation(zero)
    _check_super_offload(zero)
    _check_zenflow(zero)


def keeps_adam_to_itself(zero: dict[str, Any]) -> str | None:
    """The option whose optimizer state DeepSpeed 0.19 does not bring back from a checkpoint; None: there is none.

    On a drive it is written, and neither it nor the weights are loaded again. SuperOffload and ZenFlow keep it in
    processes of their own, where `save_checkpoint` does not look.
    """
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        return "offload_optimizer on nvme"
    if offload.get("super_offload"):
        return "offload_optimizer.super_offload"
    return "zenflow" if zero.get("zenflow") else None


def _check_drives(zero: dict[str, Any]) -> None:
    for part in ("offload_optimizer", "offload_param"):
        target = zero.get(part) or {}
        if target.get("device") != "nvme":
            continue
        path = target.get("nvme_path")
        if not path or path == "auto":
            raise ValueError(
                f"zero_optimization.{part}.device is nvme: set {part}.nvme_path to a folder on the drive."
            )
        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ValueError(
                f"zero_optimization.{part}.device is nvme, but DeepSpeed's asynchronous IO does not build here: "
                "install libaio's headers (Debian: apt-get install libaio-dev), or offload to `cpu`."
            )


def _check_hierarchy(zero: dict[str, Any], *, world_size: int) -> None:
    for name in ("mics_shard_size", "mics_hierarchical_params_gather"):
        if name in zero:
            raise ValueError(
                f"zero_optimization.{name}: DeepSpeed 0.19 has no MiCS any more. Remove it; zero_hpz_partition_size "
                "(preset zero3_hpz) keeps the gathers of the backward pass inside of a host."
            )
    stage = zero.get("stage", 0)
    group = zero.get("zero_hpz_partition_size") or 1
    wanted = [name for name in QUANTISED if zero.get(name)]
    for name in ["zero_hpz_partition_size"] * (group > 1) + wanted:
        if stage != 3:
            raise ValueError(
                f"zero_optimization.{name}={zero[name]} at stage {stage}: DeepSpeed reads it at stage 3 alone. "
                "Set stage 3, or remove it."
            )
    if world_size % group:
        raise ValueError(
            f"zero_optimization.zero_hpz_partition_size={group} does not divide the {world_size} ranks. Give the "
            'ranks of a host, or "auto".'
        )


def _check_quantisation(zero: dict[str, Any]) -> None:
    wanted = [name for name in QUANTISED if zero.get(name)]
    if not wanted:
        return
    if not torch.cuda.is_available():
        raise ValueError(
            f"zero_optimization.{wanted[0]}: DeepSpeed quantises in a CUDA kernel, and there is no CUDA device here. "
            "Remove it; zero3_hpz is the part of ZeRO++ that runs anywhere."
        )
    native_ops.ready(native_ops.QUANTIZER)


def _check_super_offload(zero: dict[str, Any]) -> None:
    if not (zero.get("offload_optimizer") or {}).get("super_offload"):
        return
    if zero.get("stage") != 3:
        raise ValueError(
            f"zero_optimization.offload_optimizer.super_offload at stage {zero.get('stage', 0)}: DeepSpeed reads it "
            "at stage 3 alone. Set stage 3, or remove it."
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "zero_optimization.offload_optimizer.super_offload: DeepSpeed overlaps the CPU's Adam with a CUDA device, "
            "and there is none here. Remove it; zero3_offload is the same offload without the overlap."
        )


def _check_zenflow(zero: dict[str, Any]) -> None:
    if not zero.get("zenflow"):
        return
    if zero.get("stage") != 3:
        raise ValueError(
            f"zero_optimization.zenflow at stage {zero.get('stage', 0)}: DeepSpeed 0.19 flattens the matrices "
            "transposed there and reads them back as they were, so training starts from scrambled weights. Take stage "
            "3 (preset zero3_zenflow), or remove it."
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "zero_optimization.zenflow: at stage 3 DeepSpeed puts its buffers on a CUDA device, and there is none "
            "here. Remove it; zero3_offload is the offload without it."
        )
