"""A new run does not touch what another run, or a person, has put into its output folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_ds.checkpoint import claim_output_dir, one_rank
from tests.checkpoint.folders import content_of, metadata, store_in, writer


def claim(output_dir: Path, *, resume_from: Path | None = None, overwrite: bool = False) -> None:
    claim_output_dir(output_dir, resume_from=resume_from, overwrite_output_dir=overwrite, ranks=one_rank())


def used_folder(tmp_path: Path) -> Path:
    """The output of a run, and two files of its user."""
    store_in(tmp_path).save(writer(), metadata(10))
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "run.yaml").write_text("beta: 0.1\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    return tmp_path


def test_a_new_or_foreign_folder_is_free(tmp_path: Path) -> None:
    claim(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run").is_dir()
    (tmp_path / "run.yaml").write_text("beta: 0.1\n")
    claim(tmp_path)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "checkpoint-10", "model.safetensors", "adapter_config.json"]
)
def test_another_runs_results_are_an_error_that_names_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError) as error:
        claim(tmp_path)
    for expected in (name, str(tmp_path), "resume_from_checkpoint", "overwrite_output_dir"):
        assert expected in str(error.value)


def test_the_remains_of_an_earlier_start_are_moved_and_its_wandb_run_stays(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "wandb_run.json").write_text("{}\n")
    claim_output_dir(
        tmp_path, resume_from=None, overwrite_output_dir=False, started_before=True, ranks=one_rank()
    )
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "wandb_run.json").exists()
    [moved] = tmp_path.glob("previous-*/metrics.jsonl")
    assert moved.read_text() == '{"step": 1}\n'


def test_a_refused_folder_is_as_it_was(tmp_path: Path) -> None:
    before = content_of(used_folder(tmp_path))
    with pytest.raises(ValueError):
        claim(tmp_path)
    assert content_of(tmp_path) == before


def test_a_resume_from_within_is_the_same_run(tmp_path: Path) -> None:
    before = content_of(used_folder(tmp_path))
    claim(tmp_path, resume_from=tmp_path / "checkpoint-10")
    assert content_of(tmp_path) == before


def test_a_resume_from_elsewhere_does_not_open_a_used_folder(tmp_path: Path) -> None:
    used = used_folder(tmp_path / "a")
    other = store_in(tmp_path / "b").save(writer(), metadata(10))
    with pytest.raises(ValueError, match="another run"):
        claim(used, resume_from=other)


def test_overwrite_moves_results_aside_and_leaves_the_users_files(tmp_path: Path) -> None:
    before = content_of(used_folder(tmp_path))
    claim(tmp_path, overwrite=True)
    (previous,) = tmp_path.glob("previous-*")
    after = content_of(tmp_path)
    users = {"run.yaml", "data/train.jsonl"}
    assert {name: after[name] for name in users} == {name: before[name] for name in users}
    moved = {f"{previous.name}/{name}": data for name, data in before.items() if name not in users}
    assert {name: data for name, data in after.items() if name not in users} == moved

    # The folder is free now, and a second run that is moved aside does not meet the first.
    claim(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("second")
    claim(tmp_path, overwrite=True)
    assert len(list(tmp_path.glob("previous-*/metrics.jsonl"))) == 2
