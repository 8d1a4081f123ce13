"""How an attention score becomes a weight; the same for all segments of a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreRule:
    """score = scaling * q.k, then softcap * tanh(score / softcap), then the mask, then softmax.

    Attributes:
        scaling: factor of the dot product, usually D ** -0.5.
        window: a token sees itself and at most the `window - 1` tokens before it (transformers'
            `sliding_window`); None is no limit.
        softcap: bound of the scores (Gemma 2, arXiv:2408.00118, section 2); None is no bound.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
