"""A resume continues from a proven checkpoint of the same run, or says why it cannot."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from orpo_ds.checkpoint import check_resume, one_rank, resolve_resume
from tests.checkpoint.folders import flip_byte, metadata, store_in, writer


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    for step in (9, 10, 100):
        store_in(tmp_path).save(writer(), metadata(step))
    return tmp_path


@pytest.mark.parametrize("wish", [True, "true", "True"])
def test_true_means_the_highest_step(output_dir: Path, wish: bool | str) -> None:
    assert resolve_resume(wish, output_dir, ranks=one_rank()) == output_dir / "checkpoint-100"


@pytest.mark.parametrize("wish", [False, None, "false"])
def test_no_wish_no_checkpoint(output_dir: Path, wish: bool | str | None) -> None:
    assert resolve_resume(wish, output_dir, ranks=one_rank()) is None


def test_auto_continues_or_starts(output_dir: Path) -> None:
    assert resolve_resume("auto", output_dir, ranks=one_rank()) == output_dir / "checkpoint-100"
    assert resolve_resume("auto", output_dir / "new", ranks=one_rank()) is None
    for step in (9, 10, 100):  # whoever has trained so far must not lose it in silence
        flip_byte(output_dir / f"checkpoint-{step}" / "engine/weights.pt", position=3)
    with pytest.raises(ValueError, match="all are broken"):
        resolve_resume("auto", output_dir, ranks=one_rank())


def test_a_newer_broken_one_is_named_and_skipped(output_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip_byte(output_dir / "checkpoint-100" / "engine/weights.pt", position=3)
    with caplog.at_level(logging.WARNING):
        assert resolve_resume(True, output_dir, ranks=one_rank()) == output_dir / "checkpoint-10"
    assert "checkpoint-100" in caplog.text
    assert "engine/weights.pt: content was changed" in caplog.text


def test_a_named_broken_one_is_an_error_that_names_the_files(output_dir: Path) -> None:
    folder = output_dir / "checkpoint-100"
    flip_byte(folder / "engine/weights.pt", position=3)
    (folder / "args.json").unlink()
    with pytest.raises(ValueError) as error:
        resolve_resume(str(folder), output_dir, ranks=one_rank())
    assert "args.json: missing" in str(error.value)
    assert "engine/weights.pt: content was changed" in str(error.value)


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is none"):
        resolve_resume(True, tmp_path / "new", ranks=one_rank())
    with pytest.raises(ValueError, match="no such folder"):
        resolve_resume(str(tmp_path / "checkpoint-3"), tmp_path, ranks=one_rank())
    assert not (tmp_path / "new").exists()
    # A save that was interrupted before its rename, and a folder without a manifest (TRL's, for one).
    (tmp_path / ".tmp-checkpoint-20").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(ValueError, match=r"all are broken \(checkpoint-10;"):
        resolve_resume(True, tmp_path, ranks=one_rank())


def test_the_same_run_may_continue(output_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Step and epoch of the run that continues are not compared; a secret that changed is not either.
    current = metadata(0, config={"learning_rate": 1e-5, "betas": [0.9, 0.999], "hub_token": "another"})
    assert check_resume(output_dir / "checkpoint-10", current).metadata.step == 10
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset_fingerprint", "ffff"),
        ("seed", 8),
    ],
)
def test_another_run_may_not(output_dir: Path, field: str, value: object) -> None:
    with pytest.raises(ValueError) as error:
        check_resume(output_dir / "checkpoint-10", metadata(0, **{field: value}))
    saved = getattr(metadata(0), field)
    assert f"{field}: {saved!r} in the checkpoint, {value!r} in this run" in str(error.value)


def test_other_ranks_and_another_stage_may(output_dir: Path) -> None:
    """With them the product of the batch settings is another one; the caller keeps the checkpoint's."""
    current = metadata(0, world_size=2, zero_stage=2, global_batch_size=32)
    manifest = check_resume(output_dir / "checkpoint-10", current)
    assert manifest.metadata.global_batch_size == metadata(0).global_batch_size != 32


def test_other_batch_settings_may_not_and_the_old_ones_are_named(tmp_path: Path) -> None:
    before = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    folder = store_in(tmp_path).save(writer(), metadata(10, config=before, global_batch_size=64))
    with pytest.raises(ValueError) as error:
        check_resume(
            folder, metadata(0, config=before | {"gradient_accumulation_steps": 3}, global_batch_size=48)
        )
    for expected in (
        "64 in the checkpoint, 48",
        "size=4, gradient_accumulation_steps=2 as they were",
        "64 pairs a step",
    ):
        assert expected in str(error.value)


def test_all_differences_are_named_at_once(output_dir: Path) -> None:
    current = metadata(0, seed=8, dataset_fingerprint="ffff", config={"learning_rate": 2e-5})
    with pytest.raises(ValueError) as error:
        check_resume(output_dir / "checkpoint-10", current)
    for expected in ("seed: 7", "dataset_fingerprint: ", "learning_rate: 1e-05 in the checkpoint, 2e-05"):
        assert expected in str(error.value)


def test_what_only_rounds_differently_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = {
        "logits_cache_mib": 256,
        "logging_steps": 10,
        "deepspeed": {"zero_optimization": {"sub_group_size": 1}},
    }
    now = {
        "logits_cache_mib": 128,
        "logging_steps": 5,
        "deepspeed": {"zero_optimization": {"sub_group_size": 2}},
    }
    folder = store_in(tmp_path).save(writer(), metadata(10, config=saved))
    with caplog.at_level(logging.WARNING):
        check_resume(folder, metadata(0, config=now))
    assert "logits_cache_mib: 256 in the checkpoint, 128 in this run" in caplog.text
    assert "deepspeed.zero_optimization.sub_group_size: 1" in caplog.text
    assert "logging_steps" not in caplog.text
