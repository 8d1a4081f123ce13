"""How far two steps are apart, relative to what float32 could possibly agree on."""

from collections.abc import Mapping

import torch
from torch import Tensor

# A difference is as exact as what it is the difference of.
SCALE_OF = {"rewards/margins": "rewards/chosen", "log_odds_chosen": "logps/chosen"}


def metric_errors(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Relative difference of every metric in `theirs`; of a difference, relative to one of its two terms."""
    return {
        name: abs(ours[name] - value) / (abs(theirs[SCALE_OF.get(name, name)]) or 1.0)
        for name, value in theirs.items()
    }


def gradient_errors(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, tolerance: float
) -> dict[str, float]:
    """Largest difference in each parameter's gradient, relative to the largest entry of that gradient.

    An entry is a sum of terms that may each be as large as the largest gradient of the model, and float32 rounds every
    one of them. A gradient that is smaller than that rounding is not asked to be exact: no parameter's scale is taken
    as less than what makes one such rounding as large as `tolerance`.
    """
    assert ours.keys() == theirs.keys()
    scale = {name: gradient.abs().max().item() for name, gradient in theirs.items()}
    floor = torch.finfo(torch.float32).eps / tolerance * max(scale.values())
    return {
        name: (ours[name].double() - gradient.double()).abs().max().item() / max(scale[name], floor)
        for name, gradient in theirs.items()
    }
