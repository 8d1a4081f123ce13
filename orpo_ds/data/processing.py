"""What turns rows into ids: a tokenizer, or for a vision-language model the processor around one."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from pathlib import Path
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


def tokenizer_of(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """The tokenizer itself.

    Raises:
        ValueError: a processor without one, as those for images or sound alone.
    """
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class
    if "tokenizer" not in processing_class.get_attributes():
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__}, which has no tokenizer: pass the processor of "
            "a model that reads and writes text"
        )
    tokenizer: PreTrainedTokenizerBase = processing_class.tokenizer
    return tokenizer


def processing_hash(processing_class: ProcessingClass) -> str:
    """Hash of what it is (vocabulary, rules, special tokens, template, image settings), not where it came from."""
    tokenizer = tokenizer_of(processing_class)
    kind = type(processing_class)
    settings = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "added_tokens": tokenizer.get_added_vocab(),
        "chat_template": processing_class.chat_template,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if isinstance(processing_class, ProcessorMixin):
        import PIL  # decodes the images, and not every release to the same bits

        digest.update(processing_class.to_json_string().encode() + PIL.__version__.encode())
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        # The last call leaves its truncation and padding in the tokenizer; they are no part of what it is.
        rules = copy.deepcopy(tokenizer.backend_tokenizer)
        rules.no_truncation()
        rules.no_padding()
        digest.update(rules.to_str().encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            for file in sorted(tokenizer.save_vocabulary(folder)):
                digest.update(Path(file).read_bytes())
    return digest.hexdigest()
