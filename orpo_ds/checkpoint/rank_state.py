"""What DeepSpeed does not save: the state of each rank's random generators.

Dropout, NEFTune noise and sampling during evaluation draw from them, so a bit-exact continuation needs all
four: Python's, numpy's, torch's CPU generator, and one for each visible GPU. The file holds tensors and
plain values only and is loaded with `weights_only=True`.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orpo_ds.checkpoint.ranks import Ranks


def save_rank_state(folder: Path, ranks: Ranks) -> None:
    """Write this rank's generators to `folder/rank_state/<rank>.pt`. Raises OSError when the disk is full."""
    path = _path(folder, ranks)
    path.parent.mkdir(exist_ok=True)
    save_torch_file(random_state(), path)


def load_rank_state(folder: Path, ranks: Ranks) -> None:
    """Set this rank's generators to what `save_rank_state` wrote."""
    set_random_state(torch.load(_path(folder, ranks), map_location="cpu", weights_only=True))


def seed_rank_anew(*, seed: int, step: int, ranks: Ranks) -> None:
    """Start this rank's generators for a run that continues on another number of ranks.

    What they draw belongs to a rank and its micro-batches, and those are others now. Each rank gets a stream of its
    own, which follows from (seed, step, ranks, rank) and repeats none that was drawn from before.
    """
    source = np.random.SeedSequence([seed, step, ranks.world_size, ranks.rank])
    first, second, third = (int(word) for word in source.generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(third)  # of all devices


def random_state() -> dict[str, Any]:
    """The state of all random generators of this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict), "legacy=False gives a dict"
    numpy_key = torch.tensor(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": (version, list(words), gauss),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`.

    Raises:
        ValueError: the number of visible GPUs is not the saved one.
    """
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible != len(state["cuda"]):
        raise ValueError(
            f"the checkpoint was written with {len(state['cuda'])} visible GPUs a rank, here are {visible}"
        )
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = state["numpy"]
    numpy_key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": numpy_key}})
    torch.set_rng_state(state["torch"])
    if visible:
        torch.cuda.set_rng_state_all(state["cuda"])


def save_torch_file(value: Any, path: str | os.PathLike[str], *, zip_format: bool = True) -> None:
    """`torch.save` that says why it failed.

    Given a path, torch hides a full disk behind "unexpected pos 640 vs 598". Given an open file, the
    OSError is still there, as the context of that message.

    Raises:
        OSError: with the error number and the file; the partial file is removed, so its space is free again.
    """
    try:
        with open(path, "wb") as file:
            torch.save(value, file, _use_new_zipfile_serialization=zip_format)
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        Path(path).unlink(missing_ok=True)
        raise OSError(cause.errno, cause.strerror, os.fspath(path)) from None


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _path(folder: Path, ranks: Ranks) -> Path:
    return folder / "rank_state" / f"{ranks.rank}.pt"
