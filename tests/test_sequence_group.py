"""What is refused with rows that ranks share; that they give the same numbers is shown in `tests/distributed`."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from orpo_ds.layout import choose_layout
from orpo_ds.model.ulysses import SequenceGroup
from orpo_ds.policy import OrpoPolicy
from orpo_ds.sequence_group import refuse_predictions, refuse_with_split_rows, sequence_group
from tests.parity.tokenizer import tiny_tokenizer
from tests.small_runs import model_of, settings


def test_the_ranks_of_the_job_must_be_a_multiple(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sequence_parallel_size=3 does not divide the 1 ranks"):
        settings(tmp_path, sequence_parallel_size=3)
    with pytest.raises(ValueError, match="sequence_parallel_size=0 must be at least 1"):
        settings(tmp_path, sequence_parallel_size=0)
    assert sequence_group(settings(tmp_path)) is None


@pytest.mark.parametrize(
    ("changes", "named"), [({"layout": "padded"}, "layout='padded'"), ({"neftune_noise_alpha": 5.0}, "=5.0")]
)
def test_settings_that_need_whole_rows(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    args = settings(tmp_path, **changes)
    args.sequence_parallel_size = 2  # the job of this test has one rank
    with pytest.raises(ValueError, match=f"sequence_parallel_size=2 and .*{named}"):
        refuse_with_split_rows(args)


def test_predictions_need_whole_rows(tmp_path: Path) -> None:
    args = settings(tmp_path)
    refuse_predictions(args)
    args.sequence_parallel_size = 2
    with pytest.raises(ValueError, match="Set prediction_loss_only=True"):
        refuse_predictions(args)


def test_an_encoder_needs_whole_rows(tmp_path: Path) -> None:
    args = settings(tmp_path)
    assert dist.group.WORLD is not None
    sequence = SequenceGroup(rank=0, size=2, group=dist.group.WORLD)
    policy = OrpoPolicy(model_of("bart"), beta=0.1, logits_cache_mib=0, sequence=sequence)

    class NoRows:
        """Nothing is read of it."""

        images = None
        example = None

    with pytest.raises(ValueError, match="sequence_parallel_size=2: BartForConditionalGeneration"):
        choose_layout(policy, args=args, processing_class=tiny_tokenizer(), datasets=[NoRows()])  # type: ignore[list-item]
