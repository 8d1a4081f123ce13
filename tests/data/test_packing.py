"""A packed row and a padded rectangle give the log-probs and gradients of the full sequences, one at a time.

The judge is a small transformer in float64, written here: grouped-query attention, learned positions, and attention
as a function that each test brings along. The reference runs every sequence alone under a plain causal mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from orpo_ds.data.packing import MicroBatch, VarlenLayout, count_targets, pack
from orpo_ds.data.padding import pad, pad_encoder_decoder
from orpo_ds.data.truncate import TokenPair

VOCABULARY, HIDDEN, QUERY_HEADS, KEY_HEADS = 13, 8, 4, 2
# Sums of fewer than 1e3 float64 terms of size O(1) in another order: 1e3 * 2.2e-16, and two layers of headroom.
RTOL, ATOL = 1e-11, 1e-12

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]
Values = tuple[Tensor, Tensor, Tensor]  # chosen means [P], rejected means [P], sum of the nll


def token_pair(
    chosen: Sequence[int], rejected: Sequence[int], chosen_start: int, rejected_start: int
) -> TokenPair:
    trunk = 0
    while trunk < min(len(chosen), len(rejected)) and chosen[trunk] == rejected[trunk]:
        trunk += 1
    return TokenPair(list(chosen), list(rejected), chosen_start, rejected_start, trunk)


CASES = {
    "branches differ from their first token": token_pair([1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8], 3, 3),
    "responses share two words": token_pair([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], 2, 2),
    "trunk ends inside the prompt": token_pair([1, 2, 9, 4, 5], [1, 2, 8, 7, 6, 3], 3, 4),
    "chosen is a prefix of rejected": token_pair([1, 2, 3], [1, 2, 3, 4, 5], 2, 2),
    "rejected is a prefix of chosen": token_pair([1, 2, 3, 4, 5], [1, 2, 3], 1, 1),
    "nothing in common": token_pair([1, 2, 3, 4], [5, 6, 7], 1, 2),
    "one prompt token, one response token": token_pair([1, 2], [1, 3], 1, 1),
    "response starts at different places in the trunk": token_pair([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], 3, 1),
    "no prompt": token_pair([1, 2, 3], [1, 4], 0, 0),
}


@st.composite
def token_pairs(draw: st.DrawFn) -> TokenPair:
    """Any pair that has a response token with something before it: three letters make long shared prefixes likely."""
    letters = st.integers(1, 3)
    prompt = draw(st.lists(letters, max_size=6))
    chosen = prompt + draw(st.lists(letters, min_size=2, max_size=7))
    rejected = prompt + draw(
        st.lists(letters, min_size=2, max_size=7).filter(lambda ids: prompt + ids != chosen)
    )
    starts = [draw(st.integers(max(0, len(prompt) - 1), len(prompt) + 1)) for _ in range(2)]
    return token_pair(chosen, rejected, *starts)


class Transformer(nn.Module):
    """Two layers in float64. It does not know how a batch is laid out: positions and attention are arguments."""

    def __init__(self) -> None:
        super().__init__()
        head = HIDDEN // QUERY_HEADS
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Embedding(32, HIDDEN)
        self.projections = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(HIDDEN, HIDDEN),
                    "k": nn.Linear(HIDDEN, KEY_HEADS * head),
                    "v": nn.Linear(HIDDEN, KEY_HEADS * head),
                    "up": nn.Linear(HIDDEN, 2 * HIDDEN),
                    "down": nn.Linear(2 * HIDDEN, HIDDEN),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor, position_ids: Tensor, attend: Attention) -> Tensor:
        """Log-probs of every next token, [T, V], of rows [T]."""
        x = self.tokens(input_ids) + self.positions(position_ids)
        for layer in self.projections:
            q, k, v = (layer[name](x).unflatten(-1, (-1, HIDDEN // QUERY_HEADS)) for name in "qkv")
            x = x + attend(q, k, v).flatten(-2)
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.head(x).log_softmax(-1)


def attend_under(mask: Tensor) -> Attention:
    """Softmax attention where `mask` [queries, keys] is True."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(QUERY_HEADS // KEY_HEADS, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)

    return attend


