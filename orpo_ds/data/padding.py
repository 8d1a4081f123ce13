"""Token pairs become padded sequences, side by side: for models that cannot take a packed row.

Row p of P pairs holds prompt + chosen of pair p, row P + p holds prompt + rejected, padded on the right.
Nothing is shared, so a trunk is computed twice. Encoder-decoder models read the prompt in the encoder, once
for each response, and predict the response in the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from orpo_ds.data.packing import NO_PAIR, MicroBatch, PairSizes, TargetRows, no_target_rows, target_rows
from orpo_ds.data.truncate import TokenPair


def pad(
    pairs: Sequence[TokenPair],
    *,
    pair_ids: Sequence[int],
    pad_token_id: int,
    nll_on_prompt: bool = True,
    companion: Sequence[int] | None = None,
) -> MicroBatch:
    """Lay P pairs side by side, `input_ids` [2P, S] with S the longest sequence.

    Args:
        pairs: the pairs; none gives one padding token with one target row of weight zero.
        pair_ids: dataset index of every pair.
        pad_token_id: fills the rows on the right. Any id will do: it is masked, and no target row touches it.
        nll_on_prompt: see `packing.pack`.
        companion: ids of one more row, the last, that no target row points to (see `orpo_ds.data.vision`).
    """
    if not pairs:
        return _empty(torch.tensor([[pad_token_id] if companion is None else [*companion]]))
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    tokens = sum(len(sequence) for sequence in sequences)
    input_ids, attention_mask = _rectangle(
        sequences if companion is None else [*sequences, companion], pad_token_id
    )
    sizes = PairSizes.of(pairs)
    chosen_row, rejected_row = (torch.arange(len(sequences)) * input_ids.shape[1]).chunk(2)
    token_weight = attention_mask.float()
    token_weight[len(sequences) :] = 0.0
    return MicroBatch(
        input_ids=input_ids,
        position_ids=_positions(input_ids),
        attention_mask=attention_mask,
        layout=None,
        rows=target_rows(
            input_ids.flatten(),
            replace(sizes, trunk=torch.zeros_like(sizes.trunk)),  # side by side, nothing is shared
            chosen_row=chosen_row,
            branch_row=rejected_row,
            nll_on_prompt=nll_on_prompt,
        ),
        token_weight=token_weight,
        pair_ids=tuple(pair_ids),
        real_tokens=tokens,
        unshared_tokens=tokens,
    )


def pad_encoder_decoder(
    pairs: Sequence[TokenPair], *, pair_ids: Sequence[int], pad_token_id: int, decoder_start_token_id: int
) -> MicroBatch:
    """Lay P pairs out for an encoder-decoder model: prompts `input_ids` [2P, S], responses [2P, S_dec].

    The decoder starts with `decoder_start_token_id`, so every response token has a source, and the prompt has
    none: the nll covers the chosen response (as in TRL). Padding in `decoder_input_ids` stands on the right,
    where a causal decoder cannot see it, so it needs no mask. Other arguments as in `pad`.
    """
    if not pairs:
        return replace(
            _empty(torch.tensor([[pad_token_id]])), decoder_input_ids=torch.tensor([[decoder_start_token_id]])
        )
    prompts = [pair.chosen[: pair.chosen_start] for pair in pairs] + [
        pair.rejected[: pair.rejected_start] for pair in pairs
    ]
    responses = [pair.chosen[pair.chosen_start :] for pair in pairs] + [
        pair.rejected[pair.rejected_start :] for pair in pairs
    ]
    input_ids, attention_mask = _rectangle(prompts, pad_token_id)
    labels, label_mask = _rectangle(responses, pad_token_id)
    start = torch.full((len(responses), 1), decoder_start_token_id)
    tokens = int(attention_mask.sum() + label_mask.sum())
    return MicroBatch(
        input_ids=input_ids,
        position_ids=_positions(input_ids),
        attention_mask=attention_mask,
        layout=None,
        rows=_decoder_rows(labels, label_mask),
        token_weight=attention_mask.float(),
        pair_ids=tuple(pair_ids),
        real_tokens=tokens,
        unshared_tokens=tokens,
        decoder_input_ids=torch.cat((start, labels[:, :-1]), dim=1),
    )


def _decoder_rows(labels: Tensor, label_mask: Tensor) -> TargetRows:
    """Every label's source is the decoder's output at the label's own place, [2P, S_dec] flattened."""
    row, column = label_mask.nonzero().unbind(1)
    pairs = len(labels) // 2
    chosen = row < pairs
    chosen_len, rejected_len = label_mask.sum(1).chunk(2)
    return TargetRows(
        index=row * labels.shape[1] + column,
        label=labels[row, column],
        nll=chosen,
        chosen_pair=row.where(chosen, NO_PAIR),
        rejected_pair=(row - pairs).where(~chosen, NO_PAIR),
        chosen_len=chosen_len,
        rejected_len=rejected_len,
    )


def _rectangle(sequences: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """B sequences to ids and mask, int64 [B, S] each, padded on the right with `fill`."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[*sequence, *(fill,) * (width - len(sequence))] for sequence in sequences])
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return ids, (torch.arange(width) < lengths.unsqueeze(1)).long()


def _positions(input_ids: Tensor) -> Tensor:
    """0, 1, 2, ... in every row of [B, S]."""
    return torch.arange(input_ids.shape[1]).expand_as(input_ids)


def _empty(tokens: Tensor) -> MicroBatch:
    """Tokens [1, S] that weigh nothing; they are not masked, because a softmax over no key is NaN."""
    return MicroBatch(
        input_ids=tokens,
        position_ids=_positions(tokens),
        attention_mask=torch.ones_like(tokens),
        layout=None,
        rows=no_target_rows(),
        token_weight=torch.zeros_like(tokens, dtype=torch.float32),
        pair_ids=(),
        real_tokens=0,
        unshared_tokens=0,
    )
