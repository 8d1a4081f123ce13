"""The ORPO loss in float64, written from the paper, to judge every other implementation by.

It shares no line with `orpo_ds` and avoids every trick that makes the real thing fast or stable: whole padded
sequences, all logits at once, probabilities and odds as the equations state them. Equation numbers are those of
Hong, Lee and Thorne, arXiv:2403.07691. Two conventions are not in the paper and follow TRL and the authors' code:
the supervised term averages over the tokens of all chosen sequences, prompt included, and a loss is the mean over
the pairs of a batch.

The steps, from what a data set gives to what an optimizer needs:

    pairs of token ids -> pad_pairs -> model -> padded_token_logps -> orpo_from_token_logps -> loss, metrics
    all of it at once, with the gradients: reference_step
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

IGNORED = -100


class PairIds(Protocol):
    """What is needed of a preference pair; `orpo_ds.data.tokenize.TokenPair` fits, and so does any test's own."""

    @property
    def chosen(self) -> list[int]:
        """Ids of prompt + chosen response."""

    @property
    def rejected(self) -> list[int]:
        """Ids of prompt + rejected response."""

    @property
    def chosen_start(self) -> int:
        """Index in `chosen` of the first response token."""

    @property
    def rejected_start(self) -> int:
        """Index in `rejected` of the first response token."""


@dataclass(frozen=True)
class PaddedPairs:
    """P pairs as 2P right-padded sequences, the P chosen first; int64 `[2P, S]` each.

    `response_labels` holds the ids of the response tokens and -100 elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_labels: Tensor


@dataclass(frozen=True)
class OrpoReference:
    """`loss`: float64 scalar that carries a gradient. `metrics`: TRL's names, means over the pairs."""

    loss: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class ReferenceStep:
    """One forward and backward pass in float64; gradients by the model's own parameter names."""

    loss: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


def pad_pairs(pairs: Sequence[PairIds], *, pad_token_id: int) -> PaddedPairs:
    """Stack P pairs into 2P right-padded sequences, the chosen ones first."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    starts = [pair.chosen_start for pair in pairs] + [pair.rejected_start for pair in pairs]
    width = max(len(sequence) for sequence in sequences)
    shape = (len(sequences), width)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    response_labels = torch.full(shape, IGNORED)
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
        response_labels[row, start : len(sequence)] = torch.tensor(sequence[start:])
    return PaddedPairs(input_ids, attention_mask, response_labels)


def padded_token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, float64 `[B, L]`; 0 where the label is ignored.

    `logits` `[B, L, V]` of any float type must already stand beside the `labels` `[B, L]` that they predict: a
    decoder-only model's logits without the last position, against its ids without the first.
    """
    logps = torch.log_softmax(logits.double(), dim=-1)
    picked = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.where(labels != IGNORED, 0.0)


