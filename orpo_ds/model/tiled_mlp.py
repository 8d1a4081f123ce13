"""The MLPs of a long row, some tokens at a time.

Between its two matrices an MLP is several times as wide as the hidden states: for 131,072 tokens of a model with an
intermediate size of 11,008 each of three such tensors takes 2.9 GB in bf16, in the one layer that is being computed. A
token's MLP looks at no other token, so the row goes through it in tiles, and a tile is computed again in backward
(`torch.utils.checkpoint`): the wide tensors of one tile are all that ever exists, for one more forward of the MLPs.

DeepSpeed's `TiledMLP` does the same with a backward pass of its own for each tile, and has to tell ZeRO which of them
is the last. Here the tiles are one graph, in which each weight's gradient is complete once. Under ZeRO-3 an MLP must be
a leaf module (`tiled_modules` says which), so that it is gathered once, however many tiles a rank has: ranks whose rows
differ in length would wait for each other for ever otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orpo_ds.model.anatomy import ModelParts


def tiled_modules(parts: ModelParts) -> list[nn.Module]:
    """The MLPs of the backbone's layers: transformers names their classes `...MLP`.

    Raises:
        ValueError: there is none.
    """
    found = [module for module in parts.backbone.modules() if type(module).__name__.endswith("MLP")]
    if not found:
        raise ValueError(
            f"mlp_tile_tokens: no layer of {type(parts.backbone).__name__} has a module whose class is named ...MLP. "
            "There is nothing to tile. Leave it out."
        )
    return found


@contextmanager
def tiled_mlps(parts: ModelParts, tokens: int | None) -> Iterator[None]:
    """Within the context the model's MLPs take at most so many tokens at once.

    Backward recomputes tiles, so it must lie within the context too.

    Args:
        parts: of the model.
        tokens: of a tile; None: all.
    """
    if tokens is None:
        yield
        return
    modules = tiled_modules(parts)
    for module in modules:
        module.forward = partial(_in_tiles, module.forward, tokens)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # what is set on the object; that of the class shows again


def _in_tiles(forward: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor) -> Tensor:
    """`forward` of [..., T, H], a tile of tokens at a time."""
    if hidden.shape[-2] <= tokens:
        return forward(hidden)
    tiles = hidden.split(
        tokens, dim=-2
    )  # not sliced: the backward of every slice fills a gradient of the whole row
    return torch.cat([checkpoint(forward, tile, use_reentrant=False) for tile in tiles], dim=-2)