def causal(queries: int, keys: int) -> Tensor:
    """[queries, keys], aligned bottom-right."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def by_definition(pairs: Sequence[TokenPair]) -> Attention:
    """A row sees the rows of its own trunk and its own branch that do not come after it."""
    where = [
        (number, part, position)
        for number, pair in enumerate(pairs)
        for part, positions in (
            ("trunk", range(pair.trunk)),
            ("chosen", range(pair.trunk, len(pair.chosen))),
            ("rejected", range(pair.trunk, len(pair.rejected))),
        )
        for position in positions
    ]
    mask = [[k[0] == q[0] and k[1] in ("trunk", q[1]) and k[2] <= q[2] for k in where] for q in where]
    return attend_under(torch.tensor(mask))


def by_segments(layout: VarlenLayout) -> Attention:
    """From the host copy of the layout, as one dense mask."""
    rows = layout.segments[-1][1]
    mask = torch.zeros(rows, rows, dtype=torch.bool)
    for q_start, q_end, trunk_start, trunk_len in layout.segments:
        mask[q_start:q_end, trunk_start : trunk_start + trunk_len] = True
        mask[q_start:q_end, q_start:q_end] = causal(q_end - q_start, q_end - q_start)
    return attend_under(mask)


def by_cu_seqlens(layout: VarlenLayout) -> Attention:
    """What a varlen kernel does: gathered keys, a bottom-right aligned causal mask in every segment."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[layout.kv_index], v[layout.kv_index]
        out = []
        borders = zip(
            pairwise(layout.cu_seqlens_q.tolist()), pairwise(layout.cu_seqlens_k.tolist()), strict=True
        )
        for (q0, q1), (k0, k1) in borders:
            assert q1 - q0 <= layout.max_seqlen_q
            assert k1 - k0 <= layout.max_seqlen_k
            out.append(attend_under(causal(q1 - q0, k1 - k0))(q[q0:q1], k[k0:k1], v[k0:k1]))
        return torch.cat(out)

    return attend


def nonlinear_loss(chosen: Tensor, rejected: Tensor, nll: Tensor) -> Tensor:
    """A loss in which every mean has its own gradient: a swapped or doubled token shows."""
    weights = torch.arange(1, len(chosen) + 1, dtype=torch.float64)
    return nll - 0.1 * (weights * nn.functional.logsigmoid(2 * chosen - rejected)).sum()


def from_full_sequences(model: Transformer, pairs: Sequence[TokenPair], nll_on_prompt: bool) -> Values:
    """Chosen means [P], rejected means [P] and the nll sum, by the definition, one sequence at a time."""

    def logps(ids: list[int]) -> Tensor:
        length = len(ids)
        out = model(torch.tensor(ids), torch.arange(length), attend_under(causal(length, length)))
        return out[torch.arange(length - 1), ids[1:]]

    chosen = [logps(pair.chosen) for pair in pairs]
    rejected = [logps(pair.rejected) for pair in pairs]
    in_chosen = [x[max(pair.chosen_start - 1, 0) :] for x, pair in zip(chosen, pairs, strict=True)]
    in_rejected = [x[max(pair.rejected_start - 1, 0) :] for x, pair in zip(rejected, pairs, strict=True)]
    return (
        torch.stack([x.mean() for x in in_chosen]),
        torch.stack([x.mean() for x in in_rejected]),
        -torch.cat(chosen if nll_on_prompt else in_chosen).sum(),
    )


def from_rows(logps: Tensor, batch: MicroBatch) -> Values:
    """The same from next-token log-probs [N, V] of a laid-out batch, as its target rows say."""
    rows = batch.rows
    values = logps[rows.index, rows.label]

    def means(pair: Tensor, length: Tensor) -> Tensor:
        return torch.stack([values[pair == number].sum() / length[number] for number in range(len(length))])

    return (
        means(rows.chosen_pair, rows.chosen_len),
        means(rows.rejected_pair, rows.rejected_len),
        -values[rows.nll].sum(),
    )


@dataclass(frozen=True)
class Expected:
    """The full sequences' values, and the gradient of their loss in every parameter."""

    values: Values
    gradients: list[Tensor]

    @classmethod
    def of(cls, model: Transformer, pairs: Sequence[TokenPair], nll_on_prompt: bool) -> Expected:
        values = from_full_sequences(model, pairs, nll_on_prompt)
        return cls(values, gradients(model, values))

    def check(self, model: Transformer, values: Values) -> None:
        for value, reference in zip(values, self.values, strict=True):
            torch.testing.assert_close(value, reference, rtol=RTOL, atol=ATOL)
        for value, reference in zip(gradients(model, values), self.gradients, strict=True):
            torch.testing.assert_close(value, reference, rtol=RTOL, atol=ATOL)


