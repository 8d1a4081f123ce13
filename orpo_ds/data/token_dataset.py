"""A tokenised dataset on disk.

    <cache_dir>/<key>/pairs*.arrow      one line for every row of the dataset, refused ones with empty ids
    <cache_dir>/<key>/rows.npy          row numbers of the usable ones
    <cache_dir>/<key>/trunk.npy …       lengths of the usable ones, for packing
    <cache_dir>/<key>/manifest.json     content hash, refused rows by reason

The folder is built beside its name and renamed when it is whole, under a file lock: whoever sees it sees all
of it. Readers map the files into memory, so that a million rows cost a reader no more than ten.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock
from numpy.typing import NDArray

from orpo_ds.data.image_inputs import ImageInputs
from orpo_ds.data.truncate import TokenPair

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"

FEATURES = datasets.Features(
    {
        "chosen": datasets.List(datasets.Value("int32")),
        "rejected_branch": datasets.List(datasets.Value("int32")),
        "chosen_start": datasets.Value("int32"),
        "rejected_start": datasets.Value("int32"),
        "trunk": datasets.Value("int32"),
        "image_tokens": datasets.Value("int32"),  # of the prompt, after its first token
        "images": datasets.Value("string"),  # hash of the pixels; the rows keep the images
        "reason": datasets.Value("string"),
        "detail": datasets.Value("string"),
    }
)

INDEX_BATCH_ROWS = 10_000
LENGTHS = (
    "trunk",
    "chosen",
    "rejected",
    "chosen_start",
    "image_tokens",
)  # the fields of PairLengths, a file each


@dataclass(frozen=True)
class PairLengths:
    """Tokens of every pair, as packed: `trunk + chosen + rejected` is what a pair costs.

    Attributes:
        trunk: int32 [N], tokens of the shared trunk.
        chosen: int32 [N], tokens of the chosen branch (after the trunk).
        rejected: int32 [N], tokens of the rejected branch.
        chosen_start: int32 [N], index of the chosen response's first token in trunk + chosen branch.
        image_tokens: int32 [N], tokens of the prompt, after the first, that stand for an image: none is in the nll.
    """

    trunk: NDArray[np.int32]
    chosen: NDArray[np.int32]
    rejected: NDArray[np.int32]
    chosen_start: NDArray[np.int32]
    image_tokens: NDArray[np.int32]

    def of(self, pairs: Sequence[int]) -> PairLengths:
        """Those of these pairs (dataset indices), in their order."""
        index = np.asarray(pairs, dtype=np.int64)
        return PairLengths(*(getattr(self, name)[index] for name in LENGTHS))

    def nll_tokens(self, *, nll_on_prompt: bool) -> NDArray[np.int64]:
        """Tokens that the nll counts in each pair, [N]: `packing.count_targets` without reading ids."""
        skipped = 1 + self.image_tokens if nll_on_prompt else np.maximum(self.chosen_start, 1)
        return self.trunk.astype(np.int64) + self.chosen - skipped

    def sequence_tokens(self) -> NDArray[np.int64]:
        """Tokens of the two full sequences of each pair, [N]."""
        return 2 * self.trunk.astype(np.int64) + self.chosen + self.rejected


class TokenDataset:
    """The usable token pairs of a dataset, read from memory-mapped files.

    Attributes:
        lengths: tokens of every pair.
        row_numbers: int64 [N], the row of the dataset that each pair came from.
        fingerprint: hash of the ids themselves; the same on every machine.
        refused: reason -> numbers of the rows that could not be used.
        example_details: reason -> what was wrong with the first of them.
        images: of the pairs that have some, where any has; whoever has the rows sets it.
        folder: where it is kept.
        was_kept: whether the folder was there already, and nothing had to be tokenised.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder made by `build_once`."""
        files = sorted(folder.glob("pairs*.arrow"))
        manifest = json.loads((folder / "manifest.json").read_text())
        self._lines = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
        self.lengths = PairLengths(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in LENGTHS))
        self.row_numbers: NDArray[np.int64] = np.load(folder / "rows.npy", mmap_mode="r")
        self.fingerprint: str = manifest["fingerprint"]
        self.refused: dict[str, list[int]] = manifest["refused"]
        self.example_details: dict[str, str] = manifest["example_details"]
        self.images: ImageInputs | None = None
        self.folder = folder
        self.was_kept = True

    def __len__(self) -> int:
        return len(self.row_numbers)

    def release(self, pairs: Sequence[int]) -> None:
        """Nothing to let go of: the pairs are on disk (`orpo_ds.data.feed.PairSource`)."""

    @property
    def example(self) -> TokenPair:
        """One of the pairs."""
        return self[0]

    def __iter__(self) -> Iterator[TokenPair]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> TokenPair:
        line = self._lines[int(self.row_numbers[index])]
        chosen, trunk = line["chosen"], line["trunk"]
        return TokenPair(
            chosen=chosen,
            rejected=chosen[:trunk] + line["rejected_branch"],
            chosen_start=line["chosen_start"],
            rejected_start=line["rejected_start"],
            trunk=trunk,
            image_tokens=line["image_tokens"],
            images=line["images"],
        )


def build_once(folder: Path, tokenize_into: Callable[[Path], datasets.Dataset]) -> TokenDataset:
    """Open `folder`, after building it if nobody has.

    Args:
        folder: the cache entry.
        tokenize_into: writes `pairs*.arrow` (columns of `FEATURES`) into the folder it is given, and returns
            them.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _build(folder, tokenize_into)
                built = TokenDataset(folder)
                built.was_kept = False
                return built
    return TokenDataset(folder)


