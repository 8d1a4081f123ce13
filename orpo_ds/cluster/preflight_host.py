"""What one host says of itself before a run: code, packages, files by hash; clock, disk, shared memory, GPUs.

Nothing here needs torch: a host whose torch is broken still answers, and all answer within a second or two.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orpo_ds
from orpo_ds.shipped import shipped_folder

# Files up to this size are hashed whole. Of a larger one: its size and blocks spread evenly over it, so that a model
# of 100 GB takes a second on each host; a file that was cut off or is another version differs there.
WHOLE_BYTES = 256 << 20
BLOCK_BYTES = 1 << 20
BLOCKS = 64
PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "wandb",
    "flash-attn",
    "bitsandbytes",
)
SHARED_MEMORY = Path("/dev/shm")
ABSENT = "absent"


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi names it."""

    name: str
    driver: str
    memory_mib: int


@dataclass(frozen=True)
class Request:
    """What a host is asked: files of the run, and folders that it writes to."""

    files: Mapping[str, str]
    folders: Mapping[str, str]


@dataclass(frozen=True)
class HostReport:
    """One host's answer. Hashes are SHA-256 in hexadecimal."""

    host: str
    python: str
    packages: dict[str, str]
    code: dict[str, str]  # file of orpo_ds -> hash
    files: dict[str, str]  # field of the run -> hash of the file or folder it names, or "absent"
    free_bytes: dict[str, int]  # field of the run -> free bytes of the file system of the folder it names
    read_only: list[str]  # fields of the run whose folder this user cannot write to
    shared_memory_bytes: int  # free in /dev/shm
    gpus: list[Gpu]
    addresses: list[str]  # of all interfaces, as `hostname -I` lists them
    meeting_address: str  # the one that gloo or NCCL would give to the other ranks
    clock: float  # seconds since 1970

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HostReport:
        """The report that `to_json` wrote."""
        return cls(**{**values, "gpus": [Gpu(**gpu) for gpu in values["gpus"]]})


def describe_host(request: Request) -> HostReport:
    """Look at this host. The clock is read last."""
    folders = {name: _existing_parent(Path(folder).expanduser()) for name, folder in request.folders.items()}
    report: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "code": code_hashes(),
        "files": {name: hash_of(Path(path).expanduser()) for name, path in request.files.items()},
        "free_bytes": {name: shutil.disk_usage(folder).free for name, folder in folders.items()},
        "read_only": [name for name, folder in folders.items() if not os.access(folder, os.W_OK)],
        "shared_memory_bytes": shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        "gpus": gpus(),
        "addresses": _words_of(["hostname", "-I"]),
        "meeting_address": meeting_address(),
    }
    return HostReport(**report, clock=time.time())


def package_versions() -> dict[str, str]:
    """Versions of what the run imports, with all that it needs in turn."""
    versions: dict[str, str] = {}
    waiting = list(PACKAGES)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in versions:
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        versions[name] = found.version
        for line in found.requires or ():
            needed = re.match(r"[A-Za-z0-9._-]+", line)
            if needed is not None and "extra ==" not in line:
                waiting.append(needed[0])
    return versions


def code_hashes() -> dict[str, str]:
    """Hash of every file of orpo_ds that this Python would import, and of the presets that come with it."""
    package = Path(orpo_ds.__file__).parent
    files = {path.relative_to(package.parent): path for path in package.rglob("*.py")}
    files |= {Path("ds_configs", path.name): path for path in shipped_folder("ds_configs").glob("*.json")}
    return {str(name): hash_of(path) for name, path in sorted(files.items())}


def hash_of(path: Path) -> str:
    """Hash of a file's content; of the names and contents of all files of a folder or a glob; or "absent"."""
    if glob.has_magic(str(path)) and not path.exists():
        found = sorted(glob.glob(str(path)))
        lines = "".join(f"{file}\0{hash_of(Path(file))}\n" for file in found)
        return hashlib.sha256(lines.encode()).hexdigest() if found else ABSENT
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            if file.is_file():
                digest.update(f"{file.relative_to(path)}\0{_file_hash(file)}\n".encode())
        return digest.hexdigest()
    return _file_hash(path) if path.is_file() else ABSENT


def gpus() -> list[Gpu]:
    """GPUs with their driver, by nvidia-smi; none where it is missing or fails."""
    fields = "name,driver_version,memory.total"
    lines = _lines_of(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    rows = [[part.strip() for part in line.split(",")] for line in lines]
    return [Gpu(row[0], row[1], int(row[2])) for row in rows if len(row) == 3 and row[2].isdigit()]


def meeting_address() -> str:
    """Where the other ranks would look for this host: GLOO_SOCKET_IFNAME's address, or that of its own name."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        words = _words_of(["ip", "-4", "-o", "address", "show", "dev", interface])
        if "inet" in words:
            return words[words.index("inet") + 1].partition("/")[0]
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _file_hash(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(BLOCKS):
            stream.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK_BYTES))
        return digest.hexdigest()


def _existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists already."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _lines_of(command: Sequence[str]) -> list[str]:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _words_of(command: Sequence[str]) -> list[str]:
    return [word for line in _lines_of(command) for word in line.split()]
