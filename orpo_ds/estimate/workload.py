"""What a step of the run consists of: its fullest micro-batch, how many there are, and their arithmetic.

From the lengths of the token cache where the dataset lies on this machine (they are tokenised now if they were not
yet, into the cache that the training will open); otherwise every pair is as long as `max_length` allows, with nothing
shared, which is the worst that the settings permit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orpo_ds.config import ORPOConfig
from orpo_ds.data.batches import PairCost, causal_scores, plan_micro_batches
from orpo_ds.data.token_dataset import PairLengths
from orpo_ds.data.truncate import TokenPair
from orpo_ds.model.size import ModelSize

SAMPLED_RANKS = 64  # whose micro-batches are dealt; more ranks have the same mixture of pairs
SEED = 0


@dataclass(frozen=True)
class Pairs:
    """Tokens of the pairs of a dataset.

    Attributes:
        trunk: shared by chosen and rejected, [N].
        chosen: of the chosen branch, [N].
        rejected: of the rejected branch, [N].
        count: pairs in the dataset; None: not known.
        about: where the lengths are from, in words.
    """

    trunk: NDArray[np.integer]
    chosen: NDArray[np.integer]
    rejected: NDArray[np.integer]
    count: int | None
    about: str

    @classmethod
    def of(cls, lengths: PairLengths, *, about: str) -> Pairs:
        """Those of a token dataset."""
        return cls(lengths.trunk, lengths.chosen, lengths.rejected, len(lengths.trunk), about)

    @classmethod
    def longest(cls, max_length: int) -> Pairs:
        """The longest that can be: two sequences of `max_length` that share one token."""
        branch = np.array([max_length - 1])
        return cls(
            np.array([1]), branch, branch, None, f"every pair as long as max_length={max_length} allows"
        )

    @property
    def tokens(self) -> NDArray[np.integer]:
        """Of each packed pair, [N]."""
        total: NDArray[np.integer] = self.trunk + self.chosen + self.rejected
        return total


@dataclass(frozen=True)
class Workload:
    """One optimizer step of one rank.

    Attributes:
        fullest: pairs of the largest micro-batch that can occur, as ids of no meaning.
        micro_steps: micro-batches of a rank in a step, on average.
        tokens: that the slowest rank pushes through the model in a step, on average.
        flops: executed by the slowest rank in a step, on average, recomputation included.
        pairs_a_step: of the global batch.
        steps: of the whole training; None: not known.
    """

    fullest: list[TokenPair]
    micro_steps: float
    tokens: float
    flops: float
    pairs_a_step: int
    steps: int | None

    @property
    def fullest_tokens(self) -> int:
        """Tokens of the largest micro-batch, packed."""
        return sum(len(pair.chosen) + len(pair.rejected) - pair.trunk for pair in self.fullest)


def workload(args: ORPOConfig, pairs: Pairs, size: ModelSize, *, ranks: int) -> Workload:
    """The step of a run on `ranks` data-parallel ranks."""
    share = args.per_device_train_batch_size * args.gradient_accumulation_steps
    budget = args.micro_batch_tokens
    longest = np.argsort(-pairs.tokens, kind="stable")[: min(share, len(pairs.tokens))]
    if pairs.count is None:
        longest = np.resize(longest, share)
    fullest: list[TokenPair] = []
    room = budget if budget is not None else int(pairs.tokens[longest].sum())
    for pair in longest.tolist():
        if int(pairs.tokens[pair]) <= room or not fullest:
            fullest.append(_pair(int(pairs.trunk[pair]), int(pairs.chosen[pair]), int(pairs.rejected[pair])))
            room -= int(pairs.tokens[pair])

    dealt_ranks = min(ranks, SAMPLED_RANKS)
    sample = np.random.default_rng(SEED).integers(len(pairs.tokens), size=share * dealt_ranks)
    costs = [_cost(args, pairs, size, pair) for pair in sample.tolist()]
    most = max(cost.tokens for cost in costs)
    deal = plan_micro_batches(
        costs,
        world_size=dealt_ranks,
        max_tokens=max(budget if budget is not None else sum(cost.tokens for cost in costs), most),
    )
    # Ranks wait for the slowest of a micro-step.
    slowest = [
        max((_sum(costs, rank[step]) for rank in deal), key=lambda c: c.flops) for step in range(len(deal[0]))
    ]
    return Workload(
        fullest=fullest,
        micro_steps=len(deal[0]),
        tokens=sum(cost.tokens for cost in slowest),
        flops=sum(cost.flops for cost in slowest),
        pairs_a_step=share * ranks,
        steps=_steps(args, pairs, share * ranks),
    )


def executed_flops(
    args: ORPOConfig, size: ModelSize, *, trunk: float, chosen: float, rejected: float
) -> float:
    """FLOPs of forward and backward of a packed pair, with what is computed twice.

    The counts are those of `orpo_ds.monitor.flops`; gradient checkpointing adds a forward pass of the body (2 a
    parameter, 4 a score), and a trained head computes its logits again in the backward pass (8 instead of 6).
    """
    tokens = trunk + chosen + rejected
    again = 1 if args.gradient_checkpointing else 0
    body = (4.0 if size.body_frozen else 6.0) + 2.0 * again
    attention = 12.0 + 4.0 * again
    head = 4.0 if size.head_frozen else 8.0
    rows = tokens - 1 if args.nll_on_prompt else chosen + rejected
    return (
        body * size.body_parameters * tokens
        + attention * size.layers * size.attention_width * causal_scores(trunk, chosen, rejected)
        + head * size.head_parameters * rows
    )


def _cost(args: ORPOConfig, pairs: Pairs, size: ModelSize, pair: int) -> PairCost:
    trunk, chosen, rejected = (int(part[pair]) for part in (pairs.trunk, pairs.chosen, pairs.rejected))
    flops = executed_flops(args, size, trunk=trunk, chosen=chosen, rejected=rejected)
    return PairCost(tokens=trunk + chosen + rejected, flops=flops)


def _sum(costs: Sequence[PairCost], positions: Sequence[int]) -> PairCost:
    return PairCost(
        tokens=sum(costs[position].tokens for position in positions),
        flops=sum(costs[position].flops for position in positions),
    )


def _steps(args: ORPOConfig, pairs: Pairs, global_batch: int) -> int | None:
    if args.max_steps > 0:
        return args.max_steps
    if pairs.count is None:
        return None
    a_epoch = pairs.count // global_batch if args.dataloader_drop_last else -(-pairs.count // global_batch)
    return max(1, round(args.num_train_epochs * a_epoch))


def _pair(trunk: int, chosen: int, rejected: int) -> TokenPair:
    """A pair of these lengths; what stands in it does not matter."""
    trunk = max(trunk, 1)
    return TokenPair(
        chosen=[0] * trunk + [1] * max(chosen, 1),
        rejected=[0] * trunk + [2] * max(rejected, 1),
        chosen_start=trunk,
        rejected_start=trunk,
        trunk=trunk,
    )
