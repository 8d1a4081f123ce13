"""Several datasets as one: TRL's `datasets:` list, with a share for each.

    datasets:
      - path: HuggingFaceH4/ultrafeedback_binarized
        split: train_prefs
        fraction: 0.7
      - path: mine.jsonl
        fraction: 0.3

Shares are those of the result. On disk they are TRL's: the largest mixture in which no dataset is used twice, of which
each gives its first rows. Streams are drawn from by chance in these shares, until the first of them ends. Without
shares all rows follow each other.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import datasets

from orpo_ds.data.images import IMAGE_COLUMNS
from orpo_ds.data.load import Rows, load_rows
from orpo_ds.data.preference import OPTIONAL_COLUMNS, REQUIRED_COLUMNS, check_columns

# What others call these fields (alignment-handbook's `dataset_mixture`).
OTHER_NAMES = {
    "id": "path",
    "config": "name",
    "weight": "fraction",
    "dataset_name": "path",
    "dataset": "path",
}


@dataclass(frozen=True)
class DatasetSource:
    """One dataset of a mixture; the fields are those of TRL's `DatasetConfig`.

    Attributes:
        path: whatever `orpo_ds.data.load` takes.
        name: configuration of a hub dataset.
        data_dir: see `datasets.load_dataset`.
        data_files: see `datasets.load_dataset`.
        split: which of its splits, or a slice of one.
        columns: those to keep; others are left out before the datasets meet.
        fraction: share of the mixture, relative to the others'.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


def parse_source(given: str | Mapping[str, Any]) -> DatasetSource:
    """A source from YAML (a mapping) or the command line (a name, or a mapping in JSON).

    Raises:
        ValueError: an unknown field (with its name here), no path, or a share that is not positive.
    """
    if isinstance(given, str):
        if not given.lstrip().startswith("{"):
            return DatasetSource(given)
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"datasets: not JSON: {given!r} ({error})") from error
    if not isinstance(given, Mapping):
        raise ValueError(f"datasets: each must be a name or a mapping with a path, got {given!r}")
    known = [field.name for field in fields(DatasetSource)]
    for key in given:
        if key not in known:
            near = [OTHER_NAMES[key]] if key in OTHER_NAMES else difflib.get_close_matches(key, known, n=1)
            hint = f"; it is called {near[0]!r}" if near else ""
            raise ValueError(f"datasets: unknown field {key!r}{hint}. Fields: {', '.join(known)}")
    if "path" not in given:
        raise ValueError(f"datasets: no path in {dict(given)}")
    source = DatasetSource(**given)
    if source.fraction is not None and not source.fraction > 0:
        raise ValueError(f"datasets: fraction={source.fraction} of {source.path!r} must be above 0")
    return source


def load_mixture(sources: Sequence[DatasetSource], *, streaming: bool, seed: int) -> Rows:
    """Load all sources and make one dataset of them.

    Args:
        sources: at least one.
        streaming: read rows when they are asked for.
        seed: decides which stream gives the next row.

    Raises:
        ValueError: a share for some and not for all, or a source that cannot be loaded.
    """
    shares = [source.fraction for source in sources if source.fraction is not None]
    if shares and len(shares) < len(sources):
        without = [source.path for source in sources if source.fraction is None]
        raise ValueError(f"datasets: fraction must be set for all or for none; {without} have none")
    loaded = [_load(source, streaming=streaming) for source in sources]
    differing = _differing_columns(loaded)
    if differing:
        loaded = [
            _in_json(rows, [name for name in differing if name in rows.column_names]) for rows in loaded
        ]
    mixed = _mix(loaded, weights=[share / sum(shares) for share in shares], seed=seed)
    # A column of type Json is read as what it holds; that of a stream has no type that survives mixing.
    return mixed.map(_from_json, fn_kwargs={"columns": differing}) if differing and streaming else mixed


def _mix(loaded: Sequence[Any], *, weights: Sequence[float], seed: int) -> Any:
    if not weights or len(loaded) == 1:
        return datasets.concatenate_datasets(list(loaded))
    if isinstance(loaded[0], datasets.IterableDataset):
        return datasets.interleave_datasets(
            list(loaded), probabilities=list(weights), seed=seed, stopping_strategy="first_exhausted"
        )
    total = min(len(rows) / weight for rows, weight in zip(loaded, weights, strict=True))
    return datasets.concatenate_datasets(
        [rows.select(range(round(weight * total))) for rows, weight in zip(loaded, weights, strict=True)]
    )


def _load(source: DatasetSource, *, streaming: bool) -> Any:
    options = {"data_dir": source.data_dir, "data_files": source.data_files}
    rows = load_rows(
        source.path,
        split=source.split,
        config_name=source.name,
        streaming=streaming,
        **{name: value for name, value in options.items() if value is not None},
    )
    columns = rows.column_names or list(next(iter(rows)))
    if source.columns is not None:
        unknown = [name for name in source.columns if name not in columns]
        if unknown:
            raise ValueError(f"datasets: {source.path!r} has no columns {unknown}; it has {columns}")
        columns = source.columns
    try:
        check_columns(columns)
    except ValueError as error:
        raise ValueError(f"{source.path!r}: {error}") from error
    known = [name for name in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS, *IMAGE_COLUMNS) if name in columns]
    return rows.select_columns(known)


def _differing_columns(loaded: Sequence[Any]) -> list[str]:
    """Columns of types that Arrow cannot mix: text here and conversations there, or messages with other keys."""
    kinds: dict[str, Any] = {}
    differing: set[str] = set()
    for rows in loaded:
        for name, kind in (rows.features or {}).items():
            if kinds.setdefault(name, kind) != kind:
                differing.add(name)
    return sorted(differing)


def _in_json(rows: Any, columns: Sequence[str]) -> Any:
    if isinstance(rows, datasets.IterableDataset):
        features = datasets.Features(
            {**rows.features, **{name: datasets.Value("string") for name in columns}}
        )
    else:
        features = datasets.Features({**rows.features, **{name: datasets.Json() for name in columns}})
    return rows.map(_to_json, features=features, fn_kwargs={"columns": list(columns)})


def _to_json(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str]:
    return {name: json.dumps(row[name]) for name in columns}


def _from_json(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    return {name: json.loads(row[name]) for name in columns if row[name] is not None}
