"""What `tests/hub_server.py` keeps: repositories of commits, and what the hub's API says about a commit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".arrow", ".parquet", ".gz", ".zip")
LFS_FROM_BYTES = 10 * 2**20


class HubError(Exception):
    """An answer other than 200, as the hub words it."""

    def __init__(self, status: int, message: str, *, code: str = "", **details: str) -> None:
        super().__init__(message)
        self.status, self.code, self.details = status, code, details


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    message: str
    files: Mapping[str, bytes]


@dataclass
class Repo:
    """A model or a dataset: its branches, each a list of commits, oldest first."""

    kind: str
    name: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with the empty commit that the hub makes."""
        self.branches["main"] = [Commit(sha1(f"{self.kind}{self.name}".encode()), "initial commit", {})]

    def commit_of(self, revision: str) -> Commit:
        """The commit that a branch's name or a commit's oid stands for."""
        if revision in self.branches:
            return self.branches[revision][-1]
        for commits in self.branches.values():
            for commit in commits:
                if commit.oid == revision:
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def commit(self, branch: str, files: Mapping[str, bytes], *, message: str) -> Commit:
        """Put a state of the files on top of a branch."""
        if branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", code="RevisionNotFound")
        content = "".join(f"{path} {sha1(data)}\n" for path, data in sorted(files.items()))
        parent = self.branches[branch][-1].oid
        made = Commit(sha1(f"{parent}{message}{content}".encode()), message, dict(files))
        self.branches[branch].append(made)
        return made


def sha1(data: bytes) -> str:
    """Hex sha1 of bytes."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    """Whether the hub keeps a file in git-LFS."""
    return path.endswith(LFS_SUFFIXES) or size >= LFS_FROM_BYTES


def blob_oid(data: bytes) -> str:
    """Git's oid of a file."""
    return sha1(b"blob %d\0" % len(data) + data)


def read_folder(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their paths in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def file_entry(path: str, data: bytes) -> dict[str, Any]:
    """A file, as listings have it."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_oid(data)}
    if is_lfs(path, len(data)):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def folders(commit: Commit) -> set[str]:
    """All folders of a commit."""
    return {str(parent) for path in commit.files for parent in Path(path).parents if str(parent) != "."}


def folder_entry(path: str) -> dict[str, Any]:
    """A folder, as listings have it."""
    return {"type": "directory", "path": path, "size": 0, "oid": sha1(path.encode())}


def tree(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """`/tree/<revision>/<folder>`."""
    if folder and folder not in folders(commit):
        raise HubError(404, f"Entry not found: {folder}", code="EntryNotFound")

    def inside(path: str) -> bool:
        rest = path.removeprefix(f"{folder}/" if folder else "")
        return (not folder or path.startswith(f"{folder}/")) and (recursive or "/" not in rest)

    entries = [folder_entry(path) for path in sorted(folders(commit)) if inside(path)]
    return entries + [file_entry(path, data) for path, data in sorted(commit.files.items()) if inside(path)]


def paths_info(commit: Commit, paths: list[str]) -> list[dict[str, Any]]:
    """`/paths-info/<revision>`."""
    files = [file_entry(path, commit.files[path]) for path in paths if path in commit.files]
    return files + [folder_entry(path) for path in paths if path in folders(commit)]


def upload_modes(commit: Commit, files: list[dict[str, Any]]) -> Any:
    """`/preupload/<revision>`: which files go through git-LFS, and what is there already."""
    answers = []
    for wanted in files:
        path, existing = wanted["path"], commit.files.get(wanted["path"])
        mode = "lfs" if is_lfs(path, wanted["size"]) else "regular"
        oid = None
        if existing is not None:
            oid = hashlib.sha256(existing).hexdigest() if mode == "lfs" else blob_oid(existing)
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": answers}
