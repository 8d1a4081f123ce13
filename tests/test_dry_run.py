"""`dry_run` on tiny models, and what an error about memory says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ds.out_of_memory import StepOutOfMemoryError
from tests import small_runs
from tests.test_rehearsal import OUT_OF_MEMORY, limited


@pytest.mark.parametrize("preset", ["zero0", "zero2", "zero3_offload"])
def test_the_largest_micro_batch_is_tried_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    run = tmp_path / "run"
    trainer = small_runs.trainer(
        run, dry_run=True, deepspeed=preset, gradient_accumulation_steps=2, max_tokens_per_micro_batch=300
    )
    widths: list[int] = []
    layer = trainer.policy.parts.backbone.layers[0]
    layer.register_forward_hook(
        lambda module, words, output: widths.append(output.shape[1]) if torch.is_grad_enabled() else None
    )
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == 0
    assert not run.exists()
    assert trainer.train_dataset is not None
    lengths = trainer.train_dataset.lengths  # type: ignore[union-attr]  # not streamed
    # The longest pairs, longest first, as many as 300 tokens hold.
    room, expected = 300, 0
    for tokens in sorted((lengths.trunk + lengths.chosen + lengths.rejected).tolist(), reverse=True)[:8]:
        if tokens <= room:
            room, expected = room - tokens, expected + tokens
    # Two steps of two micro-batches: with 8 pairs a step, 300 tokens do not hold all.
    assert widths == [expected] * 4
    assert f"({expected:,} tokens) fits. Peak memory" in capsys.readouterr().out


def test_a_dry_run_that_does_not_fit_names_what_to_lower(tmp_path: Path) -> None:
    trainer = small_runs.trainer(tmp_path / "run", dry_run=True, max_tokens_per_micro_batch=400)
    limited(trainer, in_backward=False)
    with pytest.raises(StepOutOfMemoryError, match=r"tokens\. Lower max_tokens_per_micro_batch") as failure:
        trainer.train()
    assert failure.value.tokens > 210
    assert not (tmp_path / "run").exists()


def test_a_stream_is_tried_with_the_longest_pair_that_there_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = small_runs.trainer(
        tmp_path / "run",
        dry_run=True,
        train_dataset=small_runs.dataset(11).to_iterable_dataset(),
        max_length=200,
        per_device_train_batch_size=1,
    )
    with pytest.raises(SystemExit):
        trainer.train()
    assert "(399 tokens) fits" in capsys.readouterr().out


def test_memory_that_runs_out_later_names_step_tokens_and_checkpoint(tmp_path: Path) -> None:
    """At the third step, after a checkpoint of the second; torch's own words stay."""
    trainer = small_runs.trainer(tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)

    def fail(*_: Any) -> None:
        if torch.is_grad_enabled() and trainer.state.global_step == 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    trainer.policy.parts.backbone.layers[0].register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError) as failure:
        trainer.train()
    said = str(failure.value)
    assert "at step 3 (the last good checkpoint is" in said
    assert "checkpoint-2" in said
    assert "gradient_checkpointing=True" in said
    assert OUT_OF_MEMORY in said


def test_the_command_ends_with_one_message(tmp_path: Path) -> None:
    small_runs.save_model_folder(tmp_path / "model")
    small_runs.write_jsonl(tmp_path / "train.jsonl", small_runs.rows(6))
    answer = small_runs.run_cli(
        small_runs.command_line(tmp_path, dry_run=True), datasets_cache=tmp_path / "cache"
    )
    assert answer.status == 0
    assert not (tmp_path / "run").exists()
