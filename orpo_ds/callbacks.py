"""The callbacks that every run has beside the user's own and the dashboards."""

from __future__ import annotations

from typing import Any

from deepspeed.accelerator import get_accelerator
from transformers import (
    DefaultFlowCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from orpo_ds.config import ORPOConfig
from orpo_ds.monitor.bars import TrainingProgress


class EmptyDeviceCache(TrainerCallback):
    """Gives the memory that torch keeps for later back to the device, every so many steps (`torch_empty_cache_steps`).

    A step becomes about a tenth slower; a model that fits in memory only when it is not fragmented may need it.
    """

    def __init__(self, every: int) -> None:
        """Take the steps between two times."""
        self._every = every

    def on_step_end(self, args: ORPOConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # type: ignore[override]  # of TrainingArguments in general
        """After a step, when its activations are gone."""
        if state.global_step % self._every == 0:
            get_accelerator().empty_cache()


def flow_callbacks(args: ORPOConfig) -> list[TrainerCallback]:
    """Those that come before all others: when to log, evaluate and save, and the device's cache."""
    flow: list[TrainerCallback] = [DefaultFlowCallback()]
    if args.torch_empty_cache_steps is not None:
        flow.append(EmptyDeviceCache(args.torch_empty_cache_steps))
    return flow


def progress_callback(args: ORPOConfig) -> TrainerCallback:
    """The one that comes last: a progress bar, or plain lines with `disable_tqdm`."""
    return PrinterCallback() if args.disable_tqdm else TrainingProgress()
