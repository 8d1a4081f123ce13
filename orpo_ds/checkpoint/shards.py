"""Where each number of a saved engine stands: parameters by name, in whatever layout DeepSpeed wrote them.

DeepSpeed cuts weights and optimizer state differently for every number of ranks and every ZeRO stage:

    stage 0     one file; a tensor for each parameter
    stage 1, 2  a file a rank; the parameters of a group lie end to end, and are cut into one run for each rank
    stage 3     a file a rank; every parameter is cut into one run for each rank
    universal   a folder for each parameter (`orpo-ds convert --universal`, DeepSpeed's `ds_to_universal`)

Here all four become the same thing: for each name, `Piece`s of the flattened parameter. The files are mapped into
memory and not read, so a piece costs nothing until somebody copies from it: no host holds more than it asks for.

The files are pickles. Whoever opens them has verified the checkpoint first.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import constants as ds
from torch import Tensor

OPTIMIZER_NAMES = "optimizer_names.json"  # of stage 0, whose optimizer state is numbered and not named
UNIVERSAL_FOLDER = "zero"
RANK_OF_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_")


@dataclass(frozen=True)
class Layout:
    """How an engine cuts its state.

    Attributes:
        ranks: that share the state.
        tensor_ranks: that share one copy of the model (tensor parallelism).
        zero: `zero_optimization` of the DeepSpeed JSON.
        universal: not cut at all.
    """

    ranks: int
    tensor_ranks: int
    zero: dict[str, Any]
    universal: bool = False

    def __str__(self) -> str:
        if self.universal:
            return "in DeepSpeed's universal format"
        parts = [part for part in ("offload_optimizer", "offload_param") if self.zero.get(part)]
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"for {ranks} under ZeRO-{self.zero.get('stage', 0)}" + "".join(
            f", {part} {self.zero[part].get('device')}" for part in parts
        )


@dataclass(frozen=True)
class Piece:
    """A run of numbers of one flattened parameter.

    Attributes:
        start: place of its first number in the parameter.
        weights: [n], the fp32 copy where the parameter is trained in a lower precision.
        states: optimizer state by name, [n] each; empty for a weight that does not train.
        step: updates that the optimizer counts; None where it counts none, or has not begun.
    """

    start: int
    weights: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)
    step: int | None = None


@dataclass(frozen=True)
class SavedEngine:
    """The content of `checkpoint-N/engine`.

    Attributes:
        pieces: name of a parameter -> all of it, in order. A tied weight has its pieces under each of its names.
        buffers: persistent ones by name.
        param_groups: learning rate and other numbers of the optimizer's groups.
        loss_scaler: DeepSpeed's own object under ZeRO; matters for fp16 only.
        counters: `global_steps` and other counts of the engine.
    """

    pieces: dict[str, list[Piece]]
    buffers: dict[str, Tensor]
    param_groups: list[dict[str, Any]]
    loss_scaler: Any | None
    counters: dict[str, int]

    def numel(self, name: str) -> int:
        """Numbers of a parameter."""
        return sum(piece.weights.numel() for piece in self.pieces[name])

    def fill(self, target: Tensor, name: str, *, start: int = 0, state: str | None = None) -> None:
        """Copy numbers of a parameter, from `start` on, into `target` [n], whatever its dtype and device.

        Args:
            target: where to.
            name: of the parameter.
            start: place of the first number in the flattened parameter.
            state: of the optimizer; None: the weights. Where there is no such state yet, `target` gets zeros.
        """
        end, filled = start + target.numel(), 0
        for piece in self.pieces[name]:
            first = max(start, piece.start)
            last = min(end, piece.start + piece.weights.numel())
            if first >= last:
                continue
            source = piece.weights if state is None else piece.states.get(state)
            run = target[first - start : last - start]
            if source is None:
                run.zero_()
            else:
                run.copy_(source[first - piece.start : last - piece.start])
            filled += last - first
        assert filled == target.numel(), (
            f"{name}: {filled} of {target.numel()} numbers from {start} on are there"
        )


def saved_layout(folder: Path) -> Layout:
    """How the engine in `folder` was cut; opens one file."""
    model = _mapped(min(folder.glob(f"*{ds.MODEL_FILE_SUFFIX}")))  # any of them says so
    return Layout(
        ranks=model["dp_world_size"],
        tensor_ranks=model["mp_world_size"],
        zero=model["ds_config"].get("zero_optimization", {}),
        universal=(folder / UNIVERSAL_FOLDER).is_dir(),
    )


def open_engine(folder: Path) -> SavedEngine:
    """Map the files of a *verified* checkpoint's `engine` folder.

    Raises:
        ValueError: this optimizer's state cannot be dealt out anew; says what of it.
    """
    models = [_mapped(path) for path in _files(folder, ds.MODEL_FILE_SUFFIX)]
    model = models[0]
    shards = [
        _mapped(path)[ds.OPTIMIZER_STATE_DICT]
        for path in (_files(folder, ds.OPTIM_FILE_SUFFIX) if model["optimizer"] is None else [])
    ]
    names_file = folder / OPTIMIZER_NAMES
    if (folder / UNIVERSAL_FOLDER).is_dir():
        pieces, rest = _universal_pieces(folder / UNIVERSAL_FOLDER, model)
    elif shards and ds.FP32_FLAT_GROUPS in shards[0]:
        pieces, rest = _zero3_pieces(shards, model), shards[0]
    elif shards:
        pieces, rest = _zero12_pieces(shards), shards[0]
    elif names_file.is_file():
        pieces, rest = _whole_pieces(model, json.loads(names_file.read_text())), model["optimizer"]
    else:
        raise ValueError(
            f"{folder} was written by an older orpo_ds at ZeRO stage 0, which does not say which state belongs to "
            "which parameter. Resume it at stage 0."
        )
    _add_frozen(pieces, models)
    for name, first_name in (model["shared_params"] or {}).items():
        if first_name in pieces:  # else it does not train, and was left out
            pieces.setdefault(name, pieces[first_name])
    buffers = {name: model["module"][name] for name in model[ds.BUFFER_NAMES]}
    base = rest.get(ds.BASE_OPTIMIZER_STATE) or rest.get(ds.OPTIMIZER_STATE_DICT) or rest
    return SavedEngine(
        pieces=pieces,
        buffers=buffers,
        param_groups=(rest if ds.PARAM_GROUPS in rest else base)[ds.PARAM_GROUPS],
        loss_scaler=rest.get(ds.LOSS_SCALER),
        counters={name: model[name] for name in ("global_steps", "global_samples", "skipped_steps")},
    )


def _mapped(path: Path) -> Any:
    # A JSON may ask for torch's older format, which cannot be mapped.
    return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=False)


def _files(folder: Path, suffix: str) -> list[Path]:
    """The files of all ranks, in the ranks' order."""
    found = {}
    for path in folder.glob(f"*{suffix}"):
        match = RANK_OF_FILE.search(path.name)
        assert match is not None, path
        if int(match[2]):
            raise ValueError(
                f"{folder} was written under tensor parallelism: resume it on the same ranks, with the same JSON."
            )
        found[int(match[1] or 0)] = path
    return [found[rank] for rank in sorted(found)]


