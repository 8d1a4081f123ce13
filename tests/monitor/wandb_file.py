"""Reads the `.wandb` file of an offline run, from the description of its format.

A file starts with seven bytes (`:W&B`, a magic number, a version). Then come LevelDB log blocks of 32 KiB:
records of a 7-byte header (masked crc32, length, type) and data, where type says whether the data is whole or the
first, a middle, or the last part. Each joined record is one protobuf message.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Any]:
    """Every `wandb_internal_pb2.Record` in the file, in order."""
    content = path.read_bytes()
    assert content[:4] == b":W&B", f"{path} is not a W&B file"
    position, parts = 7, b""
    while position + HEADER.size <= len(content):
        room = BLOCK - position % BLOCK
        if room < HEADER.size:
            position += room
            continue
        _, length, kind = HEADER.unpack_from(content, position)
        if kind == 0:
            return
        data = content[position + HEADER.size : position + HEADER.size + length]
        position += HEADER.size + length
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def key_of(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


class OfflineRun:
    """What an offline run recorded: its id, its config, one dictionary a logged step, and how it ended."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("*.wandb")
        self.folder = folder
        self.id = ""
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.metric_axes: dict[str, str] = {}
        self.record: Any = None  # of the run: its name, project, tags, notes and group
        self.system: set[str] = set()  # names of the system metrics
        self.alerts: list[tuple[str, str]] = []
        self.artifacts: dict[str, list[str]] = {}  # files by the artifact's name
        self.exit_code: int | None = None
        for record in read_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.id = record.run.run_id
                self.record = record.run
                self._update(record.run.config)
            elif kind == "config":
                self._update(record.config)
            elif kind == "history":
                self.history.append(
                    {key_of(item): json.loads(item.value_json) for item in record.history.item}
                )
            elif kind == "stats":
                self.system |= {item.key for item in record.stats.item}
            elif kind == "alert":
                self.alerts.append((record.alert.title, record.alert.text))
            elif kind == "artifact":
                names = [entry.path for entry in record.artifact.manifest.contents]
                self.artifacts.setdefault(record.artifact.name, []).extend(names)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code
            elif kind == "metric":
                self.metric_axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric

    def _update(self, config: Any) -> None:
        self.config |= {key_of(item): json.loads(item.value_json) for item in config.update}
