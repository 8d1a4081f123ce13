"""A packed row cut over ranks: nothing is lost, nothing counts twice."""

import pytest
import torch

from orpo_ds.data.packing import pack
from orpo_ds.data.row_part import part_of_row
from tests.model.pairs import SHAPES, random_pairs


@pytest.mark.parametrize("parts", [2, 3, 4, 7])
def test_the_parts_are_the_row(parts: int, seed: int) -> None:
    pairs = random_pairs(SHAPES, vocab_size=50, seed=seed)
    row = pack(pairs, pair_ids=range(10, 10 + len(pairs)))
    tokens = row.real_tokens
    cut = [part_of_row(row, part=part, parts=parts) for part in range(parts)]
    length = cut[0].input_ids.shape[1]
    assert {part.input_ids.shape[1] for part in cut} == {length}
    assert tokens <= length * parts < tokens + parts
    for name in ("input_ids", "position_ids", "token_weight"):
        joined = torch.cat([getattr(part, name) for part in cut], dim=1)
        assert torch.equal(joined[:, :tokens], getattr(row, name))
        assert not joined[:, tokens:].any(), "inert tokens count for nothing"
    sources = torch.cat([part.rows.index + number * length for number, part in enumerate(cut)])
    assert torch.equal(sources, row.rows.index)
    for name in ("label", "nll", "chosen_pair", "rejected_pair"):
        assert torch.equal(torch.cat([getattr(part.rows, name) for part in cut]), getattr(row.rows, name))
    for part in cut:
        assert not len(part.rows.index) or 0 <= part.rows.index.min() <= part.rows.index.max() < length
        assert part.layout is row.layout
        assert torch.equal(part.rows.chosen_len, row.rows.chosen_len), "lengths are of whole responses"
    assert sum((part.pair_ids for part in cut), ()) == row.pair_ids
    assert sum(part.real_tokens for part in cut) == tokens
    assert sum(part.unshared_tokens for part in cut) == row.unshared_tokens


def test_a_row_without_pairs() -> None:
    row = pack([], pair_ids=[])
    cut = [part_of_row(row, part=part, parts=4) for part in range(4)]
    assert [part.input_ids.shape for part in cut] == [(1, 1)] * 4
    assert [len(part.rows.index) for part in cut] == [1, 0, 0, 0]
    assert sum(part.real_tokens for part in cut) == row.real_tokens == 0
