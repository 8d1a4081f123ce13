"""`orpo-ds convert`: a checkpoint as something else, without an engine, a GPU or the training set.

    --huggingface   the model, as a folder that `from_pretrained` loads: of a run that ended before it saved its model
    --universal     DeepSpeed's universal format, for other tools; `orpo-ds train` resumes from it as well

To resume on other ranks or under another ZeRO stage nothing needs to be converted. The checkpoint is verified before
anything of it is loaded, and the new folder gets a manifest of its own. It appears when it is complete, and nothing is
overwritten. Tensors are mapped and copied one layer (or one rank's file) at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor

from orpo_ds.checkpoint import Manifest, one_rank, read_manifest, verify
from orpo_ds.checkpoint.engine_state import ENGINE_TAG
from orpo_ds.checkpoint.manifest import (
    MANIFEST_NAME,
    hash_progress,
    list_files,
    new_manifest,
    seal_files,
    sync_path,
    write_durably,
)
from orpo_ds.checkpoint.shards import SavedEngine, open_engine, saved_layout
from orpo_ds.export import save_pretrained
from orpo_ds.model.load import ADAPTER_CONFIG, empty_model, load_processing, reads_images

PARTIAL_PREFIX = ".tmp-convert-"
POLICY_PREFIX = "model."  # the engine wraps the model in `OrpoPolicy`
THE_RUNS_OWN = "Give the model that the run started from."


def run(words: Sequence[str]) -> None:
    """Read the command's words, convert, and say where the result is."""
    parser = argparse.ArgumentParser(prog="orpo-ds convert", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", help="Folder of a checkpoint: OUTPUT_DIR/checkpoint-N.")
    parser.add_argument("output", help="Folder to write; must not exist yet.")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--huggingface", action="store_true", help="The model, for from_pretrained.")
    kind.add_argument("--universal", action="store_true", help="DeepSpeed's universal format.")
    parser.add_argument(
        "--model", help="With --huggingface: what the run started from; its config and tokenizer are read."
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that the model ships.")
    given = parser.parse_args(list(words))
    if given.huggingface and given.model is None:
        raise ValueError("--huggingface needs --model: the folder or hub id that the run started from.")
    if given.universal:
        folder = to_universal(given.checkpoint, given.output)
    else:
        folder = to_huggingface(
            given.checkpoint,
            given.output,
            model=given.model,
            trust_remote_code=given.trust_remote_code,
        )
    print(f"The converted checkpoint is in {folder}")


def to_universal(checkpoint: str | Path, output: str | Path) -> Path:
    """Write a checkpoint in DeepSpeed's universal format, by DeepSpeed's own converter.

    Args:
        checkpoint: of ZeRO stage 1 to 3.
        output: appears when it is complete; `orpo-ds train --resume_from_checkpoint OUTPUT` continues from it.

    Returns:
        `output`.

    Raises:
        ValueError: the checkpoint is not good or not of that kind, or there is something in `output`.
    """
    source, manifest = _verified(checkpoint)
    engine = source / ENGINE_TAG
    layout = saved_layout(engine)
    if layout.universal or not layout.zero.get("stage"):
        raise ValueError(
            f"{source} was written {layout}: DeepSpeed converts checkpoints of ZeRO 1 to 3. It can be resumed as it "
            "is, on any ranks and under any stage."
        )

    def write(partial: Path) -> Manifest:
        for name in manifest.files:
            if not name.startswith(f"{ENGINE_TAG}/"):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, partial / name)
        options = argparse.Namespace(
            input_folder=str(engine),
            output_folder=str(partial / ENGINE_TAG),
            num_extract_workers=1,  # in this process, a file at a time
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # an empty note on tensor parallelism
        )
        with contextlib.redirect_stdout(sys.stderr):
            ds_to_universal.main(options)
        return manifest

    return _publish(output, write)


def to_huggingface(
    checkpoint: str | Path, output: str | Path, *, model: str, trust_remote_code: bool = False
) -> Path:
    """Write the model of a checkpoint as a Hugging Face folder, in the dtype it was trained in.

    Args:
        checkpoint: of any ZeRO stage.
        output: appears when it is complete.
        model: folder or hub id that the run started from; its weights are not read.
        trust_remote_code: run code that it ships.

    Returns:
        `output`.

    Raises:
        ValueError: the checkpoint is not good or not of that model, or there is something in `output`.
    """
    source, manifest = _verified(checkpoint)
    if (source / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{source} holds adapters, and PEFT loads it as it is. `orpo-ds merge {source} --output {output}` makes "
            "one model of them and their base."
        )
    config = manifest.metadata.config
    dtype = torch.bfloat16 if config.get("bf16") else torch.float16 if config.get("fp16") else torch.float32
    empty = empty_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_processing(
        model, trust_remote_code=trust_remote_code, reads_images=reads_images(empty.config)
    )
    saved = open_engine(source / ENGINE_TAG)
    known = dict(empty.named_parameters(remove_duplicate=False))
    names = {name.removeprefix(POLICY_PREFIX) for name in saved.pieces}
    if unknown := sorted(names - known.keys()):
        raise ValueError(f"--model {model} has no {unknown[0]}, which the checkpoint has. {THE_RUNS_OWN}")
    read = _reader(saved, model=model)

    def write(partial: Path) -> Manifest:
        save_pretrained(empty, partial, tokenizer=tokenizer, read=read)
        only_model = manifest.metadata.config | {"save_only_model": True}  # what a resume has to know of it
        return replace(manifest, metadata=replace(manifest.metadata, config=only_model))

    return _publish(output, write)


def _reader(saved: SavedEngine, *, model: str) -> Callable[[str, Tensor], Tensor]:
    """Reads a tensor of the model by its name, in the dtype and shape of the empty one."""

    def read(name: str, empty: Tensor) -> Tensor:
        name = POLICY_PREFIX + name
        if name in saved.buffers:
            return saved.buffers[name].to(empty.dtype)
        if name not in saved.pieces or saved.numel(name) != empty.numel():
            raise ValueError(
                f"--model {model}: {name.removeprefix(POLICY_PREFIX)} {list(empty.shape)} is not in the checkpoint, or "
                f"of another size there. {THE_RUNS_OWN}"
            )
        numbers = torch.empty(empty.numel(), dtype=empty.dtype)
        saved.fill(numbers, name)
        return numbers.view(empty.shape)

    return read


def _verified(checkpoint: str | Path) -> tuple[Path, Manifest]:
    source = Path(checkpoint).expanduser()
    problems = verify(source)
    if problems:
        raise ValueError(f"{source} is not a good checkpoint:\n  " + "\n  ".join(problems))
    manifest = read_manifest(source)
    if manifest.metadata.config.get("save_only_model"):
        raise ValueError(f"{source} holds a model and no engine: `from_pretrained` loads it as it is.")
    return source, manifest


def _publish(output: str | Path, write: Callable[[Path], Manifest]) -> Path:
    """Let `write` fill a folder, seal it with a manifest, and give it its name."""
    target = Path(output).expanduser()
    if target.exists():
        raise ValueError(f"{target}: there is something already, and nothing is overwritten.")
    partial = target.parent / f"{PARTIAL_PREFIX}{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        metadata = write(partial).metadata
        sized = list_files(partial)
        with hash_progress(f"hash {target.name}", sized, one_rank()) as progress:
            manifest = new_manifest(metadata, seal_files(partial, sized, progress))
        write_durably(partial / MANIFEST_NAME, manifest.to_json())
        sync_path(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
