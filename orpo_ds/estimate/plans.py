"""Estimates of a run: with its own DeepSpeed settings, and with every preset that could serve instead."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from orpo_ds.config import ORPOConfig
from orpo_ds.deepspeed_json import PRESETS, read_deepspeed_config
from orpo_ds.estimate.hardware import CUDA_RESERVE_BYTES, PROCESS_BYTES, Cluster
from orpo_ds.estimate.memory import RankMemory, Subject, rank_memory, rank_states
from orpo_ds.estimate.shapes import read_config
from orpo_ds.estimate.states import ZeroPlan
from orpo_ds.estimate.timing import EFFICIENCY, StepTime, step_time
from orpo_ds.estimate.workload import Pairs, Workload, workload
from orpo_ds.prepare import training_dtype

MARGIN = 1.10  # what is computed may be 10% too low (`benchmarks/estimate.py`), so a run must fit with as much to spare
OWN = "as set"
# Keys of `zero_optimization` that the arithmetic knows. A preset with others is not proposed.
KNOWN = frozenset(
    {
        "stage",
        "overlap_comm",
        "contiguous_gradients",
        "reduce_bucket_size",
        "allgather_bucket_size",
        "sub_group_size",
        "round_robin_gradients",
        "reduce_scatter",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
        "offload_optimizer",
        "offload_param",
    }
)


def is_known(zero: Mapping[str, Any]) -> bool:
    """Whether the arithmetic knows all that these settings of `zero_optimization` ask for."""
    return not zero.keys() - KNOWN and not (zero.get("offload_optimizer") or {}).get("super_offload")


@dataclass(frozen=True)
class Estimate:
    """What a run needs with one set of DeepSpeed settings.

    Attributes:
        name: of the preset, or OWN.
        recomputes: whether gradient checkpointing is on.
        plan: ZeRO stage and offload.
        cluster: what it runs on.
        work: a step of it.
        memory: of one rank.
        time: of one step.
        loading: bytes that a node's host needs while the weights are read.
    """

    name: str
    recomputes: bool
    plan: ZeroPlan
    cluster: Cluster
    work: Workload
    memory: RankMemory
    time: StepTime
    loading: int

    @property
    def device_bytes(self) -> int:
        """Of one GPU, its context included."""
        return self.memory.device + CUDA_RESERVE_BYTES

    @property
    def host_bytes(self) -> int:
        """Of one node, at the worse of loading and training."""
        a_node = self.cluster.gpus_per_node
        return a_node * PROCESS_BYTES + max(a_node * self.memory.host, self.loading)

    @property
    def fits(self) -> bool:
        """On the GPUs and on the hosts, with a tenth to spare."""
        device = MARGIN * self.memory.device + CUDA_RESERVE_BYTES
        return (
            device <= self.cluster.gpu.memory_bytes
            and MARGIN * self.host_bytes <= self.cluster.host_bytes_per_node
        )

    @property
    def days(self) -> float | None:
        """Of the whole training; None where the number of steps is not known."""
        return None if self.work.steps is None else self.work.steps * self.time.total / 86_400

    @property
    def usd(self) -> float | None:
        """Price of the whole training; None where steps or price are not known."""
        if self.days is None or self.cluster.gpu.usd_per_hour is None:
            return None
        return self.days * 24 * self.cluster.ranks * self.cluster.gpu.usd_per_hour


class Estimator:
    """Estimates one run under several DeepSpeed settings; the model is made once for each way to train it."""

    def __init__(
        self,
        model: str,
        args: ORPOConfig,
        *,
        pairs: Pairs,
        peft_config: Any | None = None,
        efficiency: float = EFFICIENCY,
    ) -> None:
        """Remember what is estimated.

        Args:
            model: folder or hub id; only its config is read.
            args: the run's settings.
            pairs: lengths of the dataset.
            peft_config: adapters, or None.
            efficiency: share of the GPUs' peak that arithmetic reaches.

        Raises:
            ValueError: the model has no config, or cannot be estimated.
        """
        self.args, self.pairs, self.efficiency = args, pairs, efficiency
        self._config = read_config(model, args=args)
        self._peft_config = peft_config
        self._subjects: dict[bool, Subject] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the training."""
        return training_dtype(self.args)

    def subject(self, *, recomputes: bool) -> Subject:
        """The model on shapes, with gradient checkpointing or without."""
        if recomputes not in self._subjects:
            args = copy.copy(self.args)
            args.gradient_checkpointing = recomputes
            self._subjects[recomputes] = Subject.of(
                self._config, args=args, dtype=self.dtype, peft_config=self._peft_config
            )
        return self._subjects[recomputes]

    def _states_alone(self, cluster: Cluster, settings: Mapping[str, Any]) -> int:
        """Bytes on a GPU before there is an activation."""
        subject = self.subject(recomputes=True)
        plan = ZeroPlan.of(dict(settings), hidden_size=subject.hidden_size)
        return rank_states(
            subject, plan, self._work(subject, cluster), ranks=cluster.ranks, device="cuda"
        ).device_total

    def _work(self, subject: Subject, cluster: Cluster) -> Workload:
        args = copy.copy(self.args)
        args.gradient_checkpointing = subject.args.gradient_checkpointing
        return workload(args, self.pairs, subject.size, ranks=cluster.ranks)

    def estimate(
        self, cluster: Cluster, settings: Mapping[str, Any], *, recomputes: bool, name: str = OWN
    ) -> Estimate:
        """The run on `cluster` with these DeepSpeed settings."""
        subject = self.subject(recomputes=recomputes)
        plan = ZeroPlan.of(dict(settings), hidden_size=subject.hidden_size)
        work = self._work(subject, cluster)
        memory = rank_memory(subject, plan, work, ranks=cluster.ranks, device="cuda")
        whole = subject.count.elements * subject.count.itemsize
        return Estimate(
            name=name,
            recomputes=recomputes,
            plan=plan,
            cluster=cluster,
            work=work,
            memory=memory,
            time=step_time(subject.count, plan, work, cluster, efficiency=self.efficiency),
            # Under ZeRO-3 one rank reads and the others receive their shards; else each has the model before its GPU.
            loading=whole if plan.stage == 3 else whole * cluster.gpus_per_node,
        )

    def own(self, cluster: Cluster) -> Estimate:
        """The run as it is set."""
        return self.estimate(
            cluster, self.args.deepspeed_settings, recomputes=self.args.gradient_checkpointing
        )

    def fastest_that_fits(self, cluster: Cluster) -> Estimate | None:
        """The fastest of the presets that the arithmetic knows, with and without gradient checkpointing.

        One that needs a drive is proposed only where no other fits. None: none fits.
        """
        candidates = []
        for path in sorted(PRESETS.glob("*.json")):
            settings = read_deepspeed_config(str(path))
            zero = settings.get("zero_optimization", {})
            if not is_known(zero) or (self.args.fp16 and zero.get("stage", 0) == 0):
                continue
            for recomputes in (False, True):
                subject = self.subject(recomputes=recomputes)
                plan = ZeroPlan.of(settings, hidden_size=subject.hidden_size)
                time = step_time(
                    subject.count, plan, self._work(subject, cluster), cluster, efficiency=self.efficiency
                )
                order = (plan.uses_drive, time.total, plan.stage, recomputes)
                candidates.append((order, path.stem, settings))
        for (_, _, _, recomputes), name, settings in sorted(candidates, key=lambda one: one[0]):
            if self._states_alone(cluster, settings) > cluster.gpu.memory_bytes:
                continue
            found = self.estimate(cluster, settings, recomputes=recomputes, name=name)
            if found.fits:
                return found
        return None
