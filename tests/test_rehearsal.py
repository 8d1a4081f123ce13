"""`auto_find_batch_size` on a model that runs out of memory above a number of tokens, as a GPU does."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo_ds import ORPOTrainer
from orpo_ds.export import full_state
from tests import small_runs

START, LIMIT = 400, 210  # tokens; a pair takes up to 110, so 200 is what halving finds
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB."


class RunsOut(torch.autograd.Function):
    """Identity, whose backward needs more memory than there is."""

    @staticmethod
    def forward(context: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def limited(trainer: ORPOTrainer, *, in_backward: bool) -> list[int]:
    """Let the trainer's model fail above LIMIT tokens, in its second layer; returns the widths that it gets to see."""
    seen: list[int] = []

    def check(module: Any, words: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        width = output.shape[1]
        if module.training:
            seen.append(width)
        if width > LIMIT and in_backward:
            return RunsOut.apply(output)  # type: ignore[no-any-return]
        if width > LIMIT:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return None

    trainer.policy.parts.backbone.layers[1].mlp.register_forward_hook(check)
    return seen


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_the_budget_is_halved_until_it_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, preset: str, in_backward: bool
) -> None:
    """Bit for bit the run that was told the budget, Adam's state included."""
    settings = {"per_device_train_batch_size": 8, "max_steps": 3, "deepspeed": preset}
    found = small_runs.trainer(
        tmp_path / "found", auto_find_batch_size=True, max_tokens_per_micro_batch=START, **settings
    )
    seen = limited(found, in_backward=in_backward)
    with caplog.at_level(logging.WARNING, "orpo_ds"):
        found.train()
    assert "micro-batches of at most 200 tokens" in caplog.text
    assert START // 2 < max(seen) <= START
    told = small_runs.trainer(tmp_path / "told", max_tokens_per_micro_batch=START // 2, **settings)
    told.train()
    names = ("loss", "grad_norm", "learning_rate")
    lines = [
        [[line[name] for name in names] for line in small_runs.step_lines(trainer)]
        for trainer in (found, told)
    ]
    assert lines[0] == lines[1]
    mine, theirs = full_state(found.model) or {}, full_state(told.model) or {}
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_a_pair_that_does_not_fit_alone(tmp_path: Path) -> None:
    trainer = small_runs.trainer(tmp_path / "run", auto_find_batch_size=True)

    def fail(*_: Any) -> None:
        if torch.is_grad_enabled():  # not yet in the check of the layout
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    trainer.policy.parts.backbone.layers[0].register_forward_hook(fail)
    with pytest.raises(
        RuntimeError, match=r"the longest pair of the dataset alone \(\d+ tokens\) does not fit"
    ):
        trainer.train()


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    trainer = small_runs.trainer(tmp_path / "run", auto_find_batch_size=True)

    def fail(*_: Any) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("shape mismatch")

    trainer.policy.parts.backbone.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer.train()
