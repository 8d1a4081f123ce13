"""The norms of the gradient by layer are those of autograd, under every ZeRO stage and on two ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from orpo_ds.monitor.gradients import METRIC, layer_of
from tests import small_runs
from tests.monitor import gradients_worker

# fp32 sums in another order: about sqrt(elements) roundings of 6e-8 each, and those of the backward pass itself.
RELATIVE = 2e-5


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", "layers.3"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "lm_head"),
        ("transformer.h.11.attn.c_attn.bias", "h.11"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0"),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.default.weight", "layers.7"),
        ("model.layers.2.mlp.experts.5.w1.weight", "layers.2"),
        ("scale", "scale"),
    ],
)
def test_a_layer_is_named_as_one_would(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def autograd_norms(outside: tuple[PreTrainedModel, Tensor]) -> dict[str, float]:
    """Norms by layer, from a model outside of DeepSpeed and one backward pass over the whole global batch."""
    model, loss = outside
    loss.backward()
    squares: dict[str, float] = {}
    for name, value in model.named_parameters():
        group = next((f"layers.{n}" for n in range(2) if f"layers.{n}." in name), name.split(".")[-2])
        squares[group] = squares.get(group, 0.0) + value.grad.double().square().sum().item()
    return {group: math.sqrt(value) for group, value in squares.items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("gradients")
    return autograd_norms(gradients_worker.loss_outside_of_deepspeed(folder))


def check(entry: dict[str, Any], expected: dict[str, float], *, what: str) -> None:
    logged = {name.removeprefix(METRIC): value for name, value in entry.items() if name.startswith(METRIC)}
    assert logged.keys() == expected.keys(), what
    for layer, norm in expected.items():
        assert logged[layer] == pytest.approx(norm, rel=RELATIVE), f"{what}: {layer}"
    # The norm that clipping goes by is DeepSpeed's own.
    whole = math.sqrt(sum(value**2 for value in logged.values()))
    assert whole == pytest.approx(entry["grad_norm"], rel=RELATIVE), what


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_logs_autograds_norms(tmp_path: Path, expected: dict[str, float], stage: int) -> None:
    check(gradients_worker.first_entry(tmp_path, stage), expected, what=f"ZeRO-{stage}")


def test_nothing_is_logged_unless_asked(tmp_path: Path) -> None:
    entry = gradients_worker.first_entry(tmp_path, 2, log_gradients_by_layer=False)
    assert not [name for name in entry if name.startswith(METRIC)]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_log_autograds_norms(tmp_path: Path, expected: dict[str, float]) -> None:
    answer = small_runs.launch("tests.monitor.gradients_worker", str(tmp_path))
    assert answer.returncode == 0, answer.stdout[-4000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert set(found) == {"0", "1", "2", "3", "2 offload", "3 offload"}
    for stage, entry in found.items():
        check(entry, expected, what=f"ZeRO-{stage} on two ranks")
