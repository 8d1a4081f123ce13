"""Which line of a JSON file is wrong, and why.

Called after `datasets` has failed: its message has the row within a block of 16 MB, not the line.
"""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec  # type: ignore[import-untyped]


def explain_json(files: Sequence[str]) -> None:
    """Raise for the first line that is malformed, or that does not fit the lines before it.

    Args:
        files: paths or URLs of JSON or JSONL files, also compressed ones.

    Raises:
        ValueError: names the file and the line.
    """
    kinds: dict[str, str] = {}  # column -> JSON type of its first value
    for file in files:
        for place, value in _readable(file):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{place} is {_json_type(value)}, not an object with columns: {_excerpt(value)}"
                )
            unknown = [key for key in value if kinds and key not in kinds]
            if unknown:
                raise ValueError(
                    f"{place} has the columns {unknown}, which the first line does not have ({list(kinds)}): "
                    "give all lines the same columns, with null where a value is missing"
                )
            for key, held in value.items():
                kind = _json_type(held)
                known = kinds.setdefault(key, kind)
                if known == "null":
                    kinds[key] = kind
                elif kind not in (known, "null"):
                    raise ValueError(
                        f"{place}: {key!r} is {kind}, but {known} in the lines before: {_excerpt(held)}"
                    )


def _readable(file: str) -> Iterator[tuple[str, Any]]:
    try:
        yield from _json_values(file)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:  # what is wrong lies below the JSON
        raise ValueError(f"{file} cannot be read: {error}") from error


def _json_values(file: str) -> Iterator[tuple[str, Any]]:
    """(place in words, value) of every line, or of every element of a file that is one array."""
    with fsspec.open(file, "rb", compression="infer") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.lstrip().startswith(b"["):
                text = line + lines.read()
                for index, value in enumerate(_parse(text, file)):
                    yield f"{file}: element {index}", value
                return
            if line.strip():
                yield f"{file}: line {number}", _parse(line, f"{file}: line {number}")


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        near = error.doc[max(0, error.pos - 40) : error.pos + 20]
        raise ValueError(f"{place} is not JSON ({error.msg} at {where}), near {near!r}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8: {error}") from error


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean"}
    return names.get(type(value), "a number")


def _excerpt(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
