"""Datasets behind URLs, in fsspec's memory and on a local web server, and why one cannot be read."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from orpo_ds.data.load import load_rows
from orpo_ds.data.remote import PACKAGES

ROWS = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(10)]
LINES = [json.dumps(row) + "\n" for row in ROWS]


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite runs offline, and `datasets` then fetches nothing, not even from this process's memory."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def memory() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/bucket", recursive=True)


def put(store: Any, path: str, lines: list[str]) -> None:
    with store.open(path, "w") as file:
        file.writelines(lines)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_globs_and_folders(memory: Any, streaming: bool) -> None:
    put(memory, "/bucket/parts/a.jsonl", LINES[:4])
    put(memory, "/bucket/parts/b.jsonl", LINES[4:])
    put(memory, "/bucket/parts/README.md", ["not rows"])
    for name, expected in {
        "memory://bucket/parts/a.jsonl": ROWS[:4],
        "memory://bucket/parts/*.jsonl": ROWS,
        "memory://bucket/parts": ROWS,
    }.items():
        assert list(load_rows(name, split="train", streaming=streaming)) == expected
    datasets.Dataset.from_list(ROWS).save_to_disk("memory://bucket/saved")
    assert list(load_rows("memory://bucket/saved", split="train[:3]")) == ROWS[:3]


def test_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(LINES))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        assert list(load_rows(f"{base}/rows.jsonl", split="train")) == ROWS
        assert list(load_rows(f"{base}/rows.jsonl?version=2", split="train", streaming=True)) == ROWS
        with pytest.raises(ValueError, match=r"nothing\.jsonl': there is nothing"):
            load_rows(f"{base}/nothing.jsonl", split="train")
        server.shutdown()


def test_a_malformed_line_is_named(memory: Any) -> None:
    put(memory, "/bucket/rows.jsonl", [*LINES, "{\n"])
    with pytest.raises(ValueError, match=r"memory://bucket/rows\.jsonl: line 11 is not JSON"):
        load_rows("memory://bucket/rows.jsonl", split="train")


@pytest.mark.parametrize("protocol", ["s3", "gs", "abfs"])
def test_a_package_that_is_missing_is_named(protocol: str) -> None:
    with pytest.raises(ValueError, match=rf"{protocol}:// needs .*pip install {PACKAGES[protocol]}$"):
        load_rows(f"{protocol}://bucket/rows.jsonl", split="train")


def test_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="unknown protocol 's4'"):
        load_rows("s4://bucket/rows.jsonl", split="train")
    for name in ("memory://bucket/none.jsonl", "memory://bucket/*.jsonl"):
        with pytest.raises(ValueError, match="there is nothing"):
            load_rows(name, split="train")
