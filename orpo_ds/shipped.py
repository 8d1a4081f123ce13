"""Where the files that come with the package lie: DeepSpeed presets and launch scripts.

In a checkout they stand beside the package, where a person looks for them; a wheel carries them inside it.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: str) -> Path:
    """The folder `ds_configs` or `launch`, in a checkout or an installed package."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
