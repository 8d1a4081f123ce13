"""Which pairs meet at which step, by the settings of a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from orpo_ds.data.batches import GlobalBatches, grouped_by_length
from orpo_ds.plan import training_batches
from tests import small_runs

PAIRS = 40


def order(tmp_path: Path, **changes: Any) -> list[int]:
    """The pairs of the first epoch, as a trainer with these settings takes them."""
    trainer = small_runs.trainer(tmp_path / "run", pairs=PAIRS, **changes)
    assert trainer.train_dataset is not None
    batches = training_batches(trainer.args, trainer.train_dataset)
    return [pair for step in range(batches.steps_per_epoch) for pair in batches.pairs(step)]


def test_seeds(tmp_path: Path) -> None:
    def embedding(seed: int) -> torch.Tensor:
        def fresh() -> Any:
            return small_runs.model_of().__class__(small_runs.model_of().config)

        made = small_runs.trainer(tmp_path / "run", model_init=fresh, seed=seed, data_seed=1)
        return made.model.get_input_embeddings().weight

    usual = order(tmp_path)
    assert order(tmp_path, seed=7) != usual
    assert order(tmp_path, seed=7, data_seed=42) == usual  # 42 is the default of `seed`
    assert torch.equal(embedding(3), embedding(3))
    assert not torch.equal(embedding(3), embedding(4))


def test_sampling_strategies(tmp_path: Path) -> None:
    trainer = small_runs.trainer(tmp_path / "run", pairs=PAIRS)
    assert trainer.train_dataset is not None
    dataset = [trainer.train_dataset[index] for index in range(PAIRS)]
    lengths = [max(len(pair.chosen), len(pair.rejected)) for pair in dataset]

    def spread(pairs: list[int]) -> float:
        """Tokens of padding that batches of 4 would have."""
        batches = np.array([lengths[pair] for pair in pairs]).reshape(-1, 4)
        return float((batches.max(axis=1, keepdims=True) - batches).sum())

    shuffled, grouped = order(tmp_path), order(tmp_path, train_sampling_strategy="group_by_length")
    assert order(tmp_path, train_sampling_strategy="sequential") == list(range(PAIRS))
    assert sorted(shuffled) == sorted(grouped) == list(range(PAIRS))
    assert shuffled != list(range(PAIRS))
    assert lengths[grouped[0]] == max(lengths)
    assert spread(grouped) < 0.75 * spread(shuffled)
    assert order(tmp_path, group_by_length=True) == grouped  # the old name


@pytest.mark.parametrize(("count", "batch_size"), [(1000, 4), (37, 4), (5, 8), (1, 1)])
def test_grouping_is_that_of_transformers(
    monkeypatch: pytest.MonkeyPatch, count: int, batch_size: int, seed: int
) -> None:
    """Their function shuffles by itself: it is given our shuffle."""
    random = np.random.default_rng(seed)
    shuffled, lengths = random.permutation(count), random.permutation(count) + 1
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.from_numpy(shuffled))
    theirs = get_length_grouped_indices(lengths.tolist(), batch_size)
    assert grouped_by_length(shuffled, lengths, batch_size=batch_size).tolist() == theirs


def test_grouped_batches_are_new_in_each_epoch_and_the_same_after_a_resume() -> None:
    def batches() -> GlobalBatches:
        lengths = np.arange(PAIRS) % 11
        return GlobalBatches(num_pairs=PAIRS, global_batch_size=4, seed=1, fingerprint="f", group_by=lengths)

    one = batches()
    whole = [one.pairs(step) for step in range(20)]
    assert [batches().pairs(step) for step in reversed(range(20))] == whole[::-1]
    assert whole[:10] != whole[10:]
