"""Training on a stream of rows: what it needs, what it gives, and that a resume in its middle changes no bit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset

from orpo_ds.data.token_stream import TokenStream
from tests import small_runs

ROWS = 25


def stream() -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(small_runs.rows(ROWS)))


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_in_order_it_is_the_training_of_the_dataset_on_disk(tmp_path: Path) -> None:
    """24 rows are six whole batches, so that both go through them in the same order for two epochs."""
    settings: dict[str, Any] = {"max_steps": 8, "train_sampling_strategy": "sequential"}
    whole = small_runs.trainer(tmp_path / "whole", pairs=24, **settings)
    lines = small_runs.rows(24)
    rows = IterableDataset.from_generator(lambda: iter(lines))
    streamed = small_runs.trainer(tmp_path / "streamed", train_dataset=rows, **settings)
    whole.train()
    streamed.train()
    assert losses(whole) == losses(streamed)
    for ours, theirs in zip(streamed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_resume_in_the_middle_changes_no_bit(tmp_path: Path) -> None:
    """Step 4 is in the middle of a block of 10 rows, and the thread has read further by then; 9 steps end the epoch."""
    settings: dict[str, Any] = {
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 4,
        "dataset_shuffle_buffer": 10,
    }
    undisturbed = small_runs.trainer(tmp_path / "undisturbed", train_dataset=stream(), **settings)
    undisturbed.train()
    resumed = small_runs.trainer(tmp_path / "resumed", train_dataset=stream(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "undisturbed" / "checkpoint-4"))
    assert losses(resumed) == losses(undisturbed)
    for ours, theirs in zip(resumed.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    def changed() -> Iterator[dict[str, Any]]:
        yield from small_runs.rows(ROWS - 1)

    other = small_runs.trainer(
        tmp_path / "other", train_dataset=IterableDataset.from_generator(changed), **settings
    )
    with pytest.raises(ValueError, match="dataset_fingerprint"):
        other.train(resume_from_checkpoint=str(tmp_path / "undisturbed" / "checkpoint-8"))


def test_an_evaluation_set_that_streams_is_evaluated_whole(tmp_path: Path) -> None:
    streamed = small_runs.trainer(tmp_path / "streamed", train_dataset=None, eval_dataset=stream())
    whole = small_runs.trainer(tmp_path / "whole", train_dataset=None, eval_dataset=small_runs.dataset(ROWS))
    ours, theirs = streamed.evaluate(), whole.evaluate()
    for name in ("eval_loss", "eval_logps/chosen", "eval_rewards/margins"):
        assert ours[name] == theirs[name]


def test_the_length_of_the_run_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set max_steps"):
        small_runs.trainer(tmp_path / "run", train_dataset=stream(), max_steps=-1)
    with pytest.raises(ValueError, match="eval_strategy='epoch'"):
        small_runs.trainer(
            tmp_path / "run",
            train_dataset=stream(),
            eval_dataset=small_runs.dataset(3),
            eval_strategy="epoch",
        )


def test_the_settings_reach_the_stream(tmp_path: Path) -> None:
    def first_rows(**settings: Any) -> list[int]:
        trainer = small_runs.trainer(tmp_path / "run", train_dataset=stream(), **settings)
        pairs = trainer.train_dataset
        assert isinstance(pairs, TokenStream)
        return [pairs.row_numbers[pair] for pair in pairs.pairs(0)]

    assert first_rows(train_sampling_strategy="sequential") == [0, 1, 2, 3]
    assert sorted(first_rows(dataset_shuffle_buffer=4)) == [0, 1, 2, 3]
    assert max(first_rows()) > 3
    assert first_rows(data_seed=7) != first_rows(data_seed=8)


def test_where_the_tokens_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(**settings: Any) -> str:
        small_runs.trainer(tmp_path / "run", pairs=11, **settings)
        return capsys.readouterr().err

    assert "token pairs" not in said()
    assert re.search(
        rf"^11 token pairs read from {tmp_path}/tokens/\w+$", said(disable_tqdm=False), re.MULTILINE
    )
    first = said(disable_tqdm=False, max_length=100, max_prompt_length=60)
    assert f"11 token pairs tokenised into {tmp_path}/tokens/" in first
