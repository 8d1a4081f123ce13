"""What to say when a micro-batch does not fit: torch names bytes, and a user needs the step and the settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]

from orpo_ds.data.packing import MicroBatch

ADVICE = (
    "Lower max_tokens_per_micro_batch (or per_device_train_batch_size) or max_length, set gradient_checkpointing=True, "
    "or shard and offload more: deepspeed='zero3' or 'zero3_offload'. `orpo-ds estimate` says what fits, --dry_run "
    "tries the largest micro-batch first."
)


class StepOutOfMemoryError(torch.OutOfMemoryError):
    """A micro-batch does not fit in memory.

    Attributes:
        tokens: that the micro-batch has, as the model sees them.
        cause: torch's own words.
    """

    def __init__(self, tokens: int, cause: str, *, where: str = "") -> None:
        """Say which micro-batch it was, and what to lower."""
        super().__init__(f"out of memory {where}in a micro-batch of {tokens:,} tokens. {ADVICE}\n{cause}")
        self.tokens, self.cause = tokens, cause

    def at(self, where: str) -> StepOutOfMemoryError:
        """The same error that also says where the run was."""
        return StepOutOfMemoryError(self.tokens, self.cause, where=f"{where}, ")


@contextmanager
def lack_of_memory_named(batch: MicroBatch) -> Iterator[None]:
    """Turn torch's errors about memory, on GPUs and on CPUs, into one that knows the micro-batch."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise StepOutOfMemoryError(batch.input_ids.numel(), str(error)) from error
