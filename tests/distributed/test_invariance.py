"""A step is the same step, whoever takes it: any number of ranks, ZeRO stage, layout, budget, tile or cache.

`worker.py` takes one step under every setting on 1, 2 and 4 ranks. Each outcome is held against the float64 reference,
which knows nothing of ranks, packing or tiles; so all of them equal one another too.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.worker import MODEL_SEED, SETTINGS, Outcome, Setting
from tests.parity.compare import gradient_errors, metric_errors
from tests.parity.orpo_side import token_pairs
from tests.parity.reference import ReferenceStep, pad_pairs, reference_step
from tests.parity.rows import ROWS
from tests.parity.tokenizer import tiny_tokenizer
from tests.tiny_models import tiny_model

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TOLERANCE = 1e-5

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda ranks: f"{ranks} ranks")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What the worker wrote, by the name of the setting."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    python = Path(sys.executable)
    start = [python, "-m"]
    if request.param > 1:
        # Port 0 would not do: the ranks have to agree on it beforehand.
        port = 29500 + os.getpid() % 1000 + request.param
        start = [
            python.with_name("deepspeed"),
            f"--num_accelerators={request.param}",
            f"--master_port={port}",
        ]
        start += ["--no_local_rank", "--module"]
    command = [*start, "tests.distributed.worker", "rows.json", "cache", "results.pt"]
    finished = subprocess.run(
        [*map(str, command[:-3]), *(str(folder / name) for name in command[-3:])],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-8000:]
    results = torch.load(folder / "results.pt", weights_only=True)
    return {name: Outcome(**fields) for name, fields in results.items()}


@functools.cache
def reference(family: str) -> ReferenceStep:
    """The same rows and weights in float64."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer), seed=MODEL_SEED)
    pairs = token_pairs(ROWS, tokenizer=tokenizer)
    return reference_step(model, pad_pairs(pairs, pad_token_id=tokenizer.pad_token_id), beta=0.1)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_loss_metrics_and_gradients(outcomes: dict[str, Outcome], setting: Setting) -> None:
    outcome, exact = outcomes[setting.name], reference(setting.family)
    assert outcome.loss == pytest.approx(exact.loss, rel=TOLERANCE)
    assert max(metric_errors(outcome.metrics, exact.metrics).values()) <= TOLERANCE
    assert max(gradient_errors(outcome.gradients, exact.gradients, tolerance=TOLERANCE).values()) <= TOLERANCE


def test_a_tight_budget_means_more_micro_steps(outcomes: dict[str, Outcome]) -> None:
    for stage in range(4):
        assert outcomes[f"zero{stage}, tight budget"].micro_steps > outcomes[f"zero{stage}"].micro_steps