# ---------------------------------------------------------------------- the four layouts


@dataclass(frozen=True)
class _Flat:
    """A tensor that the optimizer updates, with its state: parameters, or runs of them, end to end."""

    weights: Tensor
    states: dict[str, Tensor]
    step: int | None

    def piece(self, offset: int, numel: int, *, start: int) -> Piece:
        return Piece(
            start=start,
            weights=self.weights[offset : offset + numel],
            states={name: value[offset : offset + numel] for name, value in self.states.items()},
            step=self.step,
        )


def _flat(weights: Tensor, state: Mapping[str, Any]) -> _Flat:
    """Take an optimizer's state apart.

    Raises:
        ValueError: a part of it is neither a number for each weight nor the count of steps.
    """
    states, step = {}, None
    for name, value in state.items():
        if name == "step":
            step = int(value)
        elif torch.is_tensor(value) and value.dim() > 0 and value.numel() >= weights.numel():
            states[name] = value.reshape(-1)  # longer by the padding of the last rank
        elif value is not None:
            raise ValueError(
                f"the optimizer keeps {name!r} for a whole shard and not for each number of it, so its state cannot be "
                "dealt out anew. Resume on the ranks, and with the zero_optimization, of the checkpoint's run."
            )
    return _Flat(weights.detach().reshape(-1), states, step)


