"""The manifest of a checkpoint: what it is, and the size and sha256 of each of its files.

`manifest.json` is written last. A folder without one is not a checkpoint; a folder with one is a good
checkpoint when every file that it lists has the listed size and hash. DeepSpeed's files are pickles, which
run code when they are loaded, so nothing is loaded from a folder before `verify` found no problem in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orpo_ds.checkpoint.ranks import Ranks, one_rank, together
from orpo_ds.progress import Bar, bar
from orpo_ds.redact import redact

MANIFEST_NAME = "manifest.json"
FORMAT = "orpo_ds checkpoint"
FORMAT_VERSION = 2
PACKAGES = ("orpo_ds", "torch", "transformers", "deepspeed", "datasets", "peft")

READ_BYTES = 16 * 2**20
PROGRESS_FROM_BYTES = 2**30


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says about the run that wrote it, and what a resume compares with its own.

    `global_batch_size` is in pairs. `config` holds the fields of the run's config (`args.to_dict()`); secrets
    in it are not written down. `dataset_fingerprint` is that of the tokenised training set.
    """

    step: int
    epoch: float
    seed: int
    world_size: int
    zero_stage: int
    global_batch_size: int
    dataset_fingerprint: str
    config: dict[str, Any]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; `files` maps paths relative to the folder, with `/`, to entries."""

    metadata: CheckpointMetadata
    packages: dict[str, str]
    created: str
    files: dict[str, FileEntry]

    @property
    def total_bytes(self) -> int:
        """Size of the checkpoint without its manifest."""
        return sum(entry.bytes for entry in self.files.values())

    def to_json(self) -> str:
        """The text of manifest.json."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **asdict(self.metadata),
            "packages": self.packages,
            "created": self.created,
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
        }
        return json.dumps({**content, "manifest_sha256": _content_hash(content)}, indent=1) + "\n"


def new_manifest(metadata: CheckpointMetadata, files: dict[str, FileEntry]) -> Manifest:
    """A manifest for files written now by the packages installed here."""
    return Manifest(
        metadata=replace(metadata, config=plain_config(metadata.config)),
        packages=package_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises ValueError (what is wrong with it) when it is missing, not JSON, of another format version, or
    changed after it was written.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST_NAME} is missing: the save was not finished") from None
    except ValueError as error:
        raise ValueError(f"{MANIFEST_NAME} is not valid JSON ({error})") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{MANIFEST_NAME} is not that of an {FORMAT}")
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{MANIFEST_NAME} has format version {version}; this orpo_ds reads {FORMAT_VERSION}")
    written_hash = content.pop("manifest_sha256", None)
    if written_hash != _content_hash({"format": FORMAT, "format_version": version, **content}):
        raise ValueError(f"{MANIFEST_NAME} was changed after it was written (its own hash does not match)")
    packages, created, files = content.pop("packages"), content.pop("created"), content.pop("files")
    return Manifest(
        metadata=CheckpointMetadata(**content),
        packages=packages,
        created=created,
        files={name: FileEntry(**entry) for name, entry in files.items()},
    )


def verify(folder: Path, ranks: Ranks | None = None) -> list[str]:
    """What is wrong with a checkpoint: a line for each missing, truncated or changed file; [] when good.

    Files that the manifest does not list are ignored. With `ranks`, a collective: each rank reads its share
    of the files, and all ranks return the same list. Hashing reads every byte, about 1 GB/s a rank.
    """
    ranks = ranks or one_rank()
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        # The same on every rank of a shared file system; the gather below keeps ranks together even where
        # it isn't.
        own_problems = [str(error)]
    else:
        own_problems = _file_problems(folder, manifest, ranks)
    gathered = together(ranks, lambda: own_problems)
    return sorted({problem for problems in gathered for problem in problems})


def problems_by_size(folder: Path) -> list[str]:
    """Like `verify` without reading the files: finds missing and truncated ones, not changed bytes."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    return [text for name, entry in manifest.files.items() if (text := _size_problem(folder, name, entry))]


def _file_problems(folder: Path, manifest: Manifest, ranks: Ranks) -> list[str]:
    sized = {name: entry.bytes for name, entry in manifest.files.items()}
    problems = []
    with hash_progress(f"verify {folder.name}", sized, ranks) as progress:
        for name in share_of_files(sized, ranks):
            entry = manifest.files[name]
            problem = _size_problem(folder, name, entry)
            if problem is None and hash_file(folder / name, progress) != entry.sha256:
                problem = f"{name}: content was changed (sha256 does not match the manifest)"
            if problem is not None:
                problems.append(problem)
    return problems


def _size_problem(folder: Path, name: str, entry: FileEntry) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name}: missing"
    size = path.stat().st_size
    if size != entry.bytes:
        return f"{name}: {size:,} bytes, the manifest says {entry.bytes:,}"
    return None


def list_files(folder: Path) -> dict[str, int]:
    """Relative path -> bytes of every file below `folder`, the manifest itself left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in files
        if path.relative_to(folder).as_posix() != MANIFEST_NAME
    }


def share_of_files(sized: dict[str, int], ranks: Ranks) -> list[str]:
    """The files that this rank reads: each, largest first, goes to the rank with the fewest bytes so far."""
    loads = [0] * ranks.world_size
    share = []
    for name, size in sorted(sized.items(), key=lambda item: (-item[1], item[0])):
        rank = loads.index(min(loads))
        loads[rank] += size
        if rank == ranks.rank:
            share.append(name)
    return share


def seal_files(folder: Path, names: Iterable[str], progress: Bar) -> dict[str, FileEntry]:
    """Flush files to the disk and hash what was written; raises OSError when the disk did not take it.

    A write can succeed into the page cache and fail on its way to the disk: `fsync` is where that error
    shows.
    """
    sealed = {}
    for name in names:
        path = folder / name
        sync_path(path)
        sealed[name] = FileEntry(bytes=path.stat().st_size, sha256=hash_file(path, progress))
    return sealed


def hash_file(path: Path, progress: Bar) -> str:
    """sha256 of a file in hex, read in pieces of 16 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            progress.update(len(piece))
    return digest.hexdigest()


def hash_progress(title: str, sized: dict[str, int], ranks: Ranks) -> Bar:
    """A progress bar over the bytes of this rank's share; shown on rank 0 when there is much to read."""
    own_bytes = sum(sized[name] for name in share_of_files(sized, ranks))
    hidden = not ranks.is_main or own_bytes < PROGRESS_FROM_BYTES
    return bar(total=own_bytes, desc=title, unit="B", unit_scale=True, shown=not hidden)


def sync_path(path: Path) -> None:
    """Fsync a file, or a folder (which makes its entries, thus a rename, durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a small text file so that it survives a power loss."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it comes back from JSON (tuples are lists, other objects are text), without secrets."""
    return json.loads(json.dumps(redact(config), default=str))


def _content_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's numbers depend on, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
