"""Dropping a gradient that DeepSpeed has accumulated, and what a failed pass has left in its engine.

DeepSpeed drops a gradient itself when it overflowed in fp16, within `step`; these are the same calls, outside of it.
"""

from __future__ import annotations

from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3, IPGBucketZ3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def drop_gradient(engine: DeepSpeedEngine) -> None:
    """Forget the gradient of the step under way; the next micro-batch is the first of a new one."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._overflow_clean_up(0)
        engine.empty_partition_cache()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        else:
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
        optimizer.micro_step_id = -1  # as at the begin of its own `step`
    elif isinstance(optimizer, BF16_Optimizer):
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
    engine.zero_grad()


def after_failure(engine: DeepSpeedEngine) -> None:
    """Bring an engine back whose forward or backward has raised half way; `drop_gradient` comes next."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        return
    for bucket in optimizer.ipg_buckets.values():
        if isinstance(bucket, IPGBucketZ3):
            bucket.clear_params()  # its buffer serves the whole training
        else:
            bucket.clear()
    reduced = optimizer.params_already_reduced
    for parameter in reduced if isinstance(reduced, dict) else range(len(reduced)):
        reduced[parameter] = False
    engine.zero_grad()  # what was computed and not yet reduced
    optimizer.exit_backward()
    optimizer.clear_backward_seen_flag()
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        parameter_offload.FWD_MODULE_STACK.clear()