def gradients(model: Transformer, values: Values) -> list[Tensor]:
    return list(torch.autograd.grad(nonlinear_loss(*values), list(model.parameters())))


def run_packed(model: Transformer, batch: MicroBatch, attend: Attention) -> Values:
    return from_rows(model(batch.input_ids[0], batch.position_ids[0], attend), batch)


def run_padded(model: Transformer, batch: MicroBatch) -> Values:
    assert batch.attention_mask is not None
    width = batch.input_ids.shape[1]
    # A padding row may see itself, so that its softmax is finite; nothing sees a padding row.
    visible = [
        causal(width, width) & mask.bool() | torch.eye(width, dtype=torch.bool)
        for mask in batch.attention_mask
    ]
    logps = [
        model(ids, positions, attend_under(mask))
        for ids, positions, mask in zip(batch.input_ids, batch.position_ids, visible, strict=True)
    ]
    return from_rows(torch.cat(logps), batch)


def layouts(pairs: Sequence[TokenPair], nll_on_prompt: bool) -> list[Callable[[Transformer], Values]]:
    packed = pack(pairs, pair_ids=range(len(pairs)), nll_on_prompt=nll_on_prompt)
    padded = pad(pairs, pair_ids=range(len(pairs)), pad_token_id=0, nll_on_prompt=nll_on_prompt)
    assert packed.layout is not None
    layout = packed.layout
    return [
        lambda model: run_packed(model, packed, by_definition(pairs)),
        lambda model: run_packed(model, packed, by_segments(layout)),
        lambda model: run_packed(model, packed, by_cu_seqlens(layout)),
        lambda model: run_padded(model, padded),
    ]


@pytest.mark.parametrize("nll_on_prompt", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_pair_alone_is_its_two_full_sequences(name: str, nll_on_prompt: bool) -> None:
    model, pairs = Transformer(), [CASES[name]]
    expected = Expected.of(model, pairs, nll_on_prompt)
    for run in layouts(pairs, nll_on_prompt):
        expected.check(model, run(model))


@pytest.mark.parametrize("nll_on_prompt", [True, False])
def test_pairs_in_one_row_do_not_see_each_other(nll_on_prompt: bool) -> None:
    model, pairs = Transformer(), list(CASES.values())
    expected = Expected.of(model, pairs, nll_on_prompt)
    for run in layouts(pairs, nll_on_prompt):
        expected.check(model, run(model))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pairs=st.lists(token_pairs(), min_size=1, max_size=4), nll_on_prompt=st.booleans())
def test_any_pairs(pairs: list[TokenPair], nll_on_prompt: bool) -> None:
    model = Transformer()
    expected = Expected.of(model, pairs, nll_on_prompt)
    for run in layouts(pairs, nll_on_prompt):
        expected.check(model, run(model))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pairs=st.lists(token_pairs(), min_size=1, max_size=5), nll_on_prompt=st.booleans())
def test_sizes_of_a_packed_row(pairs: list[TokenPair], nll_on_prompt: bool) -> None:
    batch = pack(pairs, pair_ids=range(10, 10 + len(pairs)), nll_on_prompt=nll_on_prompt)
    layout, rows = batch.layout, batch.rows
    assert layout is not None

    both = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    trunks = sum(pair.trunk for pair in pairs)
    assert batch.input_ids.shape == batch.position_ids.shape == batch.token_weight.shape == (1, both - trunks)
    assert (batch.real_tokens, batch.unshared_tokens) == (both - trunks, both)
    assert float(batch.token_weight.sum()) == both
    assert batch.pair_ids == tuple(range(10, 10 + len(pairs)))

    unasked = sum(pair.trunk for pair in pairs if len(pair.rejected) == pair.trunk)
    assert len(layout.kv_index) == both - unasked, "two segments a pair gather 2t + c + r keys"
    assert layout.cu_seqlens_q.tolist() == [0, *(q_end for _, q_end, _, _ in layout.segments)]
    for tensor in (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.kv_index):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
    assert layout.max_seqlen_k == max(layout.cu_seqlens_k.diff().tolist())
    assert layout.max_seqlen_q == max(layout.cu_seqlens_q.diff().tolist())
    assert 0 not in layout.cu_seqlens_q.diff().tolist()

    assert rows.index.tolist() == sorted(rows.index.tolist())
    assert bool((rows.nll | (rows.chosen_pair >= 0) | (rows.rejected_pair >= 0)).all()), (
        "a row that nothing needs"
    )
    assert int(rows.nll.sum()) == sum(count_targets(pair, nll_on_prompt) for pair in pairs)


