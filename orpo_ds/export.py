"""The trained model as a Hugging Face folder that `from_pretrained` and serving tools load.

The weights leave shard by shard: one layer at a time is gathered from the ranks (ZeRO-3) into the main process's
memory, and a file is written whenever a shard is full. Neither a GPU nor the host ever holds the whole model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from orpo_ds import distributed
from orpo_ds.checkpoint import CheckpointSaveError, Ranks, job_ranks
from orpo_ds.checkpoint.ranks import TogetherError, free_bytes, on_main
from orpo_ds.data.processing import ProcessingClass
from orpo_ds.monitor.bars import of_libraries
from orpo_ds.progress import bar
from orpo_ds.tensor_parallel import whole

PARTIAL_NAME = ".tmp-model"
MAX_SHARD_BYTES = 5 * 10**9  # what the hub recommends for a file
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# A layer's weights are converted together: transformers keeps the experts of a layer as one tensor, files do not.
LAYER = re.compile(r"(.*?\.\d+)\.")


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: ProcessingClass | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    read: Callable[[str, Tensor], Tensor] | None = None,
) -> list[str]:
    """Write weights (safetensors), config, generation config, and the tokenizer with its chat template.

    All ranks call it; the main process writes. It holds at most one shard and one layer in host memory; no GPU holds
    more than one parameter beside its own share. A PEFT model writes its adapter only. Files appear in `folder` when
    all of them are complete, and replace those of an earlier save.

    Args:
        model: inside or outside an engine.
        folder: created if it does not exist.
        tokenizer: or processor; saved beside the weights.
        max_shard_bytes: of a file of weights; a larger tensor gets a file of its own.
        read: gives the main process the numbers of a parameter or buffer; None: they are the model's own.

    Returns:
        The names of the files written, on all ranks.

    Raises:
        CheckpointSaveError: on all ranks, when the files could not be written; what `folder` held is untouched.
    """
    target, ranks = Path(folder), job_ranks()
    partial = target / PARTIAL_NAME
    is_adapter = hasattr(model, "peft_config")
    try:
        with of_libraries(f"Saving the model in {target}"):
            on_main(ranks, lambda: _make_empty(partial))
            rest = full_state(model) if is_adapter else {}
            # Before the weights: transformers would take them for those of an earlier save and remove them.
            on_main(ranks, lambda: _write_rest(model, partial, state=rest, tokenizer=tokenizer))
            if not is_adapter:
                _write_weights(model, partial, max_shard_bytes=max_shard_bytes, ranks=ranks, read=read)
            return on_main(ranks, lambda: _publish(partial, target))
    except TogetherError as error:
        raise CheckpointSaveError(
            f"the model was not saved in {target}: {error} ({free_bytes(target):,} bytes are free there)"
        ) from None
    finally:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_weights(
    model: PreTrainedModel,
    folder: Path,
    *,
    max_shard_bytes: int,
    ranks: Ranks,
    read: Callable[[str, Tensor], Tensor] | None,
) -> None:
    """Gather the model layer by layer on all ranks, and write it on the main one."""
    shards = ShardWriter(folder, max_shard_bytes)
    failure: OSError | None = None
    layers = list(_layers(model))
    for layer in bar(layers, total=len(layers), desc="Saving the model", unit="layer"):
        tensors = {name: read(name, value) if read else _gathered(value) for name, value in layer.items()}
        if ranks.is_main and failure is None:
            try:
                shards.add(revert_weight_conversion(model, tensors))
            except OSError as error:
                failure = error  # the other ranks are on their way to the next gathering

    def close() -> None:
        if failure is not None:
            raise failure
        shards.close()

    on_main(ranks, close)


def _layers(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """What belongs into the file, a layer (or a module outside of layers) at a time, in the model's order."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    persistent = set(model.state_dict(keep_vars=True))
    buffers = {name: value for name, value in model.named_buffers() if name in persistent}
    entries = parameters | buffers
    for pattern in model._keys_to_ignore_on_save or ():
        entries.pop(pattern, None)
    # transformers decides which name of tied weights stays; it looks at the parameters and not at these.
    shapes = {name: torch.empty(_shape(value), device="meta") for name, value in entries.items()}
    stored = remove_tied_weights_from_state_dict(shapes, model)
    layers: dict[str, dict[str, Tensor]] = {}
    for name in stored:
        layer = LAYER.match(name)
        key = layer.group(1) if layer else name.rpartition(".")[0]
        layers.setdefault(key, {})[name] = entries[name]
    yield from layers.values()


