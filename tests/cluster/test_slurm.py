"""Batch jobs on a real SLURM with two nodes: they come back, whatever ends them, and end as if nothing had happened."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from orpo_ds.checkpoint import verify
from orpo_ds.cluster.submit import parse, script
from orpo_ds.monitor.jsonl import read_metrics
from tests import small_runs
from tests.cluster.virtual_hosts import Slurm
from tests.faults.test_resume import differences, numbers

STEPS, SAVE_STEPS = 8, 2
WAIT_S = 200  # for anything, however busy the machine is
RANKS = 2
OURS = "orpo_ds (train|supervise)|slurm_worker|wandb-core"

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def wait_until(what: str, happened: Callable[[], object], *, log: Path | None = None) -> None:
    until = time.monotonic() + WAIT_S
    while not happened():
        shown = log.read_text() if log is not None and log.exists() else ""
        assert time.monotonic() < until, f"{what} has not happened within {WAIT_S} s\n{shown}"
        time.sleep(0.2)


@dataclass(frozen=True)
class Lab:
    """A model, rows, and settings of a run that writes into `runs/` beside them."""

    folder: Path
    slurm: Slurm

    @property
    def log(self) -> Path:
        """Of the jobs that `start` submits; none of them is an array."""
        return self.folder / "job.log"

    def start(self, *options: str, output: str) -> str:
        """Submit the very script of `orpo-ds submit`, but for the module that trains: one with a gate."""
        words = ["--nodes=2", *options, str(self.folder / "run.yaml")]
        _, job = parse([f"--log={self.log}", "--no-preflight", *words, "--seed=1", f"--output_dir={output}"])
        text = script(job)
        assert text.count("-m orpo_ds train") + text.count("--module orpo_ds train") == 1
        text = text.replace("-m orpo_ds train", "-m tests.cluster.slurm_worker")
        text = text.replace("--module orpo_ds train", "--module tests.cluster.slurm_worker")
        (self.folder / "job.sbatch").write_text(text)
        answer = self.slurm.run("sbatch", "--parsable", self.folder / "job.sbatch")
        assert answer.returncode == 0, answer.stdout
        return answer.stdout.strip()

    def set_gate(self, place: str) -> None:
        """Where the next start waits."""
        for trace in self.folder.glob(f"{place}-*"):
            trace.unlink()
        (self.folder / "gate").write_text(place)

    def wait_at(self, place: str) -> None:
        """All ranks wait there."""
        wait_until(
            f"{place}",
            lambda: len(list(self.folder.glob(f"{place}-*"))) == RANKS,
            log=self.log,
        )

    def state(self, job: str) -> str:
        """What SLURM says of a job."""
        text = self.slurm.run("scontrol", "--oneliner", "show", "job", job).stdout
        found = re.search(r"JobState=(\S+)", text)
        return found.group(1) if found else text

    def wait_for_state(self, job: str, *states: str) -> None:
        wait_until(f"job {job}: {states}", lambda: self.state(job) in states, log=self.log)

    def processes(self) -> list[str]:
        return [line for node in self.slurm.hosts.nodes for line in self.slurm.hosts.processes(node, OURS)]

    def assert_whole(self, run: Path, undisturbed: Path, *, wandb_starts: int) -> None:
        """The run has ended as the undisturbed one has: model, metrics, checkpoints; one W&B run; nothing left."""
        model = "model.safetensors"
        assert list(differences(load_file(undisturbed / model), load_file(run / model))) == []
        assert numbers(run) == numbers(undisturbed)
        steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        assert steps == list(range(1, STEPS + 1))
        for checkpoint in run.glob("checkpoint-*"):
            assert verify(checkpoint) == []
        assert (run / f"checkpoint-{STEPS}").is_dir()
        assert list(run.glob(".tmp-*")) == []
        run_id = json.loads((run / "wandb_run.json").read_text())["id"]
        folders = [path.name for path in (run / "wandb").glob("offline-run-*")]
        assert len(folders) == wandb_starts
        assert {name.rpartition("-")[2] for name in folders} == {run_id}
        assert self.processes() == []


@pytest.fixture(scope="module")
def lab(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("slurm")
    small_runs.save_model_folder(folder / "model")
    small_runs.write_jsonl(folder / "train.jsonl", small_runs.rows(11))
    _, *words = small_runs.command_line(
        folder,
        output_dir=folder / "runs",
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        report_to="wandb",
    )
    names = [word.removeprefix("--") for word in words[::2]]
    (folder / "run.yaml").write_text(yaml.safe_dump(dict(zip(names, words[1::2], strict=True))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "hf"))
        patch.setenv("GATES", str(folder))
        yield Lab(folder, slurm)


@pytest.fixture(scope="module")
def array(lab: Lab) -> str:
    """What `orpo-ds submit` says while it follows an array of two seeds, each on both nodes."""
    words = ["--nodes", "2", "--time", "10", "--seeds", "1-2", "--log", str(lab.folder / "seed-%a.log")]
    answer = lab.slurm.run(
        "python", "-m", "orpo_ds", "submit", *words, lab.folder / "run.yaml", timeout_s=2 * WAIT_S
    )
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


def test_an_array_over_seeds(lab: Lab, array: str) -> None:
    """It is followed to its end; the two runs do not get into each other's way."""
    assert "#SBATCH --array=1-2" in array
    assert re.search(r"job \d+_1: COMPLETED", array), array
    assert re.search(r"job \d+_2: COMPLETED", array), array
    runs = [lab.folder / "runs" / f"seed-{seed}" for seed in (1, 2)]
    for run in runs:
        lab.assert_whole(run, run, wandb_starts=1)
    assert numbers(runs[0]) != numbers(runs[1])
    assert "supervise: restart" not in array


