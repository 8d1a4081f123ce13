"""The table of settings: every field has a row, every row a test that exists, every default is the known one."""

import ast
import csv
import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from orpo_ds import ORPOConfig
from orpo_ds.settings.claims import Claim, Mapped
from orpo_ds.settings.dropped import DROPPED, defaults_of
from orpo_ds.settings.page import page
from orpo_ds.settings.table import CLAIMS, GROUPS
from tests.small_runs import REPOSITORY

# The 142 fields of TRL's ORPOConfig as people know it, of the time before transformers 5.
KNOWN = list(csv.DictReader(Path(__file__).with_name("orpo_config_fields.tsv").open(), delimiter="\t"))


def test_every_field_has_one_row() -> None:
    rows = [claim.name for group in GROUPS for claim in group.claims]
    assert sorted(rows) == sorted(set(rows))
    fields = {item.name for item in dataclasses.fields(ORPOConfig)}
    assert fields == set(rows)
    assert fields >= {row["field"] for row in KNOWN}
    assert fields >= {item.name for item in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row["field"])
def test_defaults_are_the_known_ones(row: dict[str, str]) -> None:
    default = defaults_of(ORPOConfig)[row["field"]]
    if row["default"] == "<factory>":
        assert default == ([] if row["type"] == "list" else {})
    else:
        assert default == ast.literal_eval(row["default"])


def names_in(path: str) -> set[str]:
    """Names of the test functions in a file, also of those in classes."""
    tree = ast.parse((REPOSITORY / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda claim: claim.name)
def test_the_test_of_a_claim_exists(claim: Claim) -> None:
    path, _, name = claim.test.partition("::")
    assert name.startswith("test_")
    assert name in names_in(path)


def test_successors_are_fields_that_work() -> None:
    for claim in CLAIMS.values():
        if isinstance(claim, Mapped) and claim.successor:
            assert claim.successor in CLAIMS
            assert claim.successor not in DROPPED


def test_the_page_is_that_of_the_table() -> None:
    written = (REPOSITORY / "docs" / "config.md").read_text()
    assert written == page(), "run: python -m orpo_ds.settings > docs/config.md"
