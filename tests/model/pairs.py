"""Random pairs, and the same numbers computed without packing: what the packed results are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orpo_ds.data.packing import TargetRows
from orpo_ds.data.truncate import TokenPair
from orpo_ds.model.kernels.score_rule import ScoreRule

FIRST_ORDINARY_ID = 3  # below it: pad, bos, eos

# (trunk, chosen, rejected): ordinary, a trunk of one token, a branch of one token, no rejected branch, no
# chosen branch, nothing in common.
SHAPES = ((12, 9, 14), (1, 5, 4), (30, 1, 17), (6, 7, 0), (5, 0, 6), (0, 11, 13))


def random_pair(
    *, trunk: int, chosen: int, rejected: int, vocab_size: int, generator: torch.Generator
) -> TokenPair:
    """A pair whose sequences share `trunk` tokens and go on for `chosen` and `rejected` tokens.

    The prompt is the trunk. Where one sequence is the beginning of the other, so that the trunk holds a whole
    response, the prompt is half of it.
    """

    def draw(count: int) -> list[int]:
        return torch.randint(FIRST_ORDINARY_ID, vocab_size, (count,), generator=generator).tolist()

    shared, branch_c, branch_r = draw(trunk), draw(chosen), draw(rejected)
    if branch_c and branch_r and branch_c[0] == branch_r[0]:  # or the trunk would be longer than asked for
        ordinary = vocab_size - FIRST_ORDINARY_ID
        branch_r[0] = FIRST_ORDINARY_ID + (branch_r[0] - FIRST_ORDINARY_ID + 1) % ordinary
    prompt = trunk if branch_c and branch_r else trunk // 2
    return TokenPair(
        chosen=shared + branch_c,
        rejected=shared + branch_r,
        chosen_start=prompt,
        rejected_start=prompt,
        trunk=trunk,
    )


def random_pairs(shapes: Sequence[tuple[int, int, int]], *, vocab_size: int, seed: int) -> list[TokenPair]:
    """A pair for each (trunk, chosen, rejected)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        random_pair(trunk=trunk, chosen=chosen, rejected=rejected, vocab_size=vocab_size, generator=generator)
        for trunk, chosen, rejected in shapes
    ]


def logps_of(logits: Tensor, rows: TargetRows) -> Tensor:
    """[R] log-probs of the target rows from logits [N, V], in the logits' dtype."""
    return logits.log_softmax(-1)[rows.index, rows.label]


def full_sequence_attention(
    pairs: Sequence[TokenPair], query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule
) -> Tensor:
    """Attention of the packed rows [T, Hq, Dv] in float64, from the lengths of the pairs alone.

    Each of the two sequences of a pair is put together from its rows and gets plain causal attention; a row
    of the trunk takes its output from the chosen sequence. Differentiable in query, key and value.
    """
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    start = 0
    for pair in pairs:
        chosen_end = start + len(pair.chosen)
        end = chosen_end + len(pair.rejected) - pair.trunk
        chosen = torch.arange(start, chosen_end)
        rejected = torch.cat((torch.arange(start, start + pair.trunk), torch.arange(chosen_end, end)))
        outputs.append(_one_sequence(query[chosen], key[chosen], value[chosen], rule))
        outputs.append(_one_sequence(query[rejected], key[rejected], value[rejected], rule)[pair.trunk :])
        start = end
    return torch.cat(outputs)


def _one_sequence(query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule) -> Tensor:
    """[S, H, D] against itself."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    position = torch.arange(len(query))
    distance = position.unsqueeze(1) - position
    hidden = distance < 0
    if rule.window is not None:
        hidden |= distance >= rule.window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)
