"""What one rank pushes through the model in optimizer step k.

The feed joins the three questions of this package: which pairs (`GlobalBatches`), on which rank and in which
micro-step (`plan_micro_batches`, `plan_padded`), and as which tensors (`pack`, `pad`). The two totals that the loss
divides by are those of the *global* batch. Every rank counts them from the lengths of all pairs, so no rank has to
ask another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol

import torch

from orpo_ds.data.batches import CostModel, PairCost, plan_micro_batches
from orpo_ds.data.image_inputs import ImageInputs
from orpo_ds.data.packing import MicroBatch
from orpo_ds.data.padded_batches import plan_padded
from orpo_ds.data.prefetch import MicroBatchLoader
from orpo_ds.data.token_dataset import PairLengths
from orpo_ds.data.truncate import TokenPair

# Lays pairs out as tensors; the second argument is the dataset index of every pair.
Layout = Callable[[Sequence[TokenPair], Sequence[int]], MicroBatch]


class LengthsByPair(Protocol):
    """The lengths of any pairs of a dataset."""

    def of(self, pairs: Sequence[int]) -> PairLengths:
        """Those of these pairs (dataset indices), in their order."""


class PairSource(Protocol):
    """What the feed asks of a dataset: a `TokenDataset` on disk, or the `TokenStream` of one without a length."""

    images: ImageInputs | None
    """Of the pairs that have some, where any has."""

    @property
    def lengths(self) -> LengthsByPair:
        """Tokens of the pairs."""

    @property
    def example(self) -> TokenPair:
        """One of the pairs."""

    def __len__(self) -> int:
        """Pairs there are; a stream does not know and raises TypeError."""

    def __getitem__(self, index: int) -> TokenPair:
        """The pair with this dataset index."""

    def release(self, pairs: Sequence[int]) -> None:
        """Take note that these pairs, a whole global batch, have been trained on."""


@dataclass(frozen=True)
class StepPlan:
    """One rank's part of a global batch.

    Attributes:
        pairs: pairs of the global batch.
        nll_tokens: tokens of the global batch that the nll counts.
        tokens: tokens of the two full sequences of all pairs of the global batch.
        micro_batches: dataset indices of this rank's micro-batches; every rank has the same number, some may be empty.
    """

    pairs: int
    nll_tokens: int
    tokens: int
    micro_batches: list[list[int]]


@dataclass(frozen=True)
class Feed:
    """One rank's view of a dataset.

    Attributes:
        dataset: the token pairs.
        layout: `pack` or `pad`, with everything but the pairs filled in.
        padded: whether `layout` pads, so that a pair takes two rows of the batch's longest sequence.
        cost_model: what a pair costs, to balance ranks by.
        nll_on_prompt: whether the nll counts the prompt.
        rank: this process.
        world_size: processes that share a global batch.
        max_tokens: budget of a micro-batch; None: a rank's share of the batch is one micro-batch.
        ahead: micro-batches that are built before they are asked for.
        pin_memory: copy them to a GPU from pinned memory.
    """

    dataset: PairSource
    layout: Layout
    padded: bool
    cost_model: CostModel
    nll_on_prompt: bool
    rank: int
    world_size: int
    max_tokens: int | None
    ahead: int = 2
    pin_memory: bool = True

    def plan(self, pairs: Sequence[int]) -> StepPlan:
        """Deal the pairs of a global batch (dataset indices); returns this rank's part."""
        costs = self.costs(pairs)
        budget = self.max_tokens
        if budget is None:  # room for all of them, padded or not
            budget = len(costs) * max(cost.tokens for cost in costs)
        plan = plan_padded if self.padded else plan_micro_batches
        deal = plan(costs, world_size=self.world_size, max_tokens=budget)
        lengths = self.dataset.lengths.of(pairs)
        return StepPlan(
            pairs=len(pairs),
            nll_tokens=int(lengths.nll_tokens(nll_on_prompt=self.nll_on_prompt).sum()),
            tokens=int(lengths.sequence_tokens().sum()),
            micro_batches=[[pairs[position] for position in positions] for positions in deal[self.rank]],
        )

    def build(self, pairs: Sequence[int]) -> MicroBatch:
        """The tensors of one micro-batch, on the CPU."""
        return self.layout([self.dataset[index] for index in pairs], pairs)

    def steps(
        self, batches: Iterable[Sequence[int]], *, device: torch.device
    ) -> Generator[tuple[StepPlan, Iterator[MicroBatch]], None, None]:
        """Plan and build one global batch after the other, ahead of the training, in the background.

        The background ends with the generator: close it where an error may leave it half done.

        Args:
            batches: the pairs of each global batch.
            device: where the micro-batches are wanted.

        Yields:
            The plan of a step and its micro-batches, all of which must be taken before the next step.
        """
        plans: deque[tuple[StepPlan, Sequence[int]]] = deque()

        def groups() -> Iterator[list[int]]:
            for pairs in batches:
                plan = self.plan(pairs)
                plans.append((plan, pairs))
                yield from plan.micro_batches

        loader = MicroBatchLoader(
            groups(), build=self.build, device=device, depth=self.ahead, pin_memory=self.pin_memory
        )
        with closing(iter(loader)) as stream:
            for first in stream:
                plan, pairs = plans.popleft()
                yield plan, chain((first,), islice(stream, len(plan.micro_batches) - 1))
                self.dataset.release(pairs)

    def costs(self, pairs: Sequence[int]) -> list[PairCost]:
        """What these pairs (dataset indices) take of a micro-batch in this layout, each of them alone."""
        lengths = self.dataset.lengths.of(pairs)
        triples = list(
            zip(lengths.trunk.tolist(), lengths.chosen.tolist(), lengths.rejected.tolist(), strict=True)
        )
        costs = [self.cost_model.pair(trunk=trunk, chosen=c, rejected=r) for trunk, c, r in triples]
        if not self.padded:
            return costs
        widths = [trunk + max(c, r) for trunk, c, r in triples]
        return [
            PairCost(tokens=2 * width, flops=cost.flops) for width, cost in zip(widths, costs, strict=True)
        ]
