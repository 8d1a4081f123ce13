"""Bars that are others': transformers' of the training, and those that libraries show on their own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import datasets
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from orpo_ds.progress import Lines, is_shown, timed


@contextlib.contextmanager
def of_libraries(desc: str) -> Iterator[None]:
    """Work during which datasets, transformers and the hub would show bars: they do on the main process's terminal.

    In a log file, two lines say when it began and ended; other processes are silent.
    """
    if is_shown() and sys.stderr.isatty():
        yield
        return
    switches = [
        (datasets.is_progress_bar_enabled(), datasets.disable_progress_bars, datasets.enable_progress_bars),
        (
            transformers_logging.is_progress_bar_enabled(),
            transformers_logging.disable_progress_bar,
            transformers_logging.enable_progress_bar,
        ),
        (not are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars),
    ]
    for _, disable, _ in switches:
        disable()
    try:
        with timed(desc):
            yield
    finally:
        for was_enabled, _, enable in switches:
            if was_enabled:
                enable()


class TrainingProgress(ProgressCallback):
    """transformers' `ProgressCallback`, in a log file with lines in place of its bars."""

    training_bar: Any
    prediction_bar: Any

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the bar of the training."""
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)
        elif state.is_world_process_zero:
            self.training_bar = Lines(total=state.max_steps, desc="Training", unit="step")
        self.current_step = 0

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make the bar of an evaluation at its first batch."""
        if self.prediction_bar is None and state.is_world_process_zero and not sys.stderr.isatty():
            self.prediction_bar = Lines(total=len(eval_dataloader), desc="Evaluating", unit="batch")
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
