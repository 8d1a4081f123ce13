"""NEFTune: noise on the embeddings while training (Jain et al., arXiv:2310.05914).

The paper draws uniform noise of at most alpha / sqrt(L H) for a sequence of L tokens and hidden size H. transformers'
hook takes the width of the batch for L, which in a packed row would be the tokens of all pairs together. Here L is the
longer sequence of a token's own pair, which is transformers' value for a batch of that pair alone; it does not depend
on what else is in the micro-batch, and is the same packed and padded. A trunk is computed once, so both of its
branches see one draw of its noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.neftune import activate_neftune

from orpo_ds.data.packing import VarlenLayout
from orpo_ds.model.anatomy import ModelParts


@contextmanager
def embedding_noise(parts: ModelParts, alpha: float | None) -> Iterator[None]:
    """Add noise to the input embeddings while the model is in training mode.

    Args:
        parts: the model. One with an encoder gets transformers' own hook.
        alpha: strength of the noise (`neftune_noise_alpha`); None for none.
    """
    if alpha is None:
        yield
        return
    if parts.is_encoder_decoder:
        handles = [activate_neftune(parts.model, alpha)]
    else:
        noise = _Noise(alpha)
        embeddings = parts.model.get_input_embeddings()
        # A vision-language model embeds the text before it calls the backbone.
        entrances = {parts.backbone, parts.model.base_model}
        handles = [
            module.register_forward_pre_hook(noise.see_lengths, with_kwargs=True) for module in entrances
        ]
        handles.append(embeddings.register_forward_hook(noise.add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Noise:
    """Two hooks: the backbone's tells the length of each token's pair, the embedding's adds the noise."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._lengths = torch.ones(1, 1)

    def see_lengths(self, module: nn.Module, words: Any, keywords: dict[str, Any]) -> None:
        """Read them off the layout of a packed row, or the mask of padded ones."""
        if (layout := keywords.get("layout")) is not None:
            self._lengths = packed_lengths(layout)[None]
        elif torch.is_tensor(mask := keywords.get("attention_mask")) and mask.dim() == 2:
            self._lengths = padded_lengths(mask)[:, None]

    def add(self, module: nn.Module, words: Any, embedded: Tensor) -> Tensor:
        """`embedded` `[B, S, H]` with noise of its own on every element."""
        if not module.training:
            return embedded
        lengths = self._lengths.to(embedded.device, torch.float32)
        largest = self._alpha / torch.sqrt(lengths * embedded.shape[-1])
        noise = torch.zeros_like(embedded).uniform_(-1, 1)
        return embedded + noise * largest[..., None].to(embedded.dtype)


def packed_lengths(layout: VarlenLayout) -> Tensor:
    """`[T]`: for each token of a packed row, the tokens of the longer sequence of its pair."""
    lengths = torch.ones(max(end for _, end, _, _ in layout.segments))
    first: dict[int, tuple[int, int]] = {}  # where a segment that has a trunk begins -> its range
    for start, end, trunk_start, trunk_length in layout.segments:
        length = trunk_length + end - start
        if trunk_length and trunk_start in first:
            other_start, other_end = first[trunk_start]
            length = max(length, other_end - other_start)
            lengths[other_start:other_end] = length
        lengths[start:end] = length
        first[start] = (start, end)
    return lengths


def padded_lengths(attention_mask: Tensor) -> Tensor:
    """`[2P]`: for each row (P chosen, then P rejected), the tokens of the longer sequence of its pair.

    Args:
        attention_mask: `[2P, S]`, 1 where a token is.
    """
    rows = attention_mask.sum(1)
    pairs = math.ceil(len(rows) / 2)
    return torch.maximum(rows[:pairs], rows[-pairs:]).repeat(2)[: len(rows)]
