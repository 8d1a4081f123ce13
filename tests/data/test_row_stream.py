"""A stream gives every row once an epoch, in an order that the seed decides, and goes back to any place exactly."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset

from orpo_ds.data.row_stream import RowStream, StreamPosition, hash_rows

COUNT, BLOCK = 23, 5


def numbered(count: int = COUNT, first: int = 0) -> list[dict[str, Any]]:
    return [{"chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(first, first + count)]


def from_generator() -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(numbered()))


def stream(source: IterableDataset, *, seed: int = 0, shuffle: bool = True) -> RowStream:
    return RowStream(source, columns=["chosen", "rejected"], seed=seed, block_rows=BLOCK, shuffle=shuffle)


def take(rows: RowStream, count: int) -> list[str]:
    return [row["chosen"] for _, row in itertools.islice(rows, count)]


def test_each_epoch_has_every_row_once_and_blocks_stay_together() -> None:
    rows = stream(from_generator())
    epochs = [list(itertools.islice(rows, COUNT)) for _ in range(2)]
    for epoch in epochs:
        assert sorted(number for number, _ in epoch) == list(range(COUNT))
        assert all(row["chosen"] == f"good {number}" for number, row in epoch)
        for first in range(0, COUNT, BLOCK):
            block = [number for number, _ in epoch[first : first + BLOCK]]
            assert sorted(block) == list(range(first, min(first + BLOCK, COUNT)))
    assert epochs[0] != epochs[1]


def test_the_seed_decides_the_order() -> None:
    orders = [take(stream(from_generator(), seed=seed), COUNT) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    in_order = [row["chosen"] for row in numbered()]
    assert take(stream(from_generator(), shuffle=False), 2 * COUNT) == 2 * in_order
    assert orders[0] != in_order


def test_columns_that_nobody_asked_for_stay_behind() -> None:
    source = IterableDataset.from_generator(lambda: iter([{"chosen": "a", "score": 1.0}] * 3))
    assert next(stream(source, shuffle=False)) == (0, {"chosen": "a"})


@pytest.fixture
def files(tmp_path: Path) -> IterableDataset:
    for part, first in enumerate(range(0, COUNT, 7)):
        lines = numbered(min(7, COUNT - first), first)
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load_dataset("json", data_files=str(tmp_path / "*.jsonl"), split="train", streaming=True)
    assert isinstance(found, IterableDataset)
    return found


SOURCES = {
    "generator": lambda _: from_generator(),
    "files": lambda files: files,
    "mapped and filtered": lambda files: files.map(lambda row: {**row, "more": 1}).filter(
        lambda row: "7" not in row["chosen"]
    ),
    "in memory": lambda _: Dataset.from_list(numbered()).to_iterable_dataset(num_shards=3),
    "interleaved": lambda files: interleave_datasets(
        [files, from_generator()], probabilities=[0.7, 0.3], seed=3, stopping_strategy="all_exhausted"
    ),
    # `datasets` cannot bring the content of a buffer back: these are reached by reading again.
    "with a shuffle buffer of its own": lambda files: files.shuffle(seed=4, buffer_size=6),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_any_place_is_found_again(files: IterableDataset, kind: str) -> None:
    """From every place of two epochs and a bit, through JSON, in a stream that was opened anew."""
    read = 2 * COUNT + 3
    rows = stream(SOURCES[kind](files))
    places: list[StreamPosition] = [rows.position]
    seen: list[str] = []
    for _ in range(read):
        seen += take(rows, 1)
        places.append(rows.position)
    another = stream(SOURCES[kind](files))
    for place in (0, 1, BLOCK, BLOCK + 2, COUNT - 1, COUNT, COUNT + 1, 2 * COUNT, read - 1):
        another.seek(StreamPosition(**json.loads(json.dumps(asdict(places[place])))))
        assert take(another, read - place) == seen[place:]


def test_it_goes_to_a_place_without_reading_up_to_it(files: IterableDataset) -> None:
    read: list[str] = []

    def noted(row: dict[str, Any]) -> dict[str, Any]:
        read.append(row["chosen"])
        return row

    rows = stream(files.map(noted))
    take(rows, 3 * BLOCK + 1)
    position, expected = rows.position, take(rows, 2)
    read.clear()
    another = stream(files.map(noted))
    another.seek(position)
    assert take(another, 2) == expected
    assert set(read) <= {f"good {number}" for number in range(3 * BLOCK, 4 * BLOCK + 1)}


def test_other_rows_than_before_are_found_out() -> None:
    rows = stream(from_generator())
    take(rows, BLOCK + 2)
    changed = numbered()
    changed[BLOCK + 1]["rejected"] = "another"
    with pytest.raises(ValueError, match=r"other rows than before from row 5 of epoch 0"):
        stream(IterableDataset.from_generator(lambda: iter(changed))).seek(rows.position)
    with pytest.raises(ValueError, match="other rows than before"):
        stream(IterableDataset.from_generator(lambda: iter(numbered(3)))).seek(rows.position)


def test_it_reads_no_further_than_its_block() -> None:
    read = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield {"chosen": str(number)}

    rows = stream(IterableDataset.from_generator(endless))
    take(rows, 100 * BLOCK + 1)
    # `datasets` looks one row ahead to know the last one.
    assert 100 * BLOCK + 1 <= read <= 101 * BLOCK + 1


def test_a_source_without_rows() -> None:
    empty = IterableDataset.from_generator(lambda: iter([]))
    with pytest.raises(ValueError, match="has no rows"):
        next(stream(empty))


def test_the_hash_knows_texts_messages_and_bytes() -> None:
    rows = [{"chosen": [{"role": "user", "content": "a"}], "images": b"1"}]
    others = [
        [{"chosen": [{"role": "user", "content": "b"}], "images": b"1"}],
        [{"chosen": [{"role": "user", "content": "a"}], "images": b"2"}],
        rows * 2,
    ]
    assert len({hash_rows(rows), *(hash_rows(other) for other in others)}) == 4
