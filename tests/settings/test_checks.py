"""Values that cannot be, found before anything is started (ranges and contradictions: `tests/test_config.py`)."""

from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import settings


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        # transformers lets its Trainer take any of these from Python, and goes on with something else.
        ("train_sampling_strategy", "sequentail", "random, sequential, group_by_length, batch_rebalance"),
        ("log_level_replica", "loud", "debug, info"),
        ("include_num_input_tokens_seen", "some", "True, False, all, non_padding, no"),
        ("layout", "dense", "auto, packed, padded"),
    ],
)
def test_a_word_that_is_none_of_the_choices(tmp_path: Path, name: str, value: Any, choices: str) -> None:
    with pytest.raises(ValueError) as raised:
        settings(tmp_path / "run", **{name: value})
    assert f"{name}={value!r} is unknown. Use one of: " in str(raised.value)
    assert all(choice in str(raised.value) for choice in choices.split(", "))


@pytest.mark.parametrize("name", ["trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"])
def test_trackios_settings_need_trackio(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='us/space' needs report_to='trackio'"):
        settings(tmp_path / "run", **{name: "us/space"})
    for dashboards in ("trackio", ["wandb", "trackio"]):
        args = settings(tmp_path / "run", report_to=dashboards, **{name: "us/space"})
        assert getattr(args, name) == "us/space"  # where transformers' TrackioCallback reads it
