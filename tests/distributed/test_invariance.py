"""A step is the same step, whoever takes it: any number of ranks, ZeRO stage, layout, budget, tile or cache.

`worker.py` takes one step under every setting on 1, 2 and 4 ranks. Each outcome is held against the float64 reference,
which knows nothing of ranks, packing or tiles; so all of them equal one another too.
"""

import functools
import json
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed.worker import SETTINGS, TRAINED_STEPS, Outcome, Setting, model_of
from tests.environment import without_rendezvous
from tests.parity.compare import gradient_errors, metric_errors
from tests.parity.orpo_side import token_pairs
from tests.parity.reference import ReferenceStep, pad_pairs, reference_step
from tests.parity.rows import ROWS
from tests.parity.tokenizer import tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RANKS = (1, 2, 4)
TOLERANCE = 1e-5

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@dataclass(frozen=True)
class Results:
    """What one start of the worker gave."""

    steps: dict[str, Outcome]
    training: list[dict[str, float]]


def results(ranks: int) -> Results:
    """What the worker found on that many ranks; it is started once."""
    if 0 < torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need a CUDA device each, and there are {torch.cuda.device_count()}")
    found = start_worker(ranks)
    assert isinstance(found, Results), found
    return found


@functools.cache
def start_worker(ranks: int) -> Results | str:
    """Run the worker, one rank by itself and several under the `deepspeed` launcher.

    Returns:
        What it found, or the end of what it printed if it failed: that is kept too, instead of being tried again.
    """
    command = [sys.executable, "-m"]
    if ranks > 1:
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [str(launcher), f"--num_accelerators={ranks}", f"--master_port={_free_port()}"]
        command += ["--no_local_rank", "--module"]
    # A trainer that an earlier test made in this process has left its own rendezvous behind.
    environment = without_rendezvous()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.json").write_text(json.dumps(ROWS))
        finished = subprocess.run(
            [*command, "tests.distributed.worker", folder],
            cwd=REPOSITORY,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if finished.returncode != 0:
            return finished.stdout[-8000:]
        written = torch.load(Path(folder) / "results.pt", weights_only=True)
    steps = {name: Outcome(**fields) for name, fields in written["steps"].items()}
    return Results(steps, written["training"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@functools.cache
def reference(family: str) -> ReferenceStep:
    """The same rows and weights in float64."""
    tokenizer = tiny_tokenizer()
    model = model_of(family)
    pairs = token_pairs(ROWS, tokenizer=tokenizer)
    return reference_step(model, pad_pairs(pairs, pad_token_id=tokenizer.pad_token_id), beta=0.1)


@pytest.mark.parametrize(
    ("ranks", "setting"),
    [
        pytest.param(ranks, setting, id=f"{ranks}-{setting.name}")
        for ranks in RANKS
        for setting in SETTINGS
        if setting.runs_on(ranks)
    ],
)
def test_loss_metrics_and_gradients(ranks: int, setting: Setting) -> None:
    outcome, exact = results(ranks).steps[setting.name], reference(setting.family)
    assert outcome.loss == pytest.approx(exact.loss, rel=TOLERANCE)
    assert max(metric_errors(outcome.metrics, exact.metrics).values()) <= TOLERANCE
    assert max(gradient_errors(outcome.gradients, exact.gradients, tolerance=TOLERANCE).values()) <= TOLERANCE


@pytest.mark.parametrize("ranks", RANKS)
def test_a_tight_budget_means_more_micro_steps(ranks: int) -> None:
    steps = results(ranks).steps
    for stage in range(4):
        assert steps[f"zero{stage}, tight budget"].micro_steps > steps[f"zero{stage}"].micro_steps


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_training_goes_the_same_way(ranks: int) -> None:
    alone, together = results(1).training, results(ranks).training
    assert len(alone) == len(together) == TRAINED_STEPS
    assert alone[0]["loss"] != alone[-1]["loss"]
    for step, (expected, line) in enumerate(zip(alone, together, strict=True), start=1):
        assert max(metric_errors(line, expected).values()) <= TOLERANCE, f"step {step}"
