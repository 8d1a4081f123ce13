"""Every family through its real transformers model: a packed row gives what padded full sequences give.

The other side is the model's own eager attention on padded sequences, with masks that transformers makes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from orpo_ds.data.packing import MicroBatch, TargetRows, pack
from orpo_ds.data.padding import pad
from orpo_ds.loss.token_logps import token_logps
from orpo_ds.model.anatomy import find_parts, hidden_states
from orpo_ds.model.attention import packed_attention_enabled
from tests.model.pairs import SHAPES, random_pairs
from tests.tiny_models import DECODER_ONLY, tiny_model

VOCAB = 97
# fp32 through two layers: a dozen roundings of each log-prob (about 5 nats); gradients add up 130 of them.
LOGP_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5  # of the parameter's largest gradient


def _logps(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    parts = find_parts(model)
    hidden, _ = hidden_states(parts, batch)
    return token_logps(
        hidden,
        parts.head.weight,
        index=batch.rows.index,
        label=batch.rows.label,
        bias=parts.bias,
        softcap=parts.softcap,
        scale=parts.scale,
    )


def _sums(logps: Tensor, rows: TargetRows) -> Tensor:
    """[2P + 1]: log-prob of every chosen and every rejected response, and of all nll tokens."""
    pairs = len(rows.chosen_len)
    sums = [
        torch.zeros(pairs + 1).index_add(0, torch.where(pair < 0, pairs, pair), logps)[:pairs]
        for pair in (rows.chosen_pair, rows.rejected_pair)
    ]
    return torch.cat([*sums, logps[rows.nll].sum().reshape(1)])


def _sums_and_gradients(model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """With weights that tell chosen, rejected, nll and the pairs apart."""
    sums = _sums(_logps(model, batch), batch.rows)
    weights = torch.linspace(-1.0, 1.5, len(sums))
    model.zero_grad()
    (weights * sums).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return sums.detach(), gradients


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_packed_equals_padded(family: str, checkpointing: bool, seed: int) -> None:
    model = tiny_model(family, vocab_size=VOCAB, seed=seed)
    pairs = random_pairs(SHAPES, vocab_size=VOCAB, seed=seed)
    ids = range(len(pairs))
    model.set_attn_implementation("eager")
    wanted, wanted_gradients = _sums_and_gradients(model, pad(pairs, pair_ids=ids, pad_token_id=0))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with packed_attention_enabled(model):
        sums, gradients = _sums_and_gradients(model, pack(pairs, pair_ids=ids))

    lengths = torch.tensor([len(pair.chosen) + len(pair.rejected) for pair in pairs]).max()
    assert (sums - wanted).abs()[:-1].max() <= LOGP_TOLERANCE * lengths
    assert (sums - wanted).abs()[-1] <= LOGP_TOLERANCE * lengths * len(pairs)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        error = (gradients[name] - gradient).abs().max()
        assert error <= GRADIENT_TOLERANCE * gradient.abs().max(), name


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma2", "gemma3"])
def test_the_window_of_the_tiny_models_bites(family: str, seed: int) -> None:
    """Or the test above would not see a window that is ignored."""
    pairs = random_pairs(SHAPES[:1], vocab_size=VOCAB, seed=seed)
    batch = pad(pairs, pair_ids=[0], pad_token_id=0)
    model = tiny_model(family, vocab_size=VOCAB, seed=seed)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        windowed = _logps(model, batch)
        model.config.sliding_window = 10_000
        model.config.layer_types = ["full_attention"] * 2
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
            layer.attention_type = "full_attention"
        unlimited = _logps(model, batch)
    assert (windowed - unlimited).abs().max() > 1e-2
