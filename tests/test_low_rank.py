"""GaLore and APOLLO: the layers that `optim_target_modules` names move as the papers say, and the others as ever."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from orpo_ds import ORPOTrainer
from tests import small_runs
from tests.parity.orpo_side import token_pairs
from tests.parity.reference import pad_pairs, reference_step
from tests.parity.tokenizer import tiny_tokenizer

RATE, RANK, SCALE = 1e-2, 2, 0.5
# Its epsilon is not corrected for the first step: 1e-8 / sqrt(1 - beta2) = 3e-7, 0.3% of such a gradient.
SURE = 1e-4
TARGETS = ["q_proj", "up_proj"]


def settings(optim: str, **changes: Any) -> dict[str, Any]:
    return {
        "optim": optim,
        "optim_target_modules": TARGETS,
        "optim_args": f"rank={RANK},scale={SCALE}",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "deepspeed": "zero0",
    } | changes


def one_step(
    folder: Path, optim: str, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The parameters before one step, by how much it moved them, and the float64 gradient of its batch."""
    tokenizer, model = tiny_tokenizer(), small_runs.model_of()
    pairs = token_pairs(small_runs.rows(4), tokenizer=tokenizer)
    exact = reference_step(model, pad_pairs(pairs, pad_token_id=tokenizer.pad_token_id), beta=0.1)
    before = {name: value.detach().double().clone() for name, value in model.named_parameters()}
    small_runs.trainer(folder, model=model, pairs=4, max_steps=1, **settings(optim, **changes)).train()
    moved = {name: value.detach().double() - before[name] for name, value in model.named_parameters()}
    return before, moved, exact.gradients


def is_target(name: str) -> bool:
    return any(name.endswith(f"{target}.weight") for target in TARGETS)


def test_galore_moves_a_matrix_within_the_gradients_first_directions(tmp_path: Path) -> None:
    """One step of arXiv:2403.03507, algorithm 2, from the float64 gradient; other parameters take AdamW's step."""
    before, moved, gradients = one_step(tmp_path / "run", "galore_adamw", weight_decay=0.1)
    for name, gradient in gradients.items():
        decay = 0.0 if "norm" in name or name.endswith("bias") else 0.1
        if not is_target(name):
            update = (
                gradient.sign()
            )  # the first step of Adam: both moments' corrected means are the gradient itself
            sure = gradient.abs() > SURE
        else:
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
            tall = gradient.shape[0] >= gradient.shape[1]
            low = gradient @ right[:RANK].T if tall else left[:, :RANK].T @ gradient
            update = SCALE * (low.sign() @ right[:RANK] if tall else left[:, :RANK] @ low.sign())
            # Where a projected gradient is all but zero, its sign is that of fp32's rounding.
            sure = (
                (low.abs() > 1e-3 * low.abs().max())
                .all(dim=1 if tall else 0, keepdim=True)
                .expand_as(gradient)
            )
            assert (
                torch.linalg.matrix_rank(moved[name] + RATE * decay * before[name], atol=RATE / 100) == RANK
            )
        # The decay comes after the update: a second order in the rate.
        error = (moved[name] + RATE * update + RATE * decay * before[name]).abs()[sure]
        assert sure.float().mean() > 0.2, name
        assert error.max() <= RATE * (0.01 + decay * RATE), name


def test_apollo_scales_the_channels_of_the_gradient(tmp_path: Path) -> None:
    """arXiv:2412.05270: the update of a matrix is its gradient, each row (or column) of it by a factor of its own."""
    _, moved, gradients = one_step(tmp_path / "run", "apollo_adamw")
    for name, gradient in gradients.items():
        if is_target(name):
            channels = 0 if gradient.shape[0] < gradient.shape[1] else 1
            alike = torch.cosine_similarity(-moved[name], gradient, dim=channels)
            assert alike.min() > 1 - 1e-4, name
            # AdamW's would not pass: its first step is the gradient's sign.
            assert torch.cosine_similarity(gradient.sign(), gradient, dim=channels).min() < 0.9
        else:
            sure = gradient.abs() > SURE
            assert (moved[name] + RATE * gradient.sign()).abs()[sure].max() <= 0.01 * RATE, name


class Stop(TrainerCallback):
    """Ends the training after its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        if state.global_step == 2:
            control.should_training_stop = True


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adafactor", "apollo_adamw"])
def test_a_resume_changes_no_bit(tmp_path: Path, optim: str) -> None:
    """The projection is part of the state: it is computed anew at every third step only."""

    def run(folder: str, *, resumes: bool = False, stops: bool = False) -> ORPOTrainer:
        trainer = small_runs.trainer(
            tmp_path / folder,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            callbacks=[Stop] if stops else [],
            **settings(optim, optim_args="rank=2,update_proj_gap=3"),
        )
        trainer.train(resume_from_checkpoint=resumes)
        return trainer

    whole = run("whole")
    run("cut", stops=True)
    resumed = run("cut", resumes=True)
    assert resumed.state.global_step == 4
    for (name, wanted), value in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(wanted, value), name
    losses = [line["loss"] for line in small_runs.step_lines(whole)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepspeed": "zero2"}, "zero_optimization.stage is 2"),
        ({"deepspeed": "zero3"}, "Set deepspeed=zero0 and bf16=False, or train adapters"),
        ({"bf16": True}, "training in half precision"),
        (
            {"optim_target_modules": None},
            "optim='galore_adamw' projects the gradients of some layers: name them",
        ),
        ({"optim": "adamw_torch", "optim_args": None}, "optim='adamw_torch' trains every module alike"),
    ],
)
def test_where_it_cannot_work_it_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        small_runs.settings(tmp_path / "run", **settings("galore_adamw") | changes)
    assert message in str(raised.value)


def test_layers_that_the_model_does_not_have(tmp_path: Path) -> None:
    trainer = small_runs.trainer(
        tmp_path / "run", **settings("galore_adamw", optim_target_modules=["nothing"])
    )
    with pytest.raises(ValueError, match="No target modules found"):
        trainer.train()
