"""The whole table: every field of `ORPOConfig`, in the order of the page."""

from __future__ import annotations

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
    if isinstance(claim, Honoured) and isinstance(value, str) and value in claim.refuses:
        return f"{shown(name, value)} is refused: {claim.refuses[value]}"
    return None
