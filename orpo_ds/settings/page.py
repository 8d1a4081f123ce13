"""The table as a page for people."""

from __future__ import annotations

from orpo_ds.settings.claims import Claim, Honoured, Mapped
from orpo_ds.settings.table import CLAIMS, GROUPS

INTRODUCTION = """\
# Settings

<!-- Written by `python -m orpo_ds.settings > docs/config.md`; do not edit. -->

What happens to each field of `ORPOConfig`, from Python, from the YAML file and as a `--flag`. No field is passed over:

- **honoured**: it does what transformers and TRL say, and a test shows its effect;
- **mapped**: another field does its work now, or nothing is left to decide; setting it works and gives one warning;
- **refused**: a value other than the default ends the start with the reason and what to use instead.

`orpo-ds train --help` lists types and defaults.
"""


def page() -> str:
    """`docs/config.md`."""
    counts = dict.fromkeys(("honoured", "mapped", "refused"), 0)
    for claim in CLAIMS.values():
        counts[_kind(claim)] += 1
    lines = [INTRODUCTION, "; ".join(f"{count} {kind}" for kind, count in counts.items()) + ".", ""]
    for group in GROUPS:
        lines += [
            f"## {group.title}",
            "",
            "| field | | what happens | shown by |",
            "| --- | --- | --- | --- |",
        ]
        lines += [_line(claim) for claim in group.claims]
        lines.append("")
    return "\n".join(lines)


def _kind(claim: Claim) -> str:
    return type(claim).__name__.lower()


def _line(claim: Claim) -> str:
    path, _, name = claim.test.partition("::")
    return f"| `{claim.name}` | {_kind(claim)} | {_what(claim)} | [{name}](../{path}) |".replace(
        "|  |", "| |"
    )


def _what(claim: Claim) -> str:
    if isinstance(claim, Honoured):
        refused = [f"`{value}` is refused: {why}" for value, why in claim.refuses.items()]
        return " ".join([claim.says, *refused]).strip()
    if isinstance(claim, Mapped):
        return f"→ `{claim.successor}`: {claim.says}" if claim.successor else claim.says
    return f"{claim.why[0].upper()}{claim.why[1:]}. {claim.instead}"
