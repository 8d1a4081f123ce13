"""A model whose matrices are split over a group of ranks: DeepSpeed's AutoTP for the body, our own head on its shard.

AutoTP reads the model's own plan (transformers' `tp_plan`): queries, keys, values and the MLP's first products are
split by columns, the products behind them by rows, whose partial sums one all-reduce adds up (Megatron-LM,
arXiv:1909.08053). The packed attention then sees a share of the heads and needs to know nothing of it. The head is
split by rows of the vocabulary, a tied embedding with it; `orpo_ds.loss.vocab_parallel` computes log-probs on the
shards, so no rank ever holds the whole weight or a whole row of logits.

DeepSpeed would do this inside of `deepspeed.initialize`. It is done before, because the model is then inside of
`OrpoPolicy`, which has neither the config nor the plan that AutoTP asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject import AutoTPConfig, set_autotp_mode
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers import PreTrainedModel

from orpo_ds import distributed
from orpo_ds.config import ORPOConfig

# Those whose loss, gradients and saved model a test holds against one rank's (tests/test_tensor_parallel.py).
FAMILIES = frozenset({"gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3"})


def shard_over_ranks(model: PreTrainedModel, args: ORPOConfig) -> None:
    """Leave of a whole model what this rank of its tensor-parallel group holds. Nothing happens at size 1.

    Args:
        model: the same on all ranks; changed in place.
        args: `tensor_parallel_size`.

    Raises:
        ValueError: a model, or a setting, that is not exact when split; names it.
    """
    size = args.tensor_parallel_size
    if "tensor_parallel" in args.deepspeed_settings:
        raise ValueError(
            "the DeepSpeed JSON has a `tensor_parallel` section: remove it, and set tensor_parallel_size instead."
        )
    if size == 1:
        return
    _refuse_models(model, size=size)
    _refuse_settings(args)
    plan = TPPlanConverter.convert(_get_hf_tp_plan(model))
    assert plan is not None, "FAMILIES have plans"
    for parameter in model.parameters():
        parameter.whole_shape = parameter.shape  # type: ignore[attr-defined]  # `orpo_ds.model` asks for it
    get_accelerator().set_device(distributed.local_rank())  # shards are moved to the device
    set_autotp_mode(training=True)
    split = AutoTP(
        module=model,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=(nn.Linear, nn.Embedding),
        orig_layer_impl=None,
        partition_config=AutoTPConfig(tp_size=size, layer_specs=plan),
        vocab_parallel_lm_head=True,
        model_config=model.config,
        training_mode=True,
    )
    split.set_tensor_parallel_config(size, groups.get_tensor_model_parallel_group())
    split.update_linear_policies()
    split._replace_module(model)
    split.register_replicated_grad_hooks(model)
    # The trainer reads the head's weight. Who calls the head, as the self-check does, gets whole logits.
    model.get_output_embeddings().gather_output = True


@contextmanager
def engine_of_shards(policy: nn.Module, config: dict[str, Any], args: ORPOConfig) -> Iterator[None]:
    """Within it, `deepspeed.initialize` makes an engine of a policy that `shard_over_ranks` has split.

    Args:
        policy: what the engine will wrap.
        config: the DeepSpeed JSON; told of the groups.
        args: `tensor_parallel_size`; nothing happens at 1.
    """
    size = args.tensor_parallel_size
    if size > 1:
        config["tensor_parallel"] = {"autotp_size": size, "tp": {"tp_size": size}}
        vars(policy)["ds_autotp_parsed"] = True  # or DeepSpeed would split it again
    yield
    if size > 1:
        # DeepSpeed's test that a group gets equal batches. It compares ours with `==`, which tensors within do not do.
        policy._forward_pre_hooks.clear()


def whole(value: Tensor) -> Tensor:
    """A parameter as it was before the ranks split it, on its device. Collective over the group."""
    if not hasattr(value, "gather_params"):  # AutoTP's mark
        return value
    copy = value.detach().clone()
    value.gather_params([copy])
    return copy


def _refuse_models(model: PreTrainedModel, *, size: int) -> None:
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"tensor_parallel_size={size}: AutoTP does not split adapters. Use 1, or train all parameters."
        )
    if family not in FAMILIES or config is None:
        raise ValueError(
            f"tensor_parallel_size={size}: {family} is not among the models that were shown to be exact when split "
            f"({', '.join(sorted(FAMILIES))}). Use 1, and zero3 to shard it."
        )
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
    }
    for name, value in sizes.items():
        if value % size:
            raise ValueError(
                f"tensor_parallel_size={size} does not divide the model's {name}={value}. Use a divisor of "
                "all of " + ", ".join(f"{key}={number}" for key, number in sizes.items()) + "."
            )
    if any(value.dtype not in (torch.float32, torch.bfloat16, torch.float16) for value in model.parameters()):
        raise ValueError(f"tensor_parallel_size={size}: the model is quantised. Use 1.")


def _refuse_settings(args: ORPOConfig) -> None:
    size, stage = args.tensor_parallel_size, args.zero_stage
    if stage not in (1, 2):
        raise ValueError(
            f"tensor_parallel_size={size} needs a zero_optimization.stage of 1 or 2 in the DeepSpeed JSON, not "
            f"{stage}: stage 0 clips by the norm of a rank's own shards, and with stage 3 it was not shown to be exact."
        )
    refused = {
        "mlp_tile_tokens": args.mlp_tile_tokens is not None,
        "sequence_parallel_size": args.sequence_parallel_size != 1,
        "neftune_noise_alpha": args.neftune_noise_alpha is not None,
        "disable_dropout": not args.disable_dropout,
        "generate_during_eval": args.generate_during_eval,
        "log_gradients_by_layer": args.log_gradients_by_layer,
        "torch_compile": args.torch_compile,
        "use_liger_kernel": args.use_liger_kernel,
    }
    for name, wanted in refused.items():
        if wanted:
            raise ValueError(
                f"{name}={getattr(args, name)!r} with tensor_parallel_size={size}: the ranks of a group would each do "
                "their own. Leave one of them out."
            )
