"""NEFTune's noise: how large, where, when; and that it is gone afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from orpo_ds.data.packing import MicroBatch, pack
from orpo_ds.data.padding import pad
from orpo_ds.model.anatomy import find_parts, hidden_states
from orpo_ds.model.attention import packed_attention_enabled
from orpo_ds.model.neftune import embedding_noise
from tests import small_runs
from tests.parity.orpo_side import token_pairs
from tests.parity.tokenizer import tiny_tokenizer

ALPHA = 5.0
PAIRS = token_pairs(small_runs.rows(5), tokenizer=tiny_tokenizer())


def noise_of(batch: MicroBatch, *, training: bool = True) -> Tensor:
    """What the first layer sees more than the embeddings, [B, S, H]."""
    model = small_runs.model_of().train(training)
    parts = find_parts(model)
    seen: list[Tensor] = []
    handle = parts.backbone.layers[0].register_forward_pre_hook(lambda _, words: seen.append(words[0]))
    torch.manual_seed(3)
    with embedding_noise(parts, ALPHA), torch.no_grad():
        if batch.layout is None:
            hidden_states(parts, batch)
        else:
            with packed_attention_enabled(model):
                hidden_states(parts, batch)
    handle.remove()
    assert not model.get_input_embeddings()._forward_hooks, "the hook is still there"
    assert not parts.backbone._forward_pre_hooks
    return seen[0] - model.get_input_embeddings().weight[batch.input_ids].detach()


def bounds(hidden: int) -> list[float]:
    """Alpha / sqrt(L H) of each pair, with L its longer sequence."""
    return [ALPHA / (max(len(pair.chosen), len(pair.rejected)) * hidden) ** 0.5 for pair in PAIRS]


def is_uniform(noise: Tensor, bound: float) -> bool:
    """Within the bound, and near to it; of n uniform draws none is beyond 0.98 with probability 0.98^n < 1e-9."""
    assert noise.numel() > 1100
    return (
        0.98 * bound < noise.abs().max().item() <= bound * (1 + 1e-5)
        and abs(noise.mean().item()) < 0.1 * bound
    )


def test_noise_is_bounded_by_the_length_of_the_pair() -> None:
    """Whatever else is in the packed row, and the same packed and padded."""
    packed = noise_of(pack(PAIRS, pair_ids=range(5)))[0]
    start = 0
    for pair, bound in zip(PAIRS, bounds(packed.shape[-1]), strict=True):
        tokens = len(pair.chosen) + len(pair.rejected) - pair.trunk
        assert is_uniform(packed[start : start + tokens], bound)
        start += tokens
    assert start == packed.shape[0]
    batch = pad(PAIRS, pair_ids=range(5), pad_token_id=0)
    padded = noise_of(batch)
    for number, (pair, bound) in enumerate(zip(PAIRS, bounds(padded.shape[-1]), strict=True)):
        assert is_uniform(padded[number, : len(pair.chosen)], bound)
        assert is_uniform(padded[number + 5, : len(pair.rejected)], bound)


def test_an_evaluation_has_none() -> None:
    assert not noise_of(pack(PAIRS, pair_ids=range(5)), training=False).any()


class EvaluationsAndHooks(TrainerCallback):
    """Counts the embedding's hooks in the training."""

    def __init__(self) -> None:
        self.hooks = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **details: Any) -> None:
        self.hooks = len(model.get_input_embeddings()._forward_hooks)


@pytest.mark.parametrize("stage", [2, 3])
def test_it_changes_the_training_and_not_the_evaluation(tmp_path: Path, stage: int) -> None:
    lines, hooks = [], []
    for alpha in (None, 20.0):
        watch = EvaluationsAndHooks()
        trainer = small_runs.trainer(
            tmp_path / str(alpha),
            callbacks=[watch],
            eval_dataset=small_runs.dataset(3),
            eval_on_start=True,
            eval_strategy="epoch",
            neftune_noise_alpha=alpha,
            max_steps=1,
            deepspeed=f"zero{stage}",
        )
        own = len(trainer.model.get_input_embeddings()._forward_hooks)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        lines.append(trainer.state.log_history)
        hooks.append(watch.hooks)
    (plain, noisy) = lines
    assert plain[0]["eval_loss"] == noisy[0]["eval_loss"]
    assert plain[1]["loss"] != noisy[1]["loss"]
    assert hooks[1] == hooks[0] + 1
    # DeepSpeed's own hooks of ZeRO-3 stay; the noise's is gone.
    assert own == 0
    assert len(trainer.model.get_input_embeddings()._forward_hooks) == hooks[0]
