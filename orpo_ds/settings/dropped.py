"""Fields that transformers 5 has dropped and that scripts and YAML files still set.

`DroppedFields` accepts them from Python, YAML and the command line. `take_dropped` gives what they say to their
successors and puts them back to their defaults, so that a config that is written down and read again says everything
once. What has no successor is refused with the other refused fields (`table.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_ds.settings.claims import Mapped, shown
from orpo_ds.settings.table import CLAIMS


def _dropped(default: Any) -> Any:
    return field(default=default, metadata={"help": "Dropped by transformers 5; see docs/config.md."})


@dataclass
class DroppedFields:
    """The fields, with the types and defaults that they had."""

    per_gpu_train_batch_size: int | None = _dropped(None)
    per_gpu_eval_batch_size: int | None = _dropped(None)
    evaluation_strategy: str | None = _dropped(None)
    warmup_ratio: float = _dropped(0.0)
    logging_dir: str | None = _dropped(None)
    save_safetensors: bool | None = _dropped(True)
    no_cuda: bool = _dropped(False)
    use_mps_device: bool = _dropped(False)
    jit_mode_eval: bool = _dropped(False)
    use_ipex: bool = _dropped(False)
    fp16_opt_level: str = _dropped("O1")
    half_precision_backend: str = _dropped("auto")
    fp16_backend: str = _dropped("auto")
    tpu_num_cores: int | None = _dropped(None)
    tpu_metrics_debug: bool = _dropped(False)
    past_index: int = _dropped(-1)
    fsdp_min_num_params: int = _dropped(0)
    fsdp_transformer_layer_cls_to_wrap: str | None = _dropped(None)
    adafactor: bool = _dropped(False)
    group_by_length: bool = _dropped(False)
    use_legacy_prediction_loop: bool = _dropped(False)
    include_inputs_for_metrics: bool = _dropped(False)
    push_to_hub_model_id: str | None = _dropped(None)
    push_to_hub_organization: str | None = _dropped(None)
    push_to_hub_token: str | None = _dropped(None)
    mp_parameters: str = _dropped("")
    torchdynamo: str | None = _dropped(None)
    ray_scope: str | None = _dropped("last")
    include_tokens_per_second: bool | None = _dropped(False)


DROPPED = frozenset(item.name for item in dataclasses.fields(DroppedFields))


def defaults_of(config: Any) -> dict[str, Any]:
    """The default of every field of a dataclass."""
    return {
        item.name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        for item in dataclasses.fields(config)
    }


def take_dropped(config: Any) -> list[str]:
    """Give what the mapped fields say to their successors, in place.

    Args:
        config: an `ORPOConfig` whose values are still those that the user gave.

    Returns:
        One warning for each mapped field that was set.

    Raises:
        ValueError: a mapped field and its successor say different things; names both.
    """
    defaults = defaults_of(config)
    warnings = []
    for claim in CLAIMS.values():
        if not isinstance(claim, Mapped):
            continue
        given, default = getattr(config, claim.name), defaults[claim.name]
        if given == default:
            continue
        if not claim.successor:
            warnings.append(f"{shown(claim.name, given)}: {_plain(claim.says)}")
            continue
        value = TRANSLATED.get(claim.name, _as_it_is)(config, given)
        _hand_over(config, claim, value, default=defaults[claim.successor])
        setattr(config, claim.name, default)
        taken = shown(claim.successor, getattr(config, claim.successor))
        warnings.append(f"{shown(claim.name, given)} is an old name: taken as {taken}. Write that instead.")
    return warnings


def _hand_over(config: Any, claim: Mapped, value: Any, *, default: Any) -> None:
    present = getattr(config, claim.successor)
    # push_to_hub_organization comes after push_to_hub_model_id, which has filled the successor already.
    if present not in (default, value) and claim.name not in COMPLETED_BY_OTHERS:
        raise ValueError(
            f"{shown(claim.name, getattr(config, claim.name))} and {shown(claim.successor, present)} disagree: "
            f"remove {claim.name}, which is the old name."
        )
    setattr(config, claim.successor, value)


def _as_it_is(_: Any, value: Any) -> Any:
    return value


def _warmup(_: Any, ratio: float) -> float:
    if not 0 <= ratio <= 1:
        raise ValueError(f"warmup_ratio={ratio} must lie between 0 and 1: it is a share of all steps.")
    # `warmup_steps=1` is one step; the number just below it is rounded up to all steps.
    return min(ratio, math.nextafter(1.0, 0.0))


def _with_inputs(config: Any, _: bool) -> list[str]:
    return [*config.include_for_metrics, *({"inputs"} - set(config.include_for_metrics))]


def _model_id(config: Any, name: str) -> str:
    organization = config.push_to_hub_organization
    return f"{organization}/{name}" if organization else name


def _organization(config: Any, organization: str) -> str:
    if config.hub_model_id is not None:  # from push_to_hub_model_id, with the organization in front
        return config.hub_model_id
    return f"{organization}/{Path(config.output_dir or 'trainer_output').name}"


def _plain(text: str) -> str:
    return text.replace("`", "")


TRANSLATED: dict[str, Callable[[Any, Any], Any]] = {
    "warmup_ratio": _warmup,
    "adafactor": lambda _, __: "adafactor",
    "group_by_length": lambda _, __: "group_by_length",
    "include_inputs_for_metrics": _with_inputs,
    "push_to_hub_model_id": _model_id,
    "push_to_hub_organization": _organization,
}
COMPLETED_BY_OTHERS = {"push_to_hub_organization", "include_inputs_for_metrics"}
