"""The engine's part of a checkpoint: DeepSpeed's own files, made safe to fail and exact to resume.

Two things DeepSpeed 0.19 does not do:

- A rank whose disk is full raises in the middle of `save_checkpoint` while the others go on to a barrier
  and wait there for its timeout. Here a failed write is noted, the collectives run to their end, and the
  error is raised after them.
- `DeepSpeedCPUAdam` keeps beta1^t and beta2^t as running fp32 products inside its C++ object, outside of
  any state dict (csrc/includes/cpu_adam.h, `IncrementStep`). A new process computes pow(beta, t) instead,
  which rounds differently, so a resumed run drifts in the last bits. `load_engine` multiplies the products
  up again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

from orpo_ds.checkpoint.elastic import engine_layout, load_other_layout, optimizer_slots, refuse_fixed
from orpo_ds.checkpoint.rank_state import save_torch_file
from orpo_ds.checkpoint.shards import OPTIMIZER_NAMES, open_engine, saved_layout

logger = logging.getLogger(__name__)

ENGINE_TAG = "engine"
SCHEDULER_FILE = "scheduler.pt"


class NotingWriter(CheckpointEngine):
    """Writes as DeepSpeed's `TorchCheckpointEngine` does, but notes an OSError instead of raising it."""

    def __init__(self, inner: TorchCheckpointEngine, *, left_out: Collection[str] = ()) -> None:
        self.name = inner.name
        self.inner = inner
        self.left_out = tuple(left_out)  # parameters of the module that are not written
        self.failures: list[OSError] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file."""
        module = state_dict.get("module") if self.left_out else None
        if module is not None:
            # What belongs to a parameter, such as the scales of a quantised one, is named after it.
            kept = {name: module[name] for name in module if not name.startswith(self.left_out)}
            state_dict = state_dict | {"module": kept}
        self.noting(save_torch_file)(state_dict, path, zip_format=self.inner.zipfile_serialization)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        self.noting(self.inner.makedirs)(path, exist_ok=exist_ok)

    def create(self, info: CheckpointCommitInfo) -> None:
        """Announce a checkpoint."""
        self.inner.create(info)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """End a checkpoint."""
        return bool(self.inner.commit(info))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file; part of DeepSpeed's interface, a writer is never asked to."""
        return self.inner.load(path, map_location=map_location)

    def noting(self, action: Callable[..., None]) -> Callable[..., None]:
        """`action` with its OSError noted in `failures`."""

        def noted(*args: Any, **kwargs: Any) -> None:
            try:
                action(*args, **kwargs)
            except OSError as error:
                self.failures.append(error)

        return noted


def check_engine(engine: DeepSpeedEngine) -> None:
    """Refuse, at the start of a run, a DeepSpeed JSON whose checkpoints could not be resumed exactly.

    Raises:
        ValueError: names the JSON's key.
    """
    if not isinstance(engine.checkpoint_engine, TorchCheckpointEngine):
        writer = type(engine.checkpoint_engine).__name__
        raise ValueError(
            f"the DeepSpeed JSON chooses {writer} to write checkpoints; here each file must be complete when "
            "its save ends. Remove checkpoint.writer, nebula and datastates from the JSON."
        )
    if engine.zero_optimization() and not engine.zero_load_from_fp32_weights():
        raise ValueError(
            "zero_optimization.load_from_fp32_weights=false in the DeepSpeed JSON makes a resume start "
            "from rounded weights. Remove it."
        )


