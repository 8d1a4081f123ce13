"""Before the first step: are the log-probs that we compute those of the model?

Two things are taken for granted everywhere else, and shown here on the model that is about to be trained,
with
two short pairs of its own tokens:

* The head is understood. Log-probs from the backbone's hidden states and the head must be those of the logits
  that the model's own forward returns. If not, something lies between them that `anatomy` does not know, and
  the run stops.
* A packed row gives what full sequences give. If not (a state-space layer carries the chosen branch into the
  rejected one, a model numbers its tokens itself, a mask is not only causal), the run takes the padded layout
  and says why.

Every rank of a job runs the same forwards in the same order, through the modules' own hooks, so that ZeRO-3
can gather what they need. A model that raises does so on every rank at the same place.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from orpo_ds.data.packing import MicroBatch, TargetRows, pack
from orpo_ds.data.padding import pad, pad_encoder_decoder
from orpo_ds.data.row_part import in_part, part_length, part_of_row
from orpo_ds.data.truncate import TokenPair
from orpo_ds.model.anatomy import ModelParts, hidden_states
from orpo_ds.model.attention import AttentionCall, UnsupportedAttentionError, packed_attention_enabled
from orpo_ds.model.ulysses import SequenceGroup

Head = Callable[[Tensor, TargetRows], Tensor]  # hidden states [N, H] and the R target rows to log-probs [R]

PROBE_SHAPES = ((24, 12, 9), (7, 3, 5))  # trunk, chosen branch, rejected branch, in tokens
# What a model raises that cannot take the packed arguments, and what is never a reason to pad.
MODEL_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
FATAL_ERRORS = (torch.OutOfMemoryError, torch.distributed.DistError)
STATELESS_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"})
# In nats. Rounding alone moved a token of SmolLM2-135M (30 layers; text and random ids) by up to 2e-5 in
# fp32, 0.04 in fp16 and 0.15 in bf16. A wrong position, a leak from the chosen branch or a trunk short by one
# token moved some token by 1.0 and more; on random models of two layers by 0.2 and more, where rounding in
# bf16 is 0.04.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.4}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackingVerdict:
    """Whether packed rows give this model's log-probs.

    Attributes:
        ok: they do.
        reason: in words, why not; or how close they are.
        max_abs_diff: largest difference of a token's log-prob, in nats; NaN where packing did not run.
    """

    ok: bool
    reason: str
    max_abs_diff: float = float("nan")


class HeadMismatchError(ValueError):
    """The log-probs of backbone and head are not those of the model's own logits."""


def check_head(parts: ModelParts, head: Head, pair: TokenPair) -> None:
    """Compare the log-probs of the padded layout with those of the model's own logits.

    Args:
        parts: of the model, on the device where it will train.
        head: the run's own head. Under ZeRO-3 a module that gathers the weight by its hooks.
        pair: gives the token ids of the probe; the same on all ranks.

    Raises:
        HeadMismatchError: the head is not understood, so no layout would train this model.
    """
    batch = _padded(parts, _probe_pairs(pair))
    with _mode(parts.model, training=False), torch.no_grad():
        own = _own_logps(parts.model, batch)
        hidden, _ = hidden_states(parts, batch)
        difference = (head(hidden, batch.rows) - own).abs().max().item()
    tolerance = _tolerance(parts.model)
    if not difference <= tolerance:
        raise HeadMismatchError(
            f"The log-probs of {type(parts.model).__name__}'s backbone and head differ from those of its own "
            f"logits by {difference:.2g} nats (tolerance {tolerance:.2g}). Its forward does something between the "
            "last hidden state and the logits that orpo_ds.model.anatomy does not know; no layout would train it."
        )


