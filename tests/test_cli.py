"""The commands of the README, as they are typed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import orpo_ds
from orpo_ds import cli
from orpo_ds.monitor.jsonl import read_metrics
from tests import small_runs
from tests.parity.tokenizer import CHAT_TEMPLATE

YAML = """
model_name_or_path: {folder}/model
dataset_name: {folder}/rows
deepspeed: ds_configs/zero3_offload.json
output_dir: {folder}/run
dataset_cache_dir: {folder}/tokens
per_device_train_batch_size: 2
num_train_epochs: 1
learning_rate: 1e-3
lr_scheduler_type: constant
beta: 0.1
bf16: false
logging_steps: 1
eval_strategy: epoch
save_strategy: epoch
report_to: none
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `deepspeed --module orpo_ds train --config run.yaml --beta 0.25` on two ranks."""
    folder = tmp_path_factory.mktemp("launched")
    small_runs.save_model_folder(folder / "model")
    (folder / "rows").mkdir()
    small_runs.write_jsonl(folder / "rows" / "train.jsonl", small_runs.rows(8))
    small_runs.write_jsonl(folder / "rows" / "test.jsonl", small_runs.rows(3))
    (folder / "run.yaml").write_text(YAML.format(folder=folder))
    words = ["train", "--config", str(folder / "run.yaml"), "--beta", "0.25"]
    finished = small_runs.launch("orpo_ds", *words, cache=folder / "hf")
    assert finished.returncode == 0, finished.stdout[-6000:]
    return folder


@pytest.mark.distributed
@pytest.mark.slow
class TestDeepspeedLauncher:
    def test_flags_and_file_both_count(self, launched: Path) -> None:
        lines = [line for line in read_metrics(launched / "run" / "metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in lines] == [1, 2]
        assert {line["learning_rate"] for line in lines} == {1e-3}
        for line in lines:
            assert line["rewards/chosen"] == pytest.approx(0.25 * line["logps/chosen"], rel=1e-6)

    def test_the_test_split_is_evaluated(self, launched: Path) -> None:
        [line] = [line for line in read_metrics(launched / "run" / "metrics.jsonl") if "eval_loss" in line]
        assert line["step"] == 2
        assert line["eval_rewards/margins"] == pytest.approx(
            line["eval_rewards/chosen"] - line["eval_rewards/rejected"], rel=1e-5
        )

    def test_the_model_folder_loads_with_the_trained_weights(self, launched: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(launched / "run")
        before = AutoModelForCausalLM.from_pretrained(launched / "model").state_dict()
        assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert model.config.use_cache is True
        # Tied before, tied after, and stored once.
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert "lm_head.weight" not in load_file(launched / "run" / "model.safetensors")

    def test_tokenizer_and_generation_config_are_beside_it(self, launched: Path) -> None:
        assert AutoTokenizer.from_pretrained(launched / "run").chat_template == CHAT_TEMPLATE
        assert GenerationConfig.from_pretrained(launched / "run").max_new_tokens == 7

    def test_the_folder_generates_the_same_with_and_without_cache(self, launched: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(launched / "run")
        tokenizer = AutoTokenizer.from_pretrained(launched / "run")
        prompt = tokenizer.apply_chat_template(
            small_runs.rows(1)[0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answers = [
            model.generate(**prompt, do_sample=False, max_new_tokens=5, use_cache=use_cache)
            for use_cache in (False, True)
        ]
        assert torch.equal(*answers)

    def test_the_checkpoint_is_there(self, launched: Path) -> None:
        manifest = json.loads((launched / "run" / "checkpoint-2" / "manifest.json").read_text())
        assert (manifest["step"], manifest["world_size"], manifest["zero_stage"]) == (2, 2, 3)
        assert manifest["config"]["beta"] == 0.25


# ---------------------------------------------------------------------- one process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With `model` and `train.jsonl`."""
    small_runs.save_model_folder(tmp_path / "model", "llama")
    small_runs.write_jsonl(tmp_path / "train.jsonl", small_runs.rows(8))
    return tmp_path


