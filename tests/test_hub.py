"""What arrives on a hub: pushes of real runs on two ranks under ZeRO-3, and a hub that hangs, refuses or is away.

One start of `tests/hub_worker.py` against one `HubServer`; each test looks at a part of it.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load

from tests import small_runs
from tests.hub_server import TOKEN, HubServer
from tests.hub_worker import SAVE_STEPS, STEPS, STRATEGIES, UNKNOWN_TOKEN

MODEL_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
IN_PROGRESS = [f"Training in progress, step {step}" for step in range(SAVE_STEPS, STEPS + 1, SAVE_STEPS)]


@dataclass(frozen=True)
class Seen:
    """What a run of the worker left: on the hub, in its folder, in its log, and in its own words."""

    hub: HubServer
    folder: Path
    log: str
    parts: dict[str, Any]


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    with HubServer() as hub, tempfile.TemporaryDirectory(prefix="orpo-hub-") as place:
        folder = Path(place) / "runs"
        folder.mkdir()
        environment = hub.environment(cache=Path(place) / "cache") | {"WANDB_MODE": "offline"}
        run = small_runs.launch("tests.hub_worker", str(folder), environment=environment)
        assert run.returncode == 0, run.stdout
        yield Seen(hub, folder, run.stdout, torch.load(folder / "results.pt", weights_only=True))


def weights(files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    """The weights that the hub has."""
    return load(files["model.safetensors"])


def is_model(stored: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> bool:
    """Whether stored weights (tied ones once) are those of a trained model."""
    return all(torch.equal(value, parameters[name]) for name, value in stored.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_each_strategy_uploads(seen: Seen, strategy: str) -> None:
    name = f"user/{strategy}"
    files, messages = seen.hub.files(name), seen.hub.messages(name)
    assert messages == IN_PROGRESS, "one commit a save; the last one has the last model"
    assert is_model(weights(files), seen.parts[strategy]["parameters"])
    folders = {path.partition("/")[0] for path in files if "/" in path}
    wanted = {
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {f"checkpoint-{step}" for step in range(SAVE_STEPS, STEPS + 1, SAVE_STEPS)},
    }
    assert folders == wanted[strategy]
    assert {path for path in files if "/" not in path} == MODEL_FILES
    for folder in folders:
        step = STEPS if folder == "last-checkpoint" else int(folder.rpartition("-")[2])
        local = seen.folder / strategy / f"checkpoint-{step}"
        content = {
            str(path.relative_to(local)): path.read_bytes() for path in local.rglob("*") if path.is_file()
        }
        uploaded = {
            path.partition("/")[2]: data for path, data in files.items() if path.startswith(f"{folder}/")
        }
        assert uploaded == content, "the checkpoint as it lies on the disk, and nothing of the one before"


def test_nothing_is_left_of_the_snapshots(seen: Seen) -> None:
    assert [path for path in seen.folder.rglob(".hub/*") if path.name.isdigit()] == []


def test_last_checkpoint_of_the_hub_continues_the_run(seen: Seen) -> None:
    part = seen.parts["resumed"]
    assert part["steps"] == list(range(1, STEPS + 2)), "the history of the run, and one step more"


def test_a_push_by_hand(seen: Seen) -> None:
    part, repo = seen.parts["by_hand"], seen.hub.repo("user/by-hand")  # named by output_dir
    assert repo.private
    assert part["files_before"] == [[], []], "hub_strategy='end': nothing by a save, nor by an _internal_call"
    assert seen.hub.messages("user/by-hand") == []
    assert seen.hub.messages("user/by-hand", revision="v2") == ["by hand", "later"]
    files = seen.hub.files("user/by-hand", revision="v2")
    assert files.keys() == MODEL_FILES
    assert is_model(weights(files), part["parameters"])
    assert part["answers"] == [(False, False), (True, True)], "a commit on the main process alone"
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["user/pairs"]
    assert card.data.model_name == "Another name"
    assert "mine" in card.data.tags


def test_the_launch_spoke_to_the_hub_from_one_process(seen: Seen) -> None:
    commits = [it for it in seen.hub.requests if "/every_save/commit/" in it.path]
    assert len(commits) == len(IN_PROGRESS)


def test_training_does_not_wait_for_the_hub(seen: Seen) -> None:
    """The hub takes no commit before the last step is done: a training that waited would not end."""
    for name in ("busy", "always"):
        assert seen.parts[name]["files_at_the_end"] == [], name
        assert seen.parts[name]["heard"] == [], name
    # The save at the last step came while the first upload was on its way; the last model goes up all the same.
    assert seen.hub.messages("user/busy") == [IN_PROGRESS[0], "End of training"]
    assert seen.hub.messages("user/always") == IN_PROGRESS


def test_a_refusing_hub_is_spoken_of_once(seen: Seen) -> None:
    part = seen.parts["refused"]
    assert part["steps"] == STEPS
    first, last = part["during"]
    assert "no upload" in first
    assert "write access" in first
    assert "was not uploaded to 'user/refused'" in last
    assert len(part["saved"]) == 1, "save_model says it and does not raise"
    assert all("was not uploaded to 'user/refused'" in text for text in part["raised"]), "push_to_hub raises"
    assert (seen.folder / "refused" / "model.safetensors").is_file()
    assert seen.hub.messages("user/refused") == []


def test_a_hub_that_is_away_comes_back(seen: Seen) -> None:
    part = seen.parts["down"]
    assert part["steps"] == STEPS
    assert len(part["heard"]) == 1
    assert seen.hub.messages("user/down") == ["End of training"]


def test_a_wrong_token_is_found_before_the_training(seen: Seen) -> None:
    for text in seen.parts["wrong_token"]["raised"]:
        assert "hf auth login" in text
        assert UNKNOWN_TOKEN not in text


def test_the_users_own_card_is_what_the_hub_shows(seen: Seen) -> None:
    for name in ("busy", "always"):  # pushed at the end of the training, and by a save
        assert seen.hub.files(f"user/{name}")["README.md"] == b"Mine.\n"
        assert (seen.folder / name / "README.md").read_text() == "Mine.\n"


def test_no_token_in_anything_written_or_uploaded(seen: Seen) -> None:
    written = [path for path in seen.folder.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in written), "W&B's own files are looked at too"
    assert any(path.name == "manifest.json" for path in written)
    for secret in (TOKEN, UNKNOWN_TOKEN):
        assert [path for path in written if secret.encode() in path.read_bytes()] == []
        assert secret not in seen.log
        uploads = [it for it in seen.hub.requests if it.method in ("POST", "PUT")]
        assert uploads
        assert [it.path for it in uploads if secret.encode() in it.body or secret in it.path] == []
    args = json.loads(next(seen.folder.glob("checkpoint/checkpoint-*/manifest.json")).read_text())["config"]
    assert args["hub_token"] != TOKEN