def _zero12_pieces(shards: list[dict[str, Any]]) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for shard in shards:
        states = shard[ds.BASE_OPTIMIZER_STATE]["state"]
        for number, runs in enumerate(shard[ds.PARAM_SLICE_MAPPINGS]):
            flat = _flat(shard[ds.SINGLE_PARTITION_OF_FP32_GROUPS][number], states.get(number, {}))
            for name, run in runs.items():
                before = pieces[name][-1] if pieces[name] else None
                start = before.start + before.weights.numel() if before else 0
                pieces[name].append(flat.piece(run.start, run.numel, start=start))
    return dict(pieces)


def _zero3_pieces(shards: list[dict[str, Any]], model: dict[str, Any]) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for rank, shard in enumerate(shards):
        states = shard[ds.OPTIMIZER_STATE_DICT]["state"]
        for number, shapes in enumerate(model[ds.PARAM_SHAPES]):
            flat = _flat(shard[ds.FP32_FLAT_GROUPS][number], states.get(number, {}))
            offset = 0
            for name, shape in shapes.items():
                start, numel, share = zero3_share(shape.numel(), rank=rank, ranks=len(shards))
                pieces[name].append(flat.piece(offset, numel, start=start))
                offset += share
    return dict(pieces)


def zero3_share(numel: int, *, rank: int, ranks: int) -> tuple[int, int, int]:
    """(first number, numbers, numbers with padding) of a rank's part of a parameter under ZeRO-3."""
    share = math.ceil(numel / ranks)
    start = min(rank * share, numel)
    return start, min(share, numel - start), share


def _whole_pieces(model: dict[str, Any], names: list[str]) -> dict[str, list[Piece]]:
    optimizer = model["optimizer"]
    states = optimizer.get(ds.OPTIMIZER_STATE_DICT, optimizer)["state"]
    masters = [value for group in optimizer.get(ds.FP32_GROUPS, []) for value in group]
    weights = masters or [model["module"][name] for name in names]  # in fp32 the weights are the fp32 copy
    pieces = {}
    for number, (name, value) in enumerate(zip(names, weights, strict=True)):
        pieces[name] = [_flat(value, states.get(number, {})).piece(0, value.numel(), start=0)]
    return pieces


def _universal_pieces(folder: Path, model: dict[str, Any]) -> tuple[dict[str, list[Piece]], dict[str, Any]]:
    rest = _mapped(folder / "optimizer_state.pt")
    nested = rest.get(ds.OPTIMIZER_STATE_DICT, {}).get("state", {})  # of stage 3: the step stands here only
    common = {"step": nested[0]["step"]} if nested and "step" in nested[0] else {}
    pieces = {}
    for name in (name for shapes in model[ds.PARAM_SHAPES] for name in shapes):
        values = {path.stem: _mapped(path) for path in sorted((folder / name).glob("*.pt"))}
        values = {key: value[ds.PARAM] if isinstance(value, dict) else value for key, value in values.items()}
        flat = _flat(values.pop(ds.FP32_WEIGHT_KEY), common | values)
        pieces[name] = [flat.piece(0, flat.weights.numel(), start=0)]
    return pieces, rest


def _add_frozen(pieces: dict[str, list[Piece]], models: list[dict[str, Any]]) -> None:
    """The weights that do not train, as far as they were saved."""
    model = models[0]
    fragments = [one[ds.FROZEN_PARAM_FRAGMENTS] or {} for one in models]
    if len(models) > 1 or _is_stage3(model):
        for name, shape in (model[ds.FROZEN_PARAM_SHAPES] or {}).items():
            pieces[name] = []
            for rank, own in enumerate(fragments):
                start, numel, _ = zero3_share(shape.numel(), rank=rank, ranks=len(models))
                pieces[name].append(Piece(start, own[name].reshape(-1)[:numel]))
        return
    for name, value in model["module"].items():
        if name not in pieces and name not in model[ds.BUFFER_NAMES]:
            pieces[name] = [Piece(0, value.reshape(-1))]


def _is_stage3(model: dict[str, Any]) -> bool:
    return bool(model["ds_config"].get("zero_optimization", {}).get("stage", 0) == 3)
