"""docs/scaling.md has the words, inputs and measured figures that its script prints; its table takes minutes."""

import importlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_script_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    script = importlib.import_module("scaling")
    page = (REPOSITORY / "docs" / "scaling.md").read_text()
    parts = [
        script._head(),
        *script._table([]),
        script._foot(),
        script.MEASURED.read_text().strip(),
        script._rest(),
    ]
    for part in parts:
        assert part in page
    for model in script.MODELS:
        assert page.count(f"| {model.name} | ") == len(script.GPU_COUNTS)
