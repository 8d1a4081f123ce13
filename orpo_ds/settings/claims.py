"""The three things that can happen to a setting.

A claim says what a field does here and names the test that shows it. `Refused` is acted upon: a value other than the
default stops the run with the claim's own words, so that page and error cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWS_REFUSALS = "tests/settings/test_refused.py::test_a_refused_field_is_named"
SHOWS_MAPPINGS = "tests/settings/test_dropped.py::test_an_old_name_is_taken_with_one_warning"


@dataclass(frozen=True)
class Honoured:
    """A field that does what transformers or TRL say it does.

    Attributes:
        name: of the field.
        says: what it does here, as far as its name does not tell.
        test: `path::name` of the test that shows its effect.
        refuses: single values that are refused all the same, with the reason and what to use instead.
    """

    name: str
    says: str
    test: str
    refuses: Mapping[Any, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Mapped:
    """A field whose task another one has, or that has nothing left to decide; using it gives one warning.

    Attributes:
        name: of the field.
        successor: the field that gets the value; empty where there is nothing to set.
        says: how the value is taken, or what is done whatever it says.
        test: `path::name` of the test that shows it.
    """

    name: str
    successor: str
    says: str
    test: str = SHOWS_MAPPINGS


@dataclass(frozen=True)
class Refused:
    """A field that must stay at its default.

    Attributes:
        name: of the field.
        why: the reason, as a clause.
        instead: what to use, as a sentence.
        accepts: values besides the default that ask for what is done anyway.
        test: `path::name` of the test that shows it.
    """

    name: str
    why: str
    instead: str
    accepts: tuple[Any, ...] = ()
    test: str = SHOWS_REFUSALS


Claim = Honoured | Mapped | Refused


@dataclass(frozen=True)
class Group:
    """Fields that answer one question of the user; a section of the page."""

    title: str
    claims: tuple[Claim, ...]


def shown(name: str, value: object) -> str:
    """`name=value` for a message; never a token."""
    return f"{name}=<token>" if name.endswith("_token") else f"{name}={value!r}"