def orpo_from_token_logps(
    token_logps: Tensor, *, nll: Tensor, response: Tensor, beta: float
) -> OrpoReference:
    """Equations 3 to 7 on the log-probabilities of the tokens of P pairs.

    `token_logps` float64 `[2P, L]`, the P chosen first. `nll` bool `[P, L]`: the tokens of the chosen sequences that
    count in the supervised term. `response` bool `[2P, L]`: the tokens of the responses. `beta` is the paper's
    lambda.
    """
    pairs = token_logps.shape[0] // 2
    mean_logps = (token_logps * response).sum(-1) / response.sum(-1)  # eq. 3
    probability = mean_logps.exp()
    odds = probability / (1 - probability)  # eq. 4
    odds_ratio = odds[:pairs] / odds[pairs:]  # eq. 5
    log_sigmoid = -torch.log(1 + 1 / odds_ratio)  # the logarithm of sigma(log(odds_ratio))
    supervised = -(token_logps[:pairs] * nll).sum() / nll.sum()
    loss = supervised + beta * (-log_sigmoid).mean()  # eq. 6 and 7

    chosen, rejected = mean_logps.detach().split(pairs)
    metrics = {
        "nll_loss": supervised,
        "log_odds_chosen": odds_ratio.log().mean(),
        "log_odds_ratio": log_sigmoid.mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "rewards/chosen": beta * chosen.mean(),
        "rewards/rejected": beta * rejected.mean(),
        "rewards/margins": beta * (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
    }
    return OrpoReference(loss, {name: value.item() for name, value in metrics.items()})


def orpo_from_logits(
    logits: Tensor, padded: PaddedPairs, *, beta: float, nll_on_prompt: bool = True
) -> OrpoReference:
    """The loss of P pairs from a decoder-only model's logits `[2P, S, V]` on the padded batch."""
    pairs = logits.shape[0] // 2
    labels = padded.input_ids.where(padded.attention_mask == 1, IGNORED)[:, 1:]
    response = padded.response_labels[:, 1:] != IGNORED
    nll = (labels != IGNORED)[:pairs] if nll_on_prompt else response[:pairs]
    token_logps = padded_token_logps(logits[:, :-1], labels)
    return orpo_from_token_logps(token_logps, nll=nll, response=response, beta=beta)


def reference_step(
    model: PreTrainedModel, padded: PaddedPairs, *, beta: float, nll_on_prompt: bool = True
) -> ReferenceStep:
    """Loss, metrics and gradients of a decoder-only model, in float64 on a copy of it.

    The forward needs no mask: the padding stands on the right, where a causal model cannot see it. A mixture of
    experts whose config asks for router logits adds its load-balancing loss, as TRL does.
    """
    double = _in_double(model)
    outputs = double(padded.input_ids, use_cache=False)
    reference = orpo_from_logits(outputs.logits, padded, beta=beta, nll_on_prompt=nll_on_prompt)
    loss = reference.loss
    if "router_logits" in outputs:
        real = padded.attention_mask.flatten() == 1
        router_logits = torch.cat([layer[real] for layer in outputs.router_logits])
        balance = load_balance(router_logits, experts_per_token=double.config.num_experts_per_tok)
        loss = loss + double.config.router_aux_loss_coef * balance
        reference.metrics["aux_loss"] = balance.item()
    return _differentiate(double, loss, reference.metrics)


def load_balance(router_logits: Tensor, *, experts_per_token: int) -> Tensor:
    """Switch Transformers' auxiliary loss (arXiv:2101.03961, eq. 4 to 6) of `[N, E]` router logits, scalar.

    Each token of each layer is a row, and with several experts a token each choice counts as a token of its own.
    """
    experts = router_logits.shape[-1]
    probabilities = router_logits.softmax(-1)
    chosen = probabilities.topk(experts_per_token).indices
    share = torch.bincount(chosen.flatten(), minlength=experts) / len(router_logits)
    return experts * (share * probabilities.mean(0)).sum()


def encoder_decoder_step(
    model: PreTrainedModel, prompts: Sequence[list[int]], responses: Sequence[list[int]], *, beta: float
) -> ReferenceStep:
    """The same for an encoder-decoder: P `prompts`, and 2P `responses` of which the chosen come first.

    The prompt goes to the encoder only, so the supervised term counts the tokens of the chosen responses.
    """
    double = _in_double(model)
    input_ids, attention_mask = _right_pad(list(prompts) * 2, value=double.config.pad_token_id)
    labels, _ = _right_pad(responses, value=IGNORED)
    outputs = double(input_ids, attention_mask=attention_mask, labels=labels, use_cache=False)
    response = labels != IGNORED
    token_logps = padded_token_logps(outputs.logits, labels)
    reference = orpo_from_token_logps(token_logps, nll=response[: len(prompts)], response=response, beta=beta)
    return _differentiate(double, reference.loss, reference.metrics)


def _in_double(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy that computes attention and experts in the plainest way transformers has."""
    double = copy.deepcopy(model).double().eval()
    double.set_attn_implementation("eager")
    double.set_experts_implementation("eager")
    return double


def _right_pad(sequences: Sequence[list[int]], *, value: int) -> tuple[Tensor, Tensor]:
    """Ids and their mask, int64 `[B, S]` each."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


def _differentiate(model: PreTrainedModel, loss: Tensor, metrics: dict[str, float]) -> ReferenceStep:
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return ReferenceStep(loss.item(), metrics, gradients)
