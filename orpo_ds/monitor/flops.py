"""FLOPs that a training step cannot do without: those of its unique tokens.

For a pair with a trunk of t tokens and branches of c and r, forward and backward, by Kaplan et al. 2020
(arXiv:2001.08361, section 2.1):

    body        6 N (t + c + r)         2 N forward, 2 N for the hidden states' gradient, 2 N for the weights'
    attention   12 L W s                L layers, W = heads x head size, s = scores of a causal mask:
                                        (t+c)(t+c+1)/2 + r t + r(r+1)/2
    head        6 H V rows              rows whose log-prob the loss needs, H hidden size, V vocabulary

A frozen body or head has no weight gradient: 4 instead of 6. What is recomputed (gradient checkpointing,
tiles of the head) or wasted (padding, trunks computed twice) does not count, so the fraction of the device's
peak that these FLOPs make up measures how well the time was used, not how busy the device was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orpo_ds.data.batches import causal_scores
from orpo_ds.data.feed import LengthsByPair
from orpo_ds.model.size import ModelSize


@dataclass(frozen=True)
class UsefulFlops:
    """Counts the useful FLOPs of pairs of one dataset in one model.

    Attributes:
        size: parameters, layers and attention width of the model.
        lengths: tokens of every pair of the dataset.
        nll_on_prompt: whether the loss needs the log-probs of prompt tokens.
    """

    size: ModelSize
    lengths: LengthsByPair
    nll_on_prompt: bool

    def __call__(self, pairs: Sequence[int]) -> float:
        """FLOPs of forward and backward of these pairs (dataset indices)."""
        if not pairs:
            return 0.0
        lengths = self.lengths.of(pairs)
        trunk, chosen, rejected = (
            tokens.astype(np.float64) for tokens in (lengths.trunk, lengths.chosen, lengths.rejected)
        )
        scores = causal_scores(trunk, chosen, rejected)
        rows = lengths.nll_tokens(nll_on_prompt=self.nll_on_prompt) + rejected
        size = self.size
        body = (4.0 if size.body_frozen else 6.0) * size.body_parameters
        head = (4.0 if size.head_frozen else 6.0) * size.head_parameters
        attention = 12.0 * size.layers * size.attention_width
        return float((body * (trunk + chosen + rejected) + attention * scores + head * rows).sum())