def test_a_job_comes_back_whatever_ends_it(lab: Lab, array: str) -> None:
    """The time limit, `scontrol requeue`, a node that dies in a step, and one that dies in a save: one chain."""
    run = lab.folder / "runs" / "chain"
    lab.set_gate("3:step")
    job = lab.start("--time=60", output=str(run))
    lab.wait_at("3:step")

    # SLURM looks at time limits every 30 s. The job's comes near, so its next look sends the signal.
    lab.set_gate("4:step")
    lab.slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    wait_until("the signal", lambda: "SIGUSR1" in lab.log.read_text(), log=lab.log)
    lab.slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    lab.wait_at("4:step")
    assert (
        f"the run was preempted; its newest checkpoint is checkpoint-3. Job {job} is requeued"
        in lab.log.read_text()
    )

    lab.set_gate("6:step")
    assert lab.slurm.run("scontrol", "requeue", job).returncode == 0
    lab.wait_at("6:step")

    lab.set_gate("6:save")
    for place in ("6:step", "6:save"):
        if place == "6:save":
            lab.wait_at(place)
            assert (run / ".tmp-checkpoint-6").is_dir()
            lab.set_gate("")
        lab.slurm.hosts.kill("node2")
        lab.wait_for_state(job, "PENDING", "COMPLETING")
        lab.slurm.revive()

    lab.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED")
    assert lab.state(job) == "COMPLETED", lab.log.read_text()
    text = lab.log.read_text()
    assert [int(number) for number in re.findall(r"restart (\d+), from", text)] == [1, 2, 3, 4]
    lab.assert_whole(run, lab.folder / "runs" / "seed-1", wandb_starts=5)


def test_scancel_is_the_end_and_the_same_command_goes_on(lab: Lab, array: str) -> None:
    """With one task a node, where DeepSpeed's launcher starts the ranks."""
    run = lab.folder / "runs" / "cancelled"
    lab.set_gate("3:step")
    job = lab.start("--task-per=node", output=str(run))
    lab.wait_at("3:step")
    lab.slurm.run("scancel", job)
    lab.wait_for_state(job, "CANCELLED")
    wait_until("the end of all processes", lambda: lab.processes() == [])
    assert [path.name for path in run.glob("checkpoint-*") if verify(path) == []] != []
    assert "is requeued" not in lab.log.read_text().partition("SIGTERM")[2]

    (lab.folder / "gate").unlink()
    again = lab.start("--task-per=node", output=str(run))
    lab.wait_for_state(again, "COMPLETED", "FAILED", "CANCELLED")
    assert lab.state(again) == "COMPLETED", lab.log.read_text()
    lab.assert_whole(run, lab.folder / "runs" / "seed-1", wandb_starts=2)
