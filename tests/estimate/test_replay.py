"""Bytes of a forward and backward pass on shapes, against torch's allocator in a real one."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from orpo_ds.data.packing import MicroBatch, pack
from orpo_ds.data.padding import pad
from orpo_ds.data.truncate import TokenPair
from orpo_ds.estimate.replay import GradientRule, replay
from orpo_ds.estimate.shapes import model_of_shapes
from orpo_ds.model.anatomy import find_parts
from orpo_ds.model.attention import packed_attention_enabled
from orpo_ds.policy import OrpoPolicy
from orpo_ds.prepare import recompute_activations
from tests import small_runs
from tests.tiny_models import tiny_model

VOCAB = 3000


def pair(trunk: int, chosen: int, rejected: int) -> TokenPair:
    return TokenPair(
        chosen=[1] * trunk + [2] * chosen,
        rejected=[1] * trunk + [3] * rejected,
        chosen_start=trunk,
        rejected_start=trunk,
        trunk=trunk,
    )


PAIRS = [pair(150, 120, 90), pair(40, 60, 200)]


def measured_peak(model: PreTrainedModel, batch: MicroBatch) -> int:
    """Most bytes that torch's allocator has given out at a time, beyond the model; gradients are kept."""
    policy = OrpoPolicy(model, beta=0.1, logits_cache_mib=0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        loss = policy(batch, nll_tokens_total=100, pairs_total=2)["loss"]
        loss.backward()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True], ids=["keeps", "recomputes"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_pass_on_shapes_takes_the_bytes_of_a_real_one(
    tmp_path: Path, family: str, layout: str, checkpointing: bool
) -> None:
    args = small_runs.settings(tmp_path / "run", gradient_checkpointing=checkpointing)
    real = tiny_model(family, vocab_size=VOCAB)
    real.config.use_cache = False
    recompute_activations(real, args)
    if layout == "packed":
        batch = pack(PAIRS, pair_ids=[0, 1])
        with packed_attention_enabled(real):
            measured = measured_peak(real, batch)
    else:
        batch = pad(PAIRS, pair_ids=[0, 1], pad_token_id=0)
        measured = measured_peak(real, batch)
    shapes, fake = model_of_shapes(real.config, args=args, dtype=torch.float32, peft_config=None)
    found = replay(find_parts(shapes), batch, fake=fake, device="cpu", rule=GradientRule(kept=1.0))
    assert found.peak == pytest.approx(measured, rel=0.05)


def test_flash_attention_keeps_no_scores(tmp_path: Path) -> None:
    """Twice the tokens are twice the bytes, where a mask of scores would be four times as many."""
    args = small_runs.settings(tmp_path / "run")
    shapes, fake = model_of_shapes(
        tiny_model("llama").config, args=args, dtype=torch.bfloat16, peft_config=None
    )
    saved = []
    for tokens in (1000, 2000):
        batch = pack([pair(1, tokens, tokens)], pair_ids=[0])
        saved.append(
            replay(find_parts(shapes), batch, fake=fake, device="cuda", rule=GradientRule(kept=0.0)).saved
        )
    assert saved[1] == pytest.approx(2 * saved[0], rel=0.01)


def test_experts_are_counted_in_the_precision_of_gpus(tmp_path: Path) -> None:
    """Every token meets two of four experts; their gradients are those of all."""
    args = small_runs.settings(tmp_path / "run")
    shapes, fake = model_of_shapes(
        tiny_model("mixtral").config, args=args, dtype=torch.bfloat16, peft_config=None
    )
    found = replay(
        find_parts(shapes),
        pack(PAIRS, pair_ids=[0, 1]),
        fake=fake,
        device="cuda",
        rule=GradientRule(kept=1.0),
    )
    assert found.kept == sum(parameter.nbytes for parameter in shapes.parameters())
