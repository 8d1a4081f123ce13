"""Models whose experts are modules of their own, so that a rank runs only those that its tokens go to.

Two shapes: a dict of experts that is called itself (Switch Transformers), and a list that the block above it walks, as
Mixtral had before transformers 5 and the code that comes with other models has still.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from tests.tiny_models import HIDDEN, tiny_model

EXPERTS = 8


class LooseBlock(nn.Module):
    """Top-1 routing to experts in a `ModuleList`, without a loop over those that nobody asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(EXPERTS))

    def forward(self, hidden: Tensor) -> Tensor:
        weight, choice = self.gate(hidden).softmax(-1).max(-1)
        out = torch.zeros_like(hidden)
        for number in choice.unique().tolist():
            here = choice == number
            out[here] = self.experts[number](hidden[here]) * weight[here].unsqueeze(-1)
        return out


def loose_llama(*, vocab_size: int, seed: int) -> PreTrainedModel:
    """A Llama with such blocks in place of its MLPs."""
    model = tiny_model("llama", vocab_size=vocab_size, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.model.layers:
            layer.mlp = LooseBlock()
    return model


def switch(*, vocab_size: int, seed: int) -> PreTrainedModel:
    """Switch Transformers: an encoder-decoder, with experts in each layer of both."""
    config = SwitchTransformersConfig(
        vocab_size=vocab_size,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_heads=4,
        num_experts=EXPERTS,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SwitchTransformersForConditionalGeneration(config).float().train()


LOOSE = {"loose_llama": loose_llama, "switch": switch}
