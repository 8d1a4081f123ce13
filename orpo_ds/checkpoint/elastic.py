"""A checkpoint of one layout in an engine of another: other ranks, another ZeRO stage, with or without offload.

DeepSpeed's own way is to write a universal checkpoint first: three times the bytes on disk, by one process, before the
run may go on; and not from stage 0. Here every rank looks up, by name, the numbers that the new layout gives to it
(`shards.py` maps the files), and copies those and no others into its engine: no second copy on disk, no collective, and
no host holds more than its own share. What was copied then goes through `load_state_dict` of DeepSpeed's optimizer,
which derives from it what else it keeps.

Copies are exact: weights, masters, moments, step counts, learning rates and the loss scale are those of the
checkpoint, bit for bit. The steps that follow differ from the uninterrupted run's in rounding alone, because other
ranks add gradients up in another order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint import constants as ds
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from orpo_ds.checkpoint.shards import Layout, SavedEngine, zero3_share

# How a group is computed, which is the new engine's own business.
HOW_TO_COMPUTE = frozenset({"params", "param_names", "fused", "foreach", "capturable", "differentiable"})
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Part:
    """A run of a parameter within a tensor that the optimizer updates."""

    name: str
    offset: int  # in the tensor
    start: int  # in the flattened parameter
    numel: int


@dataclass(frozen=True)
class Slot:
    """A tensor that the optimizer of this rank updates.

    Attributes:
        tensor: key of the optimizer's state.
        parts: what lies in it; the rest is padding.
        names: parameters that share it, also those of which this rank has nothing.
    """

    tensor: Tensor
    parts: list[Part]
    names: list[str]


def engine_layout(engine: DeepSpeedEngine) -> Layout:
    """How this engine cuts its state."""
    return Layout(
        ranks=engine.seq_dp_world_size,
        tensor_ranks=engine.mp_world_size,
        zero=engine.config.get("zero_optimization", {}),
    )


def refuse_fixed(before: Layout, now: Layout) -> None:
    """Refuse layouts that only DeepSpeed itself, and the same one, can load.

    Raises:
        ValueError: names the JSON's key.
    """
    for layout in (before, now):
        zero = layout.zero
        offload = zero.get("offload_optimizer") or {}
        fixed = {
            "tensor parallelism": layout.tensor_ranks > 1,
            "zero_optimization.zenflow": zero.get("zenflow"),
            "zero_optimization.mics_shard_size": zero.get("mics_shard_size", -1) > 0,
            "zero_optimization.elastic_checkpoint": zero.get("elastic_checkpoint"),
            "zero_optimization.offload_optimizer.super_offload": offload.get("super_offload"),
            "zero_optimization.offload_optimizer.device nvme": offload.get("device") == "nvme",
        }
        for name, is_set in fixed.items():
            if is_set:
                raise ValueError(
                    f"the checkpoint was written {before}; this run is cut {now}. With {name}, a checkpoint is loaded "
                    "on the same number of ranks and with the same zero_optimization only: set them as they were."
                )


def optimizer_slots(engine: DeepSpeedEngine) -> list[Slot]:
    """The tensors that the optimizer updates on this rank, in the order of its own numbers for them.

    Raises:
        ValueError: an optimizer of DeepSpeed that keeps state elsewhere.
    """
    optimizer, names = engine.optimizer, engine.param_names
    kind = type(optimizer)  # not isinstance: SuperOffload, MiCS and ZenFlow derive from these
    if kind is DeepSpeedZeroOptimizer_Stage3:
        groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return [_zero3_slot(tensor, group, engine) for tensor, group in groups]
    if kind is DeepSpeedZeroOptimizer:
        groups = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
        return [_zero12_slot(tensor, group, engine) for tensor, group in groups]
    if kind is FP16_UnfusedOptimizer:  # bf16 at stage 0
        masters, weights = chain(*optimizer.fp32_groups), chain(*optimizer.fp16_groups)
        return [_whole_slot(master, names[value]) for master, value in zip(masters, weights, strict=True)]
    if optimizer is engine.basic_optimizer:  # fp32 at stage 0
        return [
            _whole_slot(value, names[value]) for group in optimizer.param_groups for value in group["params"]
        ]
    raise ValueError(
        f"{kind.__name__} of DeepSpeed keeps its state in a way of its own: a checkpoint is loaded by it, or from it, "
        "on the same ranks and with the same zero_optimization only."
    )


def _zero3_slot(tensor: Tensor, group: list[Any], engine: DeepSpeedEngine) -> Slot:
    parts, offset = [], 0
    ranks, rank = engine.seq_dp_world_size, torch.distributed.get_rank(engine.optimizer.dp_process_group)
    for value in group:
        start, numel, share = zero3_share(value.ds_numel, rank=rank, ranks=ranks)
        assert share == value.partition_numel(), "DeepSpeed cuts parameters in another way now"
        parts.append(Part(engine.param_names[value], offset, start, numel))
        offset += share
    return Slot(tensor, parts, [part.name for part in parts])


def _zero12_slot(tensor: Tensor, group: list[Any], engine: DeepSpeedEngine) -> Slot:
    parts = []
    for value in group:
        place = value._hp_mapping
        if place is not None:  # some of it is this rank's
            own, whole = place.hp_fragment_address, place.lp_fragment_address
            parts.append(Part(engine.param_names[value], own.start, whole.start, own.numel))
    return Slot(tensor, parts, [engine.param_names[value] for value in group])


def _whole_slot(tensor: Tensor, name: str) -> Slot:
    return Slot(tensor, [Part(name, 0, 0, tensor.numel())], [name])


# ---------------------------------------------------------------------- loading


@torch.no_grad()
def load_other_layout(engine: DeepSpeedEngine, saved: SavedEngine, *, only_trained: bool) -> None:
    """Set a freshly made engine to a checkpoint that was cut in another way. All ranks call it.

    Args:
        engine: of the same model and optimizer.
        saved: the checkpoint.
        only_trained: the weights that do not train are not in it.

    Raises:
        ValueError: it is of another model, or its optimizer's state cannot be dealt out.
    """
    slots = optimizer_slots(engine)
    _check_parameters(engine, saved, only_trained=only_trained)
    optimizer = engine.optimizer
    is_zero3 = engine.zero_optimization_partition_weights()
    if is_zero3:
        optimizer.checkpoint_event_prologue()
    for slot in slots:
        _fill_slot(slot, engine.basic_optimizer, saved)
    for name, value in engine.module.named_parameters():
        if not value.requires_grad and only_trained:
            continue
        if not is_zero3:
            saved.fill(value.view(-1), name)
        elif not value.requires_grad:
            rank = torch.distributed.get_rank(value.ds_process_group)
            start, numel, _ = zero3_share(value.ds_numel, rank=rank, ranks=engine.seq_dp_world_size)
            saved.fill(value.ds_tensor.view(-1)[:numel], name, start=start)
    for name, value in engine.module.named_buffers():
        if name in saved.buffers:
            value.copy_(saved.buffers[name])
    _take_groups(engine.basic_optimizer, saved.param_groups)
    state = optimizer.state_dict()
    if engine.zero_optimization():
        if engine.fp16_enabled() and saved.loss_scaler is not None:
            state[ds.LOSS_SCALER] = saved.loss_scaler
        rank = torch.distributed.get_rank(optimizer.dp_process_group)
        optimizer.load_state_dict({rank: state}, load_optimizer_states=True, load_from_fp32_weights=True)
    else:
        optimizer.load_state_dict(state)
    if is_zero3:
        optimizer.checkpoint_event_epilogue()
    for name, count in saved.counters.items():
        setattr(engine, name, count)


def _check_parameters(engine: DeepSpeedEngine, saved: SavedEngine, *, only_trained: bool) -> None:
    sizes = {
        name: value.ds_numel if hasattr(value, "ds_numel") else value.numel()
        for name, value in engine.module.named_parameters()
        if value.requires_grad or not only_trained
    }
    wrong = [name for name in sizes if name not in saved.pieces or saved.numel(name) != sizes[name]]
    if wrong:
        raise ValueError(
            f"the checkpoint is of another model: {', '.join(wrong[:NAMES_SHOWN])} of this model ({len(wrong)} such "
            f"parameters in all) {'are' if len(wrong) > 1 else 'is'} not in it, or of another size there."
        )


def _fill_slot(slot: Slot, optimizer: torch.optim.Optimizer, saved: SavedEngine) -> None:
    weights = slot.tensor.view(-1)
    for part in slot.parts:
        saved.fill(weights[part.offset : part.offset + part.numel], part.name, start=part.start)
    # Of all parameters of the slot: a rank that has only padding of it counts steps as the others do.
    pieces = [piece for name in slot.names for piece in saved.pieces[name]]
    state: dict[str, Any] = {}
    if (step := _common_step(pieces, slot.names)) is not None:
        # torch's own count in tensors; DeepSpeed's and others' in numbers.
        in_tensors = type(optimizer).__module__.startswith("torch.optim")
        state["step"] = torch.tensor(float(step)) if in_tensors else step
    dtypes = {key: value.dtype for piece in pieces for key, value in piece.states.items()}
    for key, dtype in dtypes.items():
        state[key] = torch.zeros_like(slot.tensor, dtype=dtype, requires_grad=False)
        numbers = state[key].view(-1)
        for part in slot.parts:
            run = numbers[part.offset : part.offset + part.numel]
            saved.fill(run, part.name, start=part.start, state=key)
    if state:
        optimizer.state[slot.tensor] = state


def _common_step(pieces: Iterable[Any], names: list[str]) -> int | None:
    steps = {piece.step for piece in pieces if piece.step is not None}
    if len(steps) > 1:
        raise ValueError(
            f"the optimizer has updated {names[0]} and the {len(names) - 1} parameters after it {sorted(steps)} times, "
            "and ZeRO counts once for all of them. Resume at ZeRO stage 0."
        )
    return steps.pop() if steps else None


def _take_groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"the optimizer has {len(optimizer.param_groups)} groups of parameters, the checkpoint's had {len(saved)}. "
            "Set optim and the JSON's optimizer as they were."
        )
    for group, before in zip(optimizer.param_groups, saved, strict=True):
        for key in group.keys() & before.keys() - HOW_TO_COMPUTE:
            group[key] = before[key]
