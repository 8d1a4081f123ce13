"""Refused fields stop the run by name, from Python, YAML and the command line; at their defaults they are silent."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.parallelism_config import ParallelismConfig

from orpo_ds import ORPOConfig
from orpo_ds.cli import parse_train_arguments
from orpo_ds.settings.claims import Honoured, Refused
from orpo_ds.settings.dropped import defaults_of
from orpo_ds.settings.table import CLAIMS
from tests.small_runs import settings

REFUSED = [claim for claim in CLAIMS.values() if isinstance(claim, Refused)]
REFUSED_VALUES = [
    (claim, value) for claim in CLAIMS.values() if isinstance(claim, Honoured) for value in claim.refuses
]

# Values that the type of the field allows; a boolean's is the other one than its default.
VALUES: dict[str, Any] = {
    "accelerator_config": {"split_batches": True},
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_prefetch_factor": 4,
    "ddp_backend": "gloo",
    "ddp_broadcast_buffers": True,
    "ddp_bucket_cap_mb": 50,
    "ddp_static_graph": True,
    "debug": "underflow_overflow",
    "fp16_opt_level": "O2",
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2},
    "fsdp_min_num_params": 1000,
    "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "hub_model_id": "me/model",
    "hub_private_repo": True,
    "hub_revision": "v2",
    "hub_strategy": "end",
    "hub_token": "hf_abcdefgh",
    "include_num_input_tokens_seen": "all",
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "tokens",
    "log_level": "info",
    "log_level_replica": "info",
    "mp_parameters": "ddp=true",
    "parallelism_config": ParallelismConfig(),
    "past_index": 1,
    "ray_scope": "all",
    "tpu_num_cores": 8,
}
ONLY_IN_PYTHON = {"parallelism_config"}  # an object


def value_of(claim: Refused) -> Any:
    default = defaults_of(ORPOConfig)[claim.name]
    return not default if isinstance(default, bool) else VALUES[claim.name]


def parse(tmp_path: Path, fields: dict[str, Any], *words: str) -> ORPOConfig:
    """What `orpo-ds train` makes of a YAML file and flags."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), **fields}))
    line = ["--model_name_or_path", "m", "--dataset_name", "d", "--config", str(file), *words]
    return parse_train_arguments(line)[1]


@pytest.mark.parametrize("claim", REFUSED, ids=lambda claim: claim.name)
def test_a_refused_field_is_named(tmp_path: Path, claim: Refused) -> None:
    value = value_of(claim)
    messages = []
    with pytest.raises(ValueError) as raised:
        settings(tmp_path / "run", **{claim.name: value})
    messages.append(str(raised.value))
    if claim.name not in ONLY_IN_PYTHON:
        with pytest.raises(ValueError) as raised:
            parse(tmp_path, {claim.name: value})
        messages.append(str(raised.value))
    if claim.name not in ONLY_IN_PYTHON and not isinstance(value, dict | list):
        with pytest.raises(ValueError) as raised:
            parse(tmp_path, {}, f"--{claim.name}", str(value))
        messages.append(str(raised.value))
    for message in messages:
        assert message.startswith(f"{claim.name}=")
        assert claim.why in message
        assert message.endswith(claim.instead)
        assert "hf_abcdefgh" not in message


@pytest.mark.parametrize(
    ("claim", "value"), REFUSED_VALUES, ids=lambda item: str(getattr(item, "name", item))
)
def test_a_refused_value_is_named(tmp_path: Path, claim: Honoured, value: Any) -> None:
    with pytest.raises(ValueError) as raised:
        settings(tmp_path / "run", **{claim.name: value})
    assert str(raised.value) == f"{claim.name}={value!r} is refused: {claim.refuses[value]}"


def test_defaults_and_accepted_values_are_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    defaults = defaults_of(ORPOConfig)
    with caplog.at_level(logging.WARNING):
        settings(tmp_path / "run", **{claim.name: defaults[claim.name] for claim in REFUSED})
        for claim in REFUSED:
            for value in claim.accepts:
                settings(tmp_path / "run", **{claim.name: value})
    assert [record.message for record in caplog.records if record.name.startswith("orpo_ds")] == []
