"""What `compute_metrics` sees and `predict` returns: numbers of every pair, in the dataset's order, from all ranks.

Without `preprocess_logits_for_metrics` these are TRL's: the mean logit of the chosen and of the rejected sequence. TRL
takes that mean over a batch with its padding. Here it is over the tokens of one sequence, which is what TRL gives for
batches of one pair, and does not change with the batch size.

With `preprocess_logits_for_metrics` they are what it makes of the logits `[1, S, V]` of one sequence at a time. The
function is given pieces `[1, r, V]` of a long sequence where it treats every position alone (most do: an argmax, a
top-k), which is tried out on a few positions first; for one that does not, the sequence's logits are put together in
host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orpo_ds import distributed
from orpo_ds.data.packing import MicroBatch
from orpo_ds.data.sequences import FullSequence, full_sequences
from orpo_ds.data.tokenize import TokenDataset
from orpo_ds.loss import LogitReader, log_odds
from orpo_ds.policy import loss_of_rows

PADDING = -100  # as in transformers: fills up sequences that are shorter than others
PROBE_POSITIONS = 4

# (logits [B, S, V], labels [B, S]) -> what is kept of them: a tensor, or a tuple, list or dict of tensors.
Preprocess = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Wanted:
    """What is collected of every pair.

    Attributes:
        preprocess: the user's function; None: TRL's mean logits.
        means: which of TRL's two means, chosen and rejected.
        inputs: also the token ids.
        losses: also the loss of every pair by itself.
        any_object: `preprocess` may return what is not a tensor.
        ignored_label: label of the prompt's tokens.
        beta: weight of the odds-ratio term, for the losses.
    """

    preprocess: Preprocess | None
    means: tuple[bool, bool]
    inputs: bool
    losses: bool
    any_object: bool
    ignored_label: int
    beta: float


@dataclass(frozen=True)
class Predictions:
    """Of some pairs in the dataset's order; each row is a sequence, the chosen one of a pair before the rejected one.

    Attributes:
        predictions: [2N] of TRL's means; or what `preprocess` returned, [2N, S, ...] padded with -100; an array of 2N
            objects where that is no tensor.
        labels: [2N] zeros (TRL's); or [2N, S] ids of the responses.
        inputs: [2N, S] token ids, or None.
        losses: [N], or None.
    """

    predictions: Any
    labels: Any
    inputs: Any
    losses: Any


@dataclass(frozen=True)
class _Pair:
    """What is kept of one pair: a tree for each of its sequences."""

    round: int
    pair_id: int
    predictions: list[Any]
    labels: list[Any]
    inputs: list[Any]
    losses: list[Any]

    def on_host(self) -> _Pair:
        return _Pair(
            self.round,
            self.pair_id,
            *(
                [map_tree(_to_host, tree) for tree in trees]
                for trees in (self.predictions, self.labels, self.inputs, self.losses)
            ),
        )


class Collector:
    """Looks at the micro-batches of an evaluation (`policy.Observer`), and keeps what is wanted of their pairs."""

    def __init__(self, dataset: TokenDataset, wanted: Wanted) -> None:
        """Start with nothing.

        Args:
            dataset: that is evaluated.
            wanted: what to collect.
        """
        self._dataset = dataset
        self._wanted = wanted
        self._preprocess = None if wanted.preprocess is None else _InPieces(wanted.preprocess)
        self._round = 0
        self._kept: list[_Pair] = []

    def __call__(self, batch: MicroBatch, *, hidden: Tensor, logps: Tensor, head: LogitReader) -> None:
        """Keep what is wanted of a micro-batch's pairs, on its device."""
        wanted = self._wanted
        pairs = [self._dataset[index] for index in batch.pair_ids]
        sequences = full_sequences(batch, pairs, ignored_label=wanted.ignored_label)
        losses = pair_losses(batch, sequences, logps, beta=wanted.beta) if wanted.losses else None
        shifted = batch.decoder_input_ids is None
        for number, (pair_id, both) in enumerate(zip(batch.pair_ids, sequences, strict=True)):
            if self._preprocess is not None:
                predictions = [self._preprocess(hidden, sequence, head) for sequence in both]
                labels = [sequence.labels[None] for sequence in both]
            else:
                asked = [sequence for sequence, on in zip(both, wanted.means, strict=True) if on]
                predictions = [_mean_logit(hidden, sequence, head, shifted=shifted) for sequence in asked]
                labels = [torch.zeros(1) for _ in asked]
            if wanted.any_object:
                predictions = [_as_object(tree) for tree in predictions]
            self._kept.append(
                _Pair(
                    self._round,
                    pair_id,
                    predictions,
                    labels,
                    [sequence.inputs[None] for sequence in both] if wanted.inputs else [],
                    [] if losses is None else [losses[number : number + 1]],
                )
            )

    def end_round(self) -> None:
        """The next pairs belong to another batch."""
        self._round += 1

    def take(self) -> list[Predictions]:
        """What was kept since the last call, of all ranks, a batch each; on the host. Collective."""
        mine = [pair.on_host() for pair in self._kept]
        self._kept = []
        rounds: dict[int, list[_Pair]] = {}
        for pair in sorted(
            chain.from_iterable(distributed.gather_objects(mine)), key=lambda pair: (pair.round, pair.pair_id)
        ):
            rounds.setdefault(pair.round, []).append(pair)
        return [
            Predictions(
                predictions=stacked([tree for pair in pairs for tree in pair.predictions]),
                labels=stacked([tree for pair in pairs for tree in pair.labels]),
                inputs=stacked([tree for pair in pairs for tree in pair.inputs])
                if self._wanted.inputs
                else None,
                losses=stacked([tree for pair in pairs for tree in pair.losses])
                if self._wanted.losses
                else None,
            )
            for pairs in rounds.values()
        ]


def map_tree(apply: Callable[[Any], Any], tree: Any) -> Any:
    """A tuple, list or dict, or several within one another, with `apply` of everything else in it."""
    return _combine([tree], lambda leaves: apply(leaves[0]))


def stacked(trees: Sequence[Any]) -> Any:
    """Join equal trees of arrays along dimension 0, padded along 1 with -100.

    Raises:
        ValueError: there is something else than arrays in them.
    """
    return _combine(trees, _stack_arrays) if trees else np.zeros(0, dtype=np.float32)


def _combine(trees: Sequence[Any], join: Callable[[Sequence[Any]], Any]) -> Any:
    """One tree of equal ones, its leaves joined."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {key: _combine([tree[key] for tree in trees], join) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_combine(same, join) for same in zip(*trees, strict=True))
    return join(trees)


def _stack_arrays(arrays: Sequence[Any]) -> NDArray[Any]:
    wrong = next((array for array in arrays if not isinstance(array, np.ndarray)), None)
    if wrong is not None:
        raise ValueError(
            f"preprocess_logits_for_metrics returned a {type(wrong).__name__}: return a tensor, or a tuple, list or "
            "dict of tensors. Other objects need eval_use_gather_object=True."
        )
    arrays = [np.atleast_1d(array) for array in arrays]
    if arrays[0].ndim > 1:
        width = max(array.shape[1] for array in arrays)
        arrays = [_widened(array, width) for array in arrays]
    return np.concatenate(arrays)


def _widened(array: NDArray[Any], width: int) -> NDArray[Any]:
    if array.shape[1] == width:
        return array
    missing = np.full((len(array), width - array.shape[1], *array.shape[2:]), PADDING, dtype=array.dtype)
    return np.concatenate((array, missing), axis=1)


def _to_host(value: Any) -> Any:
    """A tensor as an array, bf16 as float32; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()


def _as_object(tree: Any) -> Any:
    """`tree` itself where it is all tensors, else an array [1] of one object."""
    leaves: list[Any] = []
    map_tree(leaves.append, tree)
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return tree
    row = np.empty(1, dtype=object)
    row[0] = tree
    return row


def _mean_logit(hidden: Tensor, sequence: FullSequence, head: LogitReader, *, shifted: bool) -> Tensor:
    """[1], mean over the positions and the vocabulary; TRL leaves the last position out, which predicts nothing."""
    places = sequence.places[:-1] if shifted else sequence.places
    return head.means(hidden, places.to(hidden.device)).mean(0, keepdim=True)


def pair_losses(
    batch: MicroBatch, sequences: list[tuple[FullSequence, FullSequence]], logps: Tensor, *, beta: float
) -> Tensor:
    """The ORPO loss [P] of every pair as if it were alone, from the log-probs [R] of the target rows."""
    rows, pairs = batch.rows, len(batch.pair_ids)
    if not pairs:
        return logps.new_zeros(0)
    alone = loss_of_rows(logps, rows, beta=beta, nll_tokens_total=1, pairs_total=1)
    odds = torch.nn.functional.logsigmoid(log_odds(alone.chosen_logps, alone.rejected_logps))
    places = int(max(sequence.places[-1] for both in sequences for sequence in both)) + 1
    owner = torch.zeros(places, dtype=torch.int64)
    for number, (chosen, _) in enumerate(sequences):
        owner[chosen.places] = number
    owners = owner.to(logps.device)[rows.index[rows.nll]]
    sums = logps.new_zeros(pairs).index_add_(0, owners, -logps[rows.nll])
    counts = logps.new_zeros(pairs).index_add_(0, owners, torch.ones_like(logps[rows.nll]))
    return sums / counts - beta * odds


class _InPieces:
    """Applies the user's function to the logits of one sequence, in pieces where it treats every position alone."""

    def __init__(self, preprocess: Preprocess) -> None:
        self._apply = preprocess
        self._composes: bool | None = None

    def __call__(self, hidden: Tensor, sequence: FullSequence, head: LogitReader) -> Any:
        places, labels = sequence.places.to(hidden.device), sequence.labels.to(hidden.device)[None]
        step, length = head.piece_rows, len(places)
        if length <= step:
            return self._apply(head.rows(hidden, places)[None], labels)
        if self._composes is None:
            few = slice(0, min(PROBE_POSITIONS, length))
            self._composes = self._try(head.rows(hidden, places[few])[None], labels[:, few])
        pieces = [slice(first, first + step) for first in range(0, length, step)]
        if not self._composes:
            logits = torch.cat([head.rows(hidden, places[piece]).cpu() for piece in pieces])
            return self._apply(logits[None], labels.cpu())
        parts = [self._apply(head.rows(hidden, places[piece])[None], labels[:, piece]) for piece in pieces]
        return _combine(parts, _side_by_side)

    def _try(self, logits: Tensor, labels: Tensor) -> bool:
        """Whether a few positions together, [1, r, V], give what they give one by one."""
        singles = [self._apply(logits[:, i : i + 1], labels[:, i : i + 1]) for i in range(labels.shape[1])]
        leaves: list[Any] = []
        for single in singles:
            map_tree(leaves.append, single)
        if not all(isinstance(leaf, Tensor) and leaf.shape[:2] == (1, 1) for leaf in leaves):
            return False
        together, apart = self._apply(logits, labels), _combine(singles, _side_by_side)
        same: list[bool] = []
        _combine([together, apart], lambda two: same.append(_close(*two)))
        return all(same)


def _side_by_side(pieces: Sequence[Tensor]) -> Tensor:
    """[1, r, ...] of several pieces to [1, sum of r, ...]."""
    return torch.cat(list(pieces), dim=1)


def _close(first: Any, second: Tensor) -> bool:
    return (
        isinstance(first, Tensor)
        and first.shape == second.shape
        and torch.allclose(first.double(), second.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
    )
