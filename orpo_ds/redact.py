"""Keeps tokens out of everything that is written down: manifests, `args` files, the W&B config.

A secret is recognised by the name of its field (`hub_token`), or by its value: the value of a known
environment variable (`HF_TOKEN`), or the shape of a Hugging Face token. `eos_token` and
`max_tokens_per_micro_batch` are not secrets, so "ends with token" would hide too much.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

SECRET_FIELD = re.compile(
    r"^token$|(^|_)(hub_token|auth_token|access_token|api_key|password|passwd|secret|secret_key|credentials?)$",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{16,}")
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
REDACTED = "<redacted>"


def redact(value: Any) -> Any:
    """A copy of `value` (mappings, lists and tuples deeply) with every secret replaced by `<redacted>`."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if isinstance(key, str) and SECRET_FIELD.search(key) and item else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, str):
        return redact_text(value)
    return value


def redact_text(text: str) -> str:
    """`text` with the values of secret environment variables and Hugging Face tokens replaced."""
    for name in SECRET_VARIABLES:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, REDACTED)
    return SECRET_VALUE.sub(REDACTED, text)


def redact_command_line(words: Sequence[str]) -> list[str]:
    """A command line with the values of secret options (`--hub_token X`, `--hub_token=X`) replaced."""
    redacted: list[str] = []
    hide_next = False
    for word in words:
        option, equals, _ = word.partition("=")
        is_secret = (
            word.startswith("--") and SECRET_FIELD.search(option.lstrip("-").replace("-", "_")) is not None
        )
        if hide_next:
            redacted.append(REDACTED)
        elif is_secret and equals:
            redacted.append(f"{option}={REDACTED}")
        else:
            redacted.append(redact_text(word))
        hide_next = is_secret and not equals
    return redacted
