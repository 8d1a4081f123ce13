"""`orpo-ds validate` as it is typed: what it prints, how it ends, and that it loads no model."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_ds import cli
from orpo_ds.validate import validate
from tests import small_runs

IDENTICAL = {"prompt": "a", "chosen": " b", "rejected": " b"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without its weights."""
    folder = Path(small_runs.save_model_folder(tmp_path_factory.mktemp("model") / "model"))
    (folder / "model.safetensors").unlink()
    return folder


def words(model: Path, data: Path, **flags: Any) -> list[str]:
    named = {"max_length": 256, "max_prompt_length": 128, "disable_tqdm": True, "bf16": False} | flags
    return ["validate", str(data), "--model", str(model)] + [
        word for name, value in named.items() for word in (f"--{name}", str(value))
    ]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        cli.main(arguments)
        status: Any = 0
    except SystemExit as stop:
        status = stop.code
    seen = capsys.readouterr()
    return status, seen.out, seen.err


def test_a_dataset_that_is_good(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{**row, "score": 1.0} for row in small_runs.rows(20)]
    data = small_runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    status, out, _ = run(words(model, data), capsys)
    assert status == 0
    for line in (
        r"rows +20",
        r"columns +prompt, chosen, rejected; ignored: score",
        r"usable pairs +20",
        r"refused rows +0",
        r"cut to max_length=256: 0 prompts \(0.0%\), responses of 0 pairs \(0.0%\), 0 tokens in all",
        r"trunk saving +\d\d\.\d% of the tokens",
        r"packing +\d\.\d pairs a micro-batch of 4,096 tokens, \d+% full; \d+% of the tokens of padded rows",
        r"trunk +\d+ +\d+",
        r"20 pairs would be trained on",
    ):
        assert re.search(line, out), (line, out)
    # A byte is a token, and so are BOS and EOS.
    assert "trunk (35 tokens) <s>user: What is 0 and 1?\nassistant: \n" in out
    assert "chosen (9 tokens) It is 1.</s>\nrejected (12 tokens) No idea, 0.</s>\n" in out
    assert "\x1b" not in out, "colours are for terminals"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"], "it writes nothing"


def test_refused_rows_by_reason(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = small_runs.rows(12)
    rows[2] = rows[9] = {**rows[1], "rejected": rows[1]["chosen"]}
    rows[5] = {**rows[5], "chosen": None}
    data = small_runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    status, out, _ = run(words(model, data), capsys)
    assert status == 1
    assert re.search(r"usable pairs +9\n", out)
    assert "identical_responses: 2 (row 2, 9)" in out
    assert "missing_key: 1 (row 5)" in out
    assert 'unusable_rows="drop" leaves them out' in out
    status, out, _ = run(words(model, data, unusable_rows="drop"), capsys)
    assert status == 0
    assert "9 pairs would be trained on" in out


def test_nothing_usable_and_nothing_there(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_runs.write_jsonl(tmp_path / "rows.jsonl", [IDENTICAL] * 3)
    status, out, _ = run(words(model, data, unusable_rows="drop"), capsys)
    assert (status, "Nothing here can be trained on" in out) == (1, True)
    status, _, err = run(words(model, tmp_path / "row.jsonl"), capsys)
    assert (status, "did you mean" in err) == (2, True)


def test_cuts_and_budgets(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small_runs.write_jsonl(tmp_path / "rows.jsonl", small_runs.rows(6))
    _, out, _ = run(words(model, data, max_length=40, max_prompt_length=20), capsys)
    assert re.search(r"cut to max_length=40: 6 prompts \(100.0%\)", out)
    status, out, _ = run(words(model, data, max_tokens_per_micro_batch=60), capsys)
    assert status == 1
    assert re.search(r"\d pairs have more tokens than a micro-batch of 60", out)


def test_the_fields_of_the_train_command(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's own YAML file serves; a stream, a slice and several datasets are read as `train` reads them."""
    data = small_runs.write_jsonl(tmp_path / "rows.jsonl", small_runs.rows(20))
    config = {"model_name_or_path": str(model), "dataset_name": str(data), "dataset_train_split": "train[:7]"}
    (tmp_path / "run.yaml").write_text(
        json.dumps(config | {"beta": 0.3, "bf16": False, "disable_tqdm": True})
    )
    assert "7 pairs would" in run(["validate", "--config", str(tmp_path / "run.yaml")], capsys)[1]
    assert "20 pairs would" in run(words(model, data, dataset_streaming=True), capsys)[1]
    several = words(model, data)
    several.insert(2, str(data))
    assert "40 pairs would" in run(several, capsys)[1]


def test_a_terminal_gets_colours(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_runs.write_jsonl(tmp_path / "rows.jsonl", small_runs.rows(2))
    script, args = cli.parse_train_arguments(cli.validate_words(words(model, data)[1:]))
    monkeypatch.delenv("NO_COLOR", raising=False)
    seen = {}
    for no_color in (False, True):
        out = io.StringIO()
        console = Console(
            file=out, force_terminal=True, no_color=no_color, color_system="standard", highlight=False
        )
        assert validate(script, args, console=console)
        seen[no_color] = out.getvalue()
    for colour, text in ((36, "What is 0 and 1"), (32, "It is 1"), (31, "No idea")):
        assert re.search(rf"\x1b\[{colour}m[^\x1b]*{text}", seen[False])
        assert not re.search(rf"\x1b\[[\d;]*{colour}m", seen[True])
