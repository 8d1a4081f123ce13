"""Old names of settings: each is taken over with one warning, from Python, YAML and the command line."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from orpo_ds import ORPOConfig
from orpo_ds.settings.claims import Mapped
from orpo_ds.settings.dropped import defaults_of, take_dropped
from orpo_ds.settings.table import CLAIMS
from tests.settings.test_refused import parse
from tests.small_runs import settings

# What each mapped field is set to, and what its successor has then.
CASES: dict[str, tuple[Any, Any]] = {
    "per_gpu_train_batch_size": (3, 3),
    "per_gpu_eval_batch_size": (5, 5),
    "evaluation_strategy": ("epoch", "epoch"),
    "warmup_ratio": (0.1, 0.1),
    "no_cuda": (True, True),
    "adafactor": (True, "adafactor"),
    "group_by_length": (True, "group_by_length"),
    "include_inputs_for_metrics": (True, ["inputs"]),
    "push_to_hub_model_id": ("model", "model"),
    "push_to_hub_organization": ("us", "us/run"),
    "push_to_hub_token": ("hf_abcdefgh", "hf_abcdefgh"),
    "torchdynamo": ("eager", "eager"),
    "half_precision_backend": ("cuda_amp", None),
    "fp16_backend": ("cuda_amp", None),
    "include_tokens_per_second": (True, None),
    "logging_nan_inf_filter": (False, None),
    "skip_memory_metrics": (False, None),
    "ddp_find_unused_parameters": (False, None),
    "dataloader_num_workers": (4, None),
    "dataloader_persistent_workers": (True, None),
    "remove_unused_columns": (False, None),
}


# Their successors start something, or need a package.
APART = {"torchdynamo", "push_to_hub_token", "push_to_hub_model_id", "push_to_hub_organization"}


def test_every_mapped_field_is_tried() -> None:
    assert {claim.name for claim in CLAIMS.values() if isinstance(claim, Mapped)} == CASES.keys()


@dataclasses.dataclass
class Given(ORPOConfig):
    """The settings as the user gave them, before anything looks at them."""

    def __post_init__(self) -> None:
        pass


@pytest.mark.parametrize("name", CASES)
def test_an_old_name_is_taken_with_one_warning(tmp_path: Path, name: str) -> None:
    claim = CLAIMS[name]
    assert isinstance(claim, Mapped)
    value, wanted = CASES[name]
    given = Given(output_dir=str(tmp_path / "run"), **{name: value})
    [warning] = take_dropped(given)
    assert warning.startswith(f"{name}=")
    assert "hf_abcdefgh" not in warning
    if claim.successor:
        assert getattr(given, claim.successor) == wanted
        assert getattr(given, name) == defaults_of(ORPOConfig)[name]
        assert f"taken as {claim.successor}=" in warning
    assert take_dropped(given) == ([] if claim.successor else [warning])


@pytest.mark.parametrize("route", ["python", "yaml", "flags"])
def test_each_route_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, route: str) -> None:
    old = {name: value for name, (value, _) in CASES.items() if name not in APART}
    with caplog.at_level(logging.WARNING):
        if route == "python":
            args = ORPOConfig(output_dir=str(tmp_path / "run"), **old)
        elif route == "yaml":
            args = parse(tmp_path, old)
        else:
            words = [word for name, value in old.items() for word in (f"--{name}", str(value))]
            args = parse(tmp_path, {}, *words)
    records = [record for record in caplog.records if record.name == "orpo_ds.config"]
    assert sorted(record.message.partition("=")[0] for record in records) == sorted(old)
    for name in old:
        claim = CLAIMS[name]
        assert isinstance(claim, Mapped)
        if claim.successor:
            assert getattr(args, claim.successor) == CASES[name][1], name


@pytest.mark.parametrize(("ratio", "steps"), [(0.1, 4), (0.001, 1), (0.0, 0), (1.0, 40)])
def test_warmup_ratio_is_rounded_up_as_transformers_4_did(tmp_path: Path, ratio: float, steps: int) -> None:
    assert settings(tmp_path / "run", warmup_ratio=ratio).get_warmup_steps(40) == steps


def test_a_ratio_beyond_all_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"warmup_ratio=1\.5 must lie between 0 and 1"):
        settings(tmp_path / "run", warmup_ratio=1.5)


def test_old_and_new_name_that_disagree(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="per_gpu_train_batch_size=3 and per_device_train_batch_size=4 disagree"
    ):
        settings(tmp_path / "run", per_gpu_train_batch_size=3)
    given = Given(push_to_hub_token="hf_old", hub_token="hf_new")
    with pytest.raises(ValueError, match="push_to_hub_token=<token> and hub_token=<token> disagree"):
        take_dropped(given)


def test_organization_and_model_together() -> None:
    given = Given(output_dir="runs/mine", push_to_hub_organization="us", push_to_hub_model_id="theirs")
    assert len(take_dropped(given)) == 2
    assert given.hub_model_id == "us/theirs"


def test_settings_survive_being_written_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = settings(
        tmp_path / "run", per_device_train_batch_size=8, per_gpu_train_batch_size=3, warmup_ratio=0.1
    )
    caplog.clear()
    again = ORPOConfig(**args.to_dict())
    changed = dataclasses.replace(args, seed=7)
    assert again.to_dict() == args.to_dict()
    assert changed.to_dict() == args.to_dict() | {"seed": 7}
    assert [record.message for record in caplog.records if record.name == "orpo_ds.config"] == []
