"""The attention function of packed rows, as transformers' models call it.

`register()` makes `orpo_packed` an attention implementation of transformers. A model set to it (see
`packed_attention_enabled`) calls `packed_attention` in every layer with query, key and value of the whole
row, and with the forward's keyword arguments, among them `layout`: the segments of this micro-batch.
transformers builds no mask for an implementation it has no mask function for
(`masking_utils._preprocess_mask_arguments`), so the layout is all there is to say who sees whom.

What this function cannot do it refuses by name. A keyword it does not know may change the result (a learned
sink, a position bias, a sparse index), so it is refused too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from orpo_ds.data.packing import VarlenLayout
from orpo_ds.data.row_part import part_length
from orpo_ds.model.kernels import choose_kernel
from orpo_ds.model.kernels.score_rule import ScoreRule
from orpo_ds.model.ulysses import SequenceGroup, own_tokens, whole_row

ATTENTION_NAME = "orpo_packed"

# Forward arguments that models hand down to their attention and that say nothing about the scores. Positions
# and rotary embeddings are in the query and the key already.
NEUTRAL_ARGUMENTS = frozenset(
    {
        "cache_position",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
UNSUPPORTED_ARGUMENTS = {
    "position_bias": "a position bias added to the scores (T5, ALiBi)",
    "alibi": "ALiBi",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "head_mask": "a head mask",
    "output_attentions": "output_attentions (no kernel keeps the attention weights)",
    "cu_seq_lens_q": "a second description of the packing (cu_seq_lens_q)",
}


class UnsupportedAttentionError(ValueError):
    """A model asked the packed attention for something that it does not do."""


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asked for; `packed_attention` appends it to the `attention_calls` list it is given."""

    layer: str
    window: int | None


def register() -> None:
    """Make `attn_implementation="orpo_packed"` known to transformers. Harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: VarlenLayout | None = None,
    sequence: SequenceGroup | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    attention_calls: list[AttentionCall] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row of T tokens under transformers' attention interface.

    Args:
        module: the attention layer that calls.
        query: [1, Hq, T, D].
        key: [1, Hkv, T, D]; Hq is a multiple of Hkv.
        value: [1, Hkv, T, Dv].
        attention_mask: None; the layout is the mask.
        layout: the segments of the row, from the forward's keyword arguments.
        sequence: the ranks that share the row, from there too: T is then the tokens of this rank, and the layout is
            that of all of them (`orpo_ds.model.ulysses`).
        scaling: factor of the scores; D ** -0.5 when None.
        dropout: 0.
        sliding_window: tokens that a token sees, itself included; None for all.
        softcap: bound of the scores; None for none.
        is_causal: None or True.
        attention_calls: what this layer asked for is appended here (for the self-check).
        kwargs: other forward arguments; refused unless they are None or in NEUTRAL_ARGUMENTS.

    Returns:
        [1, T, Hq, Dv] in query's dtype, and None for the attention weights.

    Raises:
        UnsupportedAttentionError: naming what this model asks for and the packed attention cannot do.
    """
    layer = type(module).__name__
    if layout is None:
        raise UnsupportedAttentionError(
            f"{layer} calls {ATTENTION_NAME} without a layout: the backbone was not given layout=..., or it "
            "does not hand its keyword arguments down to the attention"
        )
    if sliding_window is not None and sliding_window < 1:
        raise UnsupportedAttentionError(f"{layer} asks for a sliding window of {sliding_window} tokens")
    _refuse_unsupported(
        layer, attention_mask, dropout=dropout, is_causal=_is_causal(module, is_causal), kwargs=kwargs
    )
    _refuse_foreign_shapes(layer, query, key, layout, sequence)
    if attention_calls is not None:
        attention_calls.append(AttentionCall(layer, sliding_window))
    rule = ScoreRule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    query, key, value = (heads.squeeze(0).transpose(0, 1) for heads in (query, key, value))
    length = query.shape[0]
    if sequence is not None:
        query, key, value = whole_row(query, key, value, tokens=_tokens(layout), sequence=sequence)
    out = choose_kernel(query, value, rule)(query, key, value, layout, rule)
    if sequence is not None:
        out = own_tokens(out, length=length, sequence=sequence)
    return out.unsqueeze(0), None


