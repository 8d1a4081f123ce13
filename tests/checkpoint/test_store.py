"""Saves are all or nothing, and retention never takes the last good checkpoint."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from orpo_ds.checkpoint import CheckpointSaveError, CheckpointStore, one_rank, resolve_resume, verify
from orpo_ds.checkpoint.manifest import MANIFEST_NAME
from orpo_ds.checkpoint.ranks import Ranks
from tests.checkpoint.folders import FILES, content_of, flip_byte, metadata, store_in, writer


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_save_publishes_exactly_what_was_written(tmp_path: Path) -> None:
    path = store_in(tmp_path).save(writer(), metadata(20))
    assert path == tmp_path / "checkpoint-20"
    assert names_in(tmp_path) == ["checkpoint-20"]
    content = content_of(path)
    del content[MANIFEST_NAME]
    assert content == FILES


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.save(writer(), metadata(20))
    store.save(writer({"weights.pt": b"new"}), metadata(20))
    assert names_in(tmp_path) == ["checkpoint-20"]
    assert content_of(tmp_path / "checkpoint-20").keys() == {"weights.pt", MANIFEST_NAME}


def test_a_users_folder_of_that_name_is_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "checkpoint-20" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("made by hand")
    with pytest.raises(CheckpointSaveError, match="not a checkpoint of orpo_ds"):
        store_in(tmp_path).save(writer(), metadata(20))
    assert content_of(tmp_path) == {"checkpoint-20/mine.txt": b"made by hand"}


# A save in a process of its own, killed at the call named by the argument.
KILLED_SAVE = """
import os, pathlib, shutil, signal, sys
from orpo_ds.checkpoint import store
from tests.checkpoint.folders import metadata, store_in, writer

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

where = sys.argv[2]
if where == "before the manifest":
    store.write_durably = die
elif where == "before the rename":
    pathlib.Path.rename = die
elif where == "between two renames":
    rename, calls = pathlib.Path.rename, []
    def second(self, target):
        calls.append(self)
        return die() if len(calls) == 2 else rename(self, target)
    pathlib.Path.rename = second
