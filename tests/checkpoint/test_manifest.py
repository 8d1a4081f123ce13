"""The manifest tells a good checkpoint from a damaged one, file by file."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from orpo_ds.checkpoint import read_manifest, verify
from orpo_ds.checkpoint.manifest import MANIFEST_NAME, problems_by_size, share_of_files
from orpo_ds.checkpoint.ranks import Ranks
from tests.checkpoint.folders import FILES, flip_byte, metadata, store_in, writer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return store_in(tmp_path).save(writer(), metadata(20))


def test_it_lists_size_and_hash_of_every_file(checkpoint: Path) -> None:
    content = json.loads((checkpoint / MANIFEST_NAME).read_text())
    assert content["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in FILES.items()
    }
    assert (content["step"], content["seed"], content["dataset_fingerprint"]) == (20, 7, "0123abcd")
    assert {"python", "torch", "deepspeed", "transformers"} <= content["packages"].keys()
    assert read_manifest(checkpoint).total_bytes == sum(map(len, FILES.values()))


def test_it_holds_no_token(checkpoint: Path) -> None:
    assert "very-secret" not in (checkpoint / MANIFEST_NAME).read_text()
    assert read_manifest(checkpoint).metadata.config["learning_rate"] == 1e-5


def test_an_untouched_checkpoint_has_no_problem(checkpoint: Path) -> None:
    assert verify(checkpoint) == []
    (checkpoint / "notes.txt").write_text("a file that the manifest does not list")
    assert verify(checkpoint) == []


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found(checkpoint: Path, name: str, seed: int) -> None:
    position = random.Random(seed).randrange(len(FILES[name]))
    flip_byte(checkpoint / name, position=position)
    assert [problem.partition(":")[0] for problem in verify(checkpoint)] == [name]
    assert problems_by_size(checkpoint) == []


def test_missing_and_truncated_files_are_named(checkpoint: Path) -> None:
    (checkpoint / "engine/weights.pt").unlink()
    (checkpoint / "engine/optimizer.pt").write_bytes(FILES["engine/optimizer.pt"][:-1])
    expected = ["engine/optimizer.pt: 4,999 bytes, the manifest says 5,000", "engine/weights.pt: missing"]
    assert verify(checkpoint) == expected
    assert sorted(problems_by_size(checkpoint)) == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"step": 20', '"step": 21'), "changed after it was written"),
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 9'), "format version 9"),
        (lambda text: "[]", "not that of an orpo_ds checkpoint"),
    ],
)
def test_a_damaged_manifest_is_a_problem(checkpoint: Path, damage: object, message: str) -> None:
    path = checkpoint / MANIFEST_NAME
    assert callable(damage)
    path.write_text(damage(path.read_text()))
    (problem,) = verify(checkpoint)
    assert message in problem


def test_without_a_manifest_the_save_was_not_finished(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).unlink()
    assert verify(checkpoint) == ["manifest.json is missing: the save was not finished"]


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_every_file_is_read_by_one_rank_and_the_work_is_even(world_size: int, seed: int) -> None:
    numbers = random.Random(seed)
    sized = {f"file-{i}": numbers.randrange(10_000) for i in range(40)}
    shares = [
        share_of_files(sized, Ranks(rank=rank, world_size=world_size, all_gather=list))
        for rank in range(world_size)
    ]
    assert sorted(name for share in shares for name in share) == sorted(sized)
    loads = [sum(sized[name] for name in share) for share in shares]
    # Graham 1969: longest first ends within one file of the even split.
    assert max(loads) - sum(sized.values()) / world_size <= max(sized.values())
