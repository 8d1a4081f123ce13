"""A name -> the rows of one split.

The name may be a file, a glob of files, a folder (of data files, or made by `save_to_disk`), each of them here or
behind a URL (`s3://`, `gs://`, `https://`, … through fsspec), or a dataset on the hub. `datasets` does the reading,
the caching and the streaming. This module finds out which of them is meant, and says what is wrong in terms of the
user's file where `datasets` speaks of its own insides.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from orpo_ds.data.bad_json import explain_json
from orpo_ds.data.remote import is_url, list_remote

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
SAVED = ("dataset_dict.json", "state.json")  # one of them lies in a folder made by `save_to_disk`


def load_rows(
    name: str, *, split: str, config_name: str | None = None, streaming: bool = False, **options: Any
) -> Rows:
    """Load one split of a dataset.

    Args:
        name: a .json, .jsonl, .csv, .parquet or .arrow file (JSON and CSV also compressed), a glob of such
            files, a folder, a URL of one of these, or a hub id.
        split: "train", "test", …; slices such as "train[:10%]" work. Files and globs are one split, "train".
        config_name: configuration of a hub dataset that has several.
        streaming: read the rows when they are asked for, and never all of them.
        options: `data_files` and `data_dir` of `load_dataset`; with them `name` is a hub id, a folder or a format.

    Raises:
        ValueError: nothing of that name (with the nearest name that exists), an unknown split (with those
            that exist), no rows, a line that is not JSON (with its number), files that do not fit together, or a URL
            for which a package is missing (with its name).
    """
    try:
        rows = _load_any(name, split=split, config_name=config_name, streaming=streaming, options=options)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name!r} has text that is not UTF-8: {error}. Convert it") from error
    if isinstance(rows, datasets.Dataset) and len(rows) == 0:
        raise ValueError(f"{name!r} has no rows in split {split!r}")
    return rows


def _load_any(
    name: str, *, split: str, config_name: str | None, streaming: bool, options: dict[str, Any]
) -> Rows:
    path = Path(name).expanduser()
    if options:
        return _load_from_hub(name, config_name, split=split, streaming=streaming, **options)
    if is_url(name):
        files = list_remote(name)
        if any(file.endswith(f"/{marker}") for file in files for marker in SAVED):
            return _load_saved(name, split=split, streaming=streaming)
        files = [file for file in files if _data_suffix(file) in BUILDERS] if len(files) > 1 else files
        return _load_files(files, split=split, streaming=streaming, name=name)
    if glob.has_magic(name):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise ValueError(f"no file matches {name!r} (in {Path.cwd()})")
        return _load_files(_with_content(found), split=split, streaming=streaming, name=name)
    if path.is_file():
        return _load_files(_with_content([str(path)]), split=split, streaming=streaming, name=name)
    if path.is_dir():
        return _load_folder(path, split=split, streaming=streaming)
    if _looks_local(name):
        raise ValueError(f"no file or folder {str(path)!r} (in {Path.cwd()}){_nearest(path)}")
    return _load_from_hub(name, config_name, split=split, streaming=streaming)


def _with_content(files: Sequence[str]) -> list[str]:
    """Local files as absolute paths, less those that are empty."""
    for file in files:
        _builder(file)  # an unknown kind is the greater mistake
    kept = [str(Path(file).resolve()) for file in files if Path(file).stat().st_size > 0]
    if not kept:
        raise ValueError(f"the dataset is empty: no content in {_few(files)}")
    return kept


def _load_files(files: Sequence[str], *, split: str, streaming: bool, name: str) -> Rows:
    builders = {_builder(file) for file in files}
    if len(builders) > 1:
        raise ValueError(f"files of different kinds cannot be one dataset: {_few(files)}")
    if not builders:
        raise ValueError(f"{name!r} has no data files ({', '.join(BUILDERS)})")
    options: dict[str, Any] = {"data_files": {"train": list(files)}}
    return _load(builders.pop(), files=files, split=split, streaming=streaming, **options)


def _load_folder(folder: Path, *, split: str, streaming: bool) -> Rows:
    if any((folder / marker).exists() for marker in SAVED):
        return _load_saved(str(folder), split=split, streaming=streaming)
    files = [
        str(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and _data_suffix(str(file)) in BUILDERS
    ]
    if not files:
        raise ValueError(f"the folder {str(folder)!r} has no data files ({', '.join(BUILDERS)})")
    return _load(str(folder.resolve()), files=files, split=split, streaming=streaming)


def _load_saved(folder: str, *, split: str, streaming: bool) -> Rows:
    """What `save_to_disk` wrote."""
    try:
        saved = datasets.load_from_disk(folder)
    except IndexError as error:  # `datasets` saves a dataset without rows, but cannot open it again
        raise ValueError(f"the dataset {folder!r} is empty: it was saved without rows") from error
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    rows = _take_split(splits, split=split, name=folder)
    return rows.to_iterable_dataset() if streaming else rows


def _take_split(splits: dict[str, datasets.Dataset], *, split: str, name: str) -> datasets.Dataset:
    """One split, or a slice of it, of datasets that are already there."""
    lengths = {key: len(rows) for key, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise ValueError(f"{name!r} has no split {split!r}; it has {list(lengths)}") from error
    return datasets.concatenate_datasets(
        [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _load(builder: str, *, files: Sequence[str], split: str, streaming: bool, **options: Any) -> Rows:
    """Run `load_dataset` over files, and explain its errors."""
    try:
        return _open(builder, split=split, streaming=streaming, **options)
    except DatasetGenerationError as error:
        explain_json([file for file in files if BUILDERS.get(_data_suffix(file)) == "json"])
        raise ValueError(f"{' or '.join(files[:5])} cannot be read: {error.__cause__ or error}") from error
    except ConnectionError as error:
        raise ValueError(f"{_few(files)} cannot be reached: {error}") from error
    except (EOFError, OSError) as error:
        raise ValueError(f"{_few(files)} cannot be read: {error}") from error
    except ValueError as error:
        if "zstd not supported" in str(error):
            raise ValueError(f"{_few(files)}: zstd needs a package: pip install zstandard") from error
        if "corresponds to no data" in str(error):
            raise ValueError(f"the dataset is empty: no rows of split {split!r} in {_few(files)}") from error
        raise ValueError(f"{str(files[0]) if len(files) == 1 else builder!r}: {error}") from error


def _load_from_hub(
    name: str, config_name: str | None, *, split: str, streaming: bool, **options: Any
) -> Rows:
    try:
        return _open(name, config_name, split=split, streaming=streaming, **options)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"{name!r} is no file or folder here{_nearest(Path(name))}, and no dataset that can be reached on "
            f"the hub: {error}"
        ) from error
    except DatasetGenerationError as error:
        raise ValueError(f"{name!r} cannot be read: {error.__cause__ or error}") from error
    except ValueError as error:  # unknown split or configuration: the message lists those that exist
        raise ValueError(f"the hub's dataset {name!r}: {error}") from error


def _open(path: str, *names: str | None, split: str, streaming: bool, **options: Any) -> Rows:
    """`load_dataset`; a stream, which knows no slices, skips and takes rows."""
    first = last = None
    if streaming and "[" in split:
        asked = split
        sliced = re.fullmatch(r"(\w+)\[(\d*):(\d*)\]", split)
        if sliced is None:
            raise ValueError(
                f"split {asked!r}: a stream does not know its length; give rows, as in 'train[:1000]', or do not stream"
            )
        split = sliced[1]
        first, last = (int(number) if number else None for number in sliced.groups()[1:])
    rows = datasets.load_dataset(path, *names, split=split, streaming=streaming, **options)
    assert isinstance(rows, datasets.Dataset | datasets.IterableDataset)
    if last is not None:
        rows = rows.take(last)
    return rows.skip(first) if first else rows


def _data_suffix(file: str) -> str:
    """The suffix that tells the format, below one of compression."""
    suffixes = [suffix.lower() for suffix in Path(file.partition("?")[0]).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _builder(file: str) -> str:
    suffix = _data_suffix(file)
    if suffix not in BUILDERS:
        raise ValueError(f"{file!r} ends in none of {list(BUILDERS)} (or those with {list(COMPRESSIONS)})")
    return BUILDERS[suffix]


def _few(files: Sequence[str]) -> str:
    return ", ".join(repr(file) for file in files[:5]) + (", …" if len(files) > 5 else "")


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path: hub ids are `name` or `owner/name`."""
    path = Path(name)
    return (
        name.startswith(("/", ".", "~"))
        or len(path.parts) > 2
        or _data_suffix(name) in BUILDERS
        or (len(path.parts) == 2 and path.parent.is_dir())
    )


def _nearest(path: Path) -> str:
    """A suggestion for the first part of a path that does not exist."""
    while not path.parent.is_dir():
        path = path.parent
    near = difflib.get_close_matches(
        path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.5
    )
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
