"""MLPs in tiles: the numbers of the whole row, and never more than a tile's tokens between the two matrices."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from orpo_ds.data.packing import pack
from orpo_ds.model.anatomy import find_parts, hidden_states
from orpo_ds.model.attention import packed_attention_enabled
from orpo_ds.model.tiled_mlp import tiled_mlps, tiled_modules
from tests.model.pairs import SHAPES, random_pairs
from tests.tiny_models import tiny_model

VOCAB = 61
TILE = 9


@contextmanager
def tokens_in_mlps(modules: list[nn.Module]) -> Iterator[list[int]]:
    """How many tokens went into each call of each matrix of these modules."""
    seen: list[int] = []
    matrices = [part for module in modules for part in module.modules() if part not in modules]
    handles = [
        part.register_forward_pre_hook(lambda _, words: seen.append(words[0].shape[-2]))
        for part in matrices
        if any(True for _ in part.parameters(recurse=False))
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_loss_and_gradients_are_the_same(family: str, checkpointing: bool, seed: int) -> None:
    model = tiny_model(family, vocab_size=VOCAB, seed=seed).double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parts = find_parts(model)
    batch = pack(random_pairs(SHAPES, vocab_size=VOCAB, seed=seed), pair_ids=range(len(SHAPES)))
    assert batch.real_tokens > 2 * TILE
    modules = tiled_modules(parts)
    assert len(modules) == model.config.num_hidden_layers

    def run(tile: int | None) -> tuple[Tensor, list[Tensor], list[int]]:
        model.zero_grad()
        with packed_attention_enabled(model), tiled_mlps(parts, tile), tokens_in_mlps(modules) as seen:
            hidden, _ = hidden_states(parts, batch)
            hidden.mul(
                torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
            ).sum().backward()
        return (
            hidden.detach(),
            [p.grad.clone() for p in parts.backbone.parameters() if p.grad is not None],
            seen,
        )

    whole, whole_grads, all_tokens = run(None)
    tiled, tiled_grads, tile_tokens = run(TILE)
    assert set(all_tokens) == {batch.real_tokens}
    assert max(tile_tokens) == TILE
    # Sums of the same float64 products in another order.
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(tiled_grads, whole_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11 * float(theirs.abs().max()))
    assert all("forward" not in vars(module) for module in modules), "the context leaves nothing behind"


def test_a_model_without_mlps() -> None:
    parts = find_parts(tiny_model("bart", vocab_size=VOCAB))
    with pytest.raises(ValueError, match=r"mlp_tile_tokens: no layer of BartDecoder"), tiled_mlps(parts, 8):
        pass
