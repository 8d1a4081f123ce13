"""What a training will do, before it does it: which pairs at which step, how many steps, how often it logs."""

from __future__ import annotations

import math

from transformers.trainer_callback import TrainerState

from orpo_ds.config import ORPOConfig
from orpo_ds.data.batches import GlobalBatches
from orpo_ds.data.token_stream import TokenStream
from orpo_ds.data.tokenize import TokenDataset


def training_batches(args: ORPOConfig, dataset: TokenDataset | TokenStream) -> GlobalBatches | TokenStream:
    """The global batches of a training, the same for any number of ranks."""
    if isinstance(dataset, TokenStream):
        return dataset
    return GlobalBatches(
        num_pairs=len(dataset),
        global_batch_size=args.global_batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        fingerprint=dataset.fingerprint,
        drop_last=args.dataloader_drop_last,
        shuffle=args.train_sampling_strategy != "sequential",
    )


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
