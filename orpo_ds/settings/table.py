"""The whole table: every field of `ORPOConfig`, in the order of the page."""

from __future__ import annotations

from enum import Enum

from orpo_ds.settings import evaluation, machine, output, training
from orpo_ds.settings.claims import Claim, Group, Honoured, Refused, shown

GROUPS: tuple[Group, ...] = (*training.GROUPS, *evaluation.GROUPS, *output.GROUPS, *machine.GROUPS)
CLAIMS: dict[str, Claim] = {claim.name: claim for group in GROUPS for claim in group.claims}


def refusal(name: str, value: object, *, default: object) -> str | None:
    """Why a field may not have this value, and what to use instead; None if it may.

    Args:
        name: of the field.
        value: that the user gave.
        default: of the field.
    """
    claim = CLAIMS[name]
    if isinstance(claim, Refused) and value != default and value not in claim.accepts:
        return f"{shown(name, value)} is refused: {claim.why}. {claim.instead}"
    if isinstance(claim, Honoured):
        for word in _words(value) & claim.refuses.keys():
            return f"{shown(name, value)} is refused: {claim.refuses[word]}"
    return None


def _words(value: object) -> set[str]:
    """The words that a value consists of: `debug` takes several, and a strategy may come as an enum."""
    if isinstance(value, Enum):
        return {value.value}
    if isinstance(value, list):
        return set().union(*map(_words, value))
    return set(value.split()) if isinstance(value, str) else set()
