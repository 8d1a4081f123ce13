"""One optimizer step, from the plan of a global batch to updated weights.

Read it top to bottom: every micro-batch adds its share of the *global* loss (the totals are known before the first
one starts), the last one lets DeepSpeed reduce, the losses of all ranks are summed once and must be finite, and only
then do the weights change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orpo_ds import distributed
from orpo_ds.data.feed import StepPlan
from orpo_ds.data.packing import MicroBatch
from orpo_ds.engine import Engine, keep_plain_norm
from orpo_ds.experts import balance_totals
from orpo_ds.host_memory import give_back
from orpo_ds.out_of_memory import lack_of_memory_named

# Takes the metric sums of a micro-batch, `loss` among them.
Recorder = Callable[[dict[str, Tensor], MicroBatch], None]


class NonFiniteLossError(RuntimeError):
    """The loss is not a number any more; the weights are still those of the step before.

    Attributes:
        loss: NaN, or an infinity.
        pairs: dataset indices of the pairs in the micro-batches whose loss is not finite.
    """

    def __init__(self, loss: float, pairs: list[int], *, advice: str = "") -> None:
        """Say what the loss is, and where to look."""
        super().__init__(f"the loss is {loss} {advice}".rstrip())
        self.loss = loss
        self.pairs = pairs


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did.

    Attributes:
        loss: of the global batch, before the update.
        applied: False when the update was skipped because the gradient is not finite, as fp16's when it overflows.
        stop: whether any rank was told to stop; the same on all of them.
    """

    loss: float
    applied: bool
    stop: bool = False


def no_one(event: str) -> None:
    """For a step that no callback watches."""


def train_step(
    engine: Engine,
    plan: StepPlan,
    micro_batches: Iterable[MicroBatch],
    *,
    record: Recorder,
    notify: Callable[[str], None] = no_one,
    told_to_stop: Callable[[], bool] = lambda: False,
) -> StepOutcome:
    """Forward, backward and update for one global batch.

    Args:
        engine: model, loss and optimizer.
        plan: this rank's part of the global batch.
        micro_batches: the tensors of `plan.micro_batches`, on the engine's device.
        record: takes the sums of every micro-batch.
        notify: told of transformers' events within a step: `on_substep_end` after each micro-batch but the last,
            `on_pre_optimizer_step`, `on_optimizer_step`.
        told_to_stop: whether this rank was; asked once, when the loss is summed.

    Raises:
        NonFiniteLossError: on all ranks, before the weights change.
        StepOutOfMemoryError: a micro-batch of this rank does not fit.
    """
    ds = engine.deepspeed
    last = len(plan.micro_batches) - 1
    totals: dict[str, Any] = {"nll_tokens_total": plan.nll_tokens, "pairs_total": plan.pairs}
    if ds.module.parts.router is not None and last > 0:
        micro_batches = list(micro_batches)
        totals |= balance_totals(ds, plan, micro_batches)
    losses: list[tuple[Tensor, MicroBatch]] = []
    for number, batch in enumerate(micro_batches):
        ds.set_gradient_accumulation_boundary(number == last)
        with lack_of_memory_named(batch):
            sums = ds(batch, **totals)
            give_back(sums["loss"].device)
            # DeepSpeed averages gradients over the ranks with different rows; their losses are shares of a sum.
            ds.backward(sums["loss"] * distributed.data_size(), scale_wrt_gas=False)
        sums["loss"] = sums["loss"].detach()
        losses.append((sums["loss"], batch))
        record(sums, batch)
        if number < last:
            notify("on_substep_end")
    loss, stop = global_loss(losses, told_to_stop=told_to_stop())
    applied = keep_plain_norm(ds)
    notify("on_pre_optimizer_step")
    give_back(losses[0][0].device)  # an embedding that is frozen has no gradient whose end would do it
    if applied:
        ds.step()
        applied = bool(ds.was_step_applied())
    notify("on_optimizer_step")
    return StepOutcome(loss=loss, applied=applied, stop=stop)


def global_loss(losses: list[tuple[Tensor, MicroBatch]], *, told_to_stop: bool = False) -> tuple[float, bool]:
    """Sum this step's loss shares over micro-batches and ranks, and ask whether any rank was told to stop. Collective.

    Args:
        losses: this rank's shares and where they come from.
        told_to_stop: whether this rank was.

    Raises:
        NonFiniteLossError: on all ranks, when the sum is NaN or infinite; names the pairs of all ranks.
    """
    own = torch.stack([loss for loss, _ in losses]).sum()
    total, told = distributed.sum_over_ranks(torch.stack((own, own.new_tensor(float(told_to_stop))))).tolist()
    if math.isfinite(total):
        # The sum is over ranks with other rows; where some have the same rows, they must know as well.
        if distributed.data_size() < distributed.world_size():
            told = distributed.max_over_ranks(own.new_tensor(told)).item()
        return total, told > 0
    mine = [pair for loss, batch in losses if not math.isfinite(loss.item()) for pair in batch.pair_ids]
    raise NonFiniteLossError(total, [pair for pairs in distributed.gather_objects(mine) for pair in pairs])
