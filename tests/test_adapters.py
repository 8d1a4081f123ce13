"""Training adapters instead of a model: dtypes, what a checkpoint holds, resume, the flags, QLoRA."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import ModelConfig, get_peft_config

from orpo_ds import ORPOTrainer, adapters
from orpo_ds.cli import parse_train_arguments
from orpo_ds.export import full_state
from orpo_ds.model.load import disable_dropout
from tests import small_runs
from tests.parity.tokenizer import tiny_tokenizer

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


def trained(folder: Path, **changes: Any) -> ORPOTrainer:
    """A trainer of adapters, after its training."""
    trainer = small_runs.trainer(folder, **{"peft_config": LORA, "learning_rate": 0.01} | changes)
    trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
    return trainer


def state_of(trainer: ORPOTrainer) -> dict[str, Tensor]:
    state = full_state(trainer.model)
    assert state is not None
    return state


class Stop(TrainerCallback):
    """Ends the training after its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
        if state.global_step == 2:
            control.should_training_stop = True


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_holds_the_adapters_alone_and_resumes_bit_for_bit(tmp_path: Path, stage: int) -> None:
    changes = {
        "peft_config": LORA | {"lora_dropout": 0.1},
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "deepspeed": f"zero{stage}",
    }
    whole = trained(tmp_path / "whole", **changes)
    trained(tmp_path / "cut", callbacks=[Stop], **changes)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    resumed = trained(tmp_path / "cut", resume_from_checkpoint=True, **changes)
    assert resumed.state.global_step == 4
    wanted = state_of(whole)
    assert {
        name for name, value in state_of(resumed).items() if not torch.equal(value, wanted[name])
    } == set()

    adapter_bytes = sum(value.numel() * 4 for value in wanted.values())
    base_bytes = sum(value.numel() * 4 for value in small_runs.model_of().parameters())
    engine_bytes = sum(path.stat().st_size for path in (checkpoint / "engine").iterdir())
    # Weights, their fp32 copy and two moments; what torch's format and DeepSpeed's settings take is less than the base.
    assert engine_bytes < 4 * adapter_bytes + 0.5 * base_bytes
    assert base_bytes > 10 * adapter_bytes
    (file,) = [path for path in (checkpoint / "engine").iterdir() if "model_states" in path.name]
    written = torch.load(file, weights_only=False)
    assert written.get("frozen_param_fragments") is None
    sizes = {name: value.numel() for name, value in written["module"].items()}
    assert all("lora_" in name for name, size in sizes.items() if size > 0)
    loaded = PeftModel.from_pretrained(small_runs.model_of(), checkpoint)
    assert any(value.any() for name, value in loaded.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("made", ["by us", "by PEFT"])
def test_adapters_have_the_dtype_of_the_training(tmp_path: Path, stage: int, made: str) -> None:
    """PEFT itself leaves them in fp32, which ZeRO-3 cannot gather beside bf16 (DeepSpeed #8072, #8113)."""
    model: Any = small_runs.model_of().bfloat16()
    changes: dict[str, Any] = {"peft_config": LORA | {"modules_to_save": ["norm"]}, "model": model}
    if made == "by PEFT":
        changes = {
            "model": get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)),
            "peft_config": None,
        }
        assert any(value.dtype == torch.float32 for value in changes["model"].parameters())
    trainer = trained(tmp_path / "run", bf16=True, max_steps=3, deepspeed=f"zero{stage}", **changes)
    assert {value.dtype for value in trainer.model.parameters()} == {torch.bfloat16}
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_parts_have_no_gradient_buffers(tmp_path: Path, stage: int) -> None:
    trainer = trained(tmp_path / "run", deepspeed=f"zero{stage}")
    assert trainer.engine is not None
    assert all(value.grad is None for value in trainer.model.parameters() if not value.requires_grad)
    count = sum(value.numel() for value in state_of(trainer).values())
    moments = sum(state["exp_avg"].numel() for state in trainer.engine.optimizer.state.values())
    assert count <= moments <= 2 * count  # ZeRO's partitions are aligned
    assert moments < 0.1 * sum(value.numel() for value in small_runs.model_of().parameters())


def test_disable_dropout_leaves_that_of_lora() -> None:
    base = small_runs.model_of("gpt2")
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    config = LoraConfig(
        task_type="CAUSAL_LM", lora_dropout=0.2, target_modules=["c_attn"], fan_in_fan_out=True
    )
    model: Any = get_peft_model(base, config)
    disable_dropout(model)
    found = {
        ("lora_dropout" in name, module.p)
        for name, module in model.named_modules()
        if isinstance(module, nn.Dropout)
    }
    assert found == {(True, 0.2), (False, 0.0)}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("stage", [2, 3])
