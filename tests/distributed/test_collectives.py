"""How many collectives a training step makes, and of how many bytes: counted on two ranks, held to a formula.

P parameters of 4 bytes, M micro-steps, W modules that own parameters, E parameters of the embedding. In fp32:

| stage | gradients | parameters |
| --- | --- | --- |
| 0 | 1 all-reduce of 4P | |
| 1 | 1 all-reduce of 4P | all-gathers of 4P, one a group of the optimizer (with and without decay) |
| 2 | M all-reduces of 4P | the same |
| 3 | M reduce-scatters of 4P | M all-gathers of 4P, while all parameters may stay from forward to backward |
| 3, which lets go | the same | M 2W all-gathers of M (8P + 8E): twice, and a tied embedding once more as head |

Only here a bucket or a prefetch holds the whole model; larger ones make more calls, of the same bytes. Beside them
there are a few numbers: the loss, the norm of the gradient, whether it is finite.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests import small_runs
from tests.collectives import Collective
from tests.distributed.collectives_worker import SETTINGS

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RANKS = 2
OPTIMIZER_GROUPS = 2
MOST_SMALL_ONES = 3


@dataclass(frozen=True)
class Counted:
    """One step: its collectives that carry parameters or gradients, and how many carry a few numbers."""

    micro_steps: int
    large: list[Collective]
    small: int

    def calls(self, kind: str) -> int:
        return sum(call.kind == kind for call in self.large)

    def bytes(self, kind: str) -> int:
        return sum(call.bytes for call in self.large if call.kind == kind)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Counted]]:
    """Setting -> the step in one micro-step, and in several."""
    if 0 < torch.cuda.device_count() < RANKS:
        pytest.skip(f"{RANKS} ranks need a CUDA device each, and there are {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp("collectives")
    done = small_runs.launch("tests.distributed.collectives_worker", str(folder), ranks=RANKS)
    assert done.returncode == 0, done.stdout[-8000:]
    found: dict[str, list[Counted]] = {name: [] for name in SETTINGS}
    for step in json.loads((folder / "counted.json").read_text())["steps"]:
        calls = [Collective(**call) for call in step["calls"]]
        large = [call for call in calls if call.is_large]
        found[step["setting"]].append(Counted(step["micro_steps"], large, len(calls) - len(large)))
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    """The model that the worker trains."""
    return small_runs.model_of()


@pytest.mark.parametrize("setting", SETTINGS)
def test_calls_and_bytes_of_a_step(counted: dict[str, list[Counted]], model: Any, setting: str) -> None:
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    embedding = 4 * model.get_input_embeddings().weight.numel()
    owners = sum(any(True for _ in module.parameters(recurse=False)) for module in model.modules())
    once, several = counted[setting]
    assert once.micro_steps == 1 < several.micro_steps
    for step in (once, several):
        many = step.micro_steps
        expected = {
            "zero0": {"allreduce": (1, parameters)},
            "zero1": {"allreduce": (1, parameters), "allgather": (OPTIMIZER_GROUPS, parameters)},
            "zero2": {
                "allreduce": (many, many * parameters),
                "allgather": (OPTIMIZER_GROUPS, parameters),
            },
            "zero3": {
                "allgather": (many, many * parameters),
                "reduce_scatter": (many, many * parameters),
            },
            "zero3, let go": {
                "allgather": (2 * owners * many, 2 * many * (parameters + embedding)),
                "reduce_scatter": (many, many * parameters),
            },
        }[setting]
        kinds = {call.kind for call in step.large}
        assert {kind: (step.calls(kind), step.bytes(kind)) for kind in kinds} == expected
        assert step.small <= MOST_SMALL_ONES


def test_what_a_rank_sends(counted: dict[str, list[Counted]], model: Any) -> None:
    """A step of one micro-step, by the ring's formula: an all-reduce is a reduce-scatter and an all-gather."""
    whole = 4 * sum(parameter.numel() for parameter in model.parameters()) * (RANKS - 1) / RANKS
    sent = {name: sum(call.sent(RANKS) for call in steps[0].large) for name, steps in counted.items()}
    assert sent["zero0"] == 2 * whole
    # DeepSpeed reduces whole gradients on every rank, though each keeps a part: one `whole` more than is needed.
    assert sent["zero1"] == sent["zero2"] == 3 * whole
    assert sent["zero3"] == 2 * whole
