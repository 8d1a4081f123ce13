"""The truncation contract, for any lengths and any limits, against a second statement of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_ds.data.preference import RowError
from orpo_ds.data.truncate import TokenizeOptions, TokenPair, truncate_pair

BOS, EOS = 1, 2


@dataclass(frozen=True)
class Case:
    """A pair whose every id is its own position: 1000s prompt, 2000s chosen, 3000s rejected, 4000s merged."""

    prompt: int
    chosen: int
    rejected: int
    merged: int  # prompt tokens at the border that merged into the chosen response only
    bos: bool

    def sequences(self) -> tuple[list[int], list[int], int, int]:
        """Chosen ids, rejected ids, and where the responses begin."""
        prompt = [BOS] * self.bos + [1000 + i for i in range(self.prompt)]
        cut = len(prompt) - min(self.merged, self.prompt)
        merged = [4000] * (self.merged > 0)
        chosen = prompt[:cut] + merged + [2000 + i for i in range(self.chosen)] + [EOS]
        rejected = prompt + [3000 + i for i in range(self.rejected)] + [EOS]
        return chosen, rejected, cut, len(prompt)


cases = st.builds(
    Case,
    prompt=st.integers(1, 40),
    chosen=st.integers(1, 40),
    rejected=st.integers(1, 40),
    merged=st.integers(0, 2),
    bos=st.booleans(),
)


@st.composite
def limits(draw: st.DrawFn) -> TokenizeOptions:
    max_length = draw(st.integers(2, 60))
    max_prompt_length = draw(st.none() | st.integers(1, max_length - 1))
    mode: Any = draw(st.sampled_from(["keep_end", "keep_start"]))
    return TokenizeOptions(max_length=max_length, max_prompt_length=max_prompt_length, truncation_mode=mode)


def _truncate(case: Case, options: TokenizeOptions) -> TokenPair:
    chosen, rejected, chosen_start, rejected_start = case.sequences()
    return truncate_pair(
        chosen,
        rejected,
        chosen_start=chosen_start,
        rejected_start=rejected_start,
        head=int(case.bos),
        tail=0,
        options=options,
        row_number=0,
    )


def _is_subsequence_with_one_gap(part: list[int], whole: list[int]) -> bool:
    return any(part == whole[:i] + whole[len(whole) - len(part) + i :] for i in range(len(part) + 1))


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(case=cases, options=limits())
def test_contract(case: Case, options: TokenizeOptions) -> None:
    chosen, rejected, chosen_start, rejected_start = case.sequences()
    assert options.max_length is not None
    if min(chosen_start, rejected_start) == 0:
        with pytest.raises(RowError, match="empty_prompt"):
            _truncate(case, options)
        return
    try:
        pair = _truncate(case, options)
    except RowError as error:
        # Only where merging left a border so ragged that no cut of what is shared makes room.
        if error.reason == "no_room_for_response":
            assert case.merged
            assert rejected_start - chosen_start >= options.max_length - 1
            return
        raise

    floor = options.max_length // 2 if options.max_prompt_length is None else options.max_prompt_length
    sides = (
        ("chosen", pair.chosen, pair.chosen_start, chosen, chosen_start),
        ("rejected", pair.rejected, pair.rejected_start, rejected, rejected_start),
    )
    for name, ids, start, whole, whole_start in sides:
        assert len(ids) <= options.max_length, name
        assert 0 < start < len(ids), name
        response, whole_response = ids[start:], whole[whole_start:]
        assert response == whole_response[: len(response)], name  # responses lose their end only
        assert _is_subsequence_with_one_gap(ids[:start], whole[:whole_start]), name
        if case.bos:
            assert ids[0] == BOS, name
    # One prompt: what the two had in common they still have.
    removed = chosen_start - pair.chosen_start
    assert removed == rejected_start - pair.rejected_start
    assert pair.trunk == min(chosen_start, rejected_start) - removed

    longest = max(len(chosen), len(rejected))
    longest_prompt = max(pair.chosen_start, pair.rejected_start)
    if longest <= options.max_length:
        assert (pair.chosen, pair.rejected) == (chosen, rejected)
    else:
        # No more is taken than needed, and the prompt gives way before a response does.
        assert max(len(pair.chosen), len(pair.rejected)) == options.max_length
        if removed:
            assert longest_prompt >= floor
        response_was_cut = (
            len(chosen) - removed > options.max_length or len(rejected) - removed > options.max_length
        )
        if response_was_cut:
            least = min(chosen_start, rejected_start) - removed == 1  # nothing of the shared prompt to take
            assert longest_prompt <= floor or least


@settings(deadline=None, derandomize=True)
@given(case=cases)
def test_no_limit_cuts_nothing(case: Case) -> None:
    chosen, rejected, chosen_start, rejected_start = case.sequences()
    if min(chosen_start, rejected_start) == 0:
        return
    pair = _truncate(case, TokenizeOptions(max_length=None))
    assert (pair.chosen, pair.rejected) == (chosen, rejected)
    assert (pair.chosen_start, pair.rejected_start) == (chosen_start, rejected_start)


@pytest.mark.parametrize(
    ("mode", "prompt"),
    [("keep_end", [BOS, 1004, 1005, 1006, 1007, 1008]), ("keep_start", [BOS, 1000, 1001, 1002, 1003, 1004])],
)
def test_the_end_named_by_the_mode_survives(mode: Any, prompt: list[int]) -> None:
    case = Case(prompt=9, chosen=3, rejected=1, merged=0, bos=True)
    pair = _truncate(case, TokenizeOptions(max_length=10, max_prompt_length=2, truncation_mode=mode))
    assert pair.chosen == [*prompt, 2000, 2001, 2002, EOS]
    assert pair.rejected == [*prompt, 3000, EOS]


def test_responses_that_differ_only_behind_the_limit_are_refused() -> None:
    prompt = [BOS, 1000, 1001]
    same = [2000 + i for i in range(20)]
    options = TokenizeOptions(max_length=12)
    with pytest.raises(RowError, match="identical_responses"):
        truncate_pair(
            [*prompt, *same, 7],
            [*prompt, *same, 8],
            chosen_start=3,
            rejected_start=3,
            head=1,
            tail=0,
            options=options,
            row_number=5,
        )
