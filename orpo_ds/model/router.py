"""The balance of a mixture of experts, exact for a batch that was cut into pieces.

With f_e the share of tokens that expert e gets and P_e the router's mean probability for it, both over all tokens of
the batch and all layers (Switch Transformer, arXiv:2101.03961, equations 4 to 6):

    balance = E * sum_e f_e P_e

It is a product of two means, so the mean of the micro-batches' balances is not the balance of the batch: with few
tokens each, it asks every micro-batch to use all experts evenly (arXiv:2501.11873 shows what that costs). But f has
no gradient, and the balance is linear in P. So each micro-batch, on whatever rank, adds

    share = E * sum_e F_e p_e / N^2

with p_e its own sum of probabilities, F_e the tokens that *all* micro-batches of all ranks send to expert e, and N all
tokens. The shares add up to the balance of the batch, and their gradients to its gradient. `ExpertSums` holds p, f and
n of a micro-batch; F and N are its sum over the others.

A token of a trunk is there once and stands in both sequences, so it weighs two: this is the balance of the padded
sequences, without their padding.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

SumOverRanks = Callable[[Tensor], Tensor]
PROBE_ROWS = 12  # of random router logits, to compare the family's balance with ours


@dataclass(frozen=True)
class Router:
    """A mixture of experts that is to be balanced.

    Attributes:
        coefficient: weight of the balance in the training loss.
        num_experts: experts a layer, E.
        experts_per_token: experts that a token is sent to.
    """

    coefficient: float
    num_experts: int
    experts_per_token: int


@dataclass(frozen=True, eq=False)
class ExpertSums:
    """What tokens did to the experts, summed over tokens and layers. Sums of micro-batches and of ranks add up.

    Attributes:
        load: float64 [E], (token, layer) choices of each expert; no gradient.
        probability: fp32 [E], the router's probability for each expert; carries the gradient.
        tokens: float64 scalar, (token, layer) pairs; no gradient.
    """

    load: Tensor
    probability: Tensor
    tokens: Tensor

    def __add__(self, other: ExpertSums) -> ExpertSums:
        return ExpertSums(
            self.load + other.load, self.probability + other.probability, self.tokens + other.tokens
        )

    def detach(self) -> ExpertSums:
        """The same numbers without a gradient."""
        return ExpertSums(self.load, self.probability.detach(), self.tokens)

    def over_ranks(self, sum_over_ranks: SumOverRanks) -> ExpertSums:
        """The sums of all ranks, without a gradient. One collective of 2E + 1 numbers."""
        vector = torch.cat((self.load, self.probability.detach().double(), self.tokens.reshape(1)))
        load, probability, tokens = sum_over_ranks(vector).split((len(self.load), len(self.load), 1))
        return ExpertSums(load, probability.to(self.probability.dtype), tokens.squeeze(0))

    def balance(self, whole: ExpertSums | None = None) -> Tensor:
        """These tokens' share of the balance of a batch.

        Args:
            whole: the sums of the whole batch; None where these are it.

        Returns:
            Scalar; differentiable in `probability`.
        """
        whole = self if whole is None else whole
        load = (whole.load / whole.tokens).to(self.probability.dtype)
        return len(load) * (load * (self.probability / whole.tokens.to(self.probability.dtype))).sum()


def expert_sums(
    router: Router, router_logits: tuple[Tensor, ...], *, token_weight: Tensor, checkpointed: bool = False
) -> ExpertSums:
    """What the tokens of one micro-batch did.

    Args:
        router: of the model.
        router_logits: [N, E] of every layer with experts, from the backbone with `output_router_logits=True`.
        token_weight: fp32 of N elements, how often a token stands in the two full sequences; 0 for padding.
        checkpointed: whether the layers are recomputed in the backward pass.

    Raises:
        ValueError: under reentrant gradient checkpointing, which cuts the router's gradient without a word.
    """
    if checkpointed and torch.is_grad_enabled() and not any(logits.requires_grad for logits in router_logits):
        raise ValueError(
            "the router's logits have no gradient: set gradient_checkpointing_kwargs={'use_reentrant': False} "
            "or output_router_logits=False in the model's config to train without load balancing"
        )
    weight = token_weight.flatten()
    load = weight.new_zeros(router.num_experts, dtype=torch.float64)  # counts beyond 2^24 are not fp32's
    probability = weight.new_zeros(
        router.num_experts, dtype=torch.promote_types(router_logits[0].dtype, torch.float32)
    )
    for logits in router_logits:
        probabilities = logits.softmax(-1, dtype=probability.dtype)
        chosen = probabilities.topk(router.experts_per_token).indices.flatten()
        load.scatter_add_(0, chosen, weight.repeat_interleave(router.experts_per_token).double())
        probability = probability + weight.to(probability.dtype) @ probabilities
    return ExpertSums(load, probability, weight.double().sum() * len(router_logits))


def find_router(model: PreTrainedModel, config: PreTrainedConfig) -> Router | None:
    """The router of a model whose config asks for `output_router_logits`; None where nothing is to be balanced.

    Raises:
        ValueError: this family's balance is another function than ours.
    """
    if not getattr(config, "output_router_logits", False):
        return None
    theirs = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    numbers = vars(model)
    known = {"router_aux_loss_coef", "num_experts", "num_experts_per_tok"} <= numbers.keys()
    if theirs is not None and known and "top_k" in inspect.signature(theirs).parameters:
        router = Router(
            coefficient=numbers["router_aux_loss_coef"],
            num_experts=numbers["num_experts"],
            experts_per_token=numbers["num_experts_per_tok"],
        )
        if _same_function(router, theirs):
            return router
    raise ValueError(
        f"{type(model).__name__} has output_router_logits=True in its config, but computes the balance "
        "of its experts in a way that is not known here. Set output_router_logits=False to go without"
    )


def _same_function(router: Router, theirs: Callable[..., Tensor]) -> bool:
    """Whether the family's own function gives our number, on random logits of two layers with and without weight."""
    generator = torch.Generator().manual_seed(0)
    layers = tuple(torch.randn(PROBE_ROWS, router.num_experts, generator=generator) for _ in range(2))
    weight = torch.arange(PROBE_ROWS).remainder(3).float()
    ours = expert_sums(router, layers, token_weight=weight).balance()
    wanted = theirs(layers, router.num_experts, router.experts_per_token, weight)
    return torch.allclose(ours, torch.as_tensor(wanted, dtype=ours.dtype), rtol=1e-4)


def expert_share(config: PreTrainedConfig) -> float:
    """Part of its experts that a token meets; 1 for a model without experts.

    Families call these numbers differently: Mixtral `num_local_experts`, Qwen3-MoE `num_experts`, DeepSeek
    `n_routed_experts`.
    """
    per_token = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    return per_token / experts if per_token and experts else 1.0