def test_one_row_serves_both_sums_for_a_word_that_responses_share() -> None:
    rows = pack([CASES["responses share two words"]], pair_ids=[0], nll_on_prompt=False).rows
    assert rows.label.tolist() == [3, 4, 5, 7, 6]
    assert rows.chosen_pair.tolist() == [0, 0, 0, -1, 0]
    assert rows.rejected_pair.tolist() == [0, 0, -1, 0, -1]
    assert rows.index.tolist() == [1, 2, 3, 3, 4], "the last trunk token is the source of 5 and of 7"


@pytest.mark.parametrize(
    "empty", [pack([], pair_ids=[]), pad([], pair_ids=[], pad_token_id=0)], ids=["packed", "padded"]
)
def test_a_micro_batch_without_pairs_runs_and_weighs_nothing(empty: MicroBatch) -> None:
    model = Transformer()
    attend = by_cu_seqlens(empty.layout) if empty.layout else attend_under(torch.ones(1, 1, dtype=torch.bool))
    logps = model(empty.input_ids[0], empty.position_ids[0], attend)
    values = logps[empty.rows.index, empty.rows.label]
    assert values.shape == (1,)
    assert bool(values.isfinite().all())
    assert not empty.rows.nll.any()
    assert empty.rows.chosen_pair.tolist() == empty.rows.rejected_pair.tolist() == [-1]
    assert len(empty.rows.chosen_len) == len(empty.rows.rejected_len) == 0
    assert (empty.real_tokens, empty.unshared_tokens, float(empty.token_weight.sum())) == (0, 0, 0.0)


def test_padding_counts_as_no_token() -> None:
    batch = pad(list(CASES.values()), pair_ids=range(len(CASES)), pad_token_id=0)
    both = sum(len(pair.chosen) + len(pair.rejected) for pair in CASES.values())
    assert batch.real_tokens == batch.unshared_tokens == int(batch.token_weight.sum()) == both
    assert batch.input_ids.shape == (2 * len(CASES), max(len(pair.chosen) for pair in CASES.values()))


def test_an_encoder_decoder_batch_is_its_single_sequences() -> None:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).double().eval()
    pairs = [pair for pair in CASES.values() if pair.chosen_start > 0]
    batch = pad_encoder_decoder(pairs, pair_ids=range(len(pairs)), pad_token_id=0, decoder_start_token_id=0)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        decoder_input_ids=batch.decoder_input_ids,
    ).logits
    values = from_rows(logits.flatten(0, 1).log_softmax(-1), batch)

    def mean_logp(ids: list[int], start: int) -> Tensor:
        return -model(input_ids=torch.tensor([ids[:start]]), labels=torch.tensor([ids[start:]])).loss

    chosen = torch.stack([mean_logp(pair.chosen, pair.chosen_start) for pair in pairs])
    rejected = torch.stack([mean_logp(pair.rejected, pair.rejected_start) for pair in pairs])
    nll = -sum(
        mean * (len(pair.chosen) - pair.chosen_start) for mean, pair in zip(chosen, pairs, strict=True)
    )
    # T5 computes its layer norms' variance and its loss in float32: 2^-24 a rounding, a few of them a layer.
    for value, reference in zip(values, (chosen, rejected, nll), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert int(batch.rows.nll.sum()) == sum(count_targets(pair, nll_on_prompt=False) for pair in pairs)


def test_to_moves_every_tensor() -> None:
    batch = pack(list(CASES.values()), pair_ids=range(len(CASES))).to("meta")
    devices: list[str] = []

    def note(tensor: Tensor) -> Tensor:
        devices.append(tensor.device.type)
        return tensor

    batch.map_tensors(note)
    assert devices == ["meta"] * 13, "3 of the row, 3 of its layout, 7 of its target rows"
    assert batch.pair_ids == tuple(range(len(CASES)))
