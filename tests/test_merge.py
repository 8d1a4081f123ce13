"""`orpo-ds merge`: the merged folder gives the adapter model's logits, and nothing is overwritten."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from orpo_ds.merge import merge
from tests import small_runs
from tests.parity.tokenizer import tiny_tokenizer

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def run(folder: Path, **lora: Any) -> str:
    """A run of adapters with a checkpoint; returns the path of the base model."""
    base = small_runs.save_model_folder(folder / "base")
    trainer = small_runs.trainer(
        folder / "run",
        model=base,
        peft_config=LORA | lora,
        learning_rate=0.05,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    trainer.save_model()
    return base


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits
    return found


@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["lora", "dora", "head"]
)
def test_the_merged_model_is_the_adapted_one(tmp_path: Path, lora: dict[str, Any]) -> None:
    base = run(tmp_path, **lora)
    ids = torch.randint(3, len(tiny_tokenizer()), (2, 11))
    adapted = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run"), ids
    )
    assert (adapted - logits(AutoModelForCausalLM.from_pretrained(base), ids)).abs().max() > 1e-2
    for source in ("run", "run/checkpoint-2"):
        output = tmp_path / f"merged {source.count('/')}"
        answer = small_runs.run_cli(
            ["merge", str(tmp_path / source), "--output", str(output)], datasets_cache=tmp_path
        )
        assert answer.status == 0, answer.stderr
        merged = AutoModelForCausalLM.from_pretrained(output)
        assert not (output / "adapter_config.json").exists()
        torch.testing.assert_close(logits(merged, ids), adapted, rtol=1e-5, atol=1e-5)
        tokenizer = Path(base) / "tokenizer.json"
        assert (output / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_mistakes_are_named_and_nothing_is_overwritten(tmp_path: Path) -> None:
    base = run(tmp_path)
    kept = tmp_path / "taken"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        merge(tmp_path / "run", kept)
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        merge(base, tmp_path / "new")
    with pytest.raises(ValueError, match="no such folder"):
        merge(tmp_path / "run", tmp_path / "new", base=str(tmp_path / "gone"))
    assert {path.name for path in tmp_path.iterdir()} >= {"base", "run", "taken"}
    assert not (tmp_path / "new").exists()