def test_trls_example_command(folder: Path) -> None:
    """Four flags and nothing else; every default has to hold."""
    words = ["--model_name_or_path", "model", "--dataset_name", "train.jsonl", "--num_train_epochs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        answer = small_runs.run_cli(["train", *words, "--output_dir", "out"], datasets_cache=folder / "hf")
    assert answer.status == 0, answer.stderr
    AutoModelForCausalLM.from_pretrained(folder / "out")
    [line] = read_metrics(folder / "out" / "metrics.jsonl")
    assert line["step"] == 1  # 8 pairs are one batch of the default size
    assert (folder / "out" / "checkpoint-1" / "manifest.json").is_file()


def test_a_model_that_is_not_on_the_hub(folder: Path) -> None:
    """The suite runs offline: training goes on, the model is saved, and the exit status says what is missing."""
    answer = small_runs.run_cli(
        small_runs.command_line(folder, push_to_hub=True, hub_strategy="end"), datasets_cache=folder / "hf"
    )
    assert answer.status == 1
    assert "the model was not uploaded to 'run'" in answer.stderr
    AutoModelForCausalLM.from_pretrained(folder / "run")
    card = (folder / "run" / "README.md").read_text()
    assert "trained on train.jsonl with ORPO" in card
    assert str(folder) not in card


def test_a_second_start_does_not_tokenise_again(folder: Path) -> None:
    first, second = (
        small_runs.run_cli(
            small_runs.command_line(folder, output_dir=folder / name, disable_tqdm=False),
            datasets_cache=folder / "hf",
        )
        for name in ("run", "again")
    )
    assert "8 token pairs tokenised into" in first.stderr
    assert second.status == 0
    assert "Tokenising" not in second.stderr
    assert "8 token pairs read from" in second.stderr


def test_resume_by_flag(folder: Path) -> None:
    flags = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    assert (
        small_runs.run_cli(small_runs.command_line(folder, **flags), datasets_cache=folder / "hf").status == 0
    )
    whole = load_file(folder / "run" / "model.safetensors")
    shutil.rmtree(folder / "run" / "checkpoint-4")
    (folder / "run" / "model.safetensors").unlink()
    answer = small_runs.run_cli(
        small_runs.command_line(folder, resume_from_checkpoint="true", **flags), datasets_cache=folder / "hf"
    )
    assert answer.status == 0, answer.stderr
    assert [line["step"] for line in read_metrics(folder / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    resumed = load_file(folder / "run" / "model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_an_evaluation_and_a_prediction_at_the_end(folder: Path) -> None:
    (folder / "rows").mkdir()
    small_runs.write_jsonl(folder / "rows" / "train.jsonl", small_runs.rows(8))
    small_runs.write_jsonl(folder / "rows" / "test.jsonl", small_runs.rows(3))
    flags = {"dataset_name": folder / "rows", "do_eval": True, "do_predict": True, "do_train": True}
    answer = small_runs.run_cli(small_runs.command_line(folder, **flags), datasets_cache=folder / "hf")
    assert answer.status == 0, answer.stderr
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == [2]
    [evaluated], [predicted] = (
        [line for line in lines if name in line] for name in ("eval_loss", "test_loss")
    )
    assert predicted["test_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-6)


def test_lora_by_flags(folder: Path) -> None:
    flags = {"use_peft": True, "lora_r": 4, "learning_rate": "1e-2"}
    line = small_runs.command_line(folder, **flags)
    answer = small_runs.run_cli(
        [*line, "--lora_target_modules", "q_proj", "v_proj"], datasets_cache=folder / "hf"
    )
    assert answer.status == 0, answer.stderr
    config = json.loads((folder / "run" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    assert not (folder / "run" / "model.safetensors").exists()


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    assert "train" in capsys.readouterr().out
    cli.main(["--version"])
    assert capsys.readouterr().out == f"orpo-ds {orpo_ds.__version__}\n"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(
        f"--{name}" in text for name in ("beta", "dataset_train_split", "config", "lora_r", "deepspeed")
    )