def _tokens(layout: VarlenLayout) -> int:
    """Those of the whole row."""
    return layout.segments[-1][1]


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    """Transformers' rule: the argument where it is given, else the attribute of the layer, else True."""
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


def _refuse_unsupported(
    layer: str, attention_mask: Tensor | None, *, dropout: float, is_causal: bool, kwargs: dict[str, Any]
) -> None:
    reasons = []
    if attention_mask is not None:
        reasons.append("an attention mask")
    if dropout > 0.0:
        reasons.append(f"attention dropout of {dropout} (disable_dropout=True turns it off)")
    if not is_causal:
        reasons.append("attention that is not causal")
    for name, value in kwargs.items():
        if value is None or name in NEUTRAL_ARGUMENTS or (name == "output_attentions" and not value):
            continue
        reasons.append(UNSUPPORTED_ARGUMENTS.get(name, f"an argument that is not known here ({name})"))
    if reasons:
        raise UnsupportedAttentionError(
            f"{layer} asks for {' and '.join(reasons)}, which {ATTENTION_NAME} does not do"
        )


def _refuse_foreign_shapes(
    layer: str, query: Tensor, key: Tensor, layout: VarlenLayout, sequence: SequenceGroup | None
) -> None:
    ranks = 1 if sequence is None else sequence.size
    tokens = part_length(_tokens(layout), parts=ranks)
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        raise UnsupportedAttentionError(
            f"{layer} brings queries {tuple(query.shape)} and keys {tuple(key.shape)} (batch, heads, tokens, "
            f"size) for a layout of {tokens} tokens; {ATTENTION_NAME} takes one packed row and no cache"
        )
    if query.shape[1] % ranks:
        raise UnsupportedAttentionError(
            f"{layer} has {query.shape[1]} query heads, which {ranks} ranks cannot share evenly: "
            "sequence_parallel_size must divide the number of heads"
        )


@dataclass(frozen=True, eq=False)
class AttentionChoice:
    """Which attention each config of a model names, at one moment."""

    named: tuple[tuple[PreTrainedConfig, str | None], ...]

    @classmethod
    def of(cls, module: nn.Module) -> AttentionChoice:
        """What the transformers model in `module` (a PeftModel, a policy) uses now."""
        return cls(tuple((config, config._attn_implementation) for config in _configs(_inner_model(module))))

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Within the context the model uses this; then what it had before. For generation inside of a training."""
        before = AttentionChoice(tuple((config, config._attn_implementation) for config, _ in self.named))
        self._set()
        try:
            yield
        finally:
            before._set()

    def _set(self) -> None:
        for config, implementation in self.named:
            config._attn_implementation_internal = implementation  # the setter would overwrite sub-configs


@contextmanager
def packed_attention_enabled(module: nn.Module) -> Iterator[None]:
    """Within the context the transformers model in `module` uses the packed attention; then what it had before.

    Backward recomputes checkpointed layers, so it must lie within the context too. Generation must not.

    Args:
        module: a transformers model, or something around one (a PeftModel, a policy).

    Raises:
        UnsupportedAttentionError: if the model's class does not go through transformers' attention interface.
    """
    model = _inner_model(module)
    if not type(model)._can_set_attn_implementation():
        raise UnsupportedAttentionError(
            f"{type(model).__name__} computes attention in code of its own, not through transformers' "
            "AttentionInterface"
        )
    register()
    with AttentionChoice.of(model).enabled():  # what is set inside is undone
        model.set_attn_implementation(ATTENTION_NAME)
        yield


def _inner_model(module: nn.Module) -> PreTrainedModel:
    return next(part for part in module.modules() if isinstance(part, PreTrainedModel))


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config that an attention layer may read: those of the sub-models, and their sub-configs."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [sub for name in config.sub_configs if (sub := getattr(config, name)) is not None]
    return list(found.values())
