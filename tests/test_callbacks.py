"""The callbacks that every run has: what they do, and when."""

from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator

from tests import small_runs


@pytest.mark.parametrize(("every", "steps"), [(None, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4])])
def test_the_cache_is_emptied_every_so_many_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None, steps: list[int]
) -> None:
    trainer = small_runs.trainer(tmp_path / "run", max_steps=5, torch_empty_cache_steps=every)
    emptied = []
    monkeypatch.setattr(get_accelerator(), "empty_cache", lambda: emptied.append(trainer.state.global_step))
    trainer.train()
    assert [step for step in emptied if step > 0] == steps  # DeepSpeed empties it before the first step
