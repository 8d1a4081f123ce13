"""Token pairs become the tensors of one micro-batch: one packed row, no padding, every trunk computed once.

A pair is laid down as trunk, chosen branch, rejected branch. Positions of both branches continue from the
trunk:

    row        0  1  2 | 3  4  5 | 6  7          trunk a b c, chosen d e f, rejected x y
    token      a  b  c   d  e  f   x  y
    position   0  1  2   3  4  5   3  4

A branch attends to (trunk + itself). In a causal model the hidden states of equal prefixes are equal, so this
row gives the loss and the gradients of the two full sequences `abcdef` and `abcxy` for the price of their
union.

Attention sees **two** segments a pair, as queries against gathered keys:

    queries            keys               scores
    trunk + chosen     trunk + chosen     (t + c)^2 / 2
    rejected           trunk + rejected   r t + r^2 / 2

The other possible layout has three (trunk; chosen against trunk + chosen; rejected against trunk + rejected).
It computes the same scores but gathers the trunk once more, `3t + c + r` rows of keys and of values instead
of `2t + c + r` (forward, and scattered back in backward), and hands the kernel half as many segments again,
each with a partly filled last block. So two it is. The mask is causal and aligned bottom-right, which is what
flash-attn >= 2.1 does when a segment has more keys than queries: query i of the rejected branch sees the
trunk and branch tokens 0..i.

The loss needs one log-prob a target row: a hidden state (the source) and the token that follows it (the
label). The last trunk token is the source of the first token of *both* branches. When responses share their
first words those words lie in the trunk, and one target row then counts for the chosen and for the rejected
mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from orpo_ds.data.truncate import TokenPair

NO_PAIR = -1  # in TargetRows.chosen_pair and .rejected_pair: the row belongs to no such response


@dataclass(frozen=True, eq=False)
class VarlenLayout:
    """What a variable-length attention kernel must know of one packed row.

    T tokens, S segments, K gathered keys.

    Attributes:
        cu_seqlens_q: int32 [S+1], cumulated query lengths; segment s asks with rows `cu_seqlens_q[s]` up to
            `cu_seqlens_q[s+1]`. The segments cover the row in order, so the queries need no gather.
        cu_seqlens_k: int32 [S+1], cumulated key lengths, into the gathered keys.
        max_seqlen_q: longest query segment, in tokens.
        max_seqlen_k: longest key segment, in tokens.
        kv_index: int32 [K], the row of every gathered key and value: `k_packed = k[kv_index]`.
        segments: the same on the host, a segment as (q_start, q_end, trunk_start, trunk_len): its keys are
            the `trunk_len` rows from `trunk_start` on, then the rows `q_start` up to `q_end`. With
            `trunk_len` 0 the segment is self-contained.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    kv_index: Tensor
    segments: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, eq=False)
class TargetRows:
    """The R token log-probs that the loss needs, in ascending order of their source; P pairs.

    Attributes:
        index: int64 [R], the source's place in the flattened hidden states, [T, H] packed or [B*S, H] padded.
        label: int64 [R], the token id whose log-prob is asked for.
        nll: bool [R], counts in the nll.
        chosen_pair: int64 [R], number (in this micro-batch) of the pair whose chosen response has this token,
            or -1.
        rejected_pair: int64 [R], the same for the rejected response.
        chosen_len: int64 [P], chosen response tokens with a log-prob: the denominator of the mean.
        rejected_len: int64 [P], the same for the rejected response.
    """

    index: Tensor
    label: Tensor
    nll: Tensor
    chosen_pair: Tensor
    rejected_pair: Tensor
    chosen_len: Tensor
    rejected_len: Tensor


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank pushes through the model at once.

    Attributes:
        input_ids: int64, [1, T] packed or [B, S] padded.
        position_ids: int64, shape of `input_ids`.
        attention_mask: int64 [B, S], 1 for a token and 0 for padding; None when packed.
        layout: the segments of the packed row; None when padded.
        rows: the token log-probs to compute.
        token_weight: fp32, shape of `input_ids`: how often the token stands in the two full sequences (2 in a
            trunk, 1 in a branch, 0 in padding). Statistics over tokens, such as a router's load, are weighted
            by it.
        pair_ids: dataset index of every pair, for messages.
        real_tokens: tokens pushed through the model that are not padding. `real_tokens / input_ids.numel()`
            is the packing efficiency.
        unshared_tokens: tokens of the two full sequences. `1 - real_tokens / unshared_tokens` is what the
            trunks save.
        decoder_input_ids: int64 [B, S_dec], encoder-decoder models only. `rows.index` then points into the
            flattened output of the decoder.
        image_inputs: what a vision-language model is given beside the ids (`pixel_values` and so on), by name; None
            for text. Then a batch is padded.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    layout: VarlenLayout | None
    rows: TargetRows
    token_weight: Tensor
    pair_ids: tuple[int, ...]
    real_tokens: int
    unshared_tokens: int
    decoder_input_ids: Tensor | None = None
    image_inputs: dict[str, Any] | None = None

    def map_tensors(self, apply: Callable[[Tensor], Tensor]) -> MicroBatch:
        """The same micro-batch with `apply` of every tensor in it, those of `layout` and `rows` included."""

        def visit(value: Any) -> Any:
            if isinstance(value, Tensor):
                return apply(value)
            if isinstance(value, dict):
                return {name: visit(held) for name, held in value.items()}
            if isinstance(value, list):
                return [visit(held) for held in value]
            if is_dataclass(value) and not isinstance(value, type):
                return replace(
                    value, **{field.name: visit(getattr(value, field.name)) for field in fields(value)}
                )
            return value

        mapped: MicroBatch = visit(self)
        return mapped

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MicroBatch:
        """The same micro-batch on `device`."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))


@dataclass(frozen=True, eq=False)
class PairSizes:
    """Lengths and borders of P pairs, int64 [P] each; the fields are those of TokenPair, in tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_start: Tensor
    rejected_start: Tensor
    trunk: Tensor

    @classmethod
    def of(cls, pairs: Sequence[TokenPair]) -> PairSizes:
        """Measure the pairs."""
        sizes = [
            (len(pair.chosen), len(pair.rejected), pair.chosen_start, pair.rejected_start, pair.trunk)
            for pair in pairs
        ]
        return cls(*torch.tensor(sizes, dtype=torch.int64).reshape(-1, 5).unbind(1))


