"""What the settings of a command name as data: one dataset or several, a hub's, streamed, split here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset

from orpo_ds.config import ScriptArguments
from orpo_ds.monitor.jsonl import read_metrics
from orpo_ds.script_data import ScriptRows, load_script_rows, public_name
from tests import small_runs
from tests.hub_server import HubServer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_runs.write_jsonl(tmp_path / "train.jsonl", small_runs.rows(20))
    small_runs.write_jsonl(tmp_path / "test.jsonl", small_runs.rows(3))
    return tmp_path


def load(*, evaluates: bool = False, seed: int = 0, **fields: Any) -> ScriptRows:
    return load_script_rows(
        ScriptArguments(model_name_or_path="unused", **fields), seed=seed, evaluates=evaluates
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_splits(folder: Path, streaming: bool) -> None:
    found = load(dataset_name=str(folder), dataset_streaming=streaming, evaluates=True)
    assert isinstance(found.train, IterableDataset) == streaming
    assert list(found.train) == small_runs.rows(20)
    assert list(found.test or ()) == small_runs.rows(3)
    sliced = load(dataset_name=str(folder), dataset_train_split="train[5:8]", dataset_streaming=streaming)
    assert list(sliced.train) == small_runs.rows(20)[5:8]


def test_a_test_split_of_ones_own(folder: Path) -> None:
    name = str(folder / "train.jsonl")
    for size, held in ((0.25, 5), (4, 4)):
        found = load(dataset_name=name, test_split_size=size, seed=1)
        assert (len(found.train), len(found.test or ())) == (20 - held, held)
        both = [*found.train, *(found.test or ())]
        assert sorted(map(json.dumps, both)) == sorted(map(json.dumps, small_runs.rows(20)))
        assert list(load(dataset_name=name, test_split_size=size, seed=1).train) == list(found.train)
        assert list(load(dataset_name=name, test_split_size=size, seed=2).train) != list(found.train)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "either --dataset_name or --datasets"),
        ({"dataset_name": "a", "datasets": ["b"]}, "either --dataset_name or --datasets"),
        (
            {"dataset_name": "train.jsonl", "streaming": True, "test_split_size": 0.1},
            "does not know its length",
        ),
        (
            {"dataset_name": "train.jsonl", "dataset_streaming": True, "dataset_train_split": "train[:1%]"},
            r"train\[:1%\].*does not know its length",
        ),
        ({"datasets": ["train.jsonl"], "evaluates": True}, "set test_split_size"),
    ],
)
def test_settings_that_do_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=words):
        load(**fields)


def test_the_command_trains_on_a_mixture_that_streams(folder: Path) -> None:
    """By YAML, with shares; the same command again repeats the losses."""
    small_runs.save_model_folder(folder / "model")
    listed = [
        {"path": str(folder / "train.jsonl"), "fraction": 0.8},
        {"path": str(folder / "test.jsonl"), "fraction": 0.2},
    ]
    (folder / "data.yaml").write_text(json.dumps({"datasets": listed, "streaming": True}))  # JSON is YAML
    seen = []
    for name in ("one", "two"):
        words = small_runs.command_line(folder, dataset_name=None, output_dir=folder / name)
        answer = small_runs.run_cli(
            [*words, "--config", str(folder / "data.yaml")], datasets_cache=folder / "hf"
        )
        assert answer.status == 0, answer.stderr
        seen.append(
            [line["loss"] for line in read_metrics(folder / name / "metrics.jsonl") if "loss" in line]
        )
    assert seen[0] == seen[1]
    assert len(seen[0]) == 2
    words = small_runs.command_line(folder, dataset_name=None, max_steps=-1, num_train_epochs=1)
    answer = small_runs.run_cli([*words, "--config", str(folder / "data.yaml")], datasets_cache=folder / "hf")
    assert (answer.status, "set max_steps" in answer.stderr) == (2, True)


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("owner/pairs", "owner/pairs"),
        ("https://bucket.example/a/pairs.jsonl?X-Amz-Signature=secret", "pairs.jsonl"),
        ("/home/ann/pairs.*.jsonl", "pairs.*.jsonl"),
        (None, None),
    ],
)
def test_a_card_does_not_tell_where_the_data_lies(name: str | None, public: str | None) -> None:
    assert public_name(ScriptArguments(model_name_or_path="unused", dataset_name=name)) == public


CARD = """---
configs:
- config_name: math
  data_files:
  - {split: train, path: math/train.jsonl}
  - {split: test, path: math/test.jsonl}
- config_name: prose
  data_files: prose.jsonl
---
"""
CLIENT = """
import sys
from orpo_ds.data.load import load_rows

for streaming in (False, True):
    for config, split in (("math", "train"), ("math", "test[1:]"), ("prose", "train")):
        print(*(row["id"] for row in load_rows("user/pairs", config_name=config, split=split, streaming=streaming)))
for config, split in (("math", "dev"), ("maths", "train"), (None, "train")):
    try:
        load_rows("user/pairs", config_name=config, split=split)
    except ValueError as error:
        print(error)
"""


def test_a_hub_dataset_with_configurations(tmp_path: Path) -> None:
    def lines(first: int, count: int) -> bytes:
        return b"".join(
            json.dumps({"id": first + n, "chosen": "a", "rejected": "b"}).encode() + b"\n"
            for n in range(count)
        )

    with HubServer() as hub:
        files = {
            "math/train.jsonl": lines(0, 3),
            "math/test.jsonl": lines(10, 2),
            "prose.jsonl": lines(20, 2),
        }
        hub.add_dataset("user/pairs", {"README.md": CARD.encode(), **files})
        answer = hub.run(CLIENT, cache=tmp_path / "cache")
    assert answer.returncode == 0, answer.stderr
    lines_out = answer.stdout.splitlines()
    assert lines_out[:6] == 2 * ["0 1 2", "11", "20 21"]
    split, config, unnamed = lines_out[6], lines_out[7], " ".join(lines_out[8:])
    assert "'user/pairs'" in split
    assert "dev" in split
    assert "train" in split
    assert "maths" in config
    assert "prose" in config
    assert "math" in unnamed