def unfinished_folder(name: str, *, within: Path) -> Path:
    """A new folder for something that gets its real name when it is whole; `remove_abandoned` knows whose it is."""
    # The name is unique, not only locked: some cluster file systems grant a lock to two nodes at once.
    owner = f"{socket.gethostname()}.{os.getpid()}."
    return Path(tempfile.mkdtemp(prefix=f"{name}.{owner}", suffix=UNFINISHED, dir=within))


def _build(folder: Path, tokenize_into: Callable[[Path], datasets.Dataset]) -> None:
    unfinished = unfinished_folder(folder.name, within=folder.parent)
    try:
        _write_index(unfinished, tokenize_into(unfinished))
        unfinished.chmod(0o755)  # mkdtemp's folder is private; a cache may be shared
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        logger.info("%s was built by another process meanwhile", folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_abandoned(cache_dir: Path) -> None:
    """Remove what processes of this host have begun in `cache_dir` and, killed, can never finish."""
    for folder in cache_dir.glob(f"*.{socket.gethostname()}.*{UNFINISHED}"):
        pid = folder.name.removesuffix(UNFINISHED).split(".")[-2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            logger.warning("removing %s: process %s was killed while it tokenised", folder, pid)
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def _write_index(folder: Path, lines: datasets.Dataset) -> None:
    """Write what can be known about all pairs without reading their ids again."""
    digest = hashlib.sha256()
    kept: dict[str, list[NDArray[Any]]] = {name: [] for name in ("rows", *LENGTHS)}
    refused: dict[str, list[int]] = {}
    example_details: dict[str, str] = {}
    first_row = 0
    for batch in lines.with_format("arrow").iter(batch_size=INDEX_BATCH_ROWS):
        columns = {name: batch[name].combine_chunks() for name in FEATURES}
        for name in ("chosen", "rejected_branch"):
            digest.update(_as_numpy(columns[name].flatten()).tobytes())
            digest.update(_as_numpy(columns[name].value_lengths()).tobytes())
        for name in ("chosen_start", "rejected_start", "trunk"):
            digest.update(_as_numpy(columns[name]).tobytes())
        for image in columns["images"].drop_null().to_pylist():
            digest.update(image.encode())

        usable = _as_numpy(columns["reason"].is_null())
        trunk = _as_numpy(columns["trunk"])
        kept["rows"].append(first_row + np.flatnonzero(usable).astype(np.int64))
        kept["trunk"].append(trunk[usable])
        kept["chosen_start"].append(_as_numpy(columns["chosen_start"])[usable])
        kept["image_tokens"].append(_as_numpy(columns["image_tokens"])[usable])
        kept["chosen"].append((_as_numpy(columns["chosen"].value_lengths()) - trunk)[usable])
        kept["rejected"].append(_as_numpy(columns["rejected_branch"].value_lengths())[usable])
        for offset in np.flatnonzero(~usable).tolist():
            reason = columns["reason"][offset].as_py()
            refused.setdefault(reason, []).append(first_row + offset)
            example_details.setdefault(
                reason, f"Row {first_row + offset}: {columns['detail'][offset].as_py()}"
            )
        first_row += len(usable)

    for name, parts in kept.items():
        np.save(folder / f"{name}.npy", np.concatenate(parts))
    manifest = {
        "fingerprint": digest.hexdigest(),
        "refused": refused,
        "example_details": example_details,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _as_numpy(array: pa.Array) -> NDArray[Any]:
    return array.to_numpy(zero_copy_only=False)