def pack(pairs: Sequence[TokenPair], *, pair_ids: Sequence[int], nll_on_prompt: bool = True) -> MicroBatch:
    """Lay the pairs into one row of T = sum(trunk + chosen branch + rejected branch) tokens.

    Args:
        pairs: the pairs; none gives one dummy token with one target row of weight zero, so that a rank
            without work still makes the same collectives as the others.
        pair_ids: dataset index of every pair.
        nll_on_prompt: the nll covers prompt and response of the chosen sequence (as in TRL and in the
            authors' code), or with False the chosen response only.

    Returns:
        A micro-batch on the CPU with `input_ids` [1, T] and a `layout`.
    """
    if not pairs:
        return _empty_row()
    sizes = PairSizes.of(pairs)
    flat_ids = torch.tensor(
        list(
            chain.from_iterable(part for pair in pairs for part in (pair.chosen, pair.rejected[pair.trunk :]))
        )
    )
    branch = sizes.rejected - sizes.trunk
    pair_start = torch.cumsum(sizes.chosen + branch, 0) - (sizes.chosen + branch)
    in_trunk = concatenated_ranges(pair_start, sizes.trunk)
    return MicroBatch(
        input_ids=flat_ids.unsqueeze(0),
        position_ids=concatenated_ranges(
            _interleave(torch.zeros_like(sizes.trunk), sizes.trunk), _interleave(sizes.chosen, branch)
        ).unsqueeze(0),
        attention_mask=None,
        layout=_varlen_layout(sizes, pair_start),
        rows=target_rows(
            flat_ids,
            sizes,
            chosen_row=pair_start,
            branch_row=pair_start + sizes.chosen,
            nll_on_prompt=nll_on_prompt,
        ),
        token_weight=torch.ones(1, len(flat_ids)).index_fill_(1, in_trunk, 2.0),
        pair_ids=tuple(pair_ids),
        real_tokens=len(flat_ids),
        unshared_tokens=int((sizes.chosen + sizes.rejected).sum()),
    )


def count_targets(pair: TokenPair, nll_on_prompt: bool) -> int:
    """Nll tokens of the pair: those tokens of the chosen sequence that count and have a token before them."""
    return len(pair.chosen) - (1 + pair.image_tokens if nll_on_prompt else max(pair.chosen_start, 1))


def target_rows(
    flat_ids: Tensor, sizes: PairSizes, *, chosen_row: Tensor, branch_row: Tensor, nll_on_prompt: bool
) -> TargetRows:
    """Find source and label of every token log-prob that the loss of P pairs needs.

    Args:
        flat_ids: int64 [N], the token ids of all rows.
        sizes: lengths and borders; `sizes.trunk` is how many tokens the two sequences share *in this layout*,
            so it is zero when they are padded side by side.
        chosen_row: int64 [P], row of the first token of the chosen sequence.
        branch_row: int64 [P], row of the first token of the rejected sequence that it does not share.
        nll_on_prompt: see `pack`.
    """
    pair = torch.arange(len(sizes.chosen))
    first = torch.ones_like(pair)  # token 0 of a sequence has no source

    pair_c = pair.repeat_interleave(sizes.chosen - first)
    token_c = concatenated_ranges(first, sizes.chosen - first)
    label_row_c = chosen_row[pair_c] + token_c
    in_chosen = token_c >= sizes.chosen_start[pair_c]
    in_rejected = (token_c >= sizes.rejected_start[pair_c]) & (token_c < sizes.trunk[pair_c])

    first = sizes.trunk.clamp(min=1)  # what lies in the trunk was counted above
    pair_r = pair.repeat_interleave(sizes.rejected - first)
    token_r = concatenated_ranges(first, sizes.rejected - first)
    label_row_r = branch_row[pair_r] + token_r - sizes.trunk[pair_r]
    follows_trunk = token_r == sizes.trunk[pair_r]
    source_r = torch.where(follows_trunk, chosen_row[pair_r] + token_r, label_row_r) - 1
    in_rejected_branch = token_r >= sizes.rejected_start[pair_r]

    index = torch.cat((label_row_c - 1, source_r))
    label = flat_ids[torch.cat((label_row_c, label_row_r))]
    nll = torch.cat((in_chosen | nll_on_prompt, torch.zeros_like(in_rejected_branch)))
    chosen_pair = torch.cat((pair_c.where(in_chosen, NO_PAIR), torch.full_like(pair_r, NO_PAIR)))
    rejected_pair = torch.cat((pair_c.where(in_rejected, NO_PAIR), pair_r.where(in_rejected_branch, NO_PAIR)))

    needed = (nll | (chosen_pair != NO_PAIR) | (rejected_pair != NO_PAIR)).nonzero().squeeze(1)
    order = needed[torch.argsort(index[needed], stable=True)]
    chosen_len = sizes.chosen - sizes.chosen_start.clamp(min=1)
    rejected_len = sizes.rejected - sizes.rejected_start.clamp(min=1)
    assert bool(((chosen_len > 0) & (rejected_len > 0)).all()), (
        "a response without a log-prob: tokenize refuses those"
    )
    return TargetRows(
        index=index[order],
        label=label[order],
        nll=nll[order],
        chosen_pair=chosen_pair[order],
        rejected_pair=rejected_pair[order],
        chosen_len=chosen_len,
        rejected_len=rejected_len,
    )