def test_new_tokens_with_resized_embeddings(tmp_path: Path, tied: bool, stage: int) -> None:
    """Both tables are trained and saved, and the saved folder gives the trained model's logits."""
    model = small_runs.model_of("qwen2" if tied else "llama")
    model.resize_token_embeddings(len(tiny_tokenizer()) + 20, mean_resizing=False)
    rows = model.get_input_embeddings().weight.detach().clone()
    config = LoraConfig(
        task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=tied, **LORA
    )
    trainer = trained(tmp_path / "run", model=model, peft_config=config, deepspeed=f"zero{stage}")
    trainer.save_model()
    trainer.model.eval()

    fresh = small_runs.model_of("qwen2" if tied else "llama")
    fresh.resize_token_embeddings(len(tiny_tokenizer()) + 20, mean_resizing=False)
    with torch.no_grad():
        fresh.get_input_embeddings().weight.copy_(rows)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "run").eval()
    ids = torch.randint(3, len(tiny_tokenizer()), (1, 9))
    state = state_of(trainer)
    moved = [name for name in state if "embed_tokens" in name or "lm_head" in name]
    assert moved
    assert all(value.shape[0] == len(rows) for name, value in state.items() if name in moved)
    with torch.no_grad():
        logits = loaded(ids).logits
        if stage == 2:
            torch.testing.assert_close(logits, trainer.model(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(state[moved[0]], rows)


# ---------------------------------------------------------------------- flags


def words(**flags: Any) -> list[str]:
    given = {"model_name_or_path": "m", "dataset_name": "d", "bf16": False, "report_to": "none"} | flags
    listed: list[str] = []
    for name, value in given.items():
        listed += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return listed


FLAGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all": {
        "lora_r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.25,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_target_parameters": ["mlp.experts.gate_up_proj"],
        "lora_modules_to_save": ["lm_head"],
        "lora_task_type": "SEQ_2_SEQ_LM",
        "use_rslora": True,
        "use_dora": True,
    },
    "one word": {"lora_target_modules": ["all-linear"]},
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_those_of_trl(name: str, tmp_path: Path) -> None:
    """The `LoraConfig` that `trl.get_peft_config` makes of the same flags; and every flag of `ModelConfig` is there."""
    script, _ = parse_train_arguments(words(output_dir=tmp_path, use_peft=True, **FLAGS[name]))
    theirs = get_peft_config(ModelConfig(use_peft=True, **FLAGS[name]))
    ours = script.peft_config()
    assert ours.to_dict() == theirs.to_dict()
    known = {field.name for field in dataclasses.fields(script)}
    assert {field.name for field in dataclasses.fields(ModelConfig)} - known == set()


def test_flags_of_quantisation(tmp_path: Path) -> None:
    flags = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True}
    _, args = parse_train_arguments(words(output_dir=tmp_path, use_peft=True, **flags))
    assert args.model_keywords["quantization_config"] == {
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    }
    script, _ = parse_train_arguments(words(output_dir=tmp_path, load_in_8bit=True))
    with pytest.raises(ValueError, match="set use_peft=True"):
        script.peft_config()
    with pytest.raises(ValueError, match="exclude each other"):
        parse_train_arguments(words(output_dir=tmp_path, use_peft=True, load_in_8bit=True, load_in_4bit=True))


# ---------------------------------------------------------------------- QLoRA

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_type": "nf4"}


def test_four_bits_without_bitsandbytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'orpo-ds\[qlora\]'"):
        adapters.check_quantization({"quantization_config": FOUR_BITS}, zero_stage=2)


def test_four_bits_under_zero3_are_refused() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="deepspeed='zero2'"):
        adapters.check_quantization({"quantization_config": FOUR_BITS}, zero_stage=3)


def save_wide_llama(folder: Path) -> str:
    """Rows of a multiple of 64 numbers, the block of the 4-bit format: bitsandbytes' CPU kernels want it."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.15,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("stage", [0, 2])
def test_qlora_trains_adapters_on_a_base_of_four_bits(tmp_path: Path, stage: int) -> None:
    """The first loss is that of the same model with the dequantised weights in fp32."""
    bnb = pytest.importorskip("bitsandbytes")
    folder = save_wide_llama(tmp_path / "model")
    quantised = small_runs.trainer(
        tmp_path / "run",
        model=folder,
        peft_config=LORA,
        model_init_kwargs={"quantization_config": FOUR_BITS},
        deepspeed=f"zero{stage}",
        max_steps=3,
        learning_rate=0.01,
    )
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, module in quantised.model.get_base_model().named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_submodule(name.replace(".base_layer", "")).weight.copy_(weight)
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in quantised.model.modules())
    dense = small_runs.trainer(
        tmp_path / "dense", model=plain, peft_config=LORA, max_steps=3, learning_rate=0.01
    )
    for trainer in (quantised, dense):
        trainer.train()
    first, second = (
        [line["loss"] for line in trainer.state.log_history if "loss" in line]
        for trainer in (quantised, dense)
    )
    assert first == pytest.approx(second, rel=1e-4)
    assert first[-1] < first[0]


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, stage: int, reentrant: bool) -> None:
    """The base is frozen, so nothing that enters a layer would ask for a gradient by itself."""
    changes = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "deepspeed": f"zero{stage}"}
    plain = trained(tmp_path / "plain", **changes)
    checkpointed = trained(
        tmp_path / "checkpointed",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        **changes,
    )
    assert checkpointed.model.get_base_model().is_gradient_checkpointing
    assert not checkpointed.model.config.use_cache
    ours, wanted = state_of(checkpointed), state_of(plain)
    fresh = small_runs.model_of().state_dict()
    for name, value in wanted.items():
        size = value.abs().max()
        assert (ours[name] - value).abs().max() <= 1e-5 * size, name
        assert size > 0
        assert name not in fresh
    checkpointed.save_model()
    loaded = PeftModel.from_pretrained(small_runs.model_of(), tmp_path / "checkpointed")
    assert loaded.config.use_cache
