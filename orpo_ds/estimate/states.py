"""What DeepSpeed holds for a model from its first step on, term by term.

Read off DeepSpeed 0.19.8 (`runtime/zero/stage_1_and_2.py`, `stage3.py`, `partition_parameters.py`) and off what
`orpo_ds.engine` makes of it; `benchmarks/estimate.py` holds each line against a process that trains. With P elements
of the model, T of them trained, L those of the largest one trained, N ranks that share them, and b bytes a number in
forward and backward:

                    ZeRO-0     ZeRO-1         ZeRO-2         ZeRO-3
    parameters      b P        b P            b P            b P / N
    fp32 weights    (4 T)      4 T / N        4 T / N        (4 T / N)      in brackets: only where b < 4
    Adam            8 T        8 T / N        8 T / N        8 T / N
    gradients       b T        b T            b T / N        b T / N        ZeRO-3: a buffer, there from the start

ZeRO-1 and 2 keep fp32 weights beside fp32 parameters, ZeRO-3 and ZeRO-0 do not (`engine._update_weights_in_place`).

Offloading the optimizer moves fp32 weights and Adam's state to the host, and adds there an fp32 gradient (4 T / N); in
ZeRO-2 also a copy of the updated parameters (b T / N) and a buffer of b L on host and device each; in ZeRO-3 the
buffer of gradients moves to the host as well. Offloading the parameters moves b P / N to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from orpo_ds.estimate.replay import GradientRule

FP32 = 4
FP64 = 8  # DeepSpeed sums the squares of a gradient in float64
# Bytes of state that an optimizer of transformers keeps for each trained element; others are refused by name.
STATE_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_apex_fused": 8,
    "adamw_bnb_8bit": 2,
    "paged_adamw_32bit": 8,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "sgd": 0,
}


@dataclass(frozen=True)
class ZeroPlan:
    """The `zero_optimization` of a DeepSpeed JSON, with what transformers writes for `auto`.

    Attributes:
        stage: 0 to 3.
        optimizer_on: "device", "cpu" or "nvme".
        parameters_on: likewise; only ZeRO-3 can move them.
        pins: whether what lies on the host is page-locked.
        settings: DeepSpeed's own defaults for everything else.
    """

    stage: int
    optimizer_on: str
    parameters_on: str
    pins: bool
    settings: DeepSpeedZeroConfig

    @property
    def uses_drive(self) -> bool:
        """Whether anything lies on NVMe."""
        return "nvme" in (self.optimizer_on, self.parameters_on)

    @classmethod
    def of(cls, config: dict[str, Any], *, hidden_size: int) -> ZeroPlan:
        """The plan of a DeepSpeed JSON.

        `auto` becomes what transformers' `HfTrainerDeepSpeedConfig.trainer_config_finalize` makes of it.
        """
        zero = dict(config.get("zero_optimization", {}))
        autos = {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        for name, value in autos.items():
            if zero.get(name) == "auto":
                zero[name] = value
        for part in ("offload_optimizer", "offload_param"):
            target = dict(zero.get(part) or {})
            if target.get("nvme_path") == "auto":
                target["nvme_path"] = "."
            if target:
                zero[part] = target
        settings = DeepSpeedZeroConfig(**zero)
        optimizer, parameters = settings.offload_optimizer, settings.offload_param
        return cls(
            stage=int(settings.stage),
            optimizer_on=_place(optimizer),
            parameters_on=_place(parameters) if int(settings.stage) == 3 else "device",
            pins=any(target is not None and target.pin_memory for target in (optimizer, parameters)),
            settings=settings,
        )


@dataclass(frozen=True)
class ModelCount:
    """Elements of a model.

    Attributes:
        elements: P.
        trained: T.
        largest: elements of the largest parameter that is trained.
        small: elements of parameters that ZeRO-3 may keep whole, by their size: (size, how many).
        itemsize: b.
    """

    elements: int
    trained: int
    largest: int
    small: tuple[tuple[int, int], ...]
    itemsize: int


@dataclass(frozen=True)
class States:
    """Bytes of one rank that live as long as the engine, by name; and what a step adds.

    Attributes:
        device: on the GPU, or on the host where that is the device.
        host: on the host, page-locked ones rounded as torch rounds them.
        drive: on NVMe.
        gradients: what becomes of one that is complete.
        step: most that the update itself allocates for a while.
    """

    device: dict[str, int]
    host: dict[str, int]
    drive: dict[str, int]
    gradients: GradientRule
    step: int

    @property
    def device_total(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """Bytes on the host."""
        return sum(self.host.values())


def states(
    count: ModelCount,
    plan: ZeroPlan,
    *,
    ranks: int,
    optim: str,
    micro_steps: int,
    host_is_device: bool,
) -> States:
    """What one rank holds.

    Args:
        count: of the model.
        plan: ZeRO stage and offload.
        ranks: N, that share what is sharded.
        optim: `args.optim`.
        micro_steps: micro-batches of a step; ZeRO-2 with an offloaded optimizer adds their gradients up on the host.
        host_is_device: on a CPU nothing is gathered from itself, and nothing is page-locked.

    Raises:
        ValueError: an optimizer whose state is not known here.
    """
    if optim not in STATE_BYTES:
        raise ValueError(
            f"optim={optim!r}: estimate does not know the size of its state. Known are {', '.join(STATE_BYTES)}; "
            "or try one step with --dry_run."
        )
    stage, b = plan.stage, count.itemsize
    share = -(-count.trained // ranks) if stage > 0 else count.trained
    held: dict[str, dict[str, int]] = {"device": {}, "cpu": {}, "nvme": {}}

    def put(where: str, name: str, num_bytes: int, *, pinned: bool = False) -> None:
        if num_bytes:
            if pinned and plan.pins and where == "cpu" and not host_is_device:
                num_bytes = _power_of_two(num_bytes)
            held[where][name] = held[where].get(name, 0) + num_bytes

    parameters = count.elements * b
    put(plan.parameters_on, "parameters", parameters // ranks if stage == 3 else parameters, pinned=True)
    if stage == 3:
        put(
            "device",
            "gathered parameters",
            _gathered(count, plan, ranks=ranks, host_is_device=host_is_device),
        )
    same_place = plan.optimizer_on == plan.parameters_on or host_is_device
    updated_in_place = b == FP32 and (
        stage == 0 or (stage == 3 and same_place and plan.optimizer_on != "nvme")
    )
    if not updated_in_place:
        put(plan.optimizer_on, "fp32 weights", FP32 * share, pinned=stage < 3)
    put(plan.optimizer_on, "optimizer", STATE_BYTES[optim] * share)
    settings = plan.settings
    if stage == 3:
        put("device" if plan.optimizer_on == "device" else "cpu", "gradients", b * share, pinned=True)
    if plan.optimizer_on != "device":
        put("cpu" if stage < 3 else plan.optimizer_on, "fp32 gradients", FP32 * share, pinned=True)
        if stage < 3:
            put("cpu", "updated parameters", b * share, pinned=True)
            put("cpu", "gradient on its way", b * count.largest, pinned=True)
            put("device", "gradient on its way", b * count.largest)
            if micro_steps > 1:
                put("cpu", "gradients of micro-batches", b * share, pinned=True)
    if plan.optimizer_on == "nvme":
        assert settings.offload_optimizer is not None
        subgroup = min(share, int(settings.sub_group_size))
        put(
            "cpu",
            "buffers of the drive",
            FP32 * subgroup * settings.offload_optimizer.buffer_count,
            pinned=True,
        )
    if plan.parameters_on == "nvme":
        target = settings.offload_param
        assert target is not None
        put("cpu", "buffers of the drive", b * int(target.buffer_size) * target.buffer_count, pinned=True)
        put("cpu", "parameters", b * min(share, int(target.max_in_cpu)), pinned=True)
    if stage > 0:
        # Allocated whole, filled as far as gradients go into it: no further than all of them.
        bucket = min(int(settings.reduce_bucket_size), count.trained)
        put("device", "buckets", b * bucket * (2 if settings.overlap_comm and stage < 3 else 1))

    offloaded = plan.optimizer_on != "device"
    return States(
        device=held["device"],
        host=held["cpu"],
        drive=held["nvme"],
        gradients=GradientRule(
            kept=0.0 if offloaded else {0: 1.0, 1: 1.0, 2: 1.0 / ranks, 3: 0.0}[stage],
            bucket=int(settings.reduce_bucket_size) if stage > 0 else 0,
            norm=offloaded,
            ranks=ranks,
        ),
        step=_step_bytes(count, plan, share=share, ranks=ranks),
    )


def _gathered(count: ModelCount, plan: ZeroPlan, *, ranks: int, host_is_device: bool) -> int:
    """Most bytes of parameters that ZeRO-3 has gathered at one time.

    It keeps what is used again within `stage3_max_reuse_distance` elements and stops prefetching at
    `stage3_max_live_parameters`; parameters below the persistence threshold stay. One rank that needs no copy from
    its host has them all in place.
    """
    if ranks == 1 and (plan.parameters_on == "device" or host_is_device):
        return 0
    settings = plan.settings
    threshold = int(settings.param_persistence_threshold)
    persistent = sum(size * times for size, times in count.small if size <= threshold)
    live = max(int(settings.max_live_parameters), int(settings.max_reuse_distance)) + int(
        settings.prefetch_bucket_size
    )
    largest = max(count.largest, max((size for size, _ in count.small), default=0))
    return count.itemsize * min(count.elements, live + largest + persistent)


def _step_bytes(count: ModelCount, plan: ZeroPlan, *, share: int, ranks: int) -> int:
    """What the update allocates on the device for a while.

    The norm of a gradient is taken of its copy in float64, one parameter at a time. ZeRO then lays the gradients of
    its share out as one flat fp32 tensor beside the gradients themselves, ZeRO-3 for one sub-group at a time.
    """
    if plan.stage == 0:
        return FP32 * count.trained if count.itemsize != FP32 else 0
    largest = min(count.largest, share)
    norm = FP64 * largest
    if plan.optimizer_on != "device":
        return norm
    flat = FP32 * (min(share, int(plan.settings.sub_group_size)) if plan.stage == 3 else share)
    return max(norm, flat)


def _place(target: Any) -> str:
    if target is None or str(getattr(target.device, "value", target.device)) == "none":
        return "device"
    return str(getattr(target.device, "value", target.device))


def _power_of_two(num_bytes: int) -> int:
    """Torch's allocator of page-locked memory rounds up to it (`aten/src/ATen/core/CachingHostAllocator.h`)."""
    return 1 << (num_bytes - 1).bit_length()