def without_labels(rows: TargetRows, ids: Sequence[int]) -> TargetRows:
    """The target rows less those of the nll with one of these labels; responses have none of them."""
    counted = rows.nll & ~torch.isin(rows.label, torch.tensor(ids))
    needed = counted | (rows.chosen_pair != NO_PAIR) | (rows.rejected_pair != NO_PAIR)
    if not len(rows.chosen_len):
        return rows  # no pairs, and one row that counts for nothing
    return replace(
        rows,
        index=rows.index[needed],
        label=rows.label[needed],
        nll=counted[needed],
        chosen_pair=rows.chosen_pair[needed],
        rejected_pair=rows.rejected_pair[needed],
    )


def no_target_rows() -> TargetRows:
    """The target rows of a micro-batch without pairs: one row, so that the head runs, that counts for nothing."""
    zero, none = torch.zeros(1, dtype=torch.int64), torch.full((1,), NO_PAIR)
    return TargetRows(
        index=zero,
        label=zero,
        nll=torch.zeros(1, dtype=torch.bool),
        chosen_pair=none,
        rejected_pair=none,
        chosen_len=zero[:0],
        rejected_len=zero[:0],
    )


def concatenated_ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """`arange(start, start + length)` of every entry, one after the other, int64 [sum(lengths)]."""
    offsets = starts - (lengths.cumsum(0) - lengths)
    return offsets.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """[P] and [P] to [2P]: first[0], second[0], first[1], ..."""
    return torch.stack((first, second), dim=1).flatten()


def _varlen_layout(sizes: PairSizes, pair_start: Tensor) -> VarlenLayout:
    """Two segments a pair (see the top of this file); one where the rejected branch is empty."""
    nothing = torch.zeros_like(sizes.trunk)
    queries = _interleave(sizes.chosen, sizes.rejected - sizes.trunk)
    query_start = _interleave(pair_start, pair_start + sizes.chosen)
    trunk = _interleave(nothing, sizes.trunk)
    trunk_start = _interleave(pair_start, pair_start)

    present = queries > 0  # a rejected response that is a prefix of the chosen one leaves no query
    queries, query_start, trunk, trunk_start = (
        t[present] for t in (queries, query_start, trunk, trunk_start)
    )
    keys = trunk + queries
    return VarlenLayout(
        cu_seqlens_q=_cumulated(queries),
        cu_seqlens_k=_cumulated(keys),
        max_seqlen_q=int(queries.max()),
        max_seqlen_k=int(keys.max()),
        kv_index=concatenated_ranges(
            _interleave(trunk_start, query_start), _interleave(trunk, queries)
        ).int(),
        segments=tuple(
            zip(
                query_start.tolist(),
                (query_start + queries).tolist(),
                trunk_start.tolist(),
                trunk.tolist(),
                strict=True,
            )
        ),
    )


def _cumulated(lengths: Tensor) -> Tensor:
    """[S] lengths to int32 [S+1] borders, as the kernels want them."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def _empty_row() -> MicroBatch:
    """One dummy token that attends to itself and weighs nothing."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    border = torch.tensor([0, 1], dtype=torch.int32)
    return MicroBatch(
        input_ids=token,
        position_ids=token,
        attention_mask=None,
        layout=VarlenLayout(
            cu_seqlens_q=border,
            cu_seqlens_k=border,
            max_seqlen_q=1,
            max_seqlen_k=1,
            kv_index=border[:1],
            segments=((0, 1, 0, 0),),
        ),
        rows=no_target_rows(),
        token_weight=torch.zeros(1, 1),
        pair_ids=(),
        real_tokens=0,
        unshared_tokens=0,
    )
