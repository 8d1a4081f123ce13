"""Split over ranks, a model trains as it does whole: loss, metrics, gradients, evaluation, saved weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from orpo_ds import distributed
from orpo_ds.tensor_parallel import FAMILIES, shard_over_ranks
from tests import small_runs
from tests.parity.compare import gradient_errors, metric_errors
from tests.tensor_parallel_worker import SETTINGS, SIZE, Outcome, Setting, trained
from tests.tiny_models import tiny_model

TOLERANCE = 1e-5  # that of tests/distributed: sums of fp32 in another order


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where the worker's runs are, and what it found on two groups of two ranks."""
    folder = tmp_path_factory.mktemp("split")
    finished = small_runs.launch("tests.tensor_parallel_worker", str(folder), ranks=2 * SIZE)
    assert finished.returncode == 0, finished.stdout[-8000:]
    return folder, torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_training_is_that_of_one_rank(
    setting: Setting, split: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, results = split
    found = Outcome(**results["outcomes"][setting.name])
    whole = trained(tmp_path, setting, size=1)
    assert whole is not None
    assert found.head_rows == (whole.head_rows + 1) // SIZE  # nowhere is the head whole
    for line, expected in zip(found.history, whole.history, strict=True):
        assert max(metric_errors(line, expected).values()) <= TOLERANCE
    assert found.evaluation == pytest.approx(whole.evaluation, rel=TOLERANCE)
    errors = gradient_errors(found.gradients, whole.gradients, tolerance=TOLERANCE)
    assert max(errors.values()) <= TOLERANCE, errors
    # The largest update is lr * gradient, and the gradients agree to TOLERANCE of their largest entry.
    close = 0.05 * TOLERANCE * max(value.abs().max().item() for value in whole.gradients.values())
    assert found.parameters.keys() == whole.parameters.keys()
    for name, value in whole.parameters.items():
        torch.testing.assert_close(found.parameters[name], value, rtol=1e-6, atol=3 * close)
    saved = load_file(folder / setting.name / "model.safetensors")
    assert saved.keys() == load_file(tmp_path / setting.name / "model.safetensors").keys()
    assert all(value.equal(found.parameters[name]) for name, value in saved.items())


@pytest.mark.distributed
@pytest.mark.slow
def test_a_resume_continues_bit_for_bit(split: tuple[Path, dict[str, Any]]) -> None:
    ends = split[1]["resume"]
    assert all(value.equal(ends["undisturbed"][name]) for name, value in ends["resumed"].items())


@pytest.mark.distributed
@pytest.mark.slow
def test_what_a_group_cannot_do_is_refused_on_all_ranks(split: tuple[Path, dict[str, Any]]) -> None:
    refused = split[1]["refused"]
    assert "predictions and compute_metrics read whole rows of logits" in refused["predictions"]
    assert "compute_metrics with tensor_parallel_size=2" in refused["compute_metrics"]
    assert "this process is in a group of 2 already" in refused["size"]


def test_every_family_has_a_run() -> None:
    kinds = {tiny_model(setting.family).config.model_type for setting in SETTINGS}
    assert kinds == FAMILIES


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        ("gpt2", {}, "gpt2 is not among the models"),
        ("mixtral", {}, "mixtral is not among the models"),
        ("llama", {"deepspeed": "zero3"}, "zero_optimization.stage of 1 or 2"),
        ("llama", {"deepspeed": "zero0"}, "zero_optimization.stage of 1 or 2"),
        ("llama", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 with tensor_parallel_size=2"),
        ("llama", {"generate_during_eval": True}, "generate_during_eval=True"),
        ("llama", {"disable_dropout": False}, "disable_dropout=False"),
        ("llama", {"deepspeed": {"tensor_parallel": {"autotp_size": 2}}}, "has a `tensor_parallel` section"),
    ],
)
def test_what_is_not_exact_is_refused(
    family: str, changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    args = small_runs.settings(tmp_path, **changes)
    args.tensor_parallel_size = SIZE  # this job has one rank
    with pytest.raises(ValueError, match=text):
        shard_over_ranks(small_runs.model_of(family), args)


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    args = small_runs.settings(tmp_path)
    args.tensor_parallel_size = 4  # tiny models have 2 heads of keys
    with pytest.raises(ValueError, match="does not divide the model's num_key_value_heads=2"):
        shard_over_ranks(small_runs.model_of("llama"), args)


def test_adapters_are_refused(tmp_path: Path) -> None:
    trainer = small_runs.trainer(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM", r=2))
    trainer.args.tensor_parallel_size = SIZE
    with pytest.raises(ValueError, match="AutoTP does not split adapters"):
        shard_over_ranks(trainer.model, trainer.args)


def test_ranks_that_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=2 does not divide the 1 ranks"):
        small_runs.settings(tmp_path, tensor_parallel_size=2)
    assert (distributed.data_rank(), distributed.data_size()) == (0, 1)
