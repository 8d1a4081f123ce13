"""A tokenised dataset: made once, found again by content, whole or not there, and flat in memory."""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from datasets.arrow_writer import ArrowWriter
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from orpo_ds.data.load import load_rows
from orpo_ds.data.preference import to_preference
from orpo_ds.data.token_dataset import FEATURES, build_once
from orpo_ds.data.tokenize import TokenDataset, TokenizeOptions, tokenize_dataset, tokenize_pair
from tests.real_tokenizers import MISTRAL_TEMPLATE, tokenizer, with_template

USER = {"role": "user", "content": "why is the sky blue?"}
ROWS = [
    {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": f"light {'blue ' * number}"}],
        "rejected": [{"role": "assistant", "content": f"paint {'red ' * (40 - number)}"}],
    }
    for number in range(40)
]
BROKEN: dict[int, Any] = {4: {"chosen": None}, 7: {"rejected": ""}, 11: {"chosen": None}, 19: {"chosen": 5}}


class CountingTokenizer(PreTrainedTokenizerFast):
    """Writes a line into a file for every call, so that calls in other processes count too."""

    calls_file: Path
    calls_before_failure: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.calls_file.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if self.calls_before_failure is not None and self.calls > self.calls_before_failure:
            raise OSError("the disk is full")
        return super().__call__(*args, **kwargs)

    @property
    def calls(self) -> int:
        return len(self.calls_file.read_text().splitlines()) if self.calls_file.exists() else 0


@pytest.fixture
def counting(tmp_path: Path) -> CountingTokenizer:
    mistral = tokenizer("mistral")
    made = CountingTokenizer(
        tokenizer_object=Tokenizer.from_str(mistral.backend_tokenizer.to_str()),
        bos_token=mistral.bos_token,
        eos_token=mistral.eos_token,
        chat_template=MISTRAL_TEMPLATE,
    )
    made.calls_file = tmp_path / "calls"
    return made


def _tokenize(
    rows: Dataset | list[dict[str, Any]],
    cache_dir: Path,
    *,
    processing_class: PreTrainedTokenizerFast | None = None,
    options: TokenizeOptions | None = None,
    unusable: Any = "error",
    num_proc: int | None = None,
) -> TokenDataset:
    return tokenize_dataset(
        Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=processing_class or tokenizer("mistral"),
        options=options or TokenizeOptions(max_length=40),
        unusable=unusable,
        cache_dir=cache_dir,
        num_proc=num_proc,
    )


def _standard_rows(changes: dict[int, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"prompt": "the sky is", "chosen": f" blue{number}", "rejected": f" red{number}"}
        for number in range(20)
    ]
    return [{**row, **changes.get(number, {})} for number, row in enumerate(rows)]


