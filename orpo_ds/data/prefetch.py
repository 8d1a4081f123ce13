"""The next micro-batch is built, and on its way to the GPU, while the current one computes.

One background thread works through the groups of pairs in order, at most `depth` micro-batches ahead. What it
does with a finished micro-batch depends on where the model lives, and that is all `Transfer` is about: to a
CPU nothing has to move; to a GPU the tensors go through pinned memory on a stream of their own, so the copy
overlaps with the kernels of the current micro-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from orpo_ds.data.packing import MicroBatch


@dataclass(frozen=True, eq=False)
class Sent:
    """A micro-batch on its way: usable once `arrived` (None: at once)."""

    micro_batch: MicroBatch
    arrived: torch.cuda.Event | None = None


class Transfer(Protocol):
    """Brings micro-batches to the device of the model."""

    def send(self, micro_batch: MicroBatch) -> Sent:
        """Start the copy; called in the background thread."""

    def receive(self, sent: Sent) -> MicroBatch:
        """Make the copy usable on the current stream; called in the consumer's thread."""


class HostTransfer:
    """For a model on the CPU: the micro-batch is where it has to be."""

    def send(self, micro_batch: MicroBatch) -> Sent:
        """Nothing to start."""
        return Sent(micro_batch)

    def receive(self, sent: Sent) -> MicroBatch:
        """Nothing to wait for."""
        return sent.micro_batch


class CudaTransfer:
    """For a model on a GPU: pinned memory, and copies on a side stream that nobody waits for on the host.

    Without pinned memory (`dataloader_pin_memory=False`) the background thread waits for its copies.
    """

    def __init__(self, device: torch.device, *, pin_memory: bool) -> None:
        self._device = device
        self._pin_memory = pin_memory
        self._stream = torch.cuda.Stream(device)

    def send(self, micro_batch: MicroBatch) -> Sent:
        """Pin the tensors and start their copies on the side stream."""
        # The caching host allocator keeps the pinned source alive until the copy is done.
        source = micro_batch.map_tensors(Tensor.pin_memory) if self._pin_memory else micro_batch
        with torch.cuda.stream(self._stream):
            on_device = source.to(self._device, non_blocking=True)
        return Sent(on_device, self._stream.record_event())

    def receive(self, sent: Sent) -> MicroBatch:
        """Let the current stream wait for the copies, and the allocator know that it reads them."""
        assert sent.arrived is not None
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(sent.arrived)

        def in_use(tensor: Tensor) -> Tensor:
            # Allocated on the side stream: without this its memory could be reused there while kernels still
            # read it.
            tensor.record_stream(consumer)
            return tensor

        return sent.micro_batch.map_tensors(in_use)


def transfer_to(device: torch.device, *, pin_memory: bool = True) -> Transfer:
    """The way micro-batches take to this device."""
    return CudaTransfer(device, pin_memory=pin_memory) if device.type == "cuda" else HostTransfer()


class MicroBatchLoader:
    """Iterates over the micro-batches of `groups`, in order, on `device`.

    An iteration owns one thread. It ends with the groups, with the first error, or when the iterator is
    closed or dropped (a `break` out of a `for` loop drops it).

    Args:
        groups: dataset indices of the pairs of every micro-batch of this rank, over as many steps as wanted.
            Consumed in the background thread, so planning is off the critical path too.
        build: makes the micro-batch of a group, on the CPU. An empty group is a micro-batch too.
        device: where the model lives.
        depth: micro-batches that may be ready or under way before they are asked for.
        pin_memory: copy to a GPU from pinned memory.

    Raises:
        Exception: whatever `groups` or `build` raised, from the iterator, with a note that names the pairs.
    """

    def __init__(
        self,
        groups: Iterable[Sequence[int]],
        *,
        build: Callable[[Sequence[int]], MicroBatch],
        device: torch.device | str,
        depth: int = 2,
        pin_memory: bool = True,
    ) -> None:
        if depth < 1:
            raise ValueError(f"cannot prefetch {depth} micro-batches: depth is at least 1")
        self._groups = groups
        self._build = build
        self._transfer = transfer_to(torch.device(device), pin_memory=pin_memory)
        self._depth = depth

    def __iter__(self) -> Generator[MicroBatch, None, None]:
        groups = iter(self._groups)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="orpo_ds-prefetch") as background:
            ahead = deque(background.submit(self._next, groups) for _ in range(self._depth))
            try:
                while (sent := ahead.popleft().result()) is not None:
                    ahead.append(background.submit(self._next, groups))
                    yield self._transfer.receive(sent)
            finally:
                background.shutdown(cancel_futures=True)

    def _next(self, groups: Iterator[Sequence[int]]) -> Sent | None:
        """Build and send the next group's micro-batch; None after the last. Runs in the background thread."""
        group = next(groups, None)
        if group is None:
            return None
        try:
            return self._transfer.send(self._build(group))
        except Exception as error:
            error.add_note(f"while building the micro-batch of pairs {list(group)}")
            raise
