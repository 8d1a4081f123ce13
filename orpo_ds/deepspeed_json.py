"""Where the DeepSpeed settings of a run come from: a file, a dict, or a preset that this package ships."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo_ds.shipped import shipped_folder

PRESETS = shipped_folder("ds_configs")
DEFAULT_PRESET = "zero2.json"
NO_ZERO = {"zero_optimization": {"stage": 0}}  # what DeepSpeed does with a JSON that does not speak of ZeRO


def read_deepspeed_config(source: str | dict[str, Any] | None) -> dict[str, Any]:
    """The DeepSpeed settings as a new dict.

    Args:
        source: a dict, the path of a JSON file, the name of a shipped preset (`zero3_offload` or
            `ds_configs/zero3_offload.json`), or None for ZeRO-2, which every model and machine supports.

    Raises:
        ValueError: no such file or preset, or not a JSON object.
    """
    if isinstance(source, dict):
        return {**NO_ZERO, **json.loads(json.dumps(source))}
    path = _find_preset(DEFAULT_PRESET if source is None else source)
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno} is not valid JSON ({error.msg}).") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path}: expected a JSON object of DeepSpeed settings, found {type(config).__name__}."
        )
    return {**NO_ZERO, **config}


def settle_host_groups(settings: dict[str, Any], ranks_of_hosts: Callable[[], list[int]]) -> None:
    """Fill `zero_hpz_partition_size: "auto"`: the ranks of a host; one host alone has no network to spare.

    Args:
        settings: the DeepSpeed settings; changed in place.
        ranks_of_hosts: tells the number of ranks on each host; asked only where there is something to fill.

    Raises:
        ValueError: the hosts do not have equally many ranks.
    """
    zero = settings["zero_optimization"]
    if zero.get("zero_hpz_partition_size") != "auto":
        return
    ranks = ranks_of_hosts()
    if len(set(ranks)) > 1:
        raise ValueError(
            f"zero_optimization.zero_hpz_partition_size is auto, but the hosts have {ranks} ranks: start equally many "
            "on each, or write a number that divides all of them."
        )
    zero["zero_hpz_partition_size"] = ranks[0] if len(ranks) > 1 else 1


def _find_preset(source: str) -> Path:
    given = Path(source).expanduser()
    candidates = [given, PRESETS / given.name, PRESETS / f"{given.name}.json"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.json")))
    raise ValueError(
        f"deepspeed={source!r}: no such file, and no such preset. Give the path of a DeepSpeed JSON, "
        f"or one of the presets: {shipped}."
    )