def _json_rows(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Dataset:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(str(folder / name), split="train")


def test_items_and_lengths_are_those_of_each_row_alone(tmp_path: Path) -> None:
    options = TokenizeOptions(max_length=40)
    found = _tokenize(ROWS, tmp_path, options=options)
    expected = [
        tokenize_pair(
            to_preference(row, processing_class=tokenizer("mistral"), row_number=number),
            processing_class=tokenizer("mistral"),
            options=options,
            row_number=number,
        )
        for number, row in enumerate(ROWS)
    ]
    assert list(found) == expected
    assert found.row_numbers.tolist() == list(range(40))
    assert found.lengths.trunk.tolist() == [pair.trunk for pair in expected]
    assert found.lengths.chosen.tolist() == [len(pair.chosen) - pair.trunk for pair in expected]
    assert found.lengths.rejected.tolist() == [len(pair.rejected) - pair.trunk for pair in expected]
    assert found.lengths.chosen_start.tolist() == [pair.chosen_start for pair in expected]
    assert found.lengths.trunk.dtype == np.int32


def test_a_second_start_does_not_tokenise(tmp_path: Path, counting: CountingTokenizer) -> None:
    rows = _json_rows(tmp_path, ROWS)
    first = _tokenize(rows, tmp_path / "cache", processing_class=counting)
    calls = counting.calls
    assert calls > 0
    again = _tokenize(
        load_rows(str(tmp_path / "rows.jsonl"), split="train"), tmp_path / "cache", processing_class=counting
    )
    assert counting.calls == calls
    assert (list(again), again.fingerprint) == (list(first), first.fingerprint)


@pytest.mark.parametrize("changed", ["rows", "options", "template", "vocabulary"])
def test_whatever_the_ids_depend_on_is_in_the_key(tmp_path: Path, changed: str) -> None:
    first = _tokenize(ROWS, tmp_path)
    if changed == "rows":
        other = _tokenize([*ROWS[:-1], {**ROWS[-1], "rejected": ROWS[0]["rejected"]}], tmp_path)
    elif changed == "options":
        other = _tokenize(ROWS, tmp_path, options=TokenizeOptions(max_length=39))
    elif changed == "template":
        template = MISTRAL_TEMPLATE.replace("[INST] ", "[INST]")
        other = _tokenize(ROWS, tmp_path, processing_class=with_template("mistral", template))
    else:
        larger = copy.deepcopy(tokenizer("mistral"))
        larger.add_tokens(["sky"])
        other = _tokenize(ROWS, tmp_path, processing_class=larger)
    assert other.fingerprint != first.fingerprint
    assert len(_entries(tmp_path)) == 2


def test_the_tokenizer_is_known_by_content(tmp_path: Path) -> None:
    """Another folder, or truncation and padding left behind by an earlier call, are the same tokenizer."""
    _tokenize(ROWS, tmp_path / "cache")
    tokenizer("mistral").save_pretrained(tmp_path / "moved")
    moved = type(tokenizer("mistral")).from_pretrained(tmp_path / "moved")
    moved.pad_token = None
    moved("one call", truncation=True, max_length=1)
    _tokenize(ROWS, tmp_path / "cache", processing_class=moved)
    assert len(_entries(tmp_path / "cache")) == 1


def _entries(cache_dir: Path) -> list[Path]:
    return [entry for entry in cache_dir.iterdir() if entry.is_dir()]


def test_a_file_with_new_content_is_tokenised_again(tmp_path: Path) -> None:
    first = _tokenize(_json_rows(tmp_path, ROWS), tmp_path / "cache")
    other = _tokenize(_json_rows(tmp_path, ROWS[::-1]), tmp_path / "cache")
    assert list(other) == list(first)[::-1]
    assert other.fingerprint != first.fingerprint


def test_several_processes_make_the_same(tmp_path: Path) -> None:
    one = _tokenize(ROWS, tmp_path / "one", num_proc=None)
    two = _tokenize(ROWS, tmp_path / "two", num_proc=2)
    assert list(one) == list(two)
    assert one.fingerprint == two.fingerprint


def test_ranks_that_start_together_tokenise_once(tmp_path: Path, counting: CountingTokenizer) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    results = context.Queue()

    def start() -> None:
        rows = Dataset.from_list(ROWS)
        barrier.wait()
        results.put(_tokenize(rows, tmp_path / "cache", processing_class=counting).fingerprint)

    ranks = [context.Process(target=start) for _ in range(4)]
    for rank in ranks:
        rank.start()
    fingerprints = {results.get(timeout=120) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert len(fingerprints) == 1
    assert len(set(counting.calls_file.read_text().split())) == 1  # one process did it
    assert len(_entries(tmp_path / "cache")) == 1


def test_an_interrupted_start_leaves_nothing_behind(tmp_path: Path, counting: CountingTokenizer) -> None:
    rows = Dataset.from_list(ROWS * 20)
    counting.calls_before_failure = 3
    with pytest.raises(OSError, match="disk is full"):
        _tokenize(rows, tmp_path / "cache", processing_class=counting)
    assert counting.calls > 2
    assert _entries(tmp_path / "cache") == []
    counting.calls_before_failure = None
    assert len(_tokenize(rows, tmp_path / "cache", processing_class=counting)) == 800


def test_what_a_killed_process_left_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder of a process that lives, or of another host, is somebody's work."""
    with subprocess.Popen(["sleep", "60"]) as living:
        ended = subprocess.Popen(["true"])
        ended.wait()
        host = socket.gethostname()
        names = {
            f"key.{host}.{ended.pid}.ab_c12.unfinished": False,
            f"key.{host}.{living.pid}.ab_c12.unfinished": True,
            f"key.other-{host}.{ended.pid}.ab_c12.unfinished": True,
        }
        for name in names:
            (tmp_path / name).mkdir()
        _tokenize(_standard_rows({}), tmp_path)
        assert {name: (tmp_path / name).exists() for name in names} == names
        assert f"process {ended.pid} was killed" in caplog.text
        living.kill()


def test_opening_and_reading_does_not_bring_the_ids_into_memory(tmp_path: Path) -> None:
    rows, tokens = 20_000, 1000
    line = {
        "chosen": list(range(tokens)),
        "rejected_branch": [7],
        "chosen_start": 3,
        "rejected_start": 3,
        "trunk": 4,
        "image_tokens": 0,
        "images": None,
        "reason": None,
        "detail": None,
    }

    def write(folder: Path) -> Dataset:
        path = str(folder / "pairs.arrow")
        with ArrowWriter(path=path, features=FEATURES) as writer:
            for _ in range(rows // 1000):
                writer.write_table(Dataset.from_list([line] * 1000, features=FEATURES).data.table)
            writer.finalize()
        return Dataset.from_file(path)

    build_once(tmp_path / "entry", write)
    before = _own_memory()
    found = TokenDataset(tmp_path / "entry")
    assert len(found) == rows
    assert found[rows - 1].rejected == [0, 1, 2, 3, 7]
    assert _own_memory() - before < rows * tokens * 4 / 10  # bytes: a tenth of the ids
    assert isinstance(found.lengths.trunk, np.memmap)


def _own_memory() -> int:
    """Bytes of this process that are not pages of a file."""
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")
    ]
    return int(line.split()[1]) * 1024


def test_unusable_rows_are_refused_with_their_numbers(tmp_path: Path) -> None:
    rows = _json_rows(tmp_path, _standard_rows(BROKEN))
    with pytest.raises(ValueError) as raised:
        _tokenize(rows, tmp_path / "cache")
    message = str(raised.value)
    assert "4 of 20 rows cannot be used" in message
    assert "missing_key: 2 (row 4, 11)" in message
    assert "empty_response: 1 (row 7)" in message
    assert "wrong_type: 1 (row 19)" in message
    assert 'unusable_rows="drop"' in message


def test_unusable_rows_are_dropped_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, counting: CountingTokenizer
) -> None:
    rows = _json_rows(tmp_path, _standard_rows(BROKEN))
    with pytest.raises(ValueError):
        _tokenize(rows, tmp_path / "cache", processing_class=counting)
    calls = counting.calls
    with caplog.at_level(logging.WARNING):
        found = _tokenize(rows, tmp_path / "cache", processing_class=counting, unusable="drop")
    assert counting.calls == calls  # the refusal had already tokenised
    assert found.refused == {"missing_key": [4, 11], "empty_response": [7], "wrong_type": [19]}
    assert found.row_numbers.tolist() == [number for number in range(20) if number not in BROKEN]
    whole = list(_tokenize(_standard_rows({}), tmp_path / "cache", processing_class=counting))
    assert list(found) == [whole[number] for number in found.row_numbers]
    assert "4 of 20 rows" in caplog.text


def test_no_usable_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": " b", "rejected": " b"}] * 3
    with pytest.raises(
        ValueError, match=r"no row of the dataset can be used(.|\n)*identical_responses: 3 \(row 0, 1, 2\)"
    ):
        _tokenize(rows, tmp_path, unusable="drop")


def test_an_empty_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        _tokenize(Dataset.from_dict({"chosen": [], "rejected": []}), tmp_path)


def test_wrong_columns(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['chosen', 'rejected'\].*\['question', 'answer'\]"):
        _tokenize([{"question": "a", "answer": "b"}], tmp_path)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_text_that_is_not_utf_8(tmp_path: Path, num_proc: int | None) -> None:
    line = b'{"prompt": "a", "chosen": "\xff", "rejected": "b"}\n'
    (tmp_path / "rows.jsonl").write_bytes(line * 2)
    rows = load_rows(str(tmp_path / "rows.jsonl"), split="train")
    with pytest.raises(ValueError, match="not UTF-8"):
        _tokenize(rows, tmp_path / "cache", num_proc=num_proc)


def test_a_stream_has_no_length(tmp_path: Path) -> None:
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    with pytest.raises(ValueError, match="IterableDataset"):
        _tokenize(stream, tmp_path)  # type: ignore[arg-type]


def test_a_formatted_dataset_is_read_as_python_objects(tmp_path: Path) -> None:
    rows = Dataset.from_list(_standard_rows({}))
    assert list(_tokenize(rows.with_format("numpy"), tmp_path)) == list(_tokenize(rows, tmp_path))