def checkpoint_bytes(engine: DeepSpeedEngine, *, only_model: bool, only_trained: bool = False) -> int:
    """About what this rank adds to a checkpoint: weights, and optimizer state as far as it is in memory yet.

    Args:
        engine: any ZeRO stage.
        only_model: the weights alone.
        only_trained: without the weights that do not train.
    """
    weights = [value for value in engine.module.parameters() if value.requires_grad or not only_trained]
    size = 0
    if engine.zero_optimization_partition_weights():
        # Of the weights that train, DeepSpeed stores the fp32 copy alone.
        stored = [value for value in weights if only_model or not value.requires_grad]
        size += sum(_bytes(value.ds_tensor) for value in stored)
    elif engine.global_rank == 0:
        size += sum(_bytes(value) for value in weights)
    if only_model or (engine.global_rank and not engine.zero_optimization()):
        return size
    own = {id(value) for value in weights}
    for parameter, state in engine.basic_optimizer.state.items():
        size += 0 if id(parameter) in own else _bytes(parameter)  # the fp32 copy, if there is one
        size += sum(_bytes(value) for value in state.values() if torch.is_tensor(value))
    return size


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def save_engine(engine: DeepSpeedEngine, folder: Path, *, scheduler: Any, only_trained: bool = False) -> None:
    """Write parameters and optimizer state into `folder/engine`, the schedule beside it. All ranks call it.

    The schedule is passed because the trainer steps it, not the engine. With `only_trained` the weights that do not
    train are left out: whoever loads it has them.

    Raises:
        OSError: this rank could not write a file; every collective has been run, so no rank is left waiting.
        RuntimeError: a write failed between two collectives (DeepSpeed's copy of NVMe files): this process
            must end.
    """
    plain_writer = engine.checkpoint_engine
    assert isinstance(plain_writer, TorchCheckpointEngine), "check_engine was not called"
    left_out = [
        # DeepSpeed's own way to leave them out forgets the second name of a tied weight.
        name
        for name, value in engine.module.named_parameters(remove_duplicate=False)
        if only_trained and not value.requires_grad
    ]
    writer = NotingWriter(plain_writer, left_out=left_out)
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = writer.noting(engine._copy_recovery_script)
    try:
        engine.save_checkpoint(
            str(folder), tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=only_trained
        )
    except OSError as error:
        raise RuntimeError(f"DeepSpeed failed between two collectives of its save: {error}") from error
    finally:
        engine.checkpoint_engine = plain_writer
        del engine._copy_recovery_script  # uncovers the method of the class
    if writer.failures:
        raise writer.failures[0]
    if engine.global_rank == 0:
        save_torch_file(scheduler.state_dict(), folder / SCHEDULER_FILE)
        if type(engine.optimizer) is FP16_UnfusedOptimizer or engine.optimizer is engine.basic_optimizer:
            names = [name for slot in optimizer_slots(engine) for name in slot.names]
            (folder / ENGINE_TAG / OPTIMIZER_NAMES).write_text(json.dumps(names))


def load_engine(engine: DeepSpeedEngine, folder: Path, *, scheduler: Any, only_trained: bool = False) -> None:
    """Set a freshly made engine and schedule to a *verified* checkpoint. All ranks call it.

    On the same ranks, with the same `zero_optimization`, DeepSpeed loads what it wrote; else `elastic.py` deals it out.

    Raises:
        ValueError: it was written in another layout and cannot be dealt out anew.
        RuntimeError: DeepSpeed loaded nothing.
    """
    before, now = saved_layout(folder / ENGINE_TAG), engine_layout(engine)
    if before == now:
        path, _ = engine.load_checkpoint(str(folder), tag=ENGINE_TAG, load_module_strict=not only_trained)
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {folder / ENGINE_TAG}")
    else:
        if engine.global_rank == 0:
            logger.warning("%s was written %s: it is dealt out %s", folder, before, now)
        refuse_fixed(before, now)
        load_other_layout(engine, open_engine(folder / ENGINE_TAG), only_trained=only_trained)
    if isinstance(engine.basic_optimizer, DeepSpeedCPUAdam):
        replay_bias_corrections(engine.basic_optimizer)
    scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, map_location="cpu", weights_only=True))


def replay_bias_corrections(optimizer: DeepSpeedCPUAdam) -> None:
    """Bring the running beta products of a CPU Adam to where its loaded `step` says they were.

    Each step of an uninterrupted run multiplies them once. One update of a single throw-away element does
    the same, at some microseconds a step.
    """
    steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    scratch = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, beta1, beta2, 1e-8, 0.0, True, *scratch
        )