def check_packing(
    parts: ModelParts, head: Head, pair: TokenPair, *, sequence: SequenceGroup | None = None
) -> PackingVerdict:
    """Check the head, then compare the log-probs of packed rows with those of the model's own logits.

    Args:
        parts: as in `check_head`.
        head: as in `check_head`.
        pair: as in `check_head`.
        sequence: the ranks that will share a row; they share that of the probe.

    Returns:
        The verdict, the same on all ranks.

    Raises:
        HeadMismatchError: see `check_head`.
    """
    check_head(parts, head, pair)
    model, name = parts.model, type(parts.model).__name__
    if parts.is_encoder_decoder:
        return PackingVerdict(False, f"{name} is an encoder-decoder model.")
    probe = _probe_pairs(pair)
    padded = _padded(parts, probe)
    packed = pack(probe, pair_ids=range(len(probe))).to(padded.input_ids.device)
    own_part = packed
    if sequence is not None:
        own_part = part_of_row(packed, part=sequence.rank, parts=sequence.size)
    calls: list[AttentionCall] = []
    with _mode(model, training=False), torch.no_grad():
        own = _own_logps(model, padded)
    try:
        with packed_attention_enabled(model), torch.no_grad():
            with _mode(model, training=False):
                hidden, _ = hidden_states(parts, own_part, sequence=sequence, attention_calls=calls)
                ours = head(hidden, own_part.rows)
            with _mode(model, training=True), torch.random.fork_rng():  # attention dropout shows here only
                hidden_states(parts, own_part, sequence=sequence)
    except UnsupportedAttentionError as error:
        return PackingVerdict(False, f"{error}.")
    except MODEL_ERRORS as error:
        if isinstance(error, FATAL_ERRORS):
            raise
        log.info("the packed forward of %s failed", name, exc_info=error)
        return PackingVerdict(False, f"The forward of {name} does not take a packed row: {error}.")
    if sequence is not None:
        ours = _of_all_parts(ours, packed, sequence)
    assert torch.equal(
        _by_response(packed.rows.label, packed.rows), _by_response(padded.rows.label, padded.rows)
    )
    difference = (_by_response(ours, packed.rows) - _by_response(own, padded.rows)).abs().max().item()
    tolerance = _tolerance(model)
    if not difference <= tolerance:
        return PackingVerdict(
            False,
            f"Packed log-probs of {name} differ from unpacked ones by {difference:.2g} nats (tolerance "
            f"{tolerance:.2g}): {_explanation(parts, calls)}.",
            difference,
        )
    unseen = _state(parts) or _unseen_mask(parts, calls)
    if unseen is not None:
        return PackingVerdict(False, f"{name} {unseen}.", difference)
    return PackingVerdict(True, f"Packed and unpacked log-probs agree to {difference:.1e} nats.", difference)


