"""Attention of a packed row on any device and dtype: torch's SDPA, segment by segment.

A segment that only sees itself is plain causal attention, which SDPA has a fast path for. A rejected branch
sees its trunk too: SDPA aligns `is_causal` top-left, so those segments, and all that a sliding window cuts,
carry a boolean mask. (Two calls, trunk and branch, merged by their log-sum-exp do fewer products but were no
faster on a CPU: 5.8 ms against 4.6 ms forward, 20 ms against 17 ms with backward; 9 heads of 64, trunk 350,
branch 230, one core, fp32.)

SDPA knows no soft-cap. Those scores are computed here, in fp32, for a block of queries at a time, and again
in backward, so that a block is all that is ever alive.

Keys are cut into pieces once, at all borders of the layout, and a segment joins the pieces it sees. Slicing
the row for each segment would be shorter, but the backward of every slice fills a gradient of the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from orpo_ds.data.packing import VarlenLayout
from orpo_ds.model.kernels.score_rule import ScoreRule

SCORES_AT_ONCE = 2**24  # soft-cap only: 64 MiB of fp32 scores


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, rule: ScoreRule
) -> Tensor:
    """Attention of a packed row; see `orpo_ds.model.kernels` for the shapes."""
    plan = _plan_of(layout)
    query, key, value = (heads.transpose(0, 1) for heads in (query, key, value))  # [H, T, D]
    queries = query.split([segment.queries for segment in plan.segments], dim=1)
    key_pieces = key.split(plan.piece_sizes, dim=1)
    value_pieces = value.split(plan.piece_sizes, dim=1)
    outputs = []
    for segment, segment_query in zip(plan.segments, queries, strict=True):
        segment_key = _join(key_pieces, segment.pieces)
        segment_value = _join(value_pieces, segment.pieces)
        mask = plan.mask(segment, rule, query.device)
        if rule.softcap is None:
            out = _attend(segment_query, segment_key, segment_value, mask, rule)
        else:
            out = _attend_softcapped(segment_query, segment_key, segment_value, mask, rule)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: ScoreRule) -> Tensor:
    """Heads-first attention of one segment, [Hq, Lq, D] against [Hkv, Lk, D]; without a mask it is causal."""
    groups = query.shape[0] // key.shape[0]
    if query.device.type != "cpu":  # elsewhere grouped heads may fall to the kernel that keeps all scores
        key, value = (heads.repeat_interleave(groups, dim=0) for heads in (key, value))
        groups = 1
    out = scaled_dot_product_attention(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=rule.scaling,
        enable_gqa=groups > 1,
    )
    return out.squeeze(0)


def _attend_softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: ScoreRule
) -> Tensor:
    """The same with soft-capped scores, a block of queries at a time."""
    heads, num_queries, _ = query.shape
    num_keys = key.shape[1]
    if mask is None:
        mask = visible_keys(num_queries, num_keys, window=None, device=query.device)
    rows = max(1, SCORES_AT_ONCE // (heads * num_keys))
    blocks = zip(query.split(rows, dim=1), mask.split(rows), strict=True)
    outputs = [
        checkpoint(_softcapped_block, block, key, value, block_mask, rule, use_reentrant=False)
        for block, block_mask in blocks
    ]
    return torch.cat(outputs, dim=1)


def _softcapped_block(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rule: ScoreRule) -> Tensor:
    assert rule.softcap is not None
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).unflatten(0, (key.shape[0], -1))  # [Hkv, Hq/Hkv, rows, D]
    scores = grouped @ key.to(dtype).unsqueeze(1).transpose(-1, -2)
    scores = rule.softcap * torch.tanh(scores * (rule.scaling / rule.softcap))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ value.to(dtype).unsqueeze(1)).flatten(0, 1).to(query.dtype)


def visible_keys(num_queries: int, num_keys: int, *, window: int | None, device: torch.device) -> Tensor:
    """Bool [num_queries, num_keys], causal and aligned bottom-right: the last query sees the last key."""
    key_position = torch.arange(num_keys, device=device)
    query_position = key_position[num_keys - num_queries :].unsqueeze(1)
    visible = key_position <= query_position
    return visible if window is None else visible & (query_position - key_position < window)


def _join(pieces: tuple[Tensor, ...], wanted: tuple[int, ...]) -> Tensor:
    return pieces[wanted[0]] if len(wanted) == 1 else torch.cat([pieces[piece] for piece in wanted], dim=1)


@dataclass(frozen=True)
class _Segment:
    """One segment: how many queries and keys, and the pieces that its keys are joined of."""

    queries: int
    keys: int
    pieces: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Plan:
    """How to cut the row, and the masks of its segments, which all layers of a micro-batch share.

    A mask has a byte for each score of a head; segments that `is_causal` serves have none.
    """

    piece_sizes: list[int]
    segments: list[_Segment]
    masks: dict[tuple[int, int, int | None, torch.device], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: VarlenLayout) -> _Plan:
        borders = sorted({border for segment in layout.segments for border in _borders(*segment)})
        number = {start: piece for piece, start in enumerate(borders)}
        segments = []
        for q_start, q_end, trunk_start, trunk_len in layout.segments:
            trunk = range(number[trunk_start], number[trunk_start + trunk_len]) if trunk_len else ()
            own = range(number[q_start], number[q_end])
            segments.append(_Segment(q_end - q_start, trunk_len + q_end - q_start, (*trunk, *own)))
        return cls([end - start for start, end in pairwise(borders)], segments)

    def mask(self, segment: _Segment, rule: ScoreRule, device: torch.device) -> Tensor | None:
        """Bool [queries, keys], or None where `is_causal` says the same."""
        window = rule.window if rule.window is not None and rule.window < segment.keys else None
        if window is None and segment.queries == segment.keys:
            return None
        wanted = (segment.queries, segment.keys, window, device)
        if wanted not in self.masks:
            self.masks[wanted] = visible_keys(segment.queries, segment.keys, window=window, device=device)
        return self.masks[wanted]


def _borders(q_start: int, q_end: int, trunk_start: int, trunk_len: int) -> tuple[int, ...]:
    return (q_start, q_end, trunk_start, trunk_start + trunk_len) if trunk_len else (q_start, q_end)


_plans: WeakKeyDictionary[VarlenLayout, _Plan] = WeakKeyDictionary()  # a plan dies with its micro-batch


def _plan_of(layout: VarlenLayout) -> _Plan:
    plan = _plans.get(layout)
    if plan is None:
        plan = _plans[layout] = _Plan.of(layout)
    return plan
