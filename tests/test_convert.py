"""Checkpoints as model folders and as DeepSpeed's universal ones; with its converter, whether a resume is exact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from orpo_ds import ORPOTrainer
from orpo_ds.checkpoint import verify
from orpo_ds.convert import to_huggingface, to_universal
from orpo_ds.export import full_state
from tests import small_runs

STEPS = 2


def make_trainer(run: Path, preset: str, **changes: Any) -> ORPOTrainer:
    """A trainer of the model folder beside its run."""
    fields: dict[str, Any] = {
        "model": str(run.parent / "model"),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": STEPS,
        "weight_decay": 0.01,
        "adam_epsilon": 1e-3,  # an update is a smooth function of the gradient, so rounding stays rounding
    }
    return small_runs.trainer(run, deepspeed=preset, **fields | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds `model`, with tied weights; runs go beside it."""
    small_runs.save_model_folder(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize(("preset", "bf16"), [("zero3", False), ("zero1", True), ("zero0", False)])
def test_a_model_folder(folder: Path, preset: str, bf16: bool) -> None:
    """Bit for bit the model that the trainer holds, with its tokenizer."""
    trainer = make_trainer(folder / "run", preset, bf16=bf16)
    trainer.train()
    expected = full_state(trainer.model)
    unset_hf_deepspeed_config()  # the command is a process of its own, and has none
    output = to_huggingface(folder / "run/checkpoint-2", folder / "out", model=str(folder / "model"))
    assert expected is not None
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    before = AutoTokenizer.from_pretrained(folder / "model")
    assert AutoTokenizer.from_pretrained(output).get_vocab() == before.get_vocab()
    assert verify(output) == []
    with pytest.raises(ValueError, match="save_only_model"):
        make_trainer(folder / "other", preset, bf16=bf16).train(resume_from_checkpoint=str(output))


def universal_state(folder: Path) -> dict[str, torch.Tensor]:
    """`<parameter>/<fp32, exp_avg or exp_avg_sq>` of a universal checkpoint, flattened."""
    state = {}
    for path in (folder / "engine" / "zero").glob("*/*.pt"):
        value = torch.load(path, weights_only=False)
        value = value["param"] if isinstance(value, dict) else value
        if torch.is_tensor(value) and value.dim():
            state[f"{path.parent.name}/{path.stem}"] = value.reshape(-1)
    return state


@pytest.mark.parametrize("bf16", [False, True])
def test_a_checkpoint_that_went_through_all_layouts_is_the_same(folder: Path, bf16: bool) -> None:
    """Weights, fp32 masters and moments bit for bit, as DeepSpeed's own converter reads them; the step counts too."""
    run = folder / "run"
    make_trainer(run, "zero3", bf16=bf16).train()
    before = universal_state(to_universal(run / "checkpoint-2", folder / "before"))
    assert {name.rpartition("/")[2] for name in before} == {"fp32", "exp_avg", "exp_avg_sq"}
    for preset in ("zero2", "zero0", "zero3_offload", "zero1", "zero2_offload", "zero3"):
        trainer = make_trainer(run, preset, bf16=bf16)
        trainer.train(resume_from_checkpoint=True)  # nothing is left to do
        trainer.save_checkpoint()
        engine = trainer._ready_engine()
        assert engine.deepspeed.global_steps == STEPS
        steps = {int(state["step"]) for state in engine.optimizer.state.values()}
        assert steps == {STEPS}, preset
    after = universal_state(to_universal(run / "checkpoint-2", folder / "after"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    moments = [value for name, value in before.items() if name.endswith("exp_avg")]
    assert all(value.abs().max() > 0 for value in moments)


@pytest.mark.parametrize(("before", "after"), [("zero2", "zero3"), ("zero3", "zero0")])
def test_a_run_goes_on_from_a_universal_checkpoint(folder: Path, before: str, after: str) -> None:
    whole = make_trainer(folder / "whole", before, max_steps=2 * STEPS)
    whole.train()
    source = to_universal(folder / "whole/checkpoint-2", folder / "universal")
    assert verify(source) == []
    resumed = make_trainer(folder / "resumed", after, max_steps=2 * STEPS)
    resumed.train(resume_from_checkpoint=str(source))
    expected = {line["step"]: line["loss"] for line in small_runs.step_lines(whole)}
    found = {line["step"]: line["loss"] for line in small_runs.step_lines(resumed)}
    assert found == pytest.approx(expected, rel=1e-6)  # one rank: the same sums, in other blocks


def test_what_cannot_be_converted_is_refused(folder: Path) -> None:
    run = folder / "run"
    make_trainer(run, "zero0").train()
    checkpoint, model = run / "checkpoint-2", str(folder / "model")
    with pytest.raises(ValueError, match=r"ZeRO-0: DeepSpeed converts .* resumed as it is"):
        to_universal(checkpoint, folder / "out")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        to_huggingface(checkpoint, folder / "model", model=model)
    small_runs.save_model_folder(folder / "other", "llama")
    with pytest.raises(ValueError, match=r"--model .*other has no .*bias, which the checkpoint has"):
        to_huggingface(checkpoint, folder / "out", model=str(folder / "other"))
    damaged = Path(shutil.copytree(checkpoint, folder / "damaged"))
    path = next((damaged / "engine").glob("*model_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model_states.pt: content was changed"):
        to_huggingface(damaged, folder / "out", model=model)
    left = {path.name for path in folder.iterdir()}
    assert left == {"model", "run", "other", "damaged", "tokens"}


def test_the_command(folder: Path) -> None:
    make_trainer(folder / "run", "zero2").train()
    words = ["convert", str(folder / "run/checkpoint-2"), str(folder / "out"), "--huggingface"]
    without = small_runs.run_cli(words, datasets_cache=folder)
    assert without.status == 2
    assert "--huggingface needs --model" in without.stderr
    words += ["--model", str(folder / "model")]
    assert small_runs.run_cli(words, datasets_cache=folder).status == 0
    assert (folder / "out/model.safetensors").is_file()