def _shape(value: Tensor) -> torch.Size:
    """That of the whole parameter, also where ZeRO-3 has sharded it."""
    return value.ds_shape if hasattr(value, "ds_shape") else value.shape


class ShardWriter:
    """Collects tensors and writes a safetensors file whenever the next one would not fit."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Write into `folder`, files of at most `max_bytes` (one tensor at least)."""
        self._folder, self._max_bytes = folder, max_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = self._total_bytes = self._total_numbers = 0
        self._files: list[tuple[Path, list[str]]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors; they must not change before they are written.

        Raises:
            OSError: a full shard could not be written.
        """
        for name in list(tensors):
            tensor = tensors.pop(name).contiguous()
            size = tensor.numel() * tensor.element_size()
            if self._shard and self._shard_bytes + size > self._max_bytes:
                self._flush()
            self._shard[name] = tensor
            self._shard_bytes += size
            self._total_bytes += size
            self._total_numbers += tensor.numel()

    def _flush(self) -> None:
        path = self._folder / f"part-{len(self._files)}"
        try:
            save_file(self._shard, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        self._files.append((path, list(self._shard)))
        self._shard, self._shard_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, and give the files their names: `model.safetensors`, or numbered ones and an index."""
        self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self._folder / SAFE_WEIGHTS_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._files, start=1):
            file = f"model-{number:05}-of-{len(self._files):05}.safetensors"
            path.rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_size": self._total_bytes, "total_parameters": self._total_numbers}
        index = {"metadata": metadata, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _write_rest(
    model: PreTrainedModel,
    partial: Path,
    *,
    state: dict[str, Tensor] | None,
    tokenizer: ProcessingClass | None,
) -> None:
    """Everything but a full model's weights; `state` is that of an adapter."""
    use_cache, model.config.use_cache = model.config.use_cache, True
    try:
        model.save_pretrained(partial, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    except SafetensorError as error:
        raise OSError(f"{partial}: {error}") from error
    finally:
        model.config.use_cache = use_cache


def _publish(partial: Path, target: Path) -> list[str]:
    """Move the files to where they belong, and remove an earlier save's weights that go by other names."""
    names = sorted(path.name for path in partial.iterdir())
    for name in names:
        (partial / name).replace(target / name)
    for path in target.iterdir():
        if path.name not in names and WEIGHT_FILE.fullmatch(path.name):
            path.unlink()
    return names


def full_state(model: torch.nn.Module) -> dict[str, Tensor] | None:
    """The state dict on the CPU of the main process; None on the others. Tied weights share one tensor."""
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    adapters_only = hasattr(model, "peft_config")
    for name, value in model.named_parameters(remove_duplicate=False):
        if adapters_only and not value.requires_grad:
            continue
        if id(value) not in copies:
            copies[id(value)] = _gathered(value)
        state[name] = copies[id(value)]
    persistent = set(model.state_dict(keep_vars=True)) - set(state)
    state.update({name: value.detach().cpu() for name, value in model.named_buffers() if name in persistent})
    return state if distributed.is_main() else None


def _gathered(value: Tensor) -> Tensor:
    value = whole(value)
    partitioned = hasattr(value, "ds_id")
    with deepspeed.zero.GatheredParameters([value], enabled=partitioned):
        return value.detach().to("cpu", copy=True) if distributed.is_main() else torch.empty(0)
