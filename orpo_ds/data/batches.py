"""Which pairs meet at optimizer step k, and which rank takes which of them in which micro-step.

The first question does not know how many ranks there are: `GlobalBatches` is a pure function of (seed, epoch,
step, dataset fingerprint), so a run that resumes, also on another number of ranks, sees exactly the batches
that are left.

The second does: `plan_micro_batches` fills rows of at most `max_tokens`. Every rank computes the same plan
from the same lengths, so the ranks need not talk. Two things cost time in a step. Each micro-step gathers all
parameters under ZeRO-3, so there are as few micro-steps as the budget allows. And ranks wait for the slowest
one, under ZeRO-3 in every micro-step, below it at the end of the step, so the rows of a micro-step should
cost the same. Tokens alone do not tell what a row costs, because attention is quadratic. `CostModel` counts
FLOPs.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Lengths = TypeVar("Lengths", float, NDArray[np.float64])

# A plan is computed while the previous step runs: no more trades than take about 10 ms for 256 pairs, and
# none for less than a hundred-thousandth of the step.
MOST_TRADES = 64
LEAST_GAIN = 1e-5


class GlobalBatches:
    """The pairs of every optimizer step: a pure function of (seed, epoch, step, fingerprint).

    Each epoch is its own permutation of the dataset, cut into batches; with `shuffle=False` each epoch is the
    dataset in order. The last batch of an epoch holds what is left, or with `drop_last` is not used in that
    epoch.

    Memory is one permutation (4 bytes a pair up to 2^31 pairs), kept for the epoch that was asked for last.

    Args:
        num_pairs: size of the dataset.
        global_batch_size: pairs of one optimizer step, over all ranks.
        seed: `args.data_seed` or `args.seed`.
        fingerprint: content hash of the dataset. Another dataset is another order.
        drop_last: leave out the partial batch at the end of an epoch.
        shuffle: permute, anew in every epoch.
        group_by: length of each pair, [num_pairs]: pairs of similar length share a batch, as far as a shuffled
            stretch of the epoch has them. None: batches are as the shuffle leaves them.

    Raises:
        ValueError: there is no pair, or `drop_last` leaves no batch.
    """

    def __init__(
        self,
        *,
        num_pairs: int,
        global_batch_size: int,
        seed: int,
        fingerprint: str,
        drop_last: bool = False,
        shuffle: bool = True,
        group_by: NDArray[np.integer] | None = None,
    ) -> None:
        if num_pairs < 1 or global_batch_size < 1:
            raise ValueError(
                f"cannot make batches of {global_batch_size} pairs from a dataset of {num_pairs} pairs"
            )
        full, rest = divmod(num_pairs, global_batch_size)
        self.steps_per_epoch = full + (1 if rest and not drop_last else 0)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the dataset has {num_pairs} pairs, fewer than one global batch of {global_batch_size}, and "
                "drop_last leaves none: set dataloader_drop_last to false or lower the batch size"
            )
        self.num_pairs = num_pairs
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.fingerprint = fingerprint
        self.shuffle = shuffle
        self.group_by = group_by
        self._cached: tuple[int, NDArray[np.integer]] | None = None

    def pairs(self, step: int) -> list[int]:
        """Dataset indices of optimizer step `step`, counted from 0 over all epochs."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.global_batch_size
        if not self.shuffle:
            return list(range(first, min(first + self.global_batch_size, self.num_pairs)))
        indices: list[int] = self._permutation(epoch)[first : first + self.global_batch_size].tolist()
        return indices

    def _permutation(self, epoch: int) -> NDArray[np.integer]:
        """Order of the dataset in this epoch, [num_pairs]."""
        cached = self._cached  # one read: the prefetch thread and the trainer may both be here
        if cached is not None and cached[0] == epoch:
            return cached[1]
        order = random_order(self.num_pairs, key=f"{self.seed}/{epoch}/{self.fingerprint}")
        if self.group_by is not None:
            order = grouped_by_length(order, self.group_by, batch_size=self.global_batch_size)
        self._cached = (epoch, order)
        return order


def random_order(count: int, *, key: str) -> NDArray[np.integer]:
    """A permutation of `range(count)`, [count], that a key decides.

    Sorting by random keys, and not `permutation()` or `torch.randperm`: NumPy promises that the raw stream of a bit
    generator never changes (NEP 19), and neither library promises that of its shuffles. So a run that resumes after an
    upgrade goes on in the same order.
    """
    digest = hashlib.sha256(key.encode()).digest()
    keys = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.min_scalar_type(-count))


