r"""The ORPO objective from token log-probabilities (Hong, Lee and Thorne, arXiv:2403.07691).

With c and r the mean log-probability of the chosen and the rejected response over their own tokens (eq. 3):

    odds(y|x)    = P(y|x) / (1 - P(y|x))                                     eq. 4
    log_odds     = log odds(chosen) - log odds(rejected)                     eq. 5
                 = (c - r) - (log(1 - exp c) - log(1 - exp r))
    L            = E[ L_SFT + beta L_OR ]                                    eq. 6
    L_OR         = -log sigmoid(log_odds)                                    eq. 7

L_SFT is the mean negative log-probability of a token, L_OR the mean over pairs, and both means run over the
*global* batch: each micro-batch divides by the totals of the optimizer step, so that the sum of its losses
over micro-batches and ranks is the loss, and the sum of their gradients the gradient, however the batch was
cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class OrpoSums:
    """What one micro-batch adds to the step. All but `loss` are detached."""

    loss: Tensor  # scalar, already divided by the step's totals
    sums: dict[
        str, Tensor
    ]  # by TRL's names: scalar sums, of nll_loss over nll tokens, of the others over pairs
    chosen_logps: Tensor  # [P] mean log-prob of each chosen response
    rejected_logps: Tensor  # [P]


def orpo_loss(
    logps: Tensor,
    *,
    nll: Tensor,
    chosen_pair: Tensor,
    rejected_pair: Tensor,
    chosen_len: Tensor,
    rejected_len: Tensor,
    beta: float,
    nll_tokens_total: int,
    pairs_total: int,
    group: dist.ProcessGroup | None = None,
) -> OrpoSums:
    """ORPO loss and metric sums of a micro-batch of P pairs, from the log-probs of its R target rows.

    Args:
        logps: [R] fp32 token log-probs.
        nll: [R] bool, whether the row counts in L_SFT.
        chosen_pair: [R] int64, the pair (0..P-1) whose chosen response the row belongs to, or -1.
        rejected_pair: the same for rejected; a row of a prefix that both responses share belongs to both.
        chosen_len: [P] int64, tokens of each chosen response, never 0.
        rejected_len: [P] int64, tokens of each rejected response, never 0.
        beta: weight of the odds-ratio term (lambda in the paper).
        nll_tokens_total: rows with `nll` in the global batch.
        pairs_total: pairs in the global batch.
        group: ranks that hold different rows of the same pairs (sequence parallel); lengths are of whole
            responses.

    Returns:
        OrpoSums. Without pairs and nll rows the loss is 0 with zero gradients: the graph is there, so that
        every rank of ZeRO-3 runs the same backward.

        Over a `group` loss, sums and logps are those of the whole micro-batch and the same on every rank
        (count them once), and backward gives each rank the gradient of that loss with respect to its own
        rows. What the ranks then hold for a shared parameter are parts of its gradient, to be summed over the
        group, not averaged.

    Raises:
        ValueError: a total that is not positive.
    """
    if nll_tokens_total <= 0 or pairs_total <= 0:
        raise ValueError(
            f"the global batch counts {nll_tokens_total} nll tokens and {pairs_total} pairs; the loss is a "
            "mean over both, so both must be positive."
        )
    num_pairs = chosen_len.shape[0]
    # [1 + 2P] sums in one tensor, so that sequence parallelism costs one all-reduce.
    sums = torch.cat(
        (
            torch.where(nll, -logps, 0).sum()[None],
            _segment_sums(logps, chosen_pair, num_pairs),
            _segment_sums(logps, rejected_pair, num_pairs),
        )
    )
    if group is not None:
        sums = _SumOverGroup.apply(sums, group)
    nll_sum, chosen_sum, rejected_sum = sums.split((1, num_pairs, num_pairs))
    chosen, rejected = chosen_sum / chosen_len, rejected_sum / rejected_len

    odds = log_odds(chosen, rejected)
    log_sigmoid = F.logsigmoid(odds)
    loss = nll_sum.squeeze(0) / nll_tokens_total - beta * log_sigmoid.sum() / pairs_total

    chosen_logps, rejected_logps = chosen.detach(), rejected.detach()
    chosen_rewards, rejected_rewards = beta * chosen_logps, beta * rejected_logps
    metrics = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(logps.dtype),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
        "log_odds_chosen": odds.detach(),
        "log_odds_ratio": log_sigmoid.detach(),
        "nll_loss": nll_sum.detach(),
    }
    return OrpoSums(
        loss=loss,
        sums={name: values.sum() for name, values in metrics.items()},
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
    )


def log_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Log odds ratio (eq. 5) of mean log-probs, elementwise; exactly 0 where the two are equal."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, elementwise, accurate and with a finite gradient everywhere.

    Two formulas, each where it does not cancel (Mächler 2012, "Accurately computing log(1 - exp(-|a|))"):
    log(-expm1(x)) above -log 2, log1p(-exp(x)) below. A `where` alone would differentiate both at every x,
    and the unused one has an infinite slope near 0 that 0 * inf turns into NaN; so each sees a harmless x
    where it is unused.

    At x = 0 (probability 1) value and slope are infinite. There x is taken as the largest negative normal
    number: the value is about -87 in fp32 and the gradient 0, as of any constant. So is an x that rounding
    made positive.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    above = torch.log(-torch.expm1(torch.where(near, x, -math.log(2))))
    below = torch.log1p(-torch.exp(torch.where(near, -math.log(2), x)))
    return torch.where(near, above, below)


def _segment_sums(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """[R] values, [R] segment numbers (-1: none) -> [num_segments] sums.

    A masked sum over [P, R] rather than index_add: it adds pairwise, in the same order on every device and
    run, where atomics on a GPU would not; and a NaN stays in its own pair, which can then be named.
    """
    member = segment == torch.arange(num_segments, device=segment.device)[:, None]
    return torch.where(member, values, 0).sum(1)


class _SumOverGroup(torch.autograd.Function):
    """All-reduce forward, identity backward.

    Every rank goes on to compute the same loss from the sum, so the gradient that arrives here is already the
    whole gradient of that one loss; reducing it again would multiply it by the size of the group.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
