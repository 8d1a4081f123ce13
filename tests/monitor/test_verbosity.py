"""Log levels, as transformers' own Trainer sets them."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from orpo_ds.monitor.verbosity import set_verbosity
from tests.small_runs import settings


@pytest.fixture(autouse=True)
def _levels_as_before() -> Iterator[None]:
    theirs, ours = transformers_logging.get_verbosity(), logging.getLogger("orpo_ds").level
    yield
    transformers_logging.set_verbosity(theirs)
    logging.getLogger("orpo_ds").setLevel(ours)


@pytest.mark.parametrize(
    ("local_rank", "on_each_node", "level"),
    [
        ("0", True, logging.DEBUG),  # the first rank of a host
        ("1", True, logging.ERROR),
        ("1", False, logging.DEBUG),  # rank 0 of the job, wherever it stands on its host
    ],
)
def test_levels_of_main_and_other_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_rank: str, on_each_node: bool, level: int
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    args = settings(
        tmp_path / "run", log_level="debug", log_level_replica="error", log_on_each_node=on_each_node
    )
    set_verbosity(args)
    assert transformers_logging.get_verbosity() == level
    assert logging.getLogger("orpo_ds.anything").getEffectiveLevel() == level


def test_passive_changes_nothing(tmp_path: Path) -> None:
    transformers_logging.set_verbosity(logging.ERROR)
    logging.getLogger("orpo_ds").setLevel(logging.CRITICAL)
    set_verbosity(settings(tmp_path / "run"))
    assert transformers_logging.get_verbosity() == logging.ERROR
    assert logging.getLogger("orpo_ds").level == logging.CRITICAL


def test_what_is_asked_for_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script that has set up no logging of its own would see no message below a warning."""
    own = logging.getLogger("orpo_ds")
    monkeypatch.setattr(own, "propagate", False)  # pytest's handlers are above
    monkeypatch.setattr(own, "handlers", [])
    set_verbosity(settings(tmp_path / "run", log_level="info"))
    logging.getLogger("orpo_ds.layout").info("a word")
    assert "INFO orpo_ds.layout: a word" in capsys.readouterr().err
