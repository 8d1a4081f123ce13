"""`orpo-ds submit` without SLURM: the script that it prints, and the words that it refuses."""

import base64
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from orpo_ds.cluster.submit import parse, script
from orpo_ds.shipped import shipped_folder
from tests import small_runs

SHIPPED = {
    "one_node.sbatch": ["--gpus-per-node", "8"],
    "many_nodes.sbatch": ["--nodes", "4", "--gpus-per-node", "8"],
    "many_nodes_launcher.sbatch": ["--nodes", "4", "--gpus-per-node", "8", "--task-per", "node"],
    "seeds.sbatch": ["--gpus-per-node", "8", "--seeds", "1-5"],
}


@pytest.fixture(autouse=True)
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("output_dir: runs/mine\n")
    return "run.yaml"


def text_of(*words: str) -> str:
    return script(parse(words)[1])


def refused(*words: str) -> str:
    answer = small_runs.run_cli(["submit", "--print-only", *words], datasets_cache=Path("hf"))
    assert answer.status == 2, answer
    assert "Traceback" not in answer.stderr
    return answer.stderr


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_scripts_are_those_that_it_prints(name: str, run_yaml: str) -> None:
    """`orpo-ds submit --print-only OPTIONS run.yaml > launch/slurm/NAME` writes one anew."""
    assert (shipped_folder("launch") / "slurm" / name).read_text() == text_of(*SHIPPED[name], run_yaml)


def test_there_is_no_other_script() -> None:
    assert {path.name for path in (shipped_folder("launch") / "slurm").iterdir()} == set(SHIPPED)


@pytest.mark.parametrize(
    "options", [*SHIPPED.values(), ["--container", "a b.sif"], ["--container", "nvcr.io/x:1"]]
)
def test_bash_reads_it(options: list[str], run_yaml: str) -> None:
    text = text_of(*options, run_yaml, "--run_name", "it's mine", "--learning_rate", "1e-5")
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_other_options_go_to_sbatch_and_other_fields_to_the_run(run_yaml: str) -> None:
    text = text_of("--partition", "gpu", "--qos=high", "--mem=0", "--exclusive", run_yaml, "--beta", "0.2")
    head = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert [
        line for line in ("--partition=gpu", "--qos=high", "--mem=0", "--exclusive") if line not in head
    ] == []
    assert "--config run.yaml --beta 0.2 " in text.splitlines()[-1]


def test_the_run_is_asked_to_save_in_time_and_the_log_is_kept(run_yaml: str) -> None:
    text = text_of("--signal-s", "300", run_yaml)
    for line in ("--signal=B:USR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text


def test_each_seed_has_its_folder(run_yaml: str) -> None:
    last = text_of("--seeds", "1,5", run_yaml).splitlines()[-1]
    assert last.endswith('--seed "$SLURM_ARRAY_TASK_ID" --output_dir runs/mine/seed-"$SLURM_ARRAY_TASK_ID"')


def test_deepspeeds_launcher_is_told_all_nodes(run_yaml: str, tmp_path: Path) -> None:
    """The pipe in the script, with a `scontrol` that knows two nodes."""
    text = text_of("--nodes", "2", "--gpus-per-node", "3", "--task-per", "node", run_yaml)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'a-1\\nb_2\\n'\n")
    scontrol.chmod(0o755)
    start = text.index("WORLD_INFO=$(")
    pipe = text[start : text.index("export WORLD_INFO")]
    done = subprocess.run(
        ["bash", "-c", f'PATH="{tmp_path}:$PATH"; SLURM_JOB_NODELIST=x; {pipe} echo "$WORLD_INFO"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(base64.urlsafe_b64decode(done.stdout)) == {"a-1": [0, 1, 2], "b_2": [0, 1, 2]}


def test_what_cannot_be_told_apart_is_refused(run_yaml: str) -> None:
    assert "--exclude=node7" in refused("--exclude", "node7", run_yaml)
    assert "no YAML file" in refused("--nodes", "2")
    assert "no such file" in refused("other.yaml")


def test_a_token_is_kept_out_of_the_script(run_yaml: str) -> None:
    answer = refused(run_yaml, "--hub_token", "hf_abcdefghijklmnopqrst")
    assert "HF_TOKEN" in answer
    assert "hf_abc" not in answer


def test_a_run_that_does_not_fit_is_not_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no sbatch here: whoever comes so far fails at that."""
    monkeypatch.setenv("PATH", "/nowhere")
    small_runs.save_model_folder(tmp_path / "model")
    small_runs.write_jsonl(tmp_path / "train.jsonl", small_runs.rows(4))
    fields = small_runs.command_line(tmp_path)[1:]
    words = {name.removeprefix("--"): value for name, value in zip(fields[::2], fields[1::2], strict=True)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(words))
    small = small_runs.run_cli(["submit", "--gpu", "1GB", "run.yaml"], datasets_cache=Path("hf"))
    assert small.status == 2, small.stderr
    assert "does not fit 1 x 1 GPUs of 1GB" in small.stderr
    large = small_runs.run_cli(["submit", "run.yaml"], datasets_cache=Path("hf"))
    assert large.status == 1
    assert "sbatch" in large.stderr


def test_where_there_is_no_slurm(run_yaml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    answer = small_runs.run_cli(["submit", "--no-estimate", run_yaml], datasets_cache=Path("hf"))
    assert answer.status == 1
    assert "sbatch: there is no such command here" in answer.stderr
