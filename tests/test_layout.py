"""Who lays the pairs out (`data_collator` of the constructor), and with what."""

from pathlib import Path
from typing import Any

import pytest
from transformers import DataCollatorWithPadding
from trl.experimental.utils import DPODataCollatorWithPadding

from orpo_ds.layout import check_collator
from tests import small_runs
from tests.parity.tokenizer import tiny_tokenizer


def test_trls_collator_pads_as_we_do(tmp_path: Path) -> None:
    """The one that TRL makes by itself: a script that passes it trains the same."""
    losses = []
    for name, collator in (("own", None), ("trl", DPODataCollatorWithPadding(pad_token_id=0))):
        trainer = small_runs.trainer(tmp_path / name, data_collator=collator)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


def test_a_collator_that_would_not_be_called_is_refused(tmp_path: Path) -> None:
    def mine(features: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    with pytest.raises(ValueError, match="data_collator=mine: orpo_ds lays the pairs out itself"):
        small_runs.trainer(tmp_path / "run", data_collator=mine)
    with pytest.raises(ValueError, match="data_collator=DataCollatorWithPadding"):
        check_collator(DataCollatorWithPadding(tiny_tokenizer()))


def test_padding_is_the_token_that_was_named(tmp_path: Path) -> None:
    """`padding_value`; its id is masked, so no number depends on it."""
    losses = []
    for value in (None, 9):
        trainer = small_runs.trainer(
            tmp_path / str(value), layout="padded", padding_value=value, eval_dataset=small_runs.dataset(3)
        )
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.train_dataset is not None
        batch = trainer._layout.feed(trainer.train_dataset, max_tokens=None).build([0, 1, 2])
        assert batch.attention_mask is not None
        padding = batch.input_ids[batch.attention_mask == 0]
        assert len(padding) > 0
        assert set(padding.tolist()) == {tiny_tokenizer().pad_token_id if value is None else value}
    assert losses[0] == losses[1]
