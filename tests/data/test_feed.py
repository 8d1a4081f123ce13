"""The feed deals every pair of a global batch exactly once, and all ranks count the same totals."""

from collections.abc import Sequence

import datasets
import pytest
import torch

from orpo_ds.data.batches import CostModel
from orpo_ds.data.feed import Feed
from orpo_ds.data.packing import MicroBatch, pack
from orpo_ds.data.padding import pad
from orpo_ds.data.tokenize import TokenDataset, TokenizeOptions, TokenPair, tokenize_dataset
from tests.parity.rows import conversation
from tests.parity.tokenizer import tiny_tokenizer

CPU = torch.device("cpu")
COUNT = 23
GLOBAL_BATCHES = [range(8), [20, 3, 17, 11, 9], [22], range(8, 16)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    rows = [
        conversation(
            f"What is {number}?" + " Now." * (number % 5), "It is." * (1 + number % 3), f"No{number}"
        )
        for number in range(COUNT)
    ]
    return tokenize_dataset(
        datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        options=TokenizeOptions(max_length=256, max_prompt_length=128),
        unusable="error",
        cache_dir=tmp_path_factory.mktemp("tokens"),
    )


def feed(
    dataset: TokenDataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    padded: bool = False,
    max_tokens: int | None = None,
    nll_on_prompt: bool = True,
) -> Feed:
    def layout(pairs: Sequence[TokenPair], ids: Sequence[int]) -> MicroBatch:
        if padded:
            return pad(pairs, pair_ids=ids, pad_token_id=0, nll_on_prompt=nll_on_prompt)
        return pack(pairs, pair_ids=ids, nll_on_prompt=nll_on_prompt)

    return Feed(
        dataset=dataset,
        layout=layout,
        padded=padded,
        cost_model=CostModel(per_token=1.0, per_score=0.01, per_target=1.0),
        nll_on_prompt=nll_on_prompt,
        rank=rank,
        world_size=world_size,
        max_tokens=max_tokens,
    )


def nll_tokens(pair: TokenPair, *, nll_on_prompt: bool) -> int:
    """Tokens of the chosen sequence that the nll counts: all that have a predecessor, or those of the response."""
    return len(pair.chosen) - (1 if nll_on_prompt else pair.chosen_start)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 1000, 300])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_pair_is_dealt_once(
    dataset: TokenDataset, world_size: int, max_tokens: int | None, padded: bool
) -> None:
    feeds = [
        feed(dataset, rank=rank, world_size=world_size, padded=padded, max_tokens=max_tokens)
        for rank in range(world_size)
    ]
    for pairs in GLOBAL_BATCHES:
        plans = [one.plan(pairs) for one in feeds]
        dealt = [pair for plan in plans for group in plan.micro_batches for pair in group]
        assert sorted(dealt) == sorted(pairs)
        assert len({len(plan.micro_batches) for plan in plans}) == 1, (
            "ranks would wait for each other for ever"
        )
        assert {(plan.pairs, plan.nll_tokens) for plan in plans} == {
            (len(pairs), sum(nll_tokens(dataset[pair], nll_on_prompt=True) for pair in pairs))
        }
        if max_tokens is None:
            assert len(plans[0].micro_batches) == 1
        else:
            sizes = [
                feeds[0].build(group).input_ids.numel() for plan in plans for group in plan.micro_batches
            ]
            assert max(sizes) <= max_tokens


def test_nll_on_responses_only(dataset: TokenDataset) -> None:
    pairs = [4, 19, 7]
    plan = feed(dataset, nll_on_prompt=False).plan(pairs)
    assert plan.nll_tokens == sum(nll_tokens(dataset[pair], nll_on_prompt=False) for pair in pairs)
    [batch] = [feed(dataset, nll_on_prompt=False).build(group) for group in plan.micro_batches]
    assert int(batch.rows.nll.sum()) == plan.nll_tokens


@pytest.mark.parametrize("world_size", [1, 3])
def test_steps_yield_what_was_planned(dataset: TokenDataset, world_size: int) -> None:
    for rank in range(world_size):
        one = feed(dataset, rank=rank, world_size=world_size, max_tokens=300)
        seen = []
        for plan, micro_batches in one.steps(GLOBAL_BATCHES, device=CPU):
            taken = list(micro_batches)
            assert [list(batch.pair_ids) for batch in taken] == plan.micro_batches
            seen.append(plan)
        assert seen == [one.plan(pairs) for pairs in GLOBAL_BATCHES]


def test_the_totals_of_all_ranks_add_up(dataset: TokenDataset) -> None:
    """The nll tokens that the micro-batches of all ranks hold are those that the loss is divided by."""
    ranks = [feed(dataset, rank=rank, world_size=3, max_tokens=300) for rank in range(3)]
    for pairs in GLOBAL_BATCHES:
        held = sum(
            int(one.build(group).rows.nll.sum()) for one in ranks for group in one.plan(pairs).micro_batches
        )
        assert held == ranks[0].plan(pairs).nll_tokens
