"""`orpo-ds merge`: adapters and their base become one model, which needs no PEFT where it is served."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from orpo_ds.model.load import ADAPTER_CONFIG, load_model

PARTIAL_NAME = ".tmp-merge"
TOKENIZER_FILES = (  # copied as they are: loading and saving again may change them
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "*processor_config.json",
)


def run(words: Sequence[str]) -> None:
    """Read the command's words, merge, and say where the model is."""
    parser = argparse.ArgumentParser(prog="orpo-ds merge", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "adapter", help="Folder with adapter_config.json: a run's output_dir, or a checkpoint of it."
    )
    parser.add_argument(
        "--output", required=True, help="Folder of the merged model; must not exist yet, or be empty."
    )
    parser.add_argument("--base", help="Base model, where it is not what adapter_config.json names.")
    parser.add_argument("--revision", help="Branch, tag or commit of the base model.")
    parser.add_argument(
        "--dtype", default="auto", help="dtype of the merged weights; auto: that of the base model."
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="Run code that the base model ships."
    )
    given = parser.parse_args(list(words))
    folder = merge(
        given.adapter,
        given.output,
        base=given.base,
        revision=given.revision,
        dtype=given.dtype,
        trust_remote_code=given.trust_remote_code,
    )
    print(f"The merged model is in {folder}")


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Merge adapters into their base model, on the CPU.

    Args:
        adapter: folder with `adapter_config.json`.
        output: folder of the merged model; appears when it is complete.
        base: folder or hub id of the base model; None: what the adapter's config names.
        revision: of the base; None: what the adapter's config names.
        dtype: of the merged weights.
        trust_remote_code: run code that the base model ships.

    Returns:
        `output`, a folder that `from_pretrained` loads, with the tokenizer that lies beside the adapters or the base's.

    Raises:
        ValueError: no adapter there, an unknown base, something in `output` already, or adapters that cannot be merged.
    """
    from peft import PeftConfig, PeftModel

    source, target = Path(adapter).expanduser(), Path(output).expanduser()
    if not (source / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{source} has no {ADAPTER_CONFIG}: give the folder that holds the adapters.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output {target}: there is something already, and nothing is overwritten.")
    config = PeftConfig.from_pretrained(str(source))
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{source / ADAPTER_CONFIG} does not name the base model: pass --base.")
    try:
        whole = load_model(
            name,
            dtype=dtype,
            revision=revision or config.revision,
            trust_remote_code=trust_remote_code,
        )
    except OSError as error:
        raise ValueError(f"the base model {name!r} cannot be loaded: {error}. Pass --base.") from error
    _fit_embeddings(whole, source)
    adapted: Any = PeftModel.from_pretrained(whole, source)
    if not hasattr(adapted, "merge_and_unload"):
        raise ValueError(f"{config.peft_type} adapters have no weights that could be merged into a model's.")
    merged = adapted.merge_and_unload(safe_merge=True)
    partial = target.parent / f"{PARTIAL_NAME}-{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        merged.save_pretrained(partial)
        _copy_tokenizer([source, Path(name)], partial, name=name, trust_remote_code=trust_remote_code)
        if target.exists():
            target.rmdir()  # it is empty
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _fit_embeddings(model: Any, source: Path) -> None:
    """Give the base the rows that the adapters' embedding has: new tokens were added before they were trained."""
    from peft.utils import load_peft_weights

    state = load_peft_weights(str(source), device="cpu")
    known = model.get_input_embeddings().weight.shape[0]
    for name, value in state.items():
        is_table = any(
            part in name
            for part in ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight")
        )
        if is_table and value.ndim == 2 and value.shape[0] != known:
            model.resize_token_embeddings(value.shape[0])
            return


def _copy_tokenizer(folders: Sequence[Path], target: Path, *, name: str, trust_remote_code: bool) -> None:
    """The tokenizer of the first folder that has one, else that of the hub's model `name`."""
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            for pattern in TOKENIZER_FILES:
                for file in folder.glob(pattern):
                    shutil.copyfile(file, target / file.name)
            return
    AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code).save_pretrained(target)
