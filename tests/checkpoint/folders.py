"""Small checkpoints made of plain files, for the tests that need no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from orpo_ds.checkpoint import CheckpointMetadata, CheckpointStore, one_rank

FILES = {
    "engine/weights.pt": bytes(range(256)) * 40,
    "engine/optimizer.pt": b"\x07" * 5000,
    "args.json": b"{}",
}


def metadata(step: int, **changes: object) -> CheckpointMetadata:
    fields = {
        "step": step,
        "epoch": step / 10,
        "seed": 7,
        "world_size": 1,
        "zero_stage": 3,
        "global_batch_size": 16,
        "dataset_fingerprint": "0123abcd",
        "config": {"learning_rate": 1e-5, "betas": (0.9, 0.999), "hub_token": "very-secret"},
    }
    return CheckpointMetadata(**(fields | changes))  # type: ignore[arg-type]


def writer(files: Mapping[str, bytes] = FILES) -> Callable[[Path], None]:
    """What a rank passes to `CheckpointStore.save`."""

    def write(folder: Path) -> None:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    return write


def store_in(output_dir: Path, *, limit: int | None = None) -> CheckpointStore:
    return CheckpointStore(output_dir, save_total_limit=limit, ranks=one_rank())


def flip_byte(path: Path, *, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
