"""An offline W&B run is really written, holds what it should and no token, and is continued by a resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_ds.monitor.wandb import RUN_FILE
from tests.environment import without_rendezvous
from tests.monitor.wandb_file import OfflineRun

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# In the shape of real ones: one that is recognised by its value, one only by the name of its option.
TOKENS = ("hf_FAKEFAKEFAKEFAKEFAKEFAKE", "plainsecret0987654321")
API_KEY = "feedfacefeedfacefeedfacefeedfacefeedface"

pytestmark = pytest.mark.slow


def run(output_dir: Path, first: int, last: int, *, token: str) -> OfflineRun:
    words = [str(output_dir), str(first), str(last), "--hub_token", token]
    finished = subprocess.run(
        [sys.executable, "-m", "tests.monitor.wandb_run", *words],
        cwd=REPOSITORY,
        env=without_rendezvous() | {"WANDB_MODE": "offline", "WANDB_API_KEY": API_KEY, "HF_TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return OfflineRun(Path(json.loads((output_dir / RUN_FILE).read_text())["folder"]))


@pytest.fixture(scope="module", params=TOKENS, ids=["token by value", "token by name"])
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[OfflineRun]]:
    """A run of three steps, and its continuation by two."""
    folder = tmp_path_factory.mktemp("wandb")
    return folder, [run(folder, 0, 3, token=request.param), run(folder, 3, 5, token=request.param)]


def test_the_metrics_can_be_read_back(runs: tuple[Path, list[OfflineRun]]) -> None:
    rows = [
        {name: row[name] for name in ("train/global_step", "train/loss", "eval/loss")}
        for part in runs[1]
        for row in part.history
    ]
    assert rows == [
        {"train/global_step": step, "train/loss": 1 / step, "eval/loss": 2 / step} for step in range(1, 6)
    ]
    assert runs[1][0].metric_axes["*"] == "train/global_step"


def test_the_config_says_what_was_trained(runs: tuple[Path, list[OfflineRun]]) -> None:
    config = runs[1][0].config
    assert config["dataset_fingerprint"] == "0123abcd"
    assert config["learning_rate"] == 3e-6
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert config["git_commit"].removesuffix("-dirty") == head.stdout.strip()


def test_a_resume_continues_the_same_run(runs: tuple[Path, list[OfflineRun]]) -> None:
    assert runs[1][0].id == runs[1][1].id != ""


def test_no_token_is_written_anywhere(runs: tuple[Path, list[OfflineRun]]) -> None:
    files = [path for path in runs[0].rglob("*") if path.is_file()]
    assert sum(path.suffix == ".wandb" for path in files) == 2
    for path in files:
        content = path.read_bytes()
        for secret in (*TOKENS, API_KEY):
            assert secret.encode() not in content, f"{secret} is in {path}"
