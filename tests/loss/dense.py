"""The head with all its logits at once, in float64, and how far fp32 may be from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


@dataclass
class Problem:
    """Arguments of `token_logps`, and an incoming gradient [R] for its result."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    index: Tensor
    label: Tensor
    grad: Tensor
    softcap: float | None = None
    scale: float = 1.0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What may have a gradient, by name."""
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments for `token_logps`."""
        return {
            "index": self.index,
            "label": self.label,
            "bias": self.bias,
            "softcap": self.softcap,
            "scale": self.scale,
        }


def make_problem(
    *,
    rows: int = 23,
    hidden_rows: int = 17,
    width: int = 12,
    vocab: int = 301,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Problem:
    """Seeded by the caller. Rows repeat and are out of order, labels include the first and last token."""
    label = torch.randint(0, vocab, (rows,))
    label[:2] = torch.tensor((0, vocab - 1))[:rows]
    return Problem(
        hidden=torch.randn(hidden_rows, width).to(dtype).requires_grad_(),
        weight=torch.randn(vocab, width).to(dtype).requires_grad_(),
        bias=torch.randn(vocab).to(dtype).requires_grad_() if bias else None,
        index=torch.randint(0, hidden_rows, (rows,)),
        label=label,
        grad=torch.randn(rows),
        softcap=softcap,
        scale=scale,
    )


def dense_logps(problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
    """[R] log-probs through torch's own log_softmax of [R, V] logits, in the dtype of `tensors`."""
    logits = problem.scale * tensors["hidden"][problem.index] @ tensors["weight"].T
    if "bias" in tensors:
        logits = logits + tensors["bias"]
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    return logits.log_softmax(-1).gather(1, problem.label[:, None])[:, 0]


def float64_reference(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs [R] and gradients of sum(grad * logps), all float64."""
    tensors = {name: tensor.detach().double().requires_grad_() for name, tensor in problem.tensors.items()}
    logps = dense_logps(problem, tensors)
    logps.backward(problem.grad.double())
    return logps.detach(), {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


def fp32_bounds(problem: Problem) -> dict[str, float]:
    """Largest absolute errors that fp32 arithmetic allows, by worst-case analysis.

    A dot product of n terms errs by at most n eps sum |x_i y_i| (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1); so a logit errs by `logit`, a soft-cap never enlarges that, and the log-sum-exp errs
    by as much again, with V eps for its sum. A probability then has a relative error of twice that; the sum
    over v of |D| is at most 2, and the products of backward add n eps once more.
    """
    hidden, weight = problem.hidden.detach().double().abs(), problem.weight.detach().double().abs()
    rows, (vocab, width) = problem.index.shape[0], weight.shape
    magnitude = abs(problem.scale) * (hidden[problem.index] @ weight.T)
    if problem.bias is not None:
        magnitude = magnitude + problem.bias.detach().double().abs()
    logit = (width + 4) * EPS * float(magnitude.max())
    logp = 2 * logit + (vocab + 4) * EPS
    difference = 2 * (2 * logp + (vocab + rows + 4) * EPS)  # error of sum_v |D_rv| and of the sums over it
    grad, scale = problem.grad.double().abs(), abs(problem.scale)
    return {
        "logps": logp,
        "hidden": difference * scale * float(grad.sum() * weight.max()),  # one hidden row may take all rows
        "weight": difference * scale * float(grad.sum() * hidden.max()),
        "bias": difference * float(grad.sum()),
    }
