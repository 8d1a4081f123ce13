"""The balance of experts: the model's own on padded sequences, also when it is put together from pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from orpo_ds.data.packing import MicroBatch, pack
from orpo_ds.data.padding import pad
from orpo_ds.model.anatomy import find_parts, hidden_states
from orpo_ds.model.attention import packed_attention_enabled
from orpo_ds.model.router import ExpertSums, expert_share, expert_sums
from tests.model.odd_models import MIXTURES, ODD_VOCAB
from tests.model.pairs import SHAPES, random_pairs
from tests.tiny_models import tiny_model

PAIRS = [(6, 5, 4), (3, 2, 7)]


def sums_of(model: PreTrainedModel, batch: MicroBatch) -> ExpertSums:
    """What a packed micro-batch does to the experts."""
    parts = find_parts(model)
    assert parts.router is not None
    with packed_attention_enabled(model):
        _, router_logits = hidden_states(parts, batch)
    assert router_logits is not None
    return expert_sums(
        parts.router,
        router_logits,
        token_weight=batch.token_weight,
        checkpointed=model.is_activation_checkpointing,
    )


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    """Torch's grouped product, which transformers takes for experts, knows no float64."""
    model = model.double().train()
    model.set_experts_implementation("eager")
    return model


def gradients_of(model: PreTrainedModel, value: Tensor) -> list[Tensor | None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(value, parameters, allow_unused=True))


def largest_error(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    """Of gradients, relative to the largest entry of all."""
    largest = max(gradient.abs().max().item() for gradient in wanted if gradient is not None)
    assert [gradient is None for gradient in found] == [gradient is None for gradient in wanted]
    errors = [
        (a - b).abs().max().item()
        for a, b in zip(found, wanted, strict=True)
        if a is not None and b is not None
    ]
    return max(errors) / largest


def own_balance(model: PreTrainedModel, padded: MicroBatch) -> Tensor:
    """`aux_loss` of the model's own padded forward."""
    output = model(padded.input_ids, attention_mask=padded.attention_mask, output_router_logits=True)
    balance: Tensor = output.aux_loss
    return balance


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("build", MIXTURES.values(), ids=MIXTURES.keys())
def test_it_is_that_of_the_padded_sequences(
    build: Callable[[], PreTrainedModel], checkpointing: bool, seed: int
) -> None:
    """In float64, so that a trunk that counts once, or padding that counts, could not hide in rounding.

    transformers adds the sums up in fp32, whatever the model's dtype: that is the tolerance.
    """
    model = in_double(build())
    pairs = random_pairs(SHAPES, vocab_size=ODD_VOCAB, seed=seed)
    padded = pad(pairs, pair_ids=range(len(pairs)), pad_token_id=0)
    wanted = own_balance(model, padded)
    wanted_gradients = gradients_of(model, wanted)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with packed_attention_enabled(model):  # recomputed layers need it in backward
        balance = sums_of(model, pack(pairs, pair_ids=range(len(pairs)))).balance()
        gradients = gradients_of(model, balance)

    eps = torch.finfo(torch.float32).eps
    assert balance.item() == pytest.approx(wanted.item(), rel=4 * eps)
    # The balance is flat near its optimum: its gradient is a small difference of terms of about 1.
    assert largest_error(gradients, wanted_gradients) <= 1e-4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_shares_of_micro_batches_add_up(family: str, seed: int) -> None:
    """Value and gradient, to the last digits of float64; the mean of the pieces' own balances is something else."""
    model = in_double(tiny_model(family, vocab_size=ODD_VOCAB, seed=seed))
    pairs = random_pairs(SHAPES, vocab_size=ODD_VOCAB, seed=seed)
    wanted = sums_of(model, pack(pairs, pair_ids=range(len(pairs)))).balance()
    wanted_gradients = gradients_of(model, wanted)

    pieces = [
        pack(pairs[:1], pair_ids=[0]),
        pack(pairs[1:4], pair_ids=range(3)),
        pack(pairs[4:], pair_ids=range(2)),
    ]
    pieces.append(pack([], pair_ids=[]))  # a rank that got no pair
    with torch.no_grad():
        first, *others = (sums_of(model, piece) for piece in pieces)
        whole = first
        for other in others:
            whole = whole + other
    shares = sum(sums_of(model, piece).balance(whole) for piece in pieces)
    assert isinstance(shares, Tensor)
    assert shares.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert largest_error(gradients_of(model, shares), wanted_gradients) <= 1e-9

    with torch.no_grad():
        mean = sum((sums_of(model, piece).balance() for piece in pieces[:3]), torch.zeros(())) / 3
    assert abs(mean.item() - wanted.item()) > 1e-3 * wanted.item()


def test_a_collective_gives_the_same_sums() -> None:
    """`over_ranks` on this rank alone; with several in `tests/distributed`."""
    sums = ExpertSums(
        torch.tensor([3.0, 5.0], dtype=torch.float64),
        torch.tensor([1.5, 2.5], requires_grad=True),
        torch.tensor(4.0, dtype=torch.float64),
    )
    doubled = sums.over_ranks(lambda vector: 2 * vector)
    assert doubled.load.tolist() == [6.0, 10.0]
    assert doubled.probability.tolist() == [3.0, 5.0]
    assert doubled.tokens.item() == 8.0
    assert not doubled.probability.requires_grad


def test_a_router_that_is_not_asked_for_costs_nothing() -> None:
    model = tiny_model("mixtral")
    assert find_parts(model).aux_coefficient == 0.02
    model.config.output_router_logits = False
    parts = find_parts(model)
    assert parts.router is None
    assert parts.aux_coefficient == 0.0


def test_a_router_that_is_not_known_is_refused() -> None:
    model = tiny_model("llama")
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=False"):
        find_parts(model)


def test_a_family_with_another_balance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    module = __import__("sys").modules[type(model).__module__]
    theirs = module.load_balancing_loss_func

    def squared(logits: object, num_experts: int, top_k: int, weight: Tensor) -> Tensor:
        value: Tensor = theirs(logits, num_experts, top_k, weight)
        return value.square()

    monkeypatch.setattr(module, "load_balancing_loss_func", squared)
    with pytest.raises(ValueError, match="not known here"):
        find_parts(model)


def test_a_router_whose_gradient_checkpointing_cuts_is_refused() -> None:
    model = tiny_model("mixtral")
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    batch = pack(random_pairs(PAIRS, vocab_size=97, seed=0), pair_ids=range(2))
    with pytest.raises(ValueError, match="use_reentrant"):
        sums_of(model, batch)


@pytest.mark.parametrize(
    ("family", "share"),
    [("mixtral", 1 / 2), ("qwen3_moe", 1 / 4), ("olmoe", 3 / 8), ("deepseek_v3", 1 / 4), ("llama", 1)],
)
def test_the_share_of_experts_that_a_token_meets(family: str, share: float) -> None:
    assert expert_share(tiny_model(family).config) == share
