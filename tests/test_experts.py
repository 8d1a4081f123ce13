"""A mixture of experts in training: what is balanced, and ranks whose tokens go to different experts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ds.data.packing import pack
from orpo_ds.experts import expert_blocks
from tests import small_runs
from tests.experts_worker import RUNS, train
from tests.loose_experts import LOOSE
from tests.model.test_router import sums_of
from tests.parity.orpo_side import token_pairs
from tests.parity.reference import pad_pairs, reference_step
from tests.parity.tokenizer import tiny_tokenizer
from tests.test_trainer import largest_difference
from tests.tiny_models import tiny_model

TOLERANCE = 1e-5
PAIRS = 4
ALONE = 130  # tokens of a micro-batch: one pair each


def logged(folder: Path, **changes: Any) -> dict[str, float]:
    """The line of one step on PAIRS pairs."""
    trainer = small_runs.trainer(
        folder, model=small_runs.model_of("mixtral"), pairs=PAIRS, max_steps=1, **changes
    )
    trainer.train()
    line: dict[str, float] = trainer.state.log_history[0]
    return line


def test_router_balance(tmp_path: Path) -> None:
    """`global_batch` is the balance of one padded batch in float64, `micro_step` the mean of the micro-steps'."""
    tokenizer = tiny_tokenizer()
    pairs = token_pairs(small_runs.rows(PAIRS), tokenizer=tokenizer)
    model = small_runs.model_of("mixtral")
    exact = reference_step(model, pad_pairs(pairs, pad_token_id=tokenizer.pad_token_id), beta=0.1)
    norm = sum(gradient.square().sum().item() for gradient in exact.gradients.values()) ** 0.5
    for name, changes in {
        "one micro-step": {},
        "several": {"max_tokens_per_micro_batch": ALONE},
        "dropout, which counting must not use up": {
            "max_tokens_per_micro_batch": ALONE,
            "disable_dropout": False,
        },
        "sharded and recomputed": {
            "max_tokens_per_micro_batch": ALONE,
            "deepspeed": "zero3",
            "gradient_checkpointing": True,
        },
    }.items():
        line = logged(tmp_path / name, **changes)
        assert line["aux_loss"] == pytest.approx(exact.metrics["aux_loss"], rel=TOLERANCE), name
        assert line["loss"] == pytest.approx(exact.loss, rel=TOLERANCE), name
        assert line["grad_norm"] == pytest.approx(norm, rel=TOLERANCE), name

    balances, tokens = [], []
    for pair in pairs:
        with torch.no_grad():
            balances.append(sums_of(model, pack([pair], pair_ids=[0])).balance().item())
        tokens.append(len(pair.chosen) + len(pair.rejected))
    mean = sum(b * t for b, t in zip(balances, tokens, strict=True)) / sum(tokens)
    line = logged(tmp_path / "micro", max_tokens_per_micro_batch=ALONE, router_balance="micro_step")
    assert line["aux_loss"] == pytest.approx(mean, rel=TOLERANCE)
    assert abs(mean - exact.metrics["aux_loss"]) > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "llama"])
def test_fused_experts_need_no_leaf(family: str) -> None:
    """They are gathered as one parameter; `tests/distributed` trains them on ranks that choose differently."""
    assert list(expert_blocks(tiny_model(family))) == []


def test_experts_that_are_modules_are_found() -> None:
    kinds = {
        name: [type(block).__name__ for block in expert_blocks(build(vocab_size=97, seed=0))]
        for name, build in LOOSE.items()
    }
    assert kinds == {"loose_llama": ["LooseBlock"] * 2, "switch": ["SwitchTransformersExperts"] * 4}


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("experts")
    finished = small_runs.launch("tests.experts_worker", str(folder))
    assert finished.returncode == 0, finished.stdout[-6000:]
    found: dict[tuple[str, int], dict[str, Any]] = torch.load(folder / "results.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {name: train(name, tmp_path_factory.mktemp("alone"), stage=0) for name in LOOSE}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_ranks_may_choose_different_experts(
    name: str,
    stage: int,
    on_two_ranks: dict[tuple[str, int], dict[str, Any]],
    on_one_rank: dict[str, dict[str, Any]],
) -> None:
    """Under ZeRO-3 the ranks would wait for each other, under ZeRO-2 add up gradients of different parameters."""
    together, alone = on_two_ranks[name, stage], on_one_rank[name]
    assert together["calls_that_differ"] > 0, "the test wants ranks that choose differently"
    assert together["losses"][0] == pytest.approx(alone["losses"][0], rel=TOLERANCE)
    moved = {key: value - alone["before"][key] for key, value in alone["after"].items()}
    moved_together = {key: value - together["before"][key] for key, value in together["after"].items()}
    still = [key for key, value in moved.items() if not value.any()]  # experts that no token went to
    assert all(not moved_together[key].any() for key in still)
    for key in still:
        del moved[key], moved_together[key]
    assert largest_difference(moved_together, moved) <= 1e-4
