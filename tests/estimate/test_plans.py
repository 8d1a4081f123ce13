"""Which presets `orpo-ds estimate` may propose: those that its arithmetic knows."""

from orpo_ds.deepspeed_json import PRESETS, read_deepspeed_config
from orpo_ds.estimate.plans import is_known


def test_presets_with_another_arithmetic_are_not_proposed() -> None:
    names = {path.stem for path in PRESETS.glob("*.json")}
    known = {name for name in names if is_known(read_deepspeed_config(name)["zero_optimization"])}
    assert names - known == {"zero3_hpz", "zero3_superoffload", "zero3_zenflow", "zero3_zeropp"}
