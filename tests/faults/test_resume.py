"""A run that was killed and resumed ends where the run that was left alone ends: nothing differs by one bit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ds.monitor.jsonl import read_metrics
from tests import small_runs
from tests.faults.resume_worker import KILLED_STEP, SAVE_STEPS, STEPS

# What two runs of the same numbers may differ in: times, and memory.
MEASURED = {
    "step_time_s",
    "pairs_per_s",
    "tokens_per_s",
    "useful_flops_fraction",
    "peak_memory_mib",
}


def numbers(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` without what was measured with a clock."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def differences(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """Paths at which two nested structures of tensors and plain values are not equal, bit for bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.dtype != second.dtype or not torch.equal(first, second):
            yield path
    elif isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in first:
            yield from differences(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from differences(one, other, f"{path}/{number}")
    elif hasattr(first, "__dict__") and type(first) is type(second):
        yield from differences(vars(first), vars(second), path)
    elif first != second:
        yield f"{path}: {first!r} and {second!r}"


def checkpoint_differences(first: Path, second: Path) -> list[str]:
    """Differences between what two checkpoints hold, file by file; of their manifests, only the step counts."""
    names = [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*.pt")} for folder in (first, second)
    ]
    assert names[0] == names[1]
    assert any("optim_states" in name for name in names[0]) or any(
        "model_states" in name for name in names[0]
    )
    found = []
    for name in sorted(names[0]):
        loaded = [torch.load(folder / name, weights_only=False) for folder in (first, second)]
        found += differences(*loaded, path=name)
    return found


# ---------------------------------------------------------------------- two ranks, ZeRO-3, offload, SIGKILL


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `resume_worker.py` after both of its starts."""
    folder = tmp_path_factory.mktemp("two_ranks")
    small_runs.save_model_folder(folder / "model", "gpt2", embd_pdrop=0.1)
    killed = small_runs.launch("tests.faults.resume_worker", "first", str(folder))
    assert (folder / "whole.pt").is_file(), killed.stdout[-6000:]
    assert killed.returncode != 0, "the second run was to be killed"
    assert not (folder / "killed.pt").exists()
    resumed = small_runs.launch("tests.faults.resume_worker", "second", str(folder))
    assert resumed.returncode == 0, resumed.stdout[-6000:]
    return folder


def seen(folder: Path, process: str, rank: int) -> list[tuple[int, Any]]:
    """(step, input ids) of every micro-batch that a rank pushed through the model, in order."""
    lines = (folder / f"{process}-{rank}.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


@pytest.mark.distributed
@pytest.mark.slow
class TestTwoRanks:
    def test_parameters(self, killed_and_resumed: Path) -> None:
        whole, resumed = (
            torch.load(killed_and_resumed / f"{process}.pt") for process in ("whole", "resumed")
        )
        assert list(differences(whole, resumed)) == []

    def test_optimizer_states_schedule_and_random_generators(self, killed_and_resumed: Path) -> None:
        last = f"checkpoint-{STEPS}"
        assert (
            checkpoint_differences(killed_and_resumed / "whole" / last, killed_and_resumed / "broken" / last)
            == []
        )

    def test_metrics_have_each_step_once_with_the_same_numbers(self, killed_and_resumed: Path) -> None:
        whole, broken = numbers(killed_and_resumed / "whole"), numbers(killed_and_resumed / "broken")
        assert [line["step"] for line in broken] == list(range(1, STEPS + 1))
        assert broken == whole

    @pytest.mark.parametrize("rank", [0, 1])
    def test_order_of_the_data(self, killed_and_resumed: Path, rank: int) -> None:
        whole = seen(killed_and_resumed, "whole", rank)
        killed = seen(killed_and_resumed, "killed", rank)
        resumed = seen(killed_and_resumed, "resumed", rank)
        saved = KILLED_STEP - 1
        assert saved % SAVE_STEPS == 0
        assert [line for line in killed if line[0] <= saved] == [line for line in whole if line[0] <= saved]
        assert resumed == [line for line in whole if line[0] > saved]
        assert len([line for line in whole if line[0] == KILLED_STEP]) > 1, "the step is one micro-batch"
        assert len([line for line in killed if line[0] == KILLED_STEP]) == 1, (
            "it was not killed within the step"
        )
