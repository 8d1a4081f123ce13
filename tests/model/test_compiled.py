"""Settings about how the same numbers are computed: compiled, by Liger's layers, deterministically."""

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from orpo_ds.export import full_state
from orpo_ds.model.compiled import use_liger_layers
from tests import small_runs


@pytest.fixture(autouse=True)
def _no_graphs_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("stage", "compiler"), [(2, "eager"), (3, "aot_eager")])
def test_compiled_numbers_are_the_same(tmp_path: Path, stage: int, compiler: str) -> None:
    """Against the run that is not compiled; `aot_eager` traces forward and backward and runs them op by op."""
    losses, states = [], []
    for backend in (None, compiler):
        counters.clear()
        trainer = small_runs.trainer(
            tmp_path / str(backend),
            torch_compile_backend=backend,
            optim="sgd",
            learning_rate=0.05,
            max_steps=2,
            deepspeed=f"zero{stage}",
        )
        trainer.train()
        assert (counters["stats"]["unique_graphs"] > 0) == (backend is not None)
        losses.append([line["loss"] for line in small_runs.step_lines(trainer)])
        states.append(full_state(trainer.model) or {})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert states[0].keys() == states[1].keys(), "compiling renamed parameters"
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)


def test_the_mode_reaches_the_compiler(tmp_path: Path) -> None:
    settings = small_runs.settings(tmp_path / "run", torch_compile_mode="reduce-overhead")
    assert (settings.torch_compile, settings.torch_compile_backend) == (True, "inductor")
    with pytest.raises(RuntimeError, match="no-such-mode"):  # torch's own words
        small_runs.trainer(tmp_path / "run", torch_compile_mode="no-such-mode").train()


def test_liger_that_is_not_installed_is_named(tmp_path: Path) -> None:
    if "liger_kernel" in sys.modules:
        pytest.skip("Liger is installed")
    with pytest.raises(ValueError, match="use_liger_kernel=True: Liger is not installed"):
        small_runs.trainer(tmp_path / "run", use_liger_kernel=True)


def test_liger_gets_layers_and_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU, so what is looked at here is the call that transformers makes of it."""
    asked: list[dict[str, Any]] = []
    package, module = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    module._apply_liger_kernel_to_instance = lambda model, **kernels: asked.append(kernels)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    for where in ("orpo_ds.model.compiled", "transformers.integrations.liger"):
        monkeypatch.setattr(f"{where}.is_liger_kernel_available", lambda: True)
    use_liger_layers(small_runs.model_of(), {"rope": False})
    assert asked == [{"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    with pytest.raises(
        ValueError, match=r"liger_kernel_config\['cross_entropy'\]=True: the loss is orpo_ds's own"
    ):
        use_liger_layers(small_runs.model_of(), {"cross_entropy": True})


@pytest.fixture
def _as_before() -> Iterator[None]:
    """What full determinism sets for the whole process is taken back."""
    environment, filled = dict(os.environ), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, False
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.usefixtures("_as_before")
def test_full_determinism(tmp_path: Path) -> None:
    small_runs.trainer(tmp_path / "off")
    assert not torch.are_deterministic_algorithms_enabled()
    losses = []
    for name in ("first", "second"):
        trainer = small_runs.trainer(tmp_path / name, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        trainer.train()
        losses.append([line["loss"] for line in small_runs.step_lines(trainer)])
    assert losses[0] == losses[1]
