"""How long a step takes: arithmetic, what ranks send to each other, and what an offloaded optimizer adds.

Volumes are those of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 7) as DeepSpeed 0.19 sends them: ZeRO-1
and 2 all-reduce each bucket of gradients (twice its bytes on the wire) and gather the updated parameters once a step;
ZeRO-2 and 3 reduce in every micro-batch; ZeRO-3 gathers the parameters for the forward and again for the backward
pass of every micro-batch. Nothing here has been measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from orpo_ds.estimate.hardware import Cluster
from orpo_ds.estimate.states import FP32, ModelCount, ZeroPlan
from orpo_ds.estimate.workload import Workload

# Share of the peak that a GPU's arithmetic reaches. Llama 3 405B trained in bf16 on 8,192 to 16,384 H100 at 0.38 to
# 0.43 (Llama Team 2024, arXiv:2407.21783, table 4), what it waited for the network included.
EFFICIENCY = 0.40
# CPU Adam reads weights, both moments and the gradient in fp32, and writes the first three.
ADAM_BYTES = 7 * FP32


@dataclass(frozen=True)
class StepTime:
    """One optimizer step.

    Attributes:
        sent: bytes that a rank sends in it.
        compute: seconds of arithmetic.
        network: seconds that the network is busy, at the line rate.
        hidden: whether arithmetic and network run at the same time.
        update: seconds of an offloaded update, and of moving states to it.
    """

    sent: float
    compute: float
    network: float
    hidden: bool
    update: float

    @property
    def total(self) -> float:
        """Seconds."""
        both = max(self.compute, self.network) if self.hidden else self.compute + self.network
        return both + self.update


def step_time(
    count: ModelCount, plan: ZeroPlan, work: Workload, cluster: Cluster, *, efficiency: float
) -> StepTime:
    """Seconds and bytes of one optimizer step."""
    b, micro_steps, ranks = count.itemsize, work.micro_steps, cluster.ranks
    gradients, parameters = b * count.trained, b * count.elements
    if plan.stage == 3:
        moves = micro_steps * (2 * parameters + gradients)
    else:
        reductions = micro_steps if plan.stage == 2 else 1
        moves = reductions * 2 * gradients + (gradients if plan.stage > 0 else 0)
    peak = cluster.gpu.flops_per_s * (1 if b < FP32 else 1 / 16)  # fp32 outside of the tensor cores
    return StepTime(
        sent=moves * (ranks - 1) / ranks,
        compute=work.flops / (peak * efficiency),
        network=cluster.seconds_to_move(moves),
        hidden=bool(plan.settings.overlap_comm),
        update=_offload_seconds(count, plan, work, cluster),
    )


def _offload_seconds(count: ModelCount, plan: ZeroPlan, work: Workload, cluster: Cluster) -> float:
    """An update on the host waits for the gradients to come down and the parameters to go up.

    Offloaded parameters go up for both passes of each micro-batch. All of it is taken to be exposed.
    """
    gpu, b = cluster.gpu, count.itemsize
    share = count.trained / cluster.ranks
    seconds = 0.0
    if plan.optimizer_on != "device":
        seconds += share * ADAM_BYTES / gpu.host_memory_bytes_per_s
        seconds += share * b * (work.micro_steps + 1) / gpu.host_link_bytes_per_s
    if plan.optimizer_on == "nvme":
        seconds += share * (3 + 3) * FP32 / gpu.drive_bytes_per_s
    if plan.parameters_on != "device":
        moved = 2 * work.micro_steps * count.elements / cluster.ranks * b
        seconds += moved / gpu.host_link_bytes_per_s
        if plan.parameters_on == "nvme":
            seconds += moved / gpu.drive_bytes_per_s
    return seconds
