"""Where the full sequences of a micro-batch lie among its hidden states.

The loss never needs them: it has its target rows. Who wants the logits of whole sequences (`compute_metrics`,
`preprocess_logits_for_metrics`) does. In a packed row the rejected sequence is in two pieces, the trunk that it shares
and its own branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_ds.data.packing import MicroBatch
from orpo_ds.data.truncate import TokenPair


@dataclass(frozen=True, eq=False)
class FullSequence:
    """One response with its prompt, S tokens; for an encoder-decoder model the response alone, as the decoder has it.

    Attributes:
        places: int64 [S], where the hidden state of each token is, as in `TargetRows.index`.
        inputs: int64 [S], the token ids; for an encoder-decoder model those of the prompt, of another length.
        labels: int64 [S], ids of the response, and the ignored label on the prompt. As in transformers a decoder-only
            model's logits at place s belong to the label at s + 1, an encoder-decoder's to the one at s.
    """

    places: Tensor
    inputs: Tensor
    labels: Tensor


def full_sequences(
    batch: MicroBatch, pairs: Sequence[TokenPair], *, ignored_label: int
) -> list[tuple[FullSequence, FullSequence]]:
    """The chosen and the rejected sequence of every pair, on the CPU.

    Args:
        batch: packed or padded.
        pairs: those of `batch.pair_ids`, in that order.
        ignored_label: stands for the prompt in `labels`.
    """
    assert len(pairs) == len(batch.pair_ids)
    if batch.decoder_input_ids is not None:
        places = _padded_places(pairs, width=batch.decoder_input_ids.shape[1])
    elif batch.layout is None:
        places = _padded_places(pairs, width=batch.input_ids.shape[1])
    else:
        places = _packed_places(pairs)
    is_encoder_decoder = batch.decoder_input_ids is not None

    def sequence(ids: list[int], start: int, first: Tensor) -> FullSequence:
        if is_encoder_decoder:
            response = torch.tensor(ids[start:])
            return FullSequence(first[: len(response)], torch.tensor(ids[:start]), response)
        return FullSequence(first, torch.tensor(ids), torch.tensor([ignored_label] * start + ids[start:]))

    return [
        (
            sequence(pair.chosen, pair.chosen_start, chosen),
            sequence(pair.rejected, pair.rejected_start, rejected),
        )
        for pair, (chosen, rejected) in zip(pairs, places, strict=True)
    ]


def _padded_places(pairs: Sequence[TokenPair], *, width: int) -> list[tuple[Tensor, Tensor]]:
    """Row p holds the chosen sequence of pair p, row P + p the rejected one."""
    return [
        (
            row * width + torch.arange(len(pair.chosen)),
            (len(pairs) + row) * width + torch.arange(len(pair.rejected)),
        )
        for row, pair in enumerate(pairs)
    ]


def _packed_places(pairs: Sequence[TokenPair]) -> list[tuple[Tensor, Tensor]]:
    """Trunk, chosen branch, rejected branch, pair after pair (`packing.pack`)."""
    places, start = [], 0
    for pair in pairs:
        chosen = start + torch.arange(len(pair.chosen))
        branch = start + len(pair.chosen) + torch.arange(len(pair.rejected) - pair.trunk)
        places.append((chosen, torch.cat((chosen[: pair.trunk], branch))))
        start += len(pair.chosen) + len(branch)
    return places
