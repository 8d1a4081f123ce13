"""What a training will do, before it does it: which pairs at which step, how many steps, how often it logs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.trainer_callback import ExportableState, TrainerState

from orpo_ds.config import ORPOConfig
from orpo_ds.data.batches import GlobalBatches
from orpo_ds.data.token_stream import TokenStream
from orpo_ds.data.tokenize import TokenDataset


def training_batches(args: ORPOConfig, dataset: TokenDataset | TokenStream) -> GlobalBatches | TokenStream:
    """The global batches of a training, the same for any number of ranks.

    Raises:
        ValueError: a stream cannot be grouped by length.
    """
    if isinstance(dataset, TokenStream):
        if args.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "train_sampling_strategy='group_by_length': the lengths of a stream are not known. Use 'random'."
            )
        return dataset
    return GlobalBatches(
        num_pairs=len(dataset),
        global_batch_size=args.global_batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        fingerprint=dataset.fingerprint,
        drop_last=args.dataloader_drop_last,
        shuffle=args.train_sampling_strategy != "sequential",
        group_by=_padded_lengths(dataset) if args.train_sampling_strategy == "group_by_length" else None,
    )


def _padded_lengths(dataset: TokenDataset) -> NDArray[np.integer]:
    """Tokens of the longer sequence of each pair, [N]: what a padded row has to hold."""
    lengths = dataset.lengths
    longer: NDArray[np.integer] = lengths.trunk + np.maximum(lengths.chosen, lengths.rejected)
    return longer


def plan_training(state: TrainerState, args: ORPOConfig, batches: GlobalBatches | TokenStream) -> None:
    """Write into `state` how many steps there are, and how often to log, evaluate and save."""
    if args.max_steps > 0:
        state.max_steps = args.max_steps
        state.num_train_epochs = math.ceil(args.max_steps / batches.steps_per_epoch)
    else:
        state.max_steps = math.ceil(args.num_train_epochs * batches.steps_per_epoch)
        state.num_train_epochs = math.ceil(args.num_train_epochs)
    state.global_step, state.epoch = 0, 0.0
    state.train_batch_size = args.per_device_train_batch_size
    state.compute_steps(args, state.max_steps)


@dataclass
class Position(ExportableState):
    """Where in the data a run is; stands in a checkpoint's `trainer_state.json` as the callbacks' own states do.

    It does not follow from the number of steps: a callback may end an epoch early, and `ignore_data_skip` begins one
    again.

    Attributes:
        epoch: the epoch under way, from 0.
        step: its steps that are done; as many as an epoch has: only what happens at its end is left to do.
        stopped: no more steps of this epoch are wanted.
        evaluation_due: a signal ended the run when it was about to evaluate, or evaluated.
    """

    epoch: int = 0
    step: int = 0
    stopped: bool = False
    evaluation_due: bool = False

    def steps_left(self, batches: GlobalBatches | TokenStream, *, at_most: int) -> range:
        """Numbers of the global batches that are left of this epoch, `at_most` so many."""
        first = self.epoch * batches.steps_per_epoch + self.step
        if self.stopped:
            return range(first, first)
        return range(first, min((self.epoch + 1) * batches.steps_per_epoch, first + at_most))

    def end_epoch(self, batches: GlobalBatches | TokenStream) -> None:
        """Go to the begin of the next epoch, if this one is over: the training may have stopped within it.

        A stream has one epoch, which a longer run continues.
        """
        if isinstance(batches, GlobalBatches) and (self.stopped or self.step == batches.steps_per_epoch):
            self.epoch, self.step, self.stopped = self.epoch + 1, 0, False

    def state(self) -> dict[str, Any]:
        """What `from_state` makes this position of."""
        return {"args": asdict(self), "attributes": {}}
