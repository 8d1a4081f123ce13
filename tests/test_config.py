"""ORPOConfig: TRL's defaults, values that are checked at once, and a DeepSpeed JSON that stays the user's."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.experimental.orpo

from orpo_ds import ORPOConfig
from orpo_ds.cli import parse_train_arguments
from orpo_ds.deepspeed_json import PRESETS, read_deepspeed_config
from tests.small_runs import settings

DECIDED_OTHERWISE = {
    # TRL turns it on; here the packed rows and the tiled head make it a choice, and off is faster.
    "gradient_checkpointing",
    # A run that its cluster takes the machine from is saved, without being told so.
    "enable_jit_checkpoint",
    # The defaults that TRL had before transformers 5 spelled them otherwise (tests/settings/orpo_config_fields.tsv).
    "fsdp",
    "include_num_input_tokens_seen",
    "lr_scheduler_kwargs",
    "optim",
    "report_to",
}


def default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def test_defaults_are_trls() -> None:
    ours = {field.name: default(field) for field in dataclasses.fields(ORPOConfig)}
    theirs = {field.name: default(field) for field in dataclasses.fields(trl.experimental.orpo.ORPOConfig)}
    shared = ours.keys() & theirs.keys()
    assert {"beta", "max_length", "max_completion_length", "disable_dropout", "dataset_num_proc"} <= shared
    assert {name for name in shared if ours[name] != theirs[name]} == DECIDED_OTHERWISE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
        ({"max_tokens_per_micro_batch": -1}, "max_tokens_per_micro_batch=-1"),
        ({"logits_cache_mib": -1}, "logits_cache_mib=-1"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"layout": "dense"}, "layout='dense' is unknown. Use one of: auto, packed, padded"),
        ({"truncation_mode": "middle"}, "truncation_mode='middle'"),
        ({"unusable_rows": "ignore"}, "unusable_rows='ignore'"),
        ({"fp16": True, "bf16": True}, "exclude each other"),
        # What would otherwise be passed over in silence.
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"save_strategy": "best"}, "save_strategy='best' needs evaluations to choose by"),
    ],
)
def test_values_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        settings(tmp_path, **changes)
    assert message in str(raised.value)


@pytest.mark.parametrize("given", ["zero3_offload", "ds_configs/zero3_offload.json", "PATH"])
def test_presets_by_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = PRESETS / "zero3_offload.json"
    found = read_deepspeed_config(str(shipped) if given == "PATH" else given)
    assert found == json.loads(shipped.read_text())
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_a_file_of_ones_own_wins_over_a_preset_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert read_deepspeed_config("zero2.json") == {"zero_optimization": {"stage": 1}}


def test_no_json_is_zero2(tmp_path: Path) -> None:
    assert settings(tmp_path, deepspeed=None).deepspeed_settings["zero_optimization"]["stage"] == 2


def test_a_dict_is_not_changed(tmp_path: Path) -> None:
    given = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
    before = json.dumps(given)
    settings(tmp_path, deepspeed=given)
    assert json.dumps(given) == before


@pytest.mark.parametrize(
    ("json_says", "given", "settled"),
    [("auto", None, False), (True, None, True), (False, None, False), ("auto", True, True)],
)
def test_bf16_is_settled_by_the_json_or_the_hardware(
    tmp_path: Path, json_says: Any, given: bool | None, settled: bool
) -> None:
    if json_says == "auto" and given is None and torch.cuda.is_available():
        settled = torch.cuda.is_bf16_supported()
    args = settings(
        tmp_path, bf16=given, deepspeed={"zero_optimization": {"stage": 2}, "bf16": {"enabled": json_says}}
    )
    assert args.bf16 is settled


def test_batch_sizes(tmp_path: Path) -> None:
    args = settings(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=5, max_length=100)
    assert args.global_batch_size == 15  # one rank
    assert args.micro_batch_tokens == 600  # 3 pairs of two responses of 100 tokens
    assert settings(tmp_path, max_tokens_per_micro_batch=64).micro_batch_tokens == 64
    assert settings(tmp_path, max_length=None, max_prompt_length=None).micro_batch_tokens is None


def test_use_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        args = settings(tmp_path, use_cpu=True)
        assert (args.use_cpu, args.device.type, args.world_size) == (True, "cpu", 1)
        assert settings(tmp_path, no_cuda=True).use_cpu is True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu"):
        settings(tmp_path, use_cpu=True)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [True, False])
def test_tf32_on_a_gpu(tmp_path: Path, wanted: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        settings(tmp_path, tf32=wanted)
        assert torch.backends.cuda.matmul.allow_tf32 is wanted
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tf32_without_a_gpu(tmp_path: Path) -> None:
    settings(tmp_path, tf32=False)
    with pytest.raises(ValueError, match="tf32"):
        settings(tmp_path, tf32=True)


def test_gradient_checkpointing_by_its_old_name_gives_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = settings(tmp_path, gradient_checkpointing=True)
    assert args.gradient_checkpointing is True


# ---------------------------------------------------------------------- YAML and flags

REQUIRED = ("--model_name_or_path", "some/model", "--dataset_name", "some/rows", "--report_to", "none")


def parse(tmp_path: Path, yaml: str, *words: str) -> ORPOConfig:
    (tmp_path / "run.yaml").write_text(yaml)
    line = [*REQUIRED, "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run"), *words]
    return parse_train_arguments(line)[1]


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-5 as a string."""
    args = parse(tmp_path, "learning_rate: 1e-5\nweight_decay: 1E-2\nnum_train_epochs: 2\n")
    assert (args.learning_rate, args.weight_decay, args.num_train_epochs) == (1e-5, 0.01, 2.0)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    yaml = "learning_rate: 1e-5\nbeta: 0.2\nmax_length: 77\n"
    args = parse(tmp_path, yaml, "--beta", "0.3", "--max_length=99")
    assert (args.learning_rate, args.beta, args.max_length) == (1e-5, 0.3, 99)


def test_booleans_lists_and_nulls_of_the_file(tmp_path: Path) -> None:
    yaml = (
        "gradient_checkpointing: true\ndisable_dropout: false\nmax_length: null\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nmodel_init_kwargs:\n  revision: v2\n"
    )
    args = parse(tmp_path, yaml)
    assert args.gradient_checkpointing is True
    assert args.disable_dropout is False
    assert args.max_length is None
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.model_keywords["revision"] == "v2"


@pytest.mark.parametrize("name", ["disable_dropout", "nll_on_prompt"])
def test_what_is_on_by_default_can_be_turned_off_and_on_again(tmp_path: Path, name: str) -> None:
    assert getattr(parse(tmp_path, f"{name}: false\n"), name) is False
    assert getattr(parse(tmp_path, "beta: 0.1\n", f"--no_{name}"), name) is False
    assert getattr(parse(tmp_path, f"{name}: false\n", f"--{name}"), name) is True


def test_the_file_may_hold_the_deepspeed_settings_themselves(tmp_path: Path) -> None:
    args = parse(tmp_path, "deepspeed:\n  zero_optimization:\n    stage: 1\n")
    assert args.deepspeed_settings["zero_optimization"]["stage"] == 1


def test_the_file_may_name_model_and_data(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: a/b\ndataset_name: c.jsonl\nuse_peft: true\nreport_to: none\n"
    )
    script, args = parse_train_arguments(["--config", str(tmp_path / "run.yaml")])
    assert (script.model_name_or_path, script.dataset_name, script.use_peft) == ("a/b", "c.jsonl", True)
    assert args.output_dir == "trainer_output"
