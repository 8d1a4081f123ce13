"""Every pair once an epoch, in an order that nothing but (seed, epoch, dataset) decides, and ranks that wait little."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from itertools import chain, permutations, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_ds.data.batches import CostModel, GlobalBatches, PairCost, plan_micro_batches
from orpo_ds.data.packing import pack
from orpo_ds.data.preference import common_prefix_length
from orpo_ds.data.truncate import TokenPair

Plan = list[list[list[int]]]
DEMO = Path(__file__).parents[3] / "shared" / "data" / "dpo_en_demo.jsonl"


def batches(
    num_pairs: int, size: int, *, seed: int = 1, fingerprint: str = "a", drop_last: bool = False
) -> GlobalBatches:
    return GlobalBatches(
        num_pairs=num_pairs, global_batch_size=size, seed=seed, fingerprint=fingerprint, drop_last=drop_last
    )


def epoch_of(source: GlobalBatches, epoch: int) -> list[list[int]]:
    first = epoch * source.steps_per_epoch
    return [source.pairs(step) for step in range(first, first + source.steps_per_epoch)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(num_pairs=st.integers(1, 200), size=st.integers(1, 50), epoch=st.integers(0, 3))
def test_an_epoch_has_every_pair_once(num_pairs: int, size: int, epoch: int) -> None:
    source = batches(num_pairs, size)
    epoch_batches = epoch_of(source, epoch)
    assert sorted(chain.from_iterable(epoch_batches)) == list(range(num_pairs))
    assert [len(batch) for batch in epoch_batches[:-1]] == [size] * (len(epoch_batches) - 1)
    assert len(epoch_batches[-1]) == (num_pairs % size or size)


def test_drop_last_leaves_out_what_does_not_fill_a_batch() -> None:
    kept, dropping = batches(10, 4), batches(10, 4, drop_last=True)
    assert (kept.steps_per_epoch, dropping.steps_per_epoch) == (3, 2)
    assert epoch_of(dropping, 0) == epoch_of(kept, 0)[:2]
    left_out = [set(range(10)) - set(chain.from_iterable(epoch_of(dropping, epoch))) for epoch in range(20)]
    assert len({frozenset(pairs) for pairs in left_out}) > 1, "another epoch leaves out other pairs"


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    forward = [batches(50, 8).pairs(step) for step in range(30)]
    one_by_one, backward = batches(50, 8), batches(50, 8)
    assert [one_by_one.pairs(step) for step in range(30)] == forward
    assert [backward.pairs(step) for step in reversed(range(30))] == forward[::-1]


def test_seed_epoch_and_dataset_each_change_the_order() -> None:
    orders = [
        epoch_of(batches(100, 100, seed=seed, fingerprint=fingerprint), epoch)
        for seed, fingerprint, epoch in product((1, 2), "ab", (0, 1))
    ]
    assert len({str(order) for order in orders}) == 8


def test_without_shuffle_every_epoch_is_the_dataset_in_order() -> None:
    source = GlobalBatches(num_pairs=5, global_batch_size=2, seed=1, fingerprint="a", shuffle=False)
    assert [source.pairs(step) for step in range(6)] == [[0, 1], [2, 3], [4]] * 2


def test_the_order_is_frozen() -> None:
    """A run that resumes with a newer orpo_ds, NumPy or torch goes on in the order it began with."""
    source = batches(12, 12, seed=42, fingerprint="frozen")
    assert source.pairs(0) == [10, 3, 2, 9, 5, 0, 7, 6, 8, 1, 11, 4]
    assert source.pairs(1) == [8, 2, 10, 1, 0, 5, 3, 9, 11, 6, 7, 4]


def test_the_order_is_that_of_another_process_with_another_hash_seed() -> None:
    program = (
        "from orpo_ds.data.batches import GlobalBatches;"
        "print(GlobalBatches(num_pairs=40, global_batch_size=40, seed=3, fingerprint='f').pairs(2))"
    )
    for hash_seed in ("0", "1"):
        other = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(other.stdout) == batches(40, 40, seed=3, fingerprint="f").pairs(2)


def test_all_permutations_are_equally_likely() -> None:
    draws = 2400
    seen = Counter(tuple(batches(4, 4, seed=seed).pairs(0)) for seed in range(draws))
    expected = draws / math.factorial(4)
    chi_square = sum((seen[order] - expected) ** 2 / expected for order in permutations(range(4)))
    assert chi_square < 65, "23 degrees of freedom: exceeded once in 100,000 by a fair shuffle"


def test_a_million_pairs_take_one_permutation_of_memory() -> None:
    source = batches(1_000_000, 64)
    tracemalloc.start()
    for epoch in range(3):
        source.pairs(epoch * source.steps_per_epoch)
    kept, _ = tracemalloc.get_traced_memory()
    assert kept < 4.1e6, "an int32 a pair"

    tracemalloc.reset_peak()
    for step in range(100):
        source.pairs(2 * source.steps_per_epoch + step)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - kept < 1e5, "the steps of an epoch share its permutation"


@pytest.mark.parametrize(("num_pairs", "size", "drop_last"), [(0, 4, False), (4, 0, False), (3, 4, True)])
def test_no_batch_is_an_error(num_pairs: int, size: int, drop_last: bool) -> None:
    with pytest.raises(ValueError, match=f"{num_pairs} pairs") as error:
        batches(num_pairs, size, drop_last=drop_last)
    assert ("drop_last" in str(error.value)) == drop_last


# -- plans -----------------------------------------------------------------------------------------------------


def flops(costs: Sequence[PairCost], positions: Sequence[int]) -> float:
    return sum(costs[position].flops for position in positions)


def step_time(costs: Sequence[PairCost], plan: Plan) -> float:
    """What ZeRO-3 waits for: the costliest micro-batch of every micro-step."""
    return sum(max(flops(costs, row) for row in rows) for rows in zip(*plan, strict=True))


def round_robin(costs: Sequence[PairCost], *, world_size: int, max_tokens: int) -> Plan:
    """Pair i to rank i mod n, each rank filling one row after the other: what a DistributedSampler would do."""
    plan: Plan = []
    for rank in range(world_size):
        rows: list[list[int]] = [[]]
        for position in range(rank, len(costs), world_size):
            if sum(costs[other].tokens for other in rows[-1]) + costs[position].tokens > max_tokens:
                rows.append([])
            rows[-1].append(position)
        plan.append(rows)
    micro_steps = max(len(rows) for rows in plan)
    return [rows + [[]] * (micro_steps - len(rows)) for rows in plan]


pair_costs = st.tuples(st.integers(2, 100), st.floats(0.5, 2.0)).map(
    lambda drawn: PairCost(tokens=drawn[0], flops=drawn[0] * drawn[1])
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    costs=st.lists(pair_costs, min_size=1, max_size=40),
    world_size=st.integers(1, 9),
    max_tokens=st.integers(100, 400),
)
def test_a_plan_keeps_its_promises(costs: list[PairCost], world_size: int, max_tokens: int) -> None:
    plan = plan_micro_batches(costs, world_size=world_size, max_tokens=max_tokens)
    assert len(plan) == world_size
    rows = [row for rank in plan for row in rank]
    assert sorted(chain.from_iterable(rows)) == list(range(len(costs))), "every pair exactly once"
    assert all(sum(costs[position].tokens for position in row) <= max_tokens for row in rows)
    assert len({len(rank) for rank in plan}) == 1, "as many micro-steps on every rank"
    assert plan == plan_micro_batches(list(costs), world_size=world_size, max_tokens=max_tokens)
    # Of any two rows of a best-fit packing the pairs of both do not fit into one, so that at most one is half empty.
    most_rows = 2 * sum(cost.tokens for cost in costs) / max_tokens + 1
    assert len(plan[0]) <= math.ceil(most_rows / world_size)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(costs=st.lists(pair_costs, min_size=1, max_size=7), world_size=st.integers(1, 3))
def test_one_micro_step_is_within_grahams_bound_of_the_best(costs: list[PairCost], world_size: int) -> None:
    """LPT is within 4/3 - 1/(3n) of the optimum (Graham 1969), and the trades only make it better."""
    plan = plan_micro_batches(costs, world_size=world_size, max_tokens=sum(cost.tokens for cost in costs))
    best = min(
        max(
            sum(cost.flops for cost, rank in zip(costs, ranks, strict=True) if rank == r)
            for r in range(world_size)
        )
        for ranks in product(range(world_size), repeat=len(costs))
    )
    assert len(plan[0]) == 1
    assert step_time(costs, plan) <= best * (4 / 3 - 1 / (3 * world_size)) * (1 + 1e-12)


def test_ranks_without_a_pair_get_an_empty_micro_batch() -> None:
    assert sorted(plan_micro_batches([PairCost(5, 5.0)] * 2, world_size=4, max_tokens=10)) == [
        [[]],
        [[]],
        [[0]],
        [[1]],
    ]


def test_a_cheap_rank_catches_up_in_the_next_micro_step() -> None:
    costs = [PairCost(10, flops) for flops in (9.0, 7.0, 4.0, 2.0)]
    plan = plan_micro_batches(costs, world_size=2, max_tokens=10)
    assert plan == [[[0], [3]], [[1], [2]]]


def test_a_trade_beats_longest_first() -> None:
    """Longest first gives 5+3+3 against 5+4, so 11; changing 3+3 for 5 gives 5+5 against 4+3+3, the best there is."""
    costs = [PairCost(1, flops) for flops in (5.0, 5.0, 4.0, 3.0, 3.0)]
    assert step_time(costs, plan_micro_batches(costs, world_size=2, max_tokens=5)) == 10.0


def test_a_pair_that_fits_nowhere_is_named() -> None:
    with pytest.raises(ValueError, match="pair 1 of the global batch takes 33 tokens") as error:
        plan_micro_batches([PairCost(5, 1.0), PairCost(33, 1.0)], world_size=2, max_tokens=32)
    assert "max_tokens_per_micro_batch to at least 33 or lower max_length" in str(error.value)


# -- costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair", [TokenPair([1, 2, 3, 4, 5], [1, 2, 6], 2, 2, 2), TokenPair([1, 2], [3, 4, 5], 1, 1, 0)]
)
def test_scores_and_targets_are_those_of_the_packed_row(pair: TokenPair) -> None:
    lengths = {
        "trunk": pair.trunk,
        "chosen": len(pair.chosen) - pair.trunk,
        "rejected": len(pair.rejected) - pair.trunk,
    }
    batch = pack([pair], pair_ids=[0])
    assert batch.layout is not None
    tokens = CostModel(per_token=1, per_score=0, per_target=0).pair(**lengths)
    assert tokens.tokens == tokens.flops == batch.input_ids.numel()

    scores = CostModel(per_token=0, per_score=1, per_target=0).pair(**lengths).flops
    assert scores == sum(
        trunk_len + row + 1
        for q_start, q_end, _, trunk_len in batch.layout.segments
        for row in range(q_end - q_start)
    )
    if pair.trunk:
        targets = CostModel(per_token=0, per_score=0, per_target=1).pair(**lengths).flops
        assert targets == len(batch.rows.index)
        response = (
            CostModel(per_token=0, per_score=0, per_target=1, nll_on_prompt=False).pair(**lengths).flops
        )
        assert response == len(pack([pair], pair_ids=[0], nll_on_prompt=False).rows.index)


def test_flops_are_those_that_torch_counts() -> None:
    tokens = 48
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    body = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.dim() == 2)
    cost = CostModel.of_model(body_parameters=body, head_parameters=160 * 64, layers=3, attention_width=64)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None]).logits.sum().backward()
    # Eager attention computes the whole square of scores; the angles of the rotary embedding, half a head a token,
    # are the only product that the model does not count.
    expected = cost.per_token * tokens + cost.per_score * tokens**2 + cost.per_target * tokens
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-4)


# -- real lengths ----------------------------------------------------------------------------------------------


def real_lengths(max_length: int = 1024) -> list[tuple[int, int, int]]:
    """(trunk, chosen branch, rejected branch) of the demo set; a token is a word of up to 5 letters, or a sign."""
    lengths = []
    for line in DEMO.read_text().splitlines():
        row = json.loads(line)
        prompt, chosen, rejected = (
            re.findall(r"\w{1,5}|[^\w\s]", " ".join(turn["content"] for turn in row[field]))
            for field in ("prompt", "chosen", "rejected")
        )
        prompt = prompt[-max_length // 2 :]
        sequences = [(prompt + response)[:max_length] for response in (chosen, rejected)]
        trunk = common_prefix_length(*sequences)
        lengths.append((trunk, len(sequences[0]) - trunk, len(sequences[1]) - trunk))
    return lengths


MODELS = {  # and how much longer than the bound a step may be on average
    "Qwen2-0.5B": (
        CostModel.of_model(
            body_parameters=358_000_000, head_parameters=136_000_000, layers=24, attention_width=896
        ),
        1.05,
    ),
    # Far from any real model: rows that are all full of tokens may still differ in squares.
    "attention only": (CostModel(per_token=0.0, per_score=1.0, per_target=0.0), 1.10),
}


@pytest.mark.skipif(not DEMO.exists(), reason=f"{DEMO} is not here")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("world_size", "pairs"), [(2, 8), (8, 32), (8, 64), (8, 256)])
@pytest.mark.parametrize("max_tokens", [4096, 8192])
def test_ranks_hardly_wait_on_real_lengths(
    model: str, world_size: int, pairs: int, max_tokens: int, seed: int
) -> None:
    """No plan is faster than all FLOPs evenly over all ranks, or than the costliest pair alone."""
    draw = random.Random(seed)
    cost_model, allowed = MODELS[model]
    population = [cost_model.pair(trunk=t, chosen=c, rejected=r) for t, c, r in real_lengths()]
    ratios = []
    for _ in range(10):
        costs = draw.sample(population, pairs)
        plan = plan_micro_batches(costs, world_size=world_size, max_tokens=max_tokens)
        naive = round_robin(costs, world_size=world_size, max_tokens=max_tokens)
        assert len(plan[0]) <= len(naive[0])
        assert step_time(costs, plan) <= step_time(costs, naive)
        fastest = max(flops(costs, range(pairs)) / world_size, max(cost.flops for cost in costs))
        ratios.append(step_time(costs, plan) / fastest)
    assert sum(ratios) / len(ratios) < allowed
