"""Useful FLOPs against what torch counts while the model really runs, and against a sum over single tokens."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orpo_ds.data.token_dataset import PairLengths
from orpo_ds.model.size import ModelSize
from orpo_ds.monitor.flops import UsefulFlops
from tests.tiny_models import tiny_model

VOCABULARY = 160


def lengths_of(*pairs: tuple[int, int, int], starts: list[int] | None = None) -> PairLengths:
    trunk, chosen, rejected = (np.array(column, dtype=np.int32) for column in zip(*pairs, strict=True))
    return PairLengths(
        trunk, chosen, rejected, np.array(starts or trunk, dtype=np.int32), image_tokens=np.zeros_like(trunk)
    )


def size_of(model: torch.nn.Module) -> ModelSize:
    """The sizes by hand: what `nn.Linear` holds, apart from the head."""
    config = model.config
    linears = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings()
    return ModelSize(
        body_parameters=sum(module.weight.numel() for module in linears if module is not head),
        head_parameters=head.weight.numel(),
        layers=config.num_hidden_layers,
        attention_width=config.num_attention_heads * (config.hidden_size // config.num_attention_heads),
        head_frozen=False,
        body_frozen=False,
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
def test_against_the_products_that_torch_counts(frozen: bool, seed: int) -> None:
    """One sequence of 48 tokens without a rejected branch, every token a target, eager attention.

    torch counts the T x T scores of an unmasked product, of which a causal mask needs T(T+1)/2.
    """
    tokens = 48
    model = tiny_model("llama", vocab_size=VOCABULARY, seed=seed)
    model.set_attn_implementation("eager")
    size = size_of(model)
    if frozen:
        model.requires_grad_(False)
        size = replace(size, head_frozen=True, body_frozen=True)
    ids = torch.randint(0, VOCABULARY, (1, tokens))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = counted["aten.mm"] + counted.get("aten.addmm", 0)
    scores = counted["aten.bmm"] * (tokens + 1) / (2 * tokens)

    # One token has no source, so tokens - 1 rows; the model computed `tokens`.
    useful = UsefulFlops(size, lengths_of((0, tokens, 0)), nll_on_prompt=True)([0])
    head_row = (4 if frozen else 6) * size.head_parameters
    assert useful + head_row == products + scores


@pytest.mark.parametrize("nll_on_prompt", [True, False])
def test_a_shared_trunk_against_counting_token_by_token(nll_on_prompt: bool, seed: int) -> None:
    size = ModelSize(
        body_parameters=1000,
        head_parameters=300,
        layers=2,
        attention_width=8,
        head_frozen=True,
        body_frozen=False,
    )
    numbers = random.Random(seed)
    pairs = [(numbers.randint(1, 20), numbers.randint(1, 20), numbers.randint(1, 20)) for _ in range(5)]
    starts = [numbers.randint(1, trunk) for trunk, _, _ in pairs]  # responses that share their first words
    total = 0.0
    for (trunk, chosen, rejected), start in zip(pairs, starts, strict=True):
        # What each unique token sees: itself and what comes before it in its own sequence.
        seen = [*range(1, trunk + chosen + 1), *range(trunk + 1, trunk + rejected + 1)]
        targets = trunk + chosen - (1 if nll_on_prompt else start) + rejected
        total += 6 * 1000 * len(seen) + 12 * 2 * 8 * sum(seen) + 4 * 300 * targets
    flops = UsefulFlops(size, lengths_of(*pairs, starts=starts), nll_on_prompt=nll_on_prompt)
    assert flops(range(5)) == total
    assert sum(flops([index]) for index in range(5)) == total
    assert flops([]) == 0.0
