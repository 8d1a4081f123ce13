"""Several datasets in given shares: TRL's rows on disk, shares by chance in a stream, mistakes by their names."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, get_dataset

from orpo_ds.data.load import Rows
from orpo_ds.data.mixture import DatasetSource, load_mixture, parse_source
from orpo_ds.data.tokenize import tokenize_rows
from orpo_ds.data.truncate import TokenizeOptions, TokenPair
from tests.parity.tokenizer import tiny_tokenizer


def rows_of(letter: str, count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{letter}{number}", "chosen": f" good {number}", "rejected": f" bad {number}"}
        for number in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {letter: write(tmp_path / f"{letter}.jsonl", rows_of(letter, n)) for letter, n in COUNTS.items()}


COUNTS = {"a": 60, "b": 25, "c": 90}


def letters(rows: Rows) -> Counter[str]:
    return Counter(row["prompt"][0] for row in rows)


@pytest.mark.parametrize("shares", [None, (0.5, 0.25, 0.25), (3, 2, 5)])
def test_on_disk_it_is_trls_mixture(files: dict[str, str], shares: tuple[float, ...] | None) -> None:
    """TRL's own `get_dataset` of the same list; its `path` is the format there, ours may be the file itself."""
    given = dict(zip(files, shares or (None, None, None), strict=True))
    theirs = get_dataset(
        DatasetMixtureConfig(
            datasets=[
                DatasetConfig(path="json", data_files=path, fraction=given[letter])
                for letter, path in files.items()
            ]
        )
    )["train"]
    sources = [DatasetSource(path, fraction=given[letter]) for letter, path in files.items()]
    assert load_mixture(sources, streaming=False, seed=0).to_list() == theirs.to_list()


def test_streams_are_drawn_from_in_their_shares(files: dict[str, str]) -> None:
    sources = [DatasetSource(files["a"], fraction=2), DatasetSource(files["c"], fraction=2)]
    orders = [
        [row["prompt"] for row in load_mixture(sources, streaming=True, seed=seed)] for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    # Until the first ends, of two that are as likely: the other gave about as many, with a deviation of sqrt(2 x 60).
    counted = Counter(prompt[0] for prompt in orders[0])
    assert counted["a"] == COUNTS["a"]
    assert abs(counted["c"] - counted["a"]) <= 4 * (2 * COUNTS["a"]) ** 0.5
    assert [prompt for prompt in orders[0] if prompt[0] == "a"] == [row["prompt"] for row in rows_of("a", 60)]


def test_splits_columns_and_files(files: dict[str, str], tmp_path: Path) -> None:
    scored = write(tmp_path / "scored.jsonl", [{**row, "score": "high"} for row in rows_of("d", 4)])
    numbered = write(tmp_path / "numbered.jsonl", [{**row, "score": {"x": 1}} for row in rows_of("e", 4)])
    sources = [
        parse_source(files["a"]),
        parse_source(json.dumps({"path": files["b"], "split": "train[:20%]"})),
        parse_source(files["c"]),
        parse_source({"path": "json", "data_files": [scored], "columns": ["prompt", "chosen", "rejected"]}),
        parse_source({"path": numbered, "columns": ["chosen", "rejected"]}),
    ]
    found = load_mixture(sources, streaming=False, seed=0)
    counted = Counter((row["prompt"] or "-")[0] for row in found)
    assert counted == {"a": 60, "b": 5, "c": 90, "d": 4, "-": 4}
    assert sorted(found.column_names) == ["chosen", "prompt", "rejected"]
    together = parse_source({"path": "json", "data_files": [files["a"], scored]})
    with pytest.raises(ValueError, match=r"(?s)'json' cannot be read: .*column names don't match"):
        load_mixture([together], streaming=False, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_text_and_conversations_meet(tmp_path: Path, streaming: bool) -> None:
    """Types that Arrow cannot put into one column; text that looks like JSON stays text."""
    text = [{"prompt": "Six times seven is", "chosen": "42", "rejected": "null"}]
    talk = [
        {
            "prompt": [{"role": "user", "content": "6 x 7?"}],
            "chosen": [{"role": "assistant", "content": "42"}],
            "rejected": [{"role": "assistant", "content": "41", "name": "x"}],
        }
    ]
    paths = [write(tmp_path / "text.jsonl", text), write(tmp_path / "talk.jsonl", talk)]
    found = list(load_mixture([DatasetSource(path) for path in paths], streaming=streaming, seed=0))
    together = tokenize_rows(
        found, numbers=[0, 1], processing_class=tiny_tokenizer(), options=TokenizeOptions()
    )
    apart = tokenize_rows(
        [*text, *talk], numbers=[0, 1], processing_class=tiny_tokenizer(), options=TokenizeOptions()
    )
    assert all(isinstance(pair, TokenPair) for pair in together)
    assert together == apart


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"path": "x", "weight": 1}, "unknown field 'weight'; it is called 'fraction'"),
        ({"id": "x"}, "unknown field 'id'; it is called 'path'"),
        ({"path": "x", "splitt": "train"}, "it is called 'split'"),
        ({"split": "train"}, "no path"),
        ('{"path": "x"', "not JSON"),
        (["x"], "a name or a mapping"),
        ({"path": "x", "fraction": 0}, "must be above 0"),
    ],
)
def test_a_source_that_is_wrong(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match="datasets: ") as raised:
        parse_source(given)
    assert words in str(raised.value)


def test_a_mixture_that_is_wrong(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"for all or for none; .*b\.jsonl'\] have none"):
        load_mixture(
            [DatasetSource(files["a"], fraction=1), DatasetSource(files["b"])], streaming=False, seed=0
        )
    other = write(tmp_path / "other.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(ValueError, match=r"other\.jsonl': a preference dataset needs the columns"):
        load_mixture([DatasetSource(files["a"]), DatasetSource(other)], streaming=False, seed=0)
    with pytest.raises(ValueError, match=r"a\.jsonl' has no columns \['score'\]"):
        load_mixture([DatasetSource(files["a"], columns=["score"])], streaming=False, seed=0)
