"""GaLore and APOLLO: optimizers whose state is that of the gradient projected to a few rows or columns.

They look at the gradient of a whole matrix. ZeRO 1 to 3, and DeepSpeed's bf16 at stage 0, hand an optimizer flat
pieces of parameters, so they are for ZeRO-0 in fp32 (arXiv:2403.03507, arXiv:2412.05270). transformers makes the
optimizer and finds the matrices that `optim_target_modules` names; it would pass over `weight_decay`, Adam's own
numbers, and the target modules of an optimizer that has no use for them, which is not done here.
"""

from __future__ import annotations

from typing import Any

from transformers.training_args import OptimizerNames

LOW_RANK = ("galore_", "apollo_")


def check_low_rank(args: Any) -> None:
    """Refuse what such an optimizer cannot do, before a model is loaded.

    Args:
        args: an `ORPOConfig` whose DeepSpeed JSON has been read.

    Raises:
        ValueError: names the fields, and what to set instead.
    """
    optim = OptimizerNames(args.optim).value
    if not optim.startswith(LOW_RANK):
        if args.optim_target_modules is not None:
            raise ValueError(
                f"optim_target_modules={args.optim_target_modules!r}: optim={optim!r} trains every module alike. Set "
                "optim to galore_adamw, galore_adafactor or apollo_adamw, or leave it out."
            )
        return
    if args.optim_target_modules is None:
        raise ValueError(
            f"optim={optim!r} projects the gradients of some layers: name them by optim_target_modules, such as "
            "all-linear."
        )
    stage = args.zero_stage
    if stage or args.bf16 or args.fp16:
        found = f"zero_optimization.stage is {stage}" if stage else "training in half precision"
        raise ValueError(
            f"optim={optim!r} projects the gradient of a whole matrix, and DeepSpeed hands an optimizer flat pieces "
            f"of parameters here ({found}). Set deepspeed=zero0 and bf16=False, or train adapters."
        )


def adam_numbers(args: Any) -> dict[str, Any]:
    """Keywords of a low-rank AdamW that transformers leaves at that class's own defaults; {} for other optimizers."""
    if OptimizerNames(args.optim) not in (OptimizerNames.GALORE_ADAMW, OptimizerNames.APOLLO_ADAMW):
        return {}
    betas = (args.adam_beta1, args.adam_beta2)
    # Its warning advises torch's AdamW, which projects nothing.
    return {"betas": betas, "eps": args.adam_epsilon, "no_deprecation_warning": True}


def with_projections(groups: list[dict[str, Any]], keywords: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups that know which of their matrices are projected, and how.

    Args:
        groups: of the parameters that train, by weight decay.
        keywords: transformers' keywords of the optimizer; its `params`, groups of all parameters in which those that
            are projected have a `rank` and more, are taken out.

    Returns:
        `groups`, each divided in two: projected and not.
    """
    projections: dict[int, dict[str, Any]] = {}
    for group in keywords.pop("params", []):
        how = {name: value for name, value in group.items() if name != "params"}
        projections |= {id(parameter): how for parameter in group["params"] if how}
    divided = []
    for group in groups:
        for projected in (False, True):
            chosen = [value for value in group["params"] if (id(value) in projections) is projected]
            how = projections[id(chosen[0])] if chosen and projected else {}
            divided.append(group | {"params": chosen} | how)
    return [group for group in divided if group["params"]]
