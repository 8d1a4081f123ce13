"""Attention of a packed row on any device and dtype: torch's SDPA, segment by segment.

A segment that only sees itself is plain causal attention, which SDPA has a fast path for. A rejected branch
sees its trunk too: SDPA aligns `is_causal` top-left, so those segments, and all that a sliding window cuts,
carry a boolean mask. (Two calls, trunk and branch, merged by their log-sum-exp do fewer products but were no
faster on a CPU: 5.8 ms against 4.6 ms forward, 20 ms against 17 ms with backward; 9 heads of 64, trunk 350,
branch 230, one core, fp32.)

A mask is as large as the scores of a head, which a long pair must never keep. Beyond SCORES_AT_ONCE a branch
on a CPU takes those two calls (`trunk_and_branch.py`), and everything else a block of queries at a time, each
with its own mask, against the keys that a window leaves it; blocks are computed again in backward.

SDPA knows no soft-cap. Those scores are computed here, in fp32, in such blocks always.

Keys are cut into pieces once, at all borders of the layout, and a segment joins the pieces it sees. Slicing
the row for each segment would be shorter, but the backward of every slice fills a gradient of the whole row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from orpo_ds.data.packing import VarlenLayout
from orpo_ds.model.kernels.score_rule import ScoreRule
from orpo_ds.model.kernels.trunk_and_branch import trunk_and_branch

SCORES_AT_ONCE = 2**24  # of a mask, or of all heads of a block of queries: 64 MiB in fp32


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
        trunk = _join(key_pieces, segment.trunk), _join(value_pieces, segment.trunk)
        own = _join(key_pieces, segment.own), _join(value_pieces, segment.own)
        if _merges(segment, query, value, rule):
            out = trunk_and_branch(segment_query, trunk, own, scaling=rule.scaling)
        else:
            segment_key, segment_value = (
                torch.cat(both, dim=1) if segment.trunk else both[1] for both in zip(trunk, own, strict=True)
            )
            if rule.softcap is not None:
                out = _in_blocks(_softcapped, segment_query, segment_key, segment_value, rule)
            elif segment.is_large(rule):
                out = _in_blocks(_attend, segment_query, segment_key, segment_value, rule)
            else:
                mask = plan.mask(segment, rule, query.device)
                out = _attend(segment_query, segment_key, segment_value, mask, rule)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def _merges(segment: _Segment, query: Tensor, value: Tensor, rule: ScoreRule) -> bool:
    """Whether a branch is long, and torch's flash kernel for CPUs takes it in two calls."""
    plain = rule.softcap is None and not segment.cut_by(rule.window)
    suits = query.device.type == "cpu" and query.shape[-1] == value.shape[-1]
    return plain and suits and segment.is_large(rule)


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


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rule: ScoreRule) -> Tensor:
    """The same with soft-capped scores."""
    assert rule.softcap is not None
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).unflatten(0, (key.shape[0], -1))  # [Hkv, Hq/Hkv, rows, D]
    scores = grouped @ key.to(dtype).unsqueeze(1).transpose(-1, -2)
    scores = rule.softcap * torch.tanh(scores * (rule.scaling / rule.softcap))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ value.to(dtype).unsqueeze(1)).flatten(0, 1).to(query.dtype)


def _in_blocks(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, ScoreRule], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: ScoreRule,
) -> Tensor:
    """Attention of one segment, a block of queries at a time; backward computes each block again."""

    def block(rows: Tensor, key: Tensor, value: Tensor, first: int, last: int) -> Tensor:
        """Queries `rows` against the keys from `first` up to `last`, which is the one that the last of them is."""
        mask = visible_keys(rows.shape[1], last - first, window=rule.window, device=rows.device)
        return attend(rows, key[:, first:last], value[:, first:last], mask, rule)

    heads, num_queries, _ = query.shape
    num_keys = key.shape[1]
    outputs, last = [], num_keys - num_queries
    for rows in query.split(_rows_at_once(heads, num_keys, rule.window), dim=1):
        first = 0 if rule.window is None else max(last - rule.window + 1, 0)
        last += rows.shape[1]
        outputs.append(checkpoint(block, rows, key, value, first, last, use_reentrant=False))
    return torch.cat(outputs, dim=1)


def _rows_at_once(heads: int, num_keys: int, window: int | None) -> int:
    """Queries whose scores are at most SCORES_AT_ONCE: r of them see num_keys, or r - 1 + window."""
    scores = SCORES_AT_ONCE // heads
    rows = scores // num_keys
    if window is not None:
        rows = max(rows, int((math.sqrt(window**2 + 4 * scores) - window) / 2))
    return max(rows, 1)


def visible_keys(num_queries: int, num_keys: int, *, window: int | None, device: torch.device) -> Tensor:
    """Bool [num_queries, num_keys], causal and aligned bottom-right: the last query sees the last key."""
    key_position = torch.arange(num_keys, device=device)
    query_position = key_position[num_keys - num_queries :].unsqueeze(1)
    visible = key_position <= query_position
    return visible if window is None else visible & (query_position - key_position < window)


def _join(pieces: tuple[Tensor, ...], wanted: tuple[int, ...]) -> Tensor:
    """The wanted pieces, one after the other; none is an empty tensor."""
    if len(wanted) == 1:
        return pieces[wanted[0]]
    return torch.cat([pieces[piece] for piece in wanted], dim=1) if wanted else pieces[0][:, :0]


@dataclass(frozen=True)
class _Segment:
    """One segment: how many queries and keys, and the pieces of its trunk, if it has one, and of its own tokens."""

    queries: int
    keys: int
    trunk: tuple[int, ...]
    own: tuple[int, ...]

    def cut_by(self, window: int | None) -> bool:
        """Whether a sliding window hides a key from some query."""
        return window is not None and window < self.keys

    def is_large(self, rule: ScoreRule) -> bool:
        """Whether it needs a mask, and a larger one than may exist."""
        needs_mask = self.cut_by(rule.window) or self.queries < self.keys
        return needs_mask and self.queries * self.keys > SCORES_AT_ONCE


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
            segments.append(_Segment(q_end - q_start, trunk_len + q_end - q_start, tuple(trunk), tuple(own)))
        return cls([end - start for start, end in pairwise(borders)], segments)

    def mask(self, segment: _Segment, rule: ScoreRule, device: torch.device) -> Tensor | None:
        """Bool [queries, keys], or None where `is_causal` says the same."""
        window = rule.window if segment.cut_by(rule.window) else None
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
