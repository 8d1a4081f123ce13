"""An offline W&B run is really written, holds what it should and no token, and is continued by a resume."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from orpo_ds.monitor.source import source_facts, source_folder
from orpo_ds.monitor.wandb import FINAL_MODEL, RUN_FILE
from tests.environment import without_rendezvous
from tests.monitor.wandb_file import OfflineRun

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# In the shape of real ones: one that is recognised by its value, one only by the name of its option.
TOKENS = ("hf_FAKEFAKEFAKEFAKEFAKEFAKE", "plainsecret0987654321")
API_KEY = "feedfacefeedfacefeedfacefeedfacefeedface"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Runs:
    """A run of three steps that ends well, its continuation by two that fails, and another node's run."""

    folder: Path
    first: OfflineRun
    resumed: OfflineRun
    node: OfflineRun


def run(output_dir: Path, first: int, last: int, ending: str, *, token: str) -> OfflineRun:
    words = [str(output_dir), str(first), str(last), ending, "--hub_token", token]
    variables = {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": API_KEY,
        "HF_TOKEN": token,
        "WANDB_PROJECT": "a project",
        "WANDB_TAGS": "one,two",
        "WANDB_NOTES": "some notes",
        "WANDB_LOG_MODEL": "end",
        "WANDB_X_STATS_SAMPLING_INTERVAL": "0.1",
    }
    finished = subprocess.run(
        [sys.executable, "-m", "tests.monitor.wandb_run", *words],
        cwd=REPOSITORY,
        env=without_rendezvous() | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == (ending == "failing"), finished.stderr[-4000:]
    file = "wandb_run-node1.json" if ending == "node" else RUN_FILE
    return OfflineRun(Path(json.loads((output_dir / file).read_text())["folder"]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("wandb")
    return Runs(
        folder,
        first=run(folder, 0, 3, "whole", token=TOKENS[0]),
        resumed=run(folder, 3, 5, "failing", token=TOKENS[1]),
        node=run(folder, 0, 3, "node", token=TOKENS[1]),
    )


def steps_of(part: OfflineRun) -> list[dict[str, float]]:
    names = ("train/global_step", "train/loss", "eval/loss")
    return [{name: row[name] for name in names} for row in part.history if "train/loss" in row]


def test_the_metrics_can_be_read_back(runs: Runs) -> None:
    assert [row for part in (runs.first, runs.resumed) for row in steps_of(part)] == [
        {"train/global_step": step, "train/loss": 1 / step, "eval/loss": 2 / step} for step in range(1, 6)
    ]
    assert runs.first.metric_axes["*"] == "train/global_step"


def test_the_machine_is_watched(runs: Runs) -> None:
    assert any(name.startswith("cpu") for name in runs.first.system)
    assert any("memory" in name for name in runs.first.system)


def test_the_config_says_what_was_trained(runs: Runs) -> None:
    config = runs.first.config
    assert config["dataset_fingerprint"] == "0123abcd"
    assert config["learning_rate"] == 3e-6
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert config["git_commit"].removesuffix("-dirty") == head.stdout.strip()
    assert isinstance(config["git_changed_files"], list)


def test_the_run_is_where_and_what_one_asked_for(runs: Runs) -> None:
    record = runs.first.record
    assert (record.display_name, record.project, record.notes) == ("a-name", "a project", "some notes")
    assert list(record.tags) == ["one", "two"]


def test_a_table_is_logged_at_its_step(runs: Runs) -> None:
    (row,) = [row for row in runs.first.history if "answers/path" in row]
    assert row["train/global_step"] == 3
    table = json.loads((runs.first.folder / "files" / row["answers/path"]).read_text())
    assert (table["columns"], table["data"]) == (["prompt", "answer"], [["2 + 2?", "four"]])


def test_the_model_is_an_artifact(runs: Runs) -> None:
    assert "model.safetensors" in runs.first.artifacts["model-a-name"]
    assert not (runs.folder / FINAL_MODEL).exists()


def test_a_resume_continues_the_same_run(runs: Runs) -> None:
    assert runs.first.id == runs.resumed.id != ""


def test_a_failure_is_an_alert_and_an_exit_code(runs: Runs) -> None:
    assert runs.first.exit_code == 0
    assert runs.first.alerts == []
    assert runs.resumed.exit_code == 1
    ((title, text),) = runs.resumed.alerts
    assert title == "The training failed"
    assert text.startswith("RuntimeError: the disk is full")


def test_a_node_has_a_run_in_the_jobs_group(runs: Runs) -> None:
    assert runs.node.id not in ("", runs.first.id)
    assert (runs.node.record.display_name, runs.node.record.run_group) == ("a-name-node1", "a-name-0123")
    assert steps_of(runs.node) == steps_of(runs.first)


def test_no_token_is_written_anywhere(runs: Runs) -> None:
    files = [path for path in runs.folder.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".wandb" for path in files) == 3
    for path in files:
        content = path.read_bytes()
        for secret in (*TOKENS, API_KEY):
            assert secret.encode() not in content, f"{secret} is in {path}"


def test_the_commit_is_that_of_the_users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    script = tmp_path / "train.py"
    script.write_text("first")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert source_folder() == tmp_path
    commit = git("rev-parse", "HEAD").strip()
    assert source_facts() == {"git_commit": commit, "git_changed_files": []}
    script.write_text("changed")
    (tmp_path / "new.py").write_text("new")
    assert source_facts() == {"git_commit": f"{commit}-dirty", "git_changed_files": ["train.py", "new.py"]}
    outside = tmp_path / ".git" / "no_repository"
    outside.mkdir()
    monkeypatch.setattr(sys, "argv", ["orpo-ds"])
    monkeypatch.chdir(outside)
    assert source_folder() == outside
