"""Every way to name a dataset gives its rows, and every mistake gives a message in the user's own terms."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from orpo_ds.data.load import load_rows
from orpo_ds.data.preference import RowError
from orpo_ds.data.row_stream import readable
from orpo_ds.data.tokenize import tokenize_rows
from orpo_ds.data.truncate import TokenizeOptions
from tests.parity.tokenizer import tiny_tokenizer

ROWS = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(10)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def _jsonl(file: Path) -> None:
    file.write_text(LINES)


def _csv(file: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_csv(file)


def _parquet(file: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(file)


def _arrow(file: Path) -> None:
    folder = file.parent / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    shutil.copy(next(folder.glob("*.arrow")), file)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": _jsonl,
    "rows.json": lambda file: file.write_text(json.dumps(ROWS)),
    "lines.json": _jsonl,
    "rows.csv": _csv,
    "rows.parquet": _parquet,
    "rows.arrow": _arrow,
    "rows.jsonl.gz": lambda file: file.write_bytes(gzip.compress(LINES.encode())),
    "rows.jsonl.bz2": lambda file: file.write_bytes(bz2.compress(LINES.encode())),
    "ROWS.JSONL": _jsonl,
}


@pytest.mark.parametrize("name", WRITERS)
def test_files(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert load_rows(str(tmp_path / name), split="train").to_list() == ROWS


def test_messages_in_parquet_and_compressed_json(tmp_path: Path) -> None:
    talk = [
        {
            "prompt": [{"role": "user", "content": f"q{n}"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        }
        for n in range(4)
    ]
    datasets.Dataset.from_list(talk).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps(talk, indent=1).encode()))
    for name in ("rows.parquet", "rows.json.gz"):
        for streaming in (False, True):
            rows = load_rows(str(tmp_path / name), split="train", streaming=streaming)
            assert list(rows) == talk, (name, streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_zstd(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "rows.jsonl.zst").write_bytes(pa.Codec("zstd").compress(LINES.encode(), asbytes=True))
    name = str(tmp_path / "rows.jsonl.zst")
    if importlib.util.find_spec("zstandard"):
        assert list(load_rows(name, split="train", streaming=streaming)) == ROWS
    else:
        with pytest.raises(ValueError, match=r"rows\.jsonl\.zst': .*pip install zstandard"):
            list(load_rows(name, split="train", streaming=streaming))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_and_line_ends(tmp_path: Path, newline: str, mark: bytes) -> None:
    """What Windows writes."""
    (tmp_path / "rows.jsonl").write_bytes(mark + LINES.replace("\n", newline).encode())
    table = newline.join(["prompt,chosen,rejected", *(",".join(row.values()) for row in ROWS), ""])
    (tmp_path / "rows.csv").write_bytes(mark + table.encode())
    for name in ("rows.jsonl", "rows.csv"):
        assert load_rows(str(tmp_path / name), split="train").to_list() == ROWS


def test_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    long = {"prompt": "q", "chosen": "word " * 2_000_000, "rejected": "b"}
    (tmp_path / "rows.jsonl").write_text(LINES + json.dumps(long) + "\n" + LINES)
    for streaming in (False, True):
        rows = list(load_rows(str(tmp_path / "rows.jsonl"), split="train", streaming=streaming))
        assert rows == [*ROWS, long, *ROWS]


def test_empty_cells_of_a_csv_are_missing(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt,chosen,rejected\na, b, c\n,x b,x c\na,,c\na,"",c\nNA, b, c\n')
    rows = load_rows(str(tmp_path / "rows.csv"), split="train")
    found = tokenize_rows(
        list(rows), numbers=range(5), processing_class=tiny_tokenizer(), options=TokenizeOptions()
    )
    reasons = [one.reason if isinstance(one, RowError) else None for one in found]
    assert reasons == [None, None, "missing_key", "missing_key", None]


def test_text_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("prompt,chosen,rejected\nä,b,c\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.csv cannot be read: 'utf-8' codec"):
        load_rows(str(tmp_path / "rows.csv"), split="train")
    (tmp_path / "rows.jsonl").write_bytes('{"chosen": "a", "rejected": "b"}\n'.encode("utf-16"))
    with pytest.raises(ValueError, match=r"rows\.jsonl.*UTF-8"):
        load_rows(str(tmp_path / "rows.jsonl"), split="train")


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _jsonl(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_rows("rows.jsonl", split="train").to_list() == ROWS
    assert load_rows("~/rows.jsonl", split="train").to_list() == ROWS


def test_slices(tmp_path: Path) -> None:
    _jsonl(tmp_path / "rows.jsonl")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "saved"):
        assert load_rows(str(tmp_path / name), split="train[2:4]").to_list() == ROWS[2:4]
        assert load_rows(str(tmp_path / name), split="train[:50%]").to_list() == ROWS[:5]


def test_globs(tmp_path: Path) -> None:
    for part in range(2):
        (tmp_path / f"part{part}.jsonl").write_text("".join(LINES.splitlines(True)[part * 5 : part * 5 + 5]))
    assert load_rows(f"{tmp_path}/part*.jsonl", split="train").to_list() == ROWS
    with pytest.raises(ValueError, match=r"no file matches .*whole\*"):
        load_rows(f"{tmp_path}/whole*.jsonl", split="train")
    _csv(tmp_path / "part9.csv")
    with pytest.raises(ValueError, match="files of different kinds"):
        load_rows(f"{tmp_path}/part*", split="train")


def test_folders(tmp_path: Path) -> None:
    files, one, several = tmp_path / "files", tmp_path / "one", tmp_path / "several"
    files.mkdir()
    (files / "train.jsonl").write_text(LINES)
    (files / "test.jsonl").write_text("".join(LINES.splitlines(True)[:3]))
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(one)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(several)

    for folder in (files, one, several):
        assert load_rows(str(folder), split="train").to_list() == ROWS
    for folder in (files, several):
        assert load_rows(str(folder), split="test").to_list() == ROWS[:3]
        with pytest.raises(ValueError, match=r"(?s)validation.*\['train', 'test'\]"):
            load_rows(str(folder), split="validation")
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        load_rows(str(one), split="test")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare' has no data files"):
        load_rows(str(tmp_path / "bare"), split="train")


def test_a_file_is_the_split_train(tmp_path: Path) -> None:
    _jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl.*test.*\['train'\]"):
        load_rows(str(tmp_path / "rows.jsonl"), split="test")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("prefs/trian.jsonl", "prefs/train.jsonl"),
        ("pref/train.jsonl", "prefs"),
        ("prefs/nothing-like-it.parquet", None),
        ("prefs/tran", "prefs/train.jsonl"),
    ],
)
def test_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suggestion: str | None
) -> None:
    (tmp_path / "prefs").mkdir()
    _jsonl(tmp_path / "prefs" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    for spelled in (name, f"{tmp_path}/{name}"):
        with pytest.raises(ValueError, match="no file or folder") as raised:
            load_rows(spelled, split="train")
        message = str(raised.value)
        assert spelled in message
        assert ("did you mean" in message) == (suggestion is not None)
        if suggestion is not None:
            assert message.endswith(f"{suggestion}'?")


def test_a_dataset_that_is_neither_here_nor_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _jsonl(tmp_path / "ultrafeedback")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"no file or folder here; did you mean 'ultrafeedback'\?.* on the hub"
    ):
        load_rows("ultrafeedbak", split="train")


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_an_empty_file(tmp_path: Path, content: str, name: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"is empty: .*{name}"):
        load_rows(str(tmp_path / name), split="train")


def test_an_empty_split(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.select([]).save_to_disk(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"nothing' is empty"):
        load_rows(str(tmp_path / "nothing"), split="train")
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved' has no rows in split 'train\[:0\]'"):
        load_rows(str(tmp_path / "saved"), split="train[:0]")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "chosen: "b", "rejected": "c"}', "':' delimiter"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"', "',' delimiter"),
        ('{"prompt": "a", "chosen": "b" "rejected": "c"}', 'near \'{"prompt": "a", "chosen": "b" "rejected'),
        ("prompt,chosen,rejected", "near 'prompt,chosen,reject"),
    ],
)
def test_a_malformed_line(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES + "\n" + line + "\n" + LINES)
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 12 is not JSON") as raised:
        load_rows(str(tmp_path / "rows.jsonl"), split="train")
    assert words in str(raised.value)


def test_a_malformed_line_in_a_compressed_file_and_in_one_of_several(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((LINES + "{").encode()))
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: line 11 is not JSON"):
        load_rows(f"{tmp_path}/*", split="train")


def test_a_malformed_array(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1).replace("},", "}", 1))
    with pytest.raises(ValueError, match=r"rows\.json is not JSON \(Expecting ',' delimiter at line 7"):
        load_rows(str(tmp_path / "rows.json"), split="train")


def test_a_line_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('"a"\n"b"\n')
    with pytest.raises(ValueError, match=r"line 1 is a string, not an object"):
        load_rows(str(tmp_path / "rows.jsonl"), split="train")


def test_a_line_that_is_no_text(tmp_path: Path) -> None:
    """Arrow takes any bytes for text, so this is found when something else is wrong, and else when tokenising."""
    (tmp_path / "rows.jsonl").write_bytes(LINES.encode() + b'{"prompt": "\xff"}\n{')
    with pytest.raises(ValueError, match=r"line 11 is not UTF-8"):
        load_rows(str(tmp_path / "rows.jsonl"), split="train")


def _one_odd_line(file: Path, odd: dict[str, Any]) -> int:
    """Write more than one of the blocks (16 MB) in which `datasets` guesses types, and an odd line behind."""
    line = json.dumps({"chosen": "b" * 100_000, "rejected": "c", "score": {"a": 1}}) + "\n"
    file.write_text(line * 200 + json.dumps(odd) + "\n")
    return 201


def test_a_late_line_with_another_column(tmp_path: Path) -> None:
    number = _one_odd_line(
        tmp_path / "rows.jsonl", {"chosen": "b", "rejected": "c", "score": {"a": 1}, "comment": "odd"}
    )
    with pytest.raises(
        ValueError, match=rf"line {number} has the columns \['comment'\], which the first line"
    ):
        load_rows(str(tmp_path / "rows.jsonl"), split="train")


def test_a_late_line_of_another_type(tmp_path: Path) -> None:
    number = _one_odd_line(tmp_path / "rows.jsonl", {"chosen": "b", "rejected": "c", "score": "high"})
    with pytest.raises(
        ValueError, match=rf"line {number}: 'score' is a string, but an object in the lines before: \"high\""
    ):
        load_rows(str(tmp_path / "rows.jsonl"), split="train")


def test_columns_that_differ_between_lines_of_a_block(tmp_path: Path) -> None:
    """`datasets` copes with these itself; the rows must be what the lines say."""
    rows: list[dict[str, Any]] = [
        {"chosen": "b", "rejected": "c", "tools": [{"a": 1}]},
        {"chosen": [{"role": "user", "content": "x"}], "rejected": "c", "tools": [{"b": {"z": [1]}}]},
        {"chosen": "b", "rejected": "c", "comment": 3},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_rows(str(tmp_path / "rows.jsonl"), split="train").to_list()
    assert [{key: value for key, value in row.items() if value is not None} for row in found] == rows


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.parquet", "PAR1 no", r"rows\.parquet.*Parquet"),
        ("rows.csv", 'prompt,chosen,rejected\na,"b,c\n', r"rows\.csv cannot be read.*EOF inside string"),
        ("rows.txt", "a", r"rows\.txt' ends in none of \['\.json'"),
        ("rows", "a", r"rows' ends in none of"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        load_rows(str(tmp_path / name), split="train")


DAMAGED: dict[str, tuple[bytes, str]] = {
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-20], "ended before the end-of-stream"),
    "word.jsonl": (LINES.encode() + b"{oops\n", "JSON"),
    "bytes.jsonl": (LINES.encode() + b'{"prompt": "\xff"}\n', "utf-8|UTF-8"),
    "quote.csv": (b'prompt,chosen,rejected\na,"b,c\n', "EOF inside string"),
    "start.parquet": (b"PAR1 no", "Parquet"),
    "open.json": (b'[{"chosen": "1"}, {"chosen": "2"}', "array|JSON"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_end_in_one_message(tmp_path: Path, name: str) -> None:
    """Read whole or streamed; what Arrow takes for text is found where it is tokenised (`test_token_dataset`)."""
    content, words = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    if name != "bytes.jsonl":
        with pytest.raises(ValueError, match=words) as raised:
            load_rows(str(tmp_path / name), split="train")
        assert name in str(raised.value)
    with pytest.raises(ValueError, match=words):
        list(readable(load_rows(str(tmp_path / name), split="train", streaming=True)))


def test_the_place_in_a_stream_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES + "{oops\n")
    with pytest.raises(
        ValueError, match=r"the stream cannot be read from row 0 on: JSON parse error.* in row 10"
    ):
        list(readable(load_rows(str(tmp_path / "rows.jsonl"), split="train", streaming=True)))
