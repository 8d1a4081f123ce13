"""What a mixture of experts needs of an optimizer step and of DeepSpeed, beyond what every model needs.

**Balance over micro-steps.** The balance of the experts (`model/router.py`) is that of the tokens of the whole global
batch. Its gradient needs to know, before the first backward pass, how many tokens each expert gets. Where a step has
one micro-step, the ranks tell each other in the middle of the forward pass: 2E + 1 numbers. Where it has several,
`router_balance` decides between an exact value, which costs a forward pass without gradient and without the head, and
the mean over the micro-steps, weighted by their tokens, which costs nothing and is what accumulation gives elsewhere.

**Experts that are modules.** The experts of transformers 5 are slices of one parameter, which is gathered and reduced
as a whole. Those of some families, and of models with code of their own, are modules that run only where a token was
sent to them. Ranks whose tokens go to different experts then take part in different collectives: under ZeRO-3 they
wait for each other for ever (DeepSpeed #1998, #670), under ZeRO-1 and 2 one rank's gradient is added to that of
another parameter. So under ZeRO-3 the block that holds them is a leaf module, which DeepSpeed gathers and reduces as a
whole, and below it experts without a token get a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from orpo_ds import distributed
from orpo_ds.data.feed import StepPlan
from orpo_ds.data.packing import MicroBatch
from orpo_ds.model.router import ExpertSums


def balance_totals(
    engine: deepspeed.DeepSpeedEngine, plan: StepPlan, micro_batches: Sequence[MicroBatch]
) -> dict[str, Any]:
    """What `OrpoPolicy.forward` is told about the experts in a step of several micro-steps. Collective.

    Args:
        engine: of a policy with a router.
        plan: of the step.
        micro_batches: all of this rank's.
    """
    if engine.module.router_balance == "micro_step":
        return {"tokens_total": plan.tokens}
    count = ExpertCount()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # Dropout draws again in the pass that trains, from where it draws now: the same tokens go the same way.
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for batch in micro_batches:
            engine(batch, nll_tokens_total=1, pairs_total=1, count_experts=count, count_only=True)
    return {"experts": count.over_ranks()}


class ExpertCount:
    """Adds up what micro-batches do to the experts. `OrpoPolicy.forward` calls it."""

    def __init__(self) -> None:
        self.total: ExpertSums | None = None  # of this rank; None where no router was seen

    def __call__(self, sums: ExpertSums) -> None:
        """Take in one micro-batch."""
        self.total = sums if self.total is None else self.total + sums

    def over_ranks(self) -> ExpertSums:
        """The sums of all ranks. Collective."""
        assert self.total is not None, "no micro-batch of a model with a router"
        return self.total.over_ranks(distributed.sum_over_ranks)


def keep_ranks_in_step(model: nn.Module, *, zero_stage: int) -> list[nn.Module]:
    """Let all ranks take part in the same collectives, whichever experts their tokens go to.

    Args:
        model: before DeepSpeed wraps it.
        zero_stage: of the run.

    Returns:
        The blocks that choose which of their children run; none in most models.
    """
    blocks = list(expert_blocks(model))
    for block in blocks:
        if zero_stage == 3:
            set_z3_leaf_module(block, True)
        else:
            block.register_forward_pre_hook(_reach_all_parameters)
    return blocks


def expert_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that choose which of their children run.

    That is a list or dict of modules with `expert` in its name or its class's, if it has a forward of its own
    (Switch Transformers), and else the module that holds it (Mixtral before transformers 5, DeepSeek's own code).
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            if not isinstance(child, nn.ModuleList | nn.ModuleDict) or len(child) < 2:
                continue
            if "expert" in name.lower() or "expert" in type(child).__name__.lower():
                yield child if _can_be_called(child) else parent


def _can_be_called(container: nn.ModuleList | nn.ModuleDict) -> bool:
    return type(container).forward is not nn.Module.forward


def _reach_all_parameters(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook before the forward: adds zero times each trainable parameter to the hidden states.

    To the input and not to the output: ZeRO-2 puts gradients into its buckets in the order in which they are complete.
    The input's gradient is complete after that of every expert that ran, and then all ranks walk this chain.
    """
    hidden, *others = arguments
    for parameter in block.parameters():
        if parameter.requires_grad:
            hidden = hidden + 0 * parameter.flatten()[0].to(hidden.dtype)
    return (hidden, *others)
