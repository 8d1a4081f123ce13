"""ORPO preference training for large language models on DeepSpeed.

Two names are the whole Python surface: `ORPOConfig` and `ORPOTrainer`. They are imported on first use, so that
`import orpo_ds` and `orpo-ds --help` answer before torch, transformers and DeepSpeed have been loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_ds.config import ORPOConfig
    from orpo_ds.trainer import ORPOTrainer

__version__ = "0.1.0"
__all__ = ["ORPOConfig", "ORPOTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "ORPOConfig":
        from orpo_ds.config import ORPOConfig

        return ORPOConfig
    if name == "ORPOTrainer":
        from orpo_ds.trainer import ORPOTrainer

        return ORPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
