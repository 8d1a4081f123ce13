"""The rows that a command's settings name: to train on, and to evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from orpo_ds.config import ScriptArguments
from orpo_ds.data.load import Rows, load_rows
from orpo_ds.data.mixture import load_mixture, parse_source
from orpo_ds.data.remote import is_url


@dataclass(frozen=True)
class ScriptRows:
    """Rows to train on, and those to evaluate if any."""

    train: Rows
    test: Rows | None


def load_script_rows(script: ScriptArguments, *, seed: int, evaluates: bool) -> ScriptRows:
    """Load what `dataset_name` or `datasets` name.

    Args:
        script: the settings.
        seed: of the split that `test_split_size` makes, and of the order in which streams are mixed.
        evaluates: whether rows to evaluate are wanted.

    Raises:
        ValueError: no dataset or two ways to name it, a way to evaluate that is missing, or rows that cannot be loaded.
    """
    streaming = script.dataset_streaming or script.streaming
    if (script.dataset_name is None) == (not script.datasets):
        raise ValueError("give either --dataset_name or --datasets.")
    if streaming and script.test_split_size is not None:
        raise ValueError(
            "test_split_size: a stream does not know its length; name a split or slices, as in "
            "dataset_train_split='train[1000:]' and dataset_test_split='train[:1000]'."
        )
    if script.datasets:
        train = load_mixture([parse_source(one) for one in script.datasets], streaming=streaming, seed=seed)
    else:
        train = _split(script, script.dataset_train_split, streaming=streaming)
    if script.test_split_size is not None:
        assert isinstance(train, datasets.Dataset)
        parts = train.train_test_split(test_size=_size(script.test_split_size), seed=seed)
        return ScriptRows(train=parts["train"], test=parts["test"])
    if not evaluates:
        return ScriptRows(train=train, test=None)
    if script.datasets:
        raise ValueError("a mixture of datasets has no split to evaluate: set test_split_size.")
    return ScriptRows(train=train, test=_split(script, script.dataset_test_split, streaming=streaming))


def public_name(script: ScriptArguments) -> str | None:
    """What a model card may call the data: a hub id, or the last part of a path or URL; no folder, no signed query."""
    name = script.dataset_name
    if name is None or not (is_url(name) or Path(name).is_absolute()):
        return name
    return Path(name.partition("?")[0]).name


def _split(script: ScriptArguments, split: str, *, streaming: bool) -> Any:
    assert script.dataset_name is not None
    return load_rows(script.dataset_name, split=split, config_name=script.dataset_config, streaming=streaming)


def _size(given: float) -> float | int:
    """A share below 1, or a number of rows."""
    return given if given < 1 else int(given)