def _probe_pairs(pair: TokenPair) -> list[TokenPair]:
    """Two pairs of PROBE_SHAPES out of the ids of a real one, whatever its lengths; prompts are trunks."""
    wanted = sum(map(sum, PROBE_SHAPES))
    ids = pair.chosen + pair.rejected
    ids = (ids * (wanted // len(ids) + 1))[:wanted]
    probe = []
    for trunk, chosen, rejected in PROBE_SHAPES:
        shared, branch_c, branch_r = ids[:trunk], ids[trunk:][:chosen], ids[trunk + chosen :][:rejected]
        ids = ids[trunk + chosen + rejected :]
        probe.append(TokenPair(shared + branch_c, shared + branch_r, trunk, trunk, trunk))
    return probe


def _padded(parts: ModelParts, pairs: list[TokenPair]) -> MicroBatch:
    """The pairs side by side, on the model's device."""
    filler = pairs[0].chosen[0]  # any id will do
    pair_ids = range(len(pairs))
    if parts.is_encoder_decoder:
        batch = pad_encoder_decoder(
            pairs, pair_ids=pair_ids, pad_token_id=filler, decoder_start_token_id=filler
        )
    else:
        batch = pad(pairs, pair_ids=pair_ids, pad_token_id=filler)
    return batch.to(next(parts.model.parameters()).device)


def _own_logps(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """[R] fp32 log-probs from the logits of the model's own forward on a padded batch."""
    keywords = {} if batch.decoder_input_ids is None else {"decoder_input_ids": batch.decoder_input_ids}
    output = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **keywords)
    logits: Tensor = output.logits.flatten(0, 1)[batch.rows.index].float()
    return logits.log_softmax(-1).gather(1, batch.rows.label.unsqueeze(1)).squeeze(1)


def _of_all_parts(logps: Tensor, packed: MicroBatch, sequence: SequenceGroup) -> Tensor:
    """The log-probs [R] of the whole row from those of each rank's part. Collective."""
    length = part_length(packed.input_ids.shape[1], parts=sequence.size)
    here = in_part(packed.rows, first=sequence.rank * length, length=length)
    return sequence.sum(logps.new_zeros(len(here)).masked_scatter(here, logps))


def _by_response(values: Tensor, rows: TargetRows) -> Tensor:
    """Bring the target rows' values [R] of the packed and of the padded layout into one order.

    Both are sorted by source. That is pair by pair, and token by token, within the chosen sequences and
    within the rejected responses (the probe's trunks are its prompts, which count with the chosen).
    """
    return values[torch.argsort(rows.rejected_pair >= 0, stable=True)]


def _tolerance(model: PreTrainedModel) -> float:
    """How far rounding alone may move a log-prob, in nats: that of the least precise of the weights."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    tolerance = max(TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) for dtype in dtypes)
    tf32 = torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return max(tolerance, TOLERANCE[torch.float16]) if tf32 else tolerance  # TF32 has the fraction of fp16


def _explanation(parts: ModelParts, calls: list[AttentionCall]) -> str:
    """What is known about the model that may be why its packed log-probs are others."""
    config = parts.model.config.get_text_config(decoder=True)
    reasons = []
    kinds = sorted(set(_layer_types(config)) - STATELESS_LAYER_TYPES)
    if len(calls) < config.num_hidden_layers or kinds:
        named = f" ({', '.join(kinds)})" if kinds else ""
        reasons.append(
            f"{len(calls)} of its {config.num_hidden_layers} layers call an attention function; layers of "
            f"another kind{named} may carry a state from one segment of the "
            "row into the next"
        )
    elif state := _state(parts):
        reasons.append(f"it {state}")
    if "position_ids" not in inspect.signature(type(parts.backbone).forward).parameters:
        reasons.append("its forward takes no position_ids, so it numbers the tokens of the row itself")
    return "; ".join(reasons) or "no cause is known"


def _state(parts: ModelParts) -> str | None:
    """A state that runs along the row beside attention, however little of it the probe's log-probs show.

    State-space and linear-attention layers begin with a convolution over neighbouring tokens; no attention layer does.
    """
    convolutions = [name for name, module in parts.backbone.named_modules() if isinstance(module, nn.Conv1d)]
    if not convolutions:
        return None
    return (
        f"convolves along the row ({convolutions[0]}, one of {len(convolutions)}), as layers do that may carry a "
        "state from one segment of the row into the next"
    )


def _unseen_mask(parts: ModelParts, calls: list[AttentionCall]) -> str | None:
    """A mask that the probe is too short to feel, and that the model does not tell its attention of."""
    config = parts.model.config.get_text_config(decoder=True)
    types = _layer_types(config)
    chunk = getattr(config, "attention_chunk_size", None)
    if "chunked_attention" in types or (chunk is not None and not types):
        return f"attends within chunks of {chunk} tokens, which its attention function is not told of"
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return None
    windowed = types.count("sliding_attention") if types else config.num_hidden_layers
    told = sum(call.window is not None for call in calls)
    if told >= windowed:
        return None
    return (
        f"has a sliding window of {window} tokens in {windowed} layers, but only {told} of them tell their "
        "attention function of it"
    )


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """Kind of every layer, where the config says it."""
    return list(getattr(config, "layer_types", None) or ())


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """With or without dropout and checkpointing; every module then goes back to the mode that it had."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
