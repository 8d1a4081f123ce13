"""The loader runs ahead by no more than it may, keeps the order, passes errors on and leaves no thread behind.

Tests wait for events that the code under test sets; `PATIENCE_S` only bounds how long a broken loader can hang them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orpo_ds.data.packing import MicroBatch, pack
from orpo_ds.data.prefetch import MicroBatchLoader
from orpo_ds.data.truncate import TokenPair
from tests import small_runs

GROUPS: list[list[int]] = [[0, 1], [2], [], [3, 4, 5], [6]]
PATIENCE_S = 30.0


def build(group: Sequence[int]) -> MicroBatch:
    return pack([TokenPair([1, 2, number], [1, 2, number + 1], 2, 2, 2) for number in group], pair_ids=group)


def tensors(batch: MicroBatch) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    batch.map_tensors(note)
    return found


# Threads that other tests of this process have left to the garbage collector.
EARLIER: set[int | None] = set()


@pytest.fixture(autouse=True)
def _know_earlier_threads() -> None:
    EARLIER.clear()
    EARLIER.update(thread.ident for thread in threading.enumerate())


def prefetch_threads() -> list[str]:
    own = [thread for thread in threading.enumerate() if thread.ident not in EARLIER]
    return [thread.name for thread in own if thread.name.startswith("orpo_ds-prefetch")]


class WatchedBuild:
    """Builds, and says how many were begun."""

    def __init__(self, wanted: int) -> None:
        self.begun: list[Sequence[int]] = []
        self.threads: set[int] = set()
        self.wanted = wanted
        self.wanted_begun = threading.Event()

    def __call__(self, group: Sequence[int]) -> MicroBatch:
        self.begun.append(group)
        self.threads.add(threading.get_ident())
        if len(self.begun) == self.wanted:
            self.wanted_begun.set()
        return build(group)


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_all_micro_batches_arrive_in_order(depth: int) -> None:
    arrived = list(MicroBatchLoader(GROUPS, build=build, device="cpu", depth=depth))
    assert [batch.pair_ids for batch in arrived] == [tuple(group) for group in GROUPS]
    for batch, group in zip(arrived, GROUPS, strict=True):
        for tensor, direct in zip(tensors(batch), tensors(build(group)), strict=True):
            assert torch.equal(tensor, direct)
    assert prefetch_threads() == []


def test_no_group_is_no_micro_batch() -> None:
    assert list(MicroBatchLoader([], build=build, device="cpu")) == []


def test_the_next_ones_are_built_while_the_first_is_in_use() -> None:
    watched = WatchedBuild(wanted=3)
    stream = iter(MicroBatchLoader(GROUPS, build=watched, device="cpu", depth=2))
    next(stream)
    assert watched.wanted_begun.wait(PATIENCE_S), "the first, and two ahead of it"
    assert threading.get_ident() not in watched.threads


def test_the_loader_runs_ahead_no_further_than_its_depth() -> None:
    watched = WatchedBuild(wanted=4)
    stream = iter(MicroBatchLoader([[number] for number in range(100)], build=watched, device="cpu", depth=2))
    next(stream)
    # The wait only gives a loader that runs too far the time to show it; one that does not passes in any time.
    assert not watched.wanted_begun.wait(0.2), "one asked for and two ahead of it are three"
    next(stream)
    assert watched.wanted_begun.wait(PATIENCE_S)


@pytest.mark.parametrize(
    ("workers", "factor", "ahead"), [(0, None, 2), (1, None, 2), (3, None, 6), (2, 4, 8)]
)
def test_a_run_builds_as_far_ahead_as_its_workers_would(
    tmp_path: Path, workers: int, factor: int | None, ahead: int
) -> None:
    """`dataloader_num_workers` and `dataloader_prefetch_factor`, through the feed of a trainer."""
    trainer = small_runs.trainer(
        tmp_path / "run", dataloader_num_workers=workers, dataloader_prefetch_factor=factor
    )
    trainer.evaluate(small_runs.dataset(1))  # chooses the layout
    assert trainer.train_dataset is not None
    feed = trainer._layout.feed(trainer.train_dataset, max_tokens=None)
    far_enough, too_far = threading.Event(), threading.Event()

    def pairs() -> Iterator[list[int]]:
        for number in range(50):
            if number == ahead:
                far_enough.set()
            if number == ahead + 1:
                too_far.set()
            yield [number % 11]

    steps = feed.steps(pairs(), device=torch.device("cpu"))
    next(steps)
    assert far_enough.wait(PATIENCE_S)
    assert not too_far.wait(0.1)  # only gives a feed that runs too far the time to show it
    steps.close()


def test_an_error_arrives_in_its_place_and_names_the_pairs() -> None:
    def fail(group: Sequence[int]) -> MicroBatch:
        if 3 in group:
            raise RuntimeError("unreadable row")
        return build(group)

    stream = iter(MicroBatchLoader(GROUPS, build=fail, device="cpu"))
    assert [next(stream).pair_ids for _ in range(3)] == [(0, 1), (2,), ()]
    with pytest.raises(RuntimeError, match="unreadable row") as error:
        next(stream)
    assert error.value.__notes__ == ["while building the micro-batch of pairs [3, 4, 5]"]
    assert prefetch_threads() == []


def test_an_error_in_the_plan_arrives_too() -> None:
    def groups() -> Iterator[Sequence[int]]:
        yield [1]
        raise ValueError("pair 1 of the global batch takes too much")

    stream = iter(MicroBatchLoader(groups(), build=build, device="cpu"))
    assert next(stream).pair_ids == (1,)
    with pytest.raises(ValueError, match="takes too much"):
        next(stream)
    assert prefetch_threads() == []


def test_a_break_ends_the_thread() -> None:
    for batch in MicroBatchLoader([[number] for number in range(100)], build=build, device="cpu"):
        assert prefetch_threads() != []
        assert batch.pair_ids == (0,)
        break
    assert prefetch_threads() == []


def test_a_loader_can_be_iterated_again() -> None:
    loader = MicroBatchLoader(GROUPS, build=build, device="cpu")
    assert [batch.pair_ids for batch in loader] == [batch.pair_ids for batch in loader]


def test_depth_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot prefetch 0 micro-batches"):
        MicroBatchLoader(GROUPS, build=build, device="cpu", depth=0)


@pytest.mark.gpu
@pytest.mark.parametrize("pin_memory", [True, False])
def test_micro_batches_on_a_gpu_are_those_on_the_host(
    pin_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of the consumer run while the next copies do; a tensor that was reused too early would show."""
    device = torch.device("cuda", torch.cuda.current_device())
    groups = [list(range(start, start + 200)) for start in range(50)]
    busy = torch.randn(2048, 2048, device=device)
    sums = []
    pinned, pin = [], Tensor.pin_memory
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or pin(tensor))
    for batch in MicroBatchLoader(groups, build=build, device=device, pin_memory=pin_memory):
        assert bool(pinned) is pin_memory
        assert all(tensor.device == device for tensor in tensors(batch))
        for _ in range(20):
            busy = (
                busy @ busy / 2048
            )  # so that the sums below run long after the copies of later micro-batches
        sums.append(torch.stack([tensor.sum().double() for tensor in tensors(batch)]))
        del batch
    for total, group in zip(sums, groups, strict=True):
        expected = torch.stack([tensor.sum().double() for tensor in tensors(build(group))])
        assert torch.equal(total.cpu(), expected)
