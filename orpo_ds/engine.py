"""From settings to a DeepSpeed engine.

The DeepSpeed JSON stays the authority on how memory is sharded and offloaded; this module fills what it left to
ORPOConfig, refuses what this machine cannot do before a minute is lost, and builds the optimizer and the schedule
that transformers would build.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.debug_utils import DebugOption, DebugUnderflowOverflow
from transformers.optimization import GreedyLR
from transformers.trainer_pt_utils import get_parameter_names
from transformers.training_args import OptimizerNames

from orpo_ds import native_ops
from orpo_ds.config import ORPOConfig
from orpo_ds.experts import keep_ranks_in_step
from orpo_ds.host_memory import give_back_after_backward
from orpo_ds.low_rank import adam_numbers, with_projections
from orpo_ds.model.tiled_mlp import tiled_modules
from orpo_ds.policy import OrpoPolicy
from orpo_ds.tensor_parallel import engine_of_shards

# Biases and norms are not decayed: transformers' own rule (Trainer.get_decay_parameter_names).
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


class Engine(NamedTuple):
    """What a training step needs."""

    deepspeed: deepspeed.DeepSpeedEngine
    optimizer: torch.optim.Optimizer  # the one that holds the learning rates; ZeRO wraps it
    scheduler: Any


def build_engine(
    policy: OrpoPolicy,
    *,
    args: ORPOConfig,
    total_steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: LRScheduler | None = None,
) -> Engine:
    """Wrap the policy under the ZeRO stage and offload of the run.

    Args:
        policy: model and loss.
        args: the run's settings; `args.hf_deepspeed_config` holds the DeepSpeed JSON.
        total_steps: optimizer steps of the whole training, for the schedule.
        optimizer: the user's own; None: the JSON's, else the one that `args.optim` names.
        scheduler: the user's own; None: the JSON's, else the one that `args.lr_scheduler_type` names.

    Raises:
        ValueError: the JSON contradicts ORPOConfig (both are named), or asks for what this machine lacks.
    """
    config = deepspeed_settings(args, policy.model, total_steps=total_steps)
    stage = config["zero_optimization"]["stage"]
    keep_ranks_in_step(policy.model, zero_stage=stage)
    if stage == 3:
        for parameter in policy.head.external_parameters():
            deepspeed.zero.register_external_parameter(policy.head, parameter)
        if args.mlp_tile_tokens is not None:
            for module in tiled_modules(policy.parts):
                deepspeed.utils.set_z3_leaf_module(module, True)
    if optimizer is None and "optimizer" not in config:
        optimizer = make_optimizer(policy, args, offloaded=_offloads_optimizer(config))
    elif optimizer is not None and "optimizer" in config:
        raise ValueError(
            f"optimizers={type(optimizer).__name__} was passed, and the DeepSpeed JSON has its own `optimizer` "
            f"({config['optimizer'].get('type')}). Remove one of them."
        )
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
        # Before DeepSpeed's own hooks, which empty ZeRO-3's parameters after a layer.
        DebugUnderflowOverflow(policy)
    if (config["zero_optimization"].get("offload_param") or {}).get("device") == "nvme":
        # Left to `initialize`, a model that was made outside zero.Init is swapped in bf16 on every device that does
        # not compute in fp16, whatever its dtype: `dtype or a if b else c` in partition_parameters.py. Told nothing
        # about a dtype, zero.Init takes the JSON's. Parameters that are sharded already stay as they are.
        deepspeed.zero.Init(module=policy, config_dict_or_path=config)
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with engine_of_shards(policy, config, args):
        wrapped, _, _, json_scheduler = deepspeed.initialize(
            model=policy, optimizer=optimizer, model_parameters=trainable, config=config
        )
    inner = wrapped.basic_optimizer
    if stage == 0 and (wrapped.fp16_enabled() or wrapped.bfloat16_enabled()):
        # DeepSpeed allocates the state here by a step of zero gradients, which Adam's bias correction would count: the
        # first updates would be a quarter smaller than under every other stage.
        inner.state.clear()
    if stage == 3:
        _update_weights_in_place(wrapped.optimizer)
    give_back_after_backward(policy.parts.model.get_input_embeddings(), wrapped.device)
    if scheduler is None:
        scheduler = json_scheduler if "scheduler" in config else make_scheduler(inner, args, total_steps)
    # The trainer steps the schedule itself, so that schedules that look at a metric work as well.
    wrapped.lr_scheduler = None
    return Engine(wrapped, inner, scheduler)


def deepspeed_settings(args: ORPOConfig, model: nn.Module, *, total_steps: int) -> dict[str, Any]:
    """The JSON with every `auto` filled and every setting that ORPOConfig owns in its place."""
    holder = args.hf_deepspeed_config
    holder.trainer_config_finalize(args, model, total_steps)
    config = holder.config
    config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    config.setdefault("train_micro_batch_size_per_gpu", args.per_device_train_batch_size)
    config.setdefault("gradient_accumulation_steps", args.gradient_accumulation_steps)
    config.setdefault("gradient_clipping", args.max_grad_norm)
    config.setdefault("bf16", {}).setdefault("enabled", bool(args.bf16))
    config.setdefault("fp16", {}).setdefault("enabled", args.fp16)
    # transformers offers optimizers that DeepSpeed has not tested with ZeRO; those that step more than element by
    # element are refused there (low_rank.py).
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def make_optimizer(policy: OrpoPolicy, args: ORPOConfig, *, offloaded: bool) -> torch.optim.Optimizer:
    """The optimizer that `args.optim` names; AdamW becomes DeepSpeed's CPU AdamW where its state is offloaded."""
    decayed = set(get_parameter_names(policy, [nn.LayerNorm], NOT_DECAYED))
    named = [(name, value) for name, value in policy.named_parameters() if value.requires_grad]
    groups = [
        {"params": [value for name, value in named if name in decayed], "weight_decay": args.weight_decay},
        {"params": [value for name, value in named if name not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    _check_optim_args(args, policy.model)
    if offloaded and OptimizerNames(args.optim).value.startswith("adamw_torch"):
        native_ops.ready(native_ops.CPU_ADAM)
        return deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            adamw_mode=True,
        )
    kind, keywords = _of_transformers(args, policy.model)
    if kind is torch.optim.AdamW:
        keywords["fused"] = True  # the same update, in one pass over the memory
    return kind(with_projections(groups, keywords), **keywords | adam_numbers(args))


def _of_transformers(args: ORPOConfig, model: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
    """The class and keywords of `args.optim`."""
    try:
        return Trainer.get_optimizer_cls_and_kwargs(args, model)
    except ImportError as error:
        name = OptimizerNames(args.optim).value
        raise ValueError(f"optim={name!r} needs a package that is not here: {error}") from error


def _check_optim_args(args: ORPOConfig, model: PreTrainedModel) -> None:
    """Refuse a key of `optim_args` that the optimizer does not read; transformers would pass it over."""
    for pair in (args.optim_args or "").replace(" ", "").split(","):
        if not pair:
            continue
        key, is_there, value = pair.partition("=")
        if not is_there:
            raise ValueError(f"optim_args={args.optim_args!r}: write `key=value,key=value`.")
        without, with_it = copy.copy(args), copy.copy(args)
        without.optim_args, with_it.optim_args = None, pair
        if _of_transformers(without, model) == _of_transformers(with_it, model):
            raise ValueError(
                f"optim_args={args.optim_args!r}: optim={OptimizerNames(args.optim).value!r} does not read {key!r}, or "
                f"{value} is what it has anyway. Remove it; Adam's own numbers are adam_beta1, adam_beta2 and "
                "adam_epsilon."
            )


def make_scheduler(optimizer: torch.optim.Optimizer, args: ORPOConfig, total_steps: int) -> LRScheduler:
    """The schedule that `args.lr_scheduler_type` names."""
    keywords = args.lr_scheduler_kwargs
    assert not isinstance(keywords, str), "transformers parses a JSON string"
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=keywords,
    )


def follows_metric(scheduler: Any) -> bool:
    """Whether a schedule moves with an evaluation's result, and not with each step."""
    return isinstance(scheduler, ReduceLROnPlateau | GreedyLR)


def keep_plain_norm(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Do for ZeRO-0 in fp32 what DeepSpeed's own optimizers do: keep the gradient's norm, and skip what is not finite.

    Called between the backward pass, after which `grad` holds the global gradient, and the step, which clips it.

    Returns:
        Whether the step may be taken. If not, the gradient is dropped and the step counted as skipped.
    """
    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return True
    gradients = [value.grad for value in engine.module.parameters() if value.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    engine._global_grad_norm = norm
    if norm.isfinite().item():
        return True
    engine.zero_grad()
    engine.skipped_steps += 1
    return False


def release_gathered(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give back the parameters that ZeRO-3 has gathered, or has begun to.

    It prefetches along the order of modules that it has recorded. After an evaluation, which has no backward pass, the
    first parameters of that pass are still in flight, and whoever gathers them by hand meets an assertion.
    """
    if engine.zero_optimization_partition_weights():
        engine.empty_partition_cache()


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """Norm of the global gradient before clipping; None where the DeepSpeed JSON forbids to compute it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _update_weights_in_place(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Let the optimizer update fp32 weights themselves and not a second fp32 copy of them: 4 bytes a parameter less.

    DeepSpeed means to do so where training and optimizer have one dtype (`_create_fp32_partitions`), but it compares a
    device with the name of a device, which are never equal, and keeps the copy.
    """
    pairs = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
    for weights, updated in pairs:
        kept = weights is not None and updated.numel() == weights.numel()  # neither lies on a drive
        if kept and updated.dtype == weights.dtype and updated.device == weights.device:
            updated.data = weights.data


def _offloads_optimizer(config: dict[str, Any]) -> bool:
    target = config["zero_optimization"].get("offload_optimizer") or {}
    return target.get("device", "none") not in ("none", None)
