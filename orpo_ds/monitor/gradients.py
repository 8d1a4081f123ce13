"""Norms of the gradient by layer, exact under every ZeRO stage, and without gathering anything.

Between the backward pass and the update each rank holds some of the global gradient: all of it (stage 0), the part
that its optimizer will use (stages 1 and 2), or a shard of every parameter (stage 3). It squares and sums what it
holds; one small sum over the ranks, when a log is due, makes the norms.
"""

from __future__ import annotations

import math
import re
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad
from torch import Tensor, nn
from transformers import TrainerCallback

from orpo_ds import distributed

# Where the number of a layer stands in a parameter's name: everything up to it names the layer.
LAYER = re.compile(r"^(.*?\.\d+)\.")
WRAPPERS = re.compile(r"^(base_model\.|model\.|module\.|transformer\.)+(?=.)")
METRIC = "grad_norm_by_layer/"


class LayerGradients(TrainerCallback):
    """Remembers the squared norms of the newest gradient until they are logged."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, model: nn.Module) -> None:
        """Find the layers.

        Args:
            engine: trains the model.
            model: whose parameters are named in the metrics.
        """
        self._engine = engine
        self._parameters = [
            (layer_of(name), value) for name, value in model.named_parameters() if value.requires_grad
        ]
        self._layers = list(dict.fromkeys(layer for layer, _ in self._parameters))
        self._squares: Tensor | None = None  # [layers] float32, of this rank's share

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Note the gradient, between the last backward pass of a step and the update. Waits for nothing."""
        shares: dict[str, list[Tensor]] = {layer: [] for layer in self._layers}
        for layer, parameter in self._parameters:
            held = self._held(parameter)
            if held is not None and held.numel():
                shares[layer].append(held.float().square().sum().to(self._engine.device))
        zero = torch.zeros((), device=self._engine.device)
        self._squares = torch.stack([sum(found, zero) for found in shares.values()])

    def figures(self) -> dict[str, float]:
        """The norms of the newest gradient before clipping, by `grad_norm_by_layer/<layer>`. Collective."""
        assert self._squares is not None, "no step since the last log"
        squares = self._squares / self._scale() ** 2
        # Stage 0 holds the whole gradient on every rank; the others hold shares that add up.
        if self._engine.zero_optimization():
            squares = distributed.sum_over_ranks(squares)
        norms = [math.sqrt(value) for value in squares.tolist()]
        return {METRIC + layer: norm for layer, norm in zip(self._layers, norms, strict=True)}

    def _scale(self) -> float:
        """What fp16 multiplied the loss with; the gradients still carry it."""
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else 1.0

    def _held(self, parameter: Any) -> Tensor | None:
        """What this rank holds of a parameter's global gradient; None where it holds nothing of it.

        DeepSpeed's public call for stages 1 and 2 makes the whole gradient of every parameter on every rank; the
        fragment that it makes it from is enough for a norm.
        """
        if self._engine.zero_optimization_partition_weights():
            held: Tensor | None = safe_get_local_grad(parameter)
        elif self._engine.zero_optimization():
            mapping = parameter._hp_mapping
            held = None if mapping is None else mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        else:
            held = safe_get_full_grad(parameter)
        return held


def layer_of(name: str) -> str:
    """The layer of a parameter: `layers.3` of `model.layers.3.mlp.up_proj.weight`, `embed_tokens` of the embedding.

    What has no number is named by its module; what wraps a model (PEFT, the model's own `model.`) is left out.
    """
    bare = WRAPPERS.sub("", name)
    numbered = LAYER.match(bare)
    return numbered.group(1) if numbered else bare.rpartition(".")[0] or bare
