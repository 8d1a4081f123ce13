"""Pages that name tests: each of these tests exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "trl.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROWS = [line for line in PAGE.read_text().splitlines() if re.match(r"\| (?!---)", line)]
HEADS = {"TRL's page", "argument or method", "field", "form", "what is seen", "report"}


def functions_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", [row for row in ROWS if row.split(" | ")[0].strip("| ") not in HEADS])
def test_a_row_names_a_test_that_exists(row: str) -> None:
    named = NAMED.findall(row)
    assert named, f"{PAGE.name}: no test in the row {row}"
    for file, name in named:
        assert name.startswith("test_")
        assert name in functions_in(ROOT / file), f"{PAGE.name}: {file} has no {name}"


def test_all_reports_of_the_list_have_a_row() -> None:
    text = PAGE.read_text()
    wanted = "6548 6588 3068 2628 3716 1676 2502 1491 4763 4639 2197 1543 35808 8072 8113 1998 670 8415 10144"
    assert [number for number in wanted.split() if f"#{number}" not in text] == []