def grouped_by_length(
    order: NDArray[np.integer], lengths: NDArray[np.integer], *, batch_size: int
) -> NDArray[np.integer]:
    """Sort a shuffled order by falling length within stretches of up to 50 batches, as transformers' sampler does.

    The longest pair of all comes first, so that a batch that does not fit in memory fails at the first step
    (`transformers.trainer_pt_utils.get_length_grouped_indices`).

    Args:
        order: [N] indices.
        lengths: [N] of each index.
        batch_size: pairs of a global batch.
    """
    stretch = batch_size * max(1, min(len(order) // (4 * batch_size), 50))
    grouped = np.concatenate(
        [
            part[np.argsort(-lengths[part].astype(np.int64), kind="stable")]
            for part in np.split(order, range(stretch, len(order), stretch))
        ]
    )
    heads = np.arange(0, len(order), stretch)
    longest = heads[np.argmax(lengths[grouped[heads]])]
    grouped[[0, longest]] = grouped[[longest, 0]]
    return grouped


def causal_scores(trunk: Lengths, chosen: Lengths, rejected: Lengths) -> Lengths:
    """(query, key) scores of a packed pair, or elementwise of many, from its lengths in tokens."""
    sequence = trunk + chosen
    return sequence * (sequence + 1) / 2 + rejected * trunk + rejected * (rejected + 1) / 2


@dataclass(frozen=True)
class PairCost:
    """What a pair takes of a micro-batch: room in its row, in tokens, and time, in FLOPs."""

    tokens: int
    flops: float


@dataclass(frozen=True)
class CostModel:
    """FLOPs of forward and backward of a packed pair: linear in tokens, attention scores and target rows.

    A parameter costs 2 FLOPs a token forward and 4 backward (Kaplan et al. 2020, arXiv:2001.08361, section
    2.1), which is linear in tokens for the body and in target rows for the head. A causal score, one query
    against one key, costs 2 FLOPs times the attention width in the query-key product and again in the product
    with the values, and twice that backward. Sliding windows and recomputation under gradient checkpointing
    are left out: the second scales all pairs alike.

    Attributes:
        per_token: FLOPs of a token in the body.
        per_score: FLOPs of one (query, key) score, over all layers.
        per_target: FLOPs of a target row in the head.
        nll_on_prompt: whether prompt tokens are target rows.
    """

    per_token: float
    per_score: float
    per_target: float
    nll_on_prompt: bool = True

    @classmethod
    def of_model(
        cls,
        *,
        body_parameters: int,
        head_parameters: int,
        layers: int,
        attention_width: int,
        nll_on_prompt: bool = True,
    ) -> CostModel:
        """Coefficients of a transformer.

        Args:
            body_parameters: parameters that multiply every token: no embeddings, no head, of experts the
                active ones.
            head_parameters: vocabulary size x hidden size.
            layers: layers with attention.
            attention_width: query heads x head size.
            nll_on_prompt: see `packing.pack`.
        """
        return cls(
            per_token=6.0 * body_parameters,
            per_score=12.0 * layers * attention_width,
            per_target=6.0 * head_parameters,
            nll_on_prompt=nll_on_prompt,
        )

    def pair(self, *, trunk: int, chosen: int, rejected: int) -> PairCost:
        """Cost of a packed pair with a trunk and two branches of these lengths, in tokens."""
        tokens = trunk + chosen + rejected
        scores = causal_scores(float(trunk), float(chosen), float(rejected))
        targets = tokens - 1 if self.nll_on_prompt else chosen + rejected
        return PairCost(tokens, self.per_token * tokens + self.per_score * scores + self.per_target * targets)


def plan_micro_batches(
    costs: Sequence[PairCost], *, world_size: int, max_tokens: int
) -> list[list[list[int]]]:
    """Deal the pairs of one global batch to ranks and micro-steps.

    Bin packing (best fit, longest first: at most 11/9 of the fewest rows, and usually the fewest) says how few
    micro-steps there can be. Then the pairs are spread over all rows of these micro-steps, costliest first,
    each to the row that has cost least so far and still has room (longest processing time first, Graham
    1969). Rows of like cost share a micro-step. A local search shortens what is left of the waiting, and in
    each micro-step the rank that has done least takes the costliest row.

    Args:
        costs: tokens and FLOPs of every pair of the global batch.
        world_size: ranks with work of their own (data-parallel size).
        max_tokens: room in one micro-batch.

    Returns:
        `plan[rank][micro_step]`: positions in `costs`. Every position stands in exactly one micro-batch, all
        ranks have the same number of micro-steps, and a micro-batch may be empty. The same input gives the
        same plan.

    Raises:
        ValueError: a pair alone does not fit in `max_tokens`.
    """
    assert costs, "GlobalBatches makes no empty batch"
    for position, cost in enumerate(costs):
        if cost.tokens > max_tokens:
            raise ValueError(
                f"pair {position} of the global batch takes {cost.tokens} tokens of a micro-batch, and there "
                f"is room for max_tokens_per_micro_batch={max_tokens}: raise max_tokens_per_micro_batch to at "
                f"least {cost.tokens} or lower max_length"
            )
    rows = _fewest_rows(costs, max_tokens)
    micro_steps = -(-len(rows) // world_size)
    rows += [[] for _ in range(micro_steps * world_size - len(rows))]
    rows = _spread(costs, rows=len(rows), max_tokens=max_tokens) or rows
    rows.sort(key=lambda row: _flops(costs, row), reverse=True)
    rows = _shorten(costs, rows, world_size=world_size, max_tokens=max_tokens)
    return deal_rows(costs, rows, world_size=world_size)


def _fewest_rows(costs: Sequence[PairCost], max_tokens: int) -> list[list[int]]:
    """Best-fit decreasing: every pair, longest first, goes into the fullest row that has room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for position in sorted(range(len(costs)), key=lambda i: -costs[i].tokens):
        tokens = costs[position].tokens
        place = bisect_left(room, (tokens, 0))
        if place < len(room):
            left, row = room.pop(place)
            rows[row].append(position)
        else:
            left, row = max_tokens, len(rows)
            rows.append([position])
        insort(room, (left - tokens, row))
    return rows


def _spread(costs: Sequence[PairCost], *, rows: int, max_tokens: int) -> list[list[int]] | None:
    """Longest processing time first over a given number of rows; None when a pair finds no room."""
    filled: list[list[int]] = [[] for _ in range(rows)]
    tokens = [0] * rows
    cheapest = [(0.0, row) for row in range(rows)]
    for position in sorted(range(len(costs)), key=lambda i: -costs[i].flops):
        cost = costs[position]
        without_room = []
        while cheapest and tokens[cheapest[0][1]] + cost.tokens > max_tokens:
            without_room.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        flops, row = heapq.heappop(cheapest)
        filled[row].append(position)
        tokens[row] += cost.tokens
        for entry in (*without_room, (flops + cost.flops, row)):
            heapq.heappush(cheapest, entry)
    return filled


def _shorten(
    costs: Sequence[PairCost], rows: list[list[int]], *, world_size: int, max_tokens: int
) -> list[list[int]]:
    """Shorten the step by trading pairs, one trade a round, until no trade is worth it.

    `rows` come in micro-steps of `world_size`, and a micro-step lasts as long as its costliest row. Only that
    row's pairs are worth moving: each is held against every pair of another row that it could change places
    with, and against nothing (so it just moves). On real lengths this takes 1 to 4 percent off a step of 4 to
    8 pairs a rank.
    """
    pairs, places = len(costs), len(rows)
    # After the pairs come `places` phantoms that cost nothing, one in every row, and never move.
    flops = np.array([cost.flops for cost in costs] + [0.0] * places)
    tokens = np.array([cost.tokens for cost in costs] + [0] * places)
    row_of = np.empty(pairs + places, dtype=np.int64)
    row_of[pairs:] = np.arange(places)
    for number, row in enumerate(rows):
        row_of[row] = number

    for _ in range(MOST_TRADES):
        row_flops = np.bincount(row_of, flops, minlength=places)
        row_tokens = np.bincount(row_of, tokens, minlength=places)
        by_step = row_flops.reshape(-1, world_size)
        slowest = by_step.argmax(axis=1) + np.arange(len(by_step)) * world_size
        lasts = row_flops[slowest]
        others = by_step.copy()
        others.reshape(-1)[slowest] = 0.0
        lasts_without = others.max(axis=1)

        given = np.isin(row_of[:pairs], slowest).nonzero()[0][:, None]
        source, target = row_of[given], row_of[None, :]
        step, target_step = source // world_size, target // world_size
        less, fewer = flops[given] - flops, tokens[given] - tokens
        source_step_lasts = np.maximum(lasts_without[step], row_flops[source] - less)
        change = np.where(
            step == target_step,
            np.maximum(source_step_lasts, row_flops[target] + less) - lasts[step],
            source_step_lasts - lasts[step] + np.maximum(0.0, row_flops[target] + less - lasts[target_step]),
        )
        fits = (row_tokens[target] + fewer <= max_tokens) & (row_tokens[source] - fewer <= max_tokens)
        change[~fits | (source == target)] = 0.0
        best, partner = np.unravel_index(change.argmin(), change.shape)
        if change[best, partner] >= -LEAST_GAIN * lasts.sum():
            break
        mover = given[best, 0]
        row_of[mover], left = row_of[partner], row_of[mover]
        if partner < pairs:
            row_of[partner] = left

    shortened: list[list[int]] = [[] for _ in rows]
    for position, number in enumerate(row_of[:pairs].tolist()):
        shortened[number].append(position)
    return shortened


def deal_rows(costs: Sequence[PairCost], rows: list[list[int]], *, world_size: int) -> list[list[list[int]]]:
    """Micro-steps of `world_size` rows each to the ranks, the costliest row to the rank that has done least."""
    plan: list[list[list[int]]] = [[] for _ in range(world_size)]
    done = [0.0] * world_size
    for first in range(0, len(rows), world_size):
        idle_first = sorted(range(world_size), key=lambda rank: done[rank])
        costliest_first = sorted(
            rows[first : first + world_size], key=lambda row: _flops(costs, row), reverse=True
        )
        for rank, row in zip(idle_first, costliest_first, strict=True):
            plan[rank].append(row)
            done[rank] += _flops(costs, row)
    return plan


def _flops(costs: Sequence[PairCost], row: list[int]) -> float:
    return sum(costs[position].flops for position in row)
