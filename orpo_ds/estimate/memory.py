"""The peak of one rank: what it holds all the time, and the worse of two moments, backward pass and update."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.training_args import OptimizerNames

from orpo_ds.config import ORPOConfig
from orpo_ds.data.packing import MicroBatch, pack
from orpo_ds.data.padding import pad, pad_encoder_decoder
from orpo_ds.estimate.replay import GradientRule, Replayed, replay
from orpo_ds.estimate.shapes import model_of_shapes
from orpo_ds.estimate.states import ModelCount, States, ZeroPlan, states
from orpo_ds.estimate.workload import Workload
from orpo_ds.model.anatomy import ModelParts, find_parts
from orpo_ds.model.size import ModelSize, measure


@dataclass(frozen=True, eq=False)
class Subject:
    """The model of a run, on shapes.

    Attributes:
        args: the run's settings.
        parts: anatomy.
        fake: the mode that its tensors belong to.
        count: its elements.
        size: its arithmetic.
        replays: what was replayed already, by what decides it.
    """

    args: ORPOConfig
    parts: ModelParts
    fake: FakeTensorMode
    count: ModelCount
    size: ModelSize
    replays: dict[tuple[GradientRule, str, int, int], Replayed] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: PreTrainedConfig, *, args: ORPOConfig, dtype: torch.dtype, peft_config: Any | None
    ) -> Subject:
        """Make the model from its config."""
        model, fake = model_of_shapes(config, args=args, dtype=dtype, peft_config=peft_config)
        parts = find_parts(model)
        return cls(args=args, parts=parts, fake=fake, count=_count(parts.model, dtype), size=measure(parts))

    @property
    def hidden_size(self) -> int:
        """Width of the head, after which DeepSpeed's buckets are sized."""
        return int(self.parts.head.weight.shape[1])


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        states: what lives as long as the engine.
        replayed: forward and backward of the fullest micro-batch.
    """

    states: States
    replayed: Replayed

    @property
    def backward(self) -> int:
        """Most on the device in forward and backward, beyond the states."""
        return self.replayed.peak

    @property
    def update(self) -> int:
        """Most on the device in the update, beyond the states."""
        return self.replayed.kept + self.states.step

    @property
    def device(self) -> int:
        """Peak on the device."""
        return self.states.device_total + max(self.backward, self.update)

    @property
    def host(self) -> int:
        """On the host, beside the process itself."""
        return self.states.host_total


def rank_memory(subject: Subject, plan: ZeroPlan, work: Workload, *, ranks: int, device: str) -> RankMemory:
    """What one of `ranks` data-parallel ranks needs.

    Args:
        subject: the model.
        plan: ZeRO stage and offload.
        work: whose fullest micro-batch counts.
        ranks: that share the model.
        device: "cuda", or "cpu": then the host is the device.
    """
    held = rank_states(subject, plan, work, ranks=ranks, device=device)
    wanted = (held.gradients, device, len(work.fullest), work.fullest_tokens)
    if wanted not in subject.replays:
        subject.replays[wanted] = replay(
            subject.parts,
            _batch(subject, work),
            fake=subject.fake,
            device=device,
            rule=held.gradients,
            logits_cache_mib=subject.args.logits_cache_mib,
        )
    return RankMemory(states=held, replayed=subject.replays[wanted])


def rank_states(subject: Subject, plan: ZeroPlan, work: Workload, *, ranks: int, device: str) -> States:
    """What lives as long as the engine; the arguments are those of `rank_memory`."""
    return states(
        subject.count,
        plan,
        ranks=ranks,
        optim=OptimizerNames(subject.args.optim).value,
        micro_steps=round(work.micro_steps),
        host_is_device=device == "cpu",
    )


def _batch(subject: Subject, work: Workload) -> MicroBatch:
    """The fullest micro-batch in the layout that the run will probably have: packed, where the model can be."""
    args, parts, ids = subject.args, subject.parts, list(range(len(work.fullest)))
    if parts.is_encoder_decoder:
        start = parts.model.config.decoder_start_token_id
        return pad_encoder_decoder(work.fullest, pair_ids=ids, pad_token_id=0, decoder_start_token_id=start)
    if args.layout == "padded" or not type(parts.model)._can_set_attn_implementation():
        return pad(work.fullest, pair_ids=ids, pad_token_id=0, nll_on_prompt=args.nll_on_prompt)
    return pack(work.fullest, pair_ids=ids, nll_on_prompt=args.nll_on_prompt)


def _count(model: nn.Module, dtype: torch.dtype) -> ModelCount:
    parameters = list(model.parameters())
    trained = [parameter.numel() for parameter in parameters if parameter.requires_grad]
    return ModelCount(
        elements=sum(parameter.numel() for parameter in parameters),
        trained=sum(trained),
        largest=max(trained),
        small=tuple(Counter(parameter.numel() for parameter in parameters).items()),
        itemsize=dtype.itemsize,
    )
