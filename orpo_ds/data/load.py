"""A name -> the rows of one split.

The name may be a file, a glob of files, a folder (of data files, or made by `save_to_disk`), or a dataset on
the hub. `datasets` does the reading and the caching. This module finds out which of them is meant, and says
what is wrong in terms of the user's file where `datasets` speaks of its own insides.
"""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec  # type: ignore[import-untyped]
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def load_rows(name: str, *, split: str, config_name: str | None = None) -> datasets.Dataset:
    """Load one split of a dataset.

    Args:
        name: a .json, .jsonl, .csv, .parquet or .arrow file (JSON and CSV also compressed), a glob of such
            files, a folder, or a hub id.
        split: "train", "test", …; slices such as "train[:10%]" work. Files and globs are one split, "train".
        config_name: configuration of a hub dataset that has several.

    Raises:
        ValueError: nothing of that name (with the nearest name that exists), an unknown split (with those
            that exist), no rows, a line that is not JSON (with its number), or files that do not fit
            together.
    """
    path = Path(name).expanduser()
    if glob.has_magic(name):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise ValueError(f"no file matches {name!r} (in {Path.cwd()})")
        rows = _load_files(files, split=split)
    elif path.is_file():
        rows = _load_files([path], split=split)
    elif path.is_dir():
        rows = _load_folder(path, split=split)
    elif _looks_local(name):
        raise ValueError(f"no file or folder {str(path)!r} (in {Path.cwd()}){_nearest(path)}")
    else:
        rows = _load_from_hub(name, split=split, config_name=config_name)
    if len(rows) == 0:
        raise ValueError(f"{name!r} has no rows in split {split!r}")
    return rows


def _load_files(files: list[Path], *, split: str) -> datasets.Dataset:
    builders = {_builder(file) for file in files}
    if len(builders) > 1:
        raise ValueError(f"files of different kinds cannot be one dataset: {[str(file) for file in files]}")
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise ValueError("the dataset is empty: its files have no content")
    return _load(
        builders.pop(),
        files=files,
        split=split,
        data_files={"train": [str(file.resolve()) for file in files]},
    )


def _load_folder(folder: Path, *, split: str) -> datasets.Dataset:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        try:
            saved = datasets.load_from_disk(str(folder))
        except IndexError as error:  # `datasets` saves a dataset without rows, but cannot open it again
            raise ValueError(f"the dataset {str(folder)!r} is empty: it was saved without rows") from error
        splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        return _take_split(splits, split=split, name=str(folder))
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and _data_suffix(file) in BUILDERS]
    if not files:
        raise ValueError(f"the folder {str(folder)!r} has no data files ({', '.join(BUILDERS)})")
    return _load(str(folder.resolve()), files=files, split=split)


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


def _load(builder: str, *, files: list[Path], split: str, **options: Any) -> datasets.Dataset:
    """Run `load_dataset` over local files, and explain its errors."""
    try:
        rows = datasets.load_dataset(builder, split=split, **options)
    except DatasetGenerationError as error:
        _explain_json(files)
        raise ValueError(
            f"{' or '.join(str(file) for file in files[:5])} cannot be read: {error.__cause__ or error}"
        ) from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(
                f"the dataset is empty: no rows of split {split!r} in {[str(file) for file in files[:5]]}"
            ) from error
        raise ValueError(f"{str(files[0]) if len(files) == 1 else builder!r}: {error}") from error
    assert isinstance(rows, datasets.Dataset)
    return rows


def _load_from_hub(name: str, *, split: str, config_name: str | None) -> datasets.Dataset:
    try:
        rows = datasets.load_dataset(name, config_name, split=split)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"{name!r} is no file or folder here{_nearest(Path(name))}, and no dataset that can be reached on "
            f"the hub: {error}"
        ) from error
    except ValueError as error:  # unknown split or configuration: the message lists those that exist
        raise ValueError(f"the hub's dataset {name!r}: {error}") from error
    assert isinstance(rows, datasets.Dataset)
    return rows


def _data_suffix(file: Path) -> str:
    """The suffix that tells the format, below one of compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _builder(file: Path) -> str:
    suffix = _data_suffix(file)
    if suffix not in BUILDERS:
        raise ValueError(
            f"{str(file)!r} ends in none of {list(BUILDERS)} (or those with {list(COMPRESSIONS)})"
        )
    return BUILDERS[suffix]


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path: hub ids are `name` or `owner/name`."""
    path = Path(name)
    return (
        name.startswith(("/", ".", "~"))
        or len(path.parts) > 2
        or _data_suffix(path) in BUILDERS
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


def _explain_json(files: list[Path]) -> None:
    """Raise for the first line of JSON files that is malformed, or that does not fit the lines before it.

    Called after `datasets` has failed, because its message has the row within a block of 16 MB, not the line.
    """
    kinds: dict[str, str] = {}  # column -> JSON type of its first value
    for file in files:
        if BUILDERS.get(_data_suffix(file)) != "json":
            continue
        for place, value in _json_values(file):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{place} is {_json_type(value)}, not an object with columns: {_excerpt(value)}"
                )
            unknown = [key for key in value if kinds and key not in kinds]
            if unknown:
                raise ValueError(
                    f"{place} has the columns {unknown}, which the first line does not have ({list(kinds)}): "
                    "give all lines the same columns, with null where a value is missing"
                )
            for key, held in value.items():
                kind = _json_type(held)
                known = kinds.setdefault(key, kind)
                if known == "null":
                    kinds[key] = kind
                elif kind not in (known, "null"):
                    raise ValueError(
                        f"{place}: {key!r} is {kind}, but {known} in the lines before: {_excerpt(held)}"
                    )


def _json_values(file: Path) -> Iterator[tuple[str, Any]]:
    """(place in words, value) of every line, or of every element of a file that is one array."""
    with fsspec.open(str(file), "rb", compression="infer") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.lstrip().startswith(b"["):
                text = line + lines.read()
                for index, value in enumerate(_parse(text, f"{file}")):
                    yield f"{file}: element {index}", value
                return
            if line.strip():
                yield f"{file}: line {number}", _parse(line, f"{file}: line {number}")


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        near = error.doc[max(0, error.pos - 40) : error.pos + 20]
        raise ValueError(f"{place} is not JSON ({error.msg} at {where}), near {near!r}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8: {error}") from error


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean"}
    return names.get(type(value), "a number")


def _excerpt(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
