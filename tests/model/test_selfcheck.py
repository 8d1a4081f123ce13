"""The check before the first step: what it lets through, what goes to the padded layout, what stops the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from orpo_ds.data.packing import TargetRows
from orpo_ds.data.truncate import TokenPair
from orpo_ds.loss.token_logps import token_logps
from orpo_ds.model.anatomy import ModelParts, find_parts
from orpo_ds.model.selfcheck import HeadMismatchError, PackingVerdict, check_head, check_packing
from tests.model.odd_models import ODD_HEADS, ODD_VOCAB, UNPACKABLE, modern_bert_decoder
from tests.model.pairs import random_pairs
from tests.tiny_models import DECODER_ONLY, tiny_model


def _head(parts: ModelParts, *, scale: float = 1.0) -> Callable[[Tensor, TargetRows], Tensor]:
    def logps(hidden: Tensor, rows: TargetRows) -> Tensor:
        return token_logps(
            hidden,
            parts.head.weight,
            index=rows.index,
            label=rows.label,
            bias=parts.bias,
            softcap=parts.softcap,
            scale=scale * parts.scale,
        )

    return logps


def _check(model: PreTrainedModel, seed: int) -> PackingVerdict:
    parts = find_parts(model)
    return check_packing(parts, _head(parts), _pair(seed))


def _pair(seed: int) -> TokenPair:
    return random_pairs([(30, 20, 25)], vocab_size=ODD_VOCAB, seed=seed)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_the_families_may_be_packed(family: str, dtype: torch.dtype, seed: int) -> None:
    verdict = _check(tiny_model(family, vocab_size=ODD_VOCAB, seed=seed).to(dtype), seed)
    assert verdict.ok, verdict.reason
    assert 0.0 < verdict.max_abs_diff < (1e-4 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize(("build", "named"), UNPACKABLE.values(), ids=UNPACKABLE.keys())
def test_models_that_cannot_be_packed_are_named_with_a_reason(
    build: Callable[[], PreTrainedModel], named: str, seed: int
) -> None:
    verdict = _check(build(), seed)
    assert not verdict.ok
    assert named in verdict.reason
    assert verdict.reason.endswith(".")


@pytest.mark.parametrize(
    "name", ["cohere: logit_scale", "granite: divided", "hyperclovax: multiplied", "phi: bias"]
)
def test_models_with_an_odd_head_may_be_packed(name: str, seed: int) -> None:
    verdict = _check(ODD_HEADS[name](), seed)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("pair", [TokenPair([5], [6], 0, 0, 0), TokenPair([5, 7], [5, 7, 9], 1, 1, 2)])
def test_any_pair_makes_a_probe(pair: TokenPair) -> None:
    """Also one without a trunk or without a branch, which on its own would show nothing."""
    parts = find_parts(tiny_model("llama", vocab_size=ODD_VOCAB))
    assert check_packing(parts, _head(parts), pair).ok


class _IgnoresPositions(LlamaForCausalLM):
    """Llama that numbers the tokens of a row itself."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        inner = self.model.rotary_emb.forward
        self.model.rotary_emb.forward = lambda x, position_ids: inner(
            x, position_ids=torch.arange(x.shape[1]).expand(position_ids.shape[0], -1)
        )


class _NoKeywords(nn.Module):
    """Around an attention layer: hands down only the arguments that it knows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_mask: Any, position_embeddings: Any, **_: Any) -> Any:
        return self.layer(
            hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings
        )


class _RefusesKeywords(_NoKeywords):
    """The same, for code from before keyword arguments were handed down."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        return self.layer(
            hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings
        )


def test_a_model_that_ignores_position_ids_is_not_packed(seed: int) -> None:
    torch.manual_seed(seed)
    config = tiny_model("llama", vocab_size=ODD_VOCAB).config
    verdict = _check(_IgnoresPositions(config), seed)
    assert not verdict.ok
    assert "differ from unpacked ones" in verdict.reason
    assert verdict.max_abs_diff > 0.1


@pytest.mark.parametrize(
    ("wrapper", "named"),
    [(_NoKeywords, "without a layout"), (_RefusesKeywords, "unexpected keyword argument")],
)
def test_a_model_that_does_not_hand_arguments_down_is_not_packed(
    wrapper: type[_NoKeywords], named: str, seed: int
) -> None:
    model = tiny_model("llama", vocab_size=ODD_VOCAB, seed=seed)
    for layer in model.model.layers:
        layer.self_attn = wrapper(layer.self_attn)
    verdict = _check(model, seed)
    assert not verdict.ok
    assert named in verdict.reason


def test_attention_dropout_is_not_packed(seed: int) -> None:
    model = tiny_model("qwen2", vocab_size=ODD_VOCAB, seed=seed)
    model.model.layers[1].self_attn.attention_dropout = 0.1
    verdict = _check(model.eval(), seed)
    assert not verdict.ok
    assert "attention dropout of 0.1" in verdict.reason


def test_the_model_is_left_as_it_was(seed: int) -> None:
    model = tiny_model("gemma2", vocab_size=ODD_VOCAB, seed=seed)
    model.model.layers[0].mlp.eval()
    model.set_attn_implementation("eager")
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert _check(model, seed).ok
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "eager"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_outside_attention_does_not_disturb_the_check(seed: int) -> None:
    model = tiny_model("gpt2", vocab_size=ODD_VOCAB, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    for layer in model.transformer.h:
        layer.attn.attn_dropout.p = 0.0
    random_state = torch.get_rng_state()
    assert _check(model, seed).ok
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_wrong_head_stops_the_run(family: str, seed: int) -> None:
    parts = find_parts(tiny_model(family, vocab_size=ODD_VOCAB, seed=seed))
    check_head(parts, _head(parts), _pair(seed))
    with pytest.raises(HeadMismatchError, match=type(parts.model).__name__):
        check_head(parts, _head(parts, scale=1.05), _pair(seed))


def test_a_head_that_is_a_network_stops_the_run(seed: int) -> None:
    with pytest.raises(HeadMismatchError, match="ModernBertDecoderForCausalLM"):
        _check(modern_bert_decoder(), seed)


@pytest.mark.parametrize("fatal", [torch.OutOfMemoryError, torch.distributed.DistBackendError])
def test_running_out_of_memory_or_ranks_is_no_reason_to_pad(
    fatal: type[RuntimeError], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    model = tiny_model("llama", vocab_size=ODD_VOCAB, seed=seed)
    parts = find_parts(model)
    own_forward = model.model.layers[0].forward

    def exhausted(*args: Any, **kwargs: Any) -> Any:
        if "layout" in kwargs:
            raise fatal("in the packed forward")
        return own_forward(*args, **kwargs)

    monkeypatch.setattr(model.model.layers[0], "forward", exhausted)
    with pytest.raises(fatal):
        check_packing(parts, _head(parts), _pair(seed))
