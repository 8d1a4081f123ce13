"""A chain of starts goes on while it makes progress, and ends with a reason when it makes none."""

from pathlib import Path

import pytest

from orpo_ds.cluster.restarts import (
    USAGE_ERROR,
    GivenUpError,
    Restarts,
    newest_step,
    run_dir_of,
)
from orpo_ds.preemption import REQUEUE_EXIT_CODE
from tests.checkpoint.folders import metadata, store_in, writer


def save(run_dir: Path, step: int) -> Path:
    return store_in(run_dir).save(writer(), metadata(step))


def test_progress_is_a_newer_checkpoint_with_all_its_files(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "none") == 0
    save(tmp_path, 9)
    newer = save(tmp_path, 10)
    (tmp_path / ".tmp-checkpoint-11").mkdir()
    (tmp_path / "checkpoint-12").mkdir()  # without a manifest
    assert newest_step(tmp_path) == 10
    file = newer / "engine" / "weights.pt"
    file.write_bytes(file.read_bytes()[:-1])
    assert newest_step(tmp_path) == 9


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_restarts_without_progress_are_counted_in_a_row(tmp_path: Path, limit: int) -> None:
    restarts = Restarts(tmp_path, name="a", limit=limit)
    for step in (10, 20):
        for number in range(limit):
            assert restarts.begin().fruitless == number
            assert not restarts.judge(1).progress
        restarts.begin()
        save(tmp_path, step)
        assert restarts.judge(1).progress
    for _ in range(limit):
        restarts.begin()
        restarts.judge(1)
    restarts.begin()
    with pytest.raises(GivenUpError, match=f"{limit} restarts in a row .* has checkpoint-20"):
        restarts.judge(1)


def test_starts_whose_end_nobody_saw_are_judged_by_the_next(tmp_path: Path) -> None:
    """Every start has a process of its own, as after the death of a node."""

    def begin() -> int:
        return Restarts(tmp_path, name="slurm-7", limit=2).begin().fruitless

    assert [begin(), begin()] == [0, 1]
    save(tmp_path, 3)
    assert [begin(), begin(), begin()] == [0, 1, 2]
    with pytest.raises(GivenUpError, match="2 restarts in a row"):
        begin()
    assert begin() == 0  # a person started the same job again


def test_another_job_counts_anew(tmp_path: Path) -> None:
    first = Restarts(tmp_path, name="slurm-7")
    for starts in (1, 2, 3):
        assert first.begin().starts == starts
    assert Restarts(tmp_path, name="slurm-8").begin().starts == 1


def test_refused_settings_are_not_started_again(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path, name="a")
    restarts.begin()
    with pytest.raises(GivenUpError, match="refused"):
        restarts.judge(USAGE_ERROR)
    # Later it can be something that passes: another process still held the output folder, for one.
    restarts.begin()
    restarts.judge(1)
    restarts.begin()
    assert not restarts.judge(USAGE_ERROR).progress


def test_a_preemption_is_told_from_a_crash(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path, name="a")
    restarts.begin()
    save(tmp_path, 5)
    assert "preempted; its newest checkpoint is checkpoint-5" in restarts.judge(REQUEUE_EXIT_CODE).text
    assert "exit status 137" in restarts.judge(137).text


def test_the_output_folder_is_that_of_the_command(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {tmp_path / 'yaml'}\nresume_from_checkpoint: auto\n")
    train = ["srun", "python", "-m", "orpo_ds", "train"]
    assert run_dir_of([*train, "--config", str(config)]) == tmp_path / "yaml"
    assert run_dir_of([*train, f"--config={config}", "--output_dir", "a", "--output_dir=b"]) == Path("b")
    assert run_dir_of([*train, "--resume_from_checkpoint", "auto"]) == Path("trainer_output")


@pytest.mark.parametrize("wish", [[], ["--resume_from_checkpoint", "true"]])
def test_a_command_that_cannot_be_repeated_is_refused(wish: list[str]) -> None:
    with pytest.raises(ValueError, match="--resume_from_checkpoint auto"):
        run_dir_of(["orpo-ds", "train", *wish])