store_in(pathlib.Path(sys.argv[1])).save(writer(), metadata(20))
"""


@pytest.mark.parametrize("where", ["before the manifest", "before the rename", "between two renames"])
def test_a_killed_save_loses_nothing(tmp_path: Path, where: str) -> None:
    store = store_in(tmp_path)
    store.save(writer(), metadata(10))
    if where == "between two renames":
        store.save(writer({"older.pt": b"of the same step"}), metadata(20))
    before = {path.name: content_of(path) for path in tmp_path.iterdir()}

    killed = subprocess.run([sys.executable, "-c", KILLED_SAVE, str(tmp_path), where], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert any(name.startswith(".tmp-") for name in names_in(tmp_path)), "it was not killed within the save"
    assert store_in(tmp_path).latest_good() == tmp_path / "checkpoint-10"

    newest = resolve_resume(True, tmp_path, ranks=one_rank())
    assert newest == tmp_path / ("checkpoint-20" if where == "between two renames" else "checkpoint-10")
    assert {path.name: content_of(path) for path in tmp_path.iterdir()} == before


def test_a_rank_that_fails_alone_finds_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    """It asks no other rank: they wait for it in a collective of the step."""
    for step in (10, 20):
        store_in(tmp_path).save(writer(), metadata(step))
    (tmp_path / "checkpoint-20" / "args.json").unlink()

    def all_gather(_: object) -> list[object]:
        raise AssertionError("it asked the others")

    alone = CheckpointStore(
        tmp_path, save_total_limit=None, ranks=Ranks(rank=1, world_size=2, all_gather=all_gather)
    )
    assert alone.newest_whole() == tmp_path / "checkpoint-10"


@pytest.fixture
def tiny_disk(disk_of: Callable[[str], Path]) -> Path:
    """A file system of one MiB."""
    return disk_of("1m")


def test_a_disk_that_fills_up_fails_the_save_and_nothing_else(tiny_disk: Path) -> None:
    store = store_in(tiny_disk)
    store.save(writer(), metadata(10))
    before = content_of(tiny_disk)
    with pytest.raises(
        CheckpointSaveError,
        match=r"checkpoint-20 was not saved: .*No space left on device.* bytes were free in .*disk",
    ):
        store.save(writer({"small": b"1", "big": bytes(2**20)}), metadata(20))
    assert content_of(tiny_disk) == before
    store.save(writer(), metadata(30))
    assert store.latest_good() == tiny_disk / "checkpoint-30"


def test_a_save_that_cannot_fit_is_not_begun(tiny_disk: Path) -> None:
    store = store_in(tiny_disk)
    store.save(writer({"weights": bytes(600_000)}), metadata(10))
    begun = []
    with pytest.raises(CheckpointSaveError, match=r"needs about 600,000 bytes, .* bytes were free in"):
        store.save(begun.append, metadata(20))
    assert begun == []

    empty = store_in(tiny_disk / "other")
    with pytest.raises(CheckpointSaveError, match=r"needs about 9,000,000 bytes"):
        empty.save(begun.append, metadata(20), estimated_bytes=9_000_000)
    assert begun == []


def test_a_file_over_the_size_limit_of_the_process_fails_the_save(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointSaveError, match="File too large"):
            store_in(tmp_path).save(writer(), metadata(20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == []


def ranks_in_threads(world_size: int) -> list[Ranks]:
    """Ranks of one process, a thread each, with a real all-gather between them."""
    barrier = Barrier(world_size, timeout=30)
    slots: list[object] = [None] * world_size

    def all_gather_of(rank: int) -> Ranks:
        def all_gather(value: object) -> list[object]:
            slots[rank] = value
            barrier.wait()
            gathered = list(slots)
            barrier.wait()
            return gathered

        return Ranks(rank=rank, world_size=world_size, all_gather=all_gather)

    return [all_gather_of(rank) for rank in range(world_size)]


def save_on_three_ranks(output_dir: Path, *, failing_rank: int | None) -> list[Path | str]:
    """The path, or the error, of every rank."""

    def save(ranks: Ranks) -> Path | str:
        def write(folder: Path) -> None:
            if ranks.rank == failing_rank:
                raise OSError(28, "No space left on device", str(folder / "mine.pt"))
            (folder / f"rank-{ranks.rank}.pt").write_bytes(bytes([ranks.rank]) * 1000)

        try:
            return CheckpointStore(output_dir, save_total_limit=None, ranks=ranks).save(write, metadata(20))
        except CheckpointSaveError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(save, ranks_in_threads(3)))


def test_all_ranks_write_into_one_checkpoint(tmp_path: Path) -> None:
    assert save_on_three_ranks(tmp_path, failing_rank=None) == [tmp_path / "checkpoint-20"] * 3
    content = content_of(tmp_path / "checkpoint-20")
    assert {name: content[name] for name in content if name != MANIFEST_NAME} == {
        f"rank-{rank}.pt": bytes([rank]) * 1000 for rank in range(3)
    }
    assert verify(tmp_path / "checkpoint-20") == []


@pytest.mark.parametrize("failing_rank", [0, 2])
def test_one_rank_that_fails_fails_all_with_the_same_words(tmp_path: Path, failing_rank: int) -> None:
    errors = save_on_three_ranks(tmp_path, failing_rank=failing_rank)
    assert len(set(errors)) == 1
    assert f"rank {failing_rank} on " in str(errors[0])
    assert names_in(tmp_path) == []


def checkpoints_at(output_dir: Path, *steps: int) -> None:
    for step in steps:
        store_in(output_dir).save(writer(), metadata(step))


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints_at(tmp_path, 10, 20, 30, 40)
    deleted = store_in(tmp_path, limit=2).prune(keep=[tmp_path / "checkpoint-10"])
    assert names_in(tmp_path) == ["checkpoint-10", "checkpoint-40"]
    assert [path.name for path in deleted] == ["checkpoint-30", "checkpoint-20"]


def test_with_a_limit_of_one_the_best_and_the_newest_both_stay(tmp_path: Path) -> None:
    checkpoints_at(tmp_path, 10, 20, 30)
    store_in(tmp_path, limit=1).prune(keep=[tmp_path / "checkpoint-10"])
    assert names_in(tmp_path) == ["checkpoint-10", "checkpoint-30"]


@pytest.mark.parametrize("limit", [1, 2])
def test_the_only_good_checkpoint_is_never_deleted(tmp_path: Path, limit: int) -> None:
    checkpoints_at(tmp_path, 10, 20, 30)
    for step in (20, 30):
        flip_byte(tmp_path / f"checkpoint-{step}" / "engine/weights.pt", position=99)
    store_in(tmp_path, limit=limit).prune()
    assert store_in(tmp_path).latest_good() == tmp_path / "checkpoint-10"


def test_a_truncated_newer_checkpoint_does_not_fill_the_limit(tmp_path: Path) -> None:
    checkpoints_at(tmp_path, 10, 20, 30)
    (tmp_path / "checkpoint-30" / "args.json").unlink()
    store_in(tmp_path, limit=1).prune()
    assert names_in(tmp_path) == ["checkpoint-20"]


def test_retention_deletes_only_checkpoints_of_ours(tmp_path: Path) -> None:
    for name in ("checkpoint-5", "checkpoint-abc", "my-checkpoint-1", "previous-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "checkpoint-7").write_text("a file")
    checkpoints_at(tmp_path, 10, 20)
    store_in(tmp_path, limit=1).prune()
    assert names_in(tmp_path) == [
        *("checkpoint-20", "checkpoint-5", "checkpoint-7", "checkpoint-abc", "my-checkpoint-1", "previous-1")
    ]


def test_without_a_limit_nothing_is_deleted(tmp_path: Path) -> None:
    checkpoints_at(tmp_path, 10, 20)
    assert store_in(tmp_path).prune() == []
    assert names_in(tmp_path) == ["checkpoint-10", "checkpoint-20"]
    with pytest.raises(ValueError, match="save_total_limit=0"):
        store_in(tmp_path, limit=0)
