"""`torch.compile` for the backbone, and Liger's kernels for its layers. The loss is orpo_ds's own with either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils.import_utils import is_liger_kernel_available

from orpo_ds.model.anatomy import ModelParts
from orpo_ds.model.attention import ATTENTION_NAME, packed_attention

# Liger's losses want the logits that are never made here.
LOSS_KERNELS = ("cross_entropy", "fused_linear_cross_entropy")


def compile_backbone(parts: ModelParts, *, backend: str, mode: str | None) -> None:
    """Compile the forward of the backbone in place; parameters and their names stay as they are.

    The packed attention stays outside of the graphs: it goes through the segments of the micro-batch, which are others
    each time, so that compiling it would never end.

    Args:
        parts: the model, inside its engine.
        backend: of `torch.compile`.
        mode: of `torch.compile`; None: its default.
    """
    outside: Any = torch.compiler.disable(packed_attention)
    AttentionInterface.register(ATTENTION_NAME, outside)
    parts.backbone.compile(backend=backend, mode=mode)


def use_liger_layers(model: PreTrainedModel, config: Mapping[str, Any] | None) -> None:
    """Replace norms, rotary embeddings and MLPs by Liger's kernels, in place.

    Args:
        model: of a family that Liger knows.
        config: `liger_kernel_config`: kernel -> on or off.

    Raises:
        ValueError: Liger is not installed, or one of its losses was asked for.
    """
    wanted = dict(config or {})
    for name in LOSS_KERNELS:
        if wanted.get(name):
            raise ValueError(
                f"liger_kernel_config[{name!r}]=True: the loss is orpo_ds's own, and never makes the logits that "
                "Liger's reads. Leave it out."
            )
    if not is_liger_kernel_available():
        raise ValueError(
            "use_liger_kernel=True: Liger is not installed. pip install liger-kernel (needs a GPU)."
        )
    apply_liger_kernel(model, wanted | dict.fromkeys(LOSS_KERNELS, False))
