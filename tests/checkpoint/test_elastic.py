"""A run that goes on with other ranks and another ZeRO stage is the run that nobody disturbed, up to rounding."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ds.monitor.jsonl import read_metrics
from tests import small_runs
from tests.checkpoint.elastic_run import FIRST_RANKS, GLOBAL_BATCH, PAIRS, RUNS, STEPS, make_trainer, train

# Ranks add the same fp32 numbers up in another order, and CPU Adam rounds unlike torch's: some units in 2^-24 of a sum,
# in the gradient of each step, which six steps of a smooth update carry on but do not blow up.
RELATIVE = 1e-5
# A step moves a weight by at most lr / epsilon = 1 times what its gradient is off by; gradients are below 10, and are
# off by some 1e-6 of that.
ABSOLUTE = 1e-5 * STEPS
# In bf16 gradients are rounded to 2^-9 after each micro-batch and each sum over ranks.
RELATIVE_BF16 = 2.0**-9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the three starts of elastic_run.py left."""
    folder = tmp_path_factory.mktemp("elastic")
    small_runs.save_model_folder(folder / "model")  # qwen2: tied weights
    for start, ranks in (("first", FIRST_RANKS), ("second", 2), ("third", FIRST_RANKS)):
        ended = small_runs.launch("tests.checkpoint.elastic_run", str(folder), start, ranks=ranks)
        assert ended.returncode == 0, ended.stdout[-8000:]
        (folder / f"{start}.log").write_text(ended.stdout)
    return folder


@dataclass(frozen=True)
class Whole:
    """A run that was not disturbed: step -> loss, the pairs of each step, the parameters at the end."""

    losses: dict[int, float]
    pairs: list[list[int]]
    parameters: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole_run(folder: Path) -> Callable[[str], Whole]:
    """The undisturbed run of a name, on one rank: the numbers of a run do not depend on the number of ranks."""

    @functools.cache
    def of(run: str) -> Whole:
        trainer = make_trainer(
            folder,
            run,
            f"{run}-whole",
            preset=RUNS[run][0].preset,
            last_step=RUNS[run][-1].last_step,
            per_device_train_batch_size=GLOBAL_BATCH // 2,
        )
        result = train(trainer, resume=False)
        return Whole(losses(folder / f"{run}-whole"), result["pairs"], result["parameters"])

    return of


def losses(run: Path) -> dict[int, float]:
    """Step -> loss; each step stands in the file once."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line["loss"] for line in lines}


def legs(folder: Path, run: str) -> list[dict[str, Any]]:
    """What each leg of a run left."""
    return [torch.load(folder / f"{run}-{number}.pt", weights_only=True) for number in range(len(RUNS[run]))]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
class TestOtherRanksAndStages:
    def test_losses(self, folder: Path, whole_run: Callable[[str], Whole], run: str) -> None:
        whole = whole_run(run).losses
        assert losses(folder / run) == pytest.approx(whole, rel=RELATIVE_BF16 if run == "bf16" else RELATIVE)
        assert max(whole.values()) > 1.01 * min(whole.values()), "it did not learn, and nothing was compared"

    def test_global_batches(self, folder: Path, whole_run: Callable[[str], Whole], run: str) -> None:
        whole = whole_run(run).pairs
        assert [pairs for leg in legs(folder, run) for pairs in leg["pairs"]] == whole
        assert sorted(pair for pairs in whole[:3] for pair in pairs) == list(range(PAIRS))

    def test_parameters(self, folder: Path, whole_run: Callable[[str], Whole], run: str) -> None:
        whole, parameters = whole_run(run).parameters, legs(folder, run)[-1]["parameters"]
        assert parameters.keys() == whole.keys()
        # In bf16 a weight may round to its neighbour.
        relative, absolute = (2.0**-7, 1e-3) if run == "bf16" else (0, ABSOLUTE)
        for name, value in parameters.items():
            torch.testing.assert_close(value, whole[name], rtol=relative, atol=absolute)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_operator_is_told_once(folder: Path) -> None:
    """By the main rank: that the global batch stays, and that the checkpoint is dealt out anew."""
    log = (folder / "second.log").read_text()
    resumed = sum(leg.start == "second" for legs in RUNS.values() for leg in legs)
    for told in ("pairs a step and goes on with them", "it is dealt out for 2 ranks"):
        assert sum(told in line for line in log.splitlines()) == resumed


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_to_one(folder: Path, whole_run: Callable[[str], Whole], tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copytree(folder / "offload" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    trainer = make_trainer(tmp_path, "offload", "run", preset="zero3_offload", last_step=STEPS)
    result = train(trainer, resume=True)
    whole = whole_run("offload")
    assert trainer.args.global_batch_size == GLOBAL_BATCH
    assert result["pairs"] == whole.pairs[4:]
    last = {line["step"]: line["loss"] for line in small_runs.step_lines(trainer)}
    assert last == pytest.approx(whole.losses, rel=RELATIVE)
    for name, value in result["parameters"].items():
        torch.testing.assert_close(value, whole.parameters[name], rtol=0, atol=ABSOLUTE)
