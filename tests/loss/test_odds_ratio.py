"""ORPO's terms against 400-digit arithmetic, against the equations written out pair by pair, and where TRL fails."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import mpmath
import pytest
import torch
from torch import Tensor

from orpo_ds.loss import log1mexp, log_odds, orpo_loss

DIGITS = 400  # 1 - exp(x) still has 90 good ones where exp(x) is the smallest float64


def exponents() -> list[float]:
    """Negative numbers from -1e-30 to -1e4, dense around -log 2 where the formulas change."""
    spread = [-(10 ** (e / 8)) for e in range(-240, 33)]
    return [*spread, *(-math.log(2) * (1 + i * 1e-7) for i in range(-20, 21))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_and_its_slope_are_accurate_everywhere(dtype: torch.dtype) -> None:
    """Within 4 units in the last place of exact arithmetic on the same x, and of the smallest normal number."""
    x = torch.tensor(exponents(), dtype=dtype, requires_grad=True)
    value = log1mexp(x)
    value.sum().backward()
    with mpmath.workdps(DIGITS):
        exact = [mpmath.mpf(float(v)) for v in x.detach()]
        expected = torch.tensor([float(mpmath.log(1 - mpmath.exp(v))) for v in exact], dtype=torch.float64)
        slope = torch.tensor([float(-1 / mpmath.expm1(-v)) for v in exact], dtype=torch.float64)
    info = torch.finfo(dtype)
    torch.testing.assert_close(value.double(), expected, rtol=4 * info.eps, atol=info.tiny)
    torch.testing.assert_close(x.grad.double(), slope, rtol=4 * info.eps, atol=info.tiny)


def test_log1mexp_at_probability_one_is_decided() -> None:
    """At 0, and above it by rounding: a finite value below every other, and no gradient."""
    x = torch.tensor([0.0, -0.0, 1e-7, 3.0], requires_grad=True)
    value = log1mexp(x)
    value.sum().backward()
    torch.testing.assert_close(value, torch.full((4,), math.log(torch.finfo(torch.float32).tiny)))
    assert (value < log1mexp(torch.tensor(-1e-30))).all()
    assert x.grad.tolist() == [0.0] * 4


def test_trl_has_nan_gradients_where_ours_are_finite() -> None:
    """The defect that decision 6 of the design names, shown on TRL itself."""
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    near_one = [-1e-9, -1e-12, -1e-30]
    theirs = torch.tensor(near_one, requires_grad=True)
    orpo_trainer.log1mexp(theirs).sum().backward()
    assert theirs.grad.isnan().all()
    ours = torch.tensor(near_one, requires_grad=True)
    log1mexp(ours).sum().backward()
    torch.testing.assert_close(ours.grad, 1 / ours.detach(), rtol=1e-6, atol=0)


def test_log_odds_is_the_log_of_the_ratio_of_odds() -> None:
    chosen, rejected = torch.rand(2, 200, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    odds_ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    # 1 - p loses up to log10(1e6) of the 16 digits in the direct formula
    torch.testing.assert_close(log_odds(chosen.log(), rejected.log()), odds_ratio.log(), rtol=1e-9, atol=1e-9)


def test_log_odds_of_identical_responses_is_exactly_zero() -> None:
    same = torch.tensor([*exponents(), 0.0])
    assert not log_odds(same, same.clone()).any()


@dataclass(frozen=True)
class Rows:
    """Arguments of `orpo_loss` that come from a micro-batch."""

    logps: Tensor
    nll: Tensor
    chosen_pair: Tensor
    rejected_pair: Tensor
    chosen_len: Tensor
    rejected_len: Tensor

    def arguments(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def make_rows(pairs: int = 5, *, dtype: torch.dtype = torch.float32) -> Rows:
    """Per pair some prompt rows, some rows of a shared response prefix, then either response; shuffled."""
    chosen, rejected, nll, chosen_len, rejected_len = [], [], [], [], []
    for pair in range(pairs):
        prompt, shared, more_chosen, more_rejected = torch.randint(1, 6, (4,)).tolist()
        chosen += [-1] * prompt + [pair] * (shared + more_chosen) + [-1] * more_rejected
        rejected += [-1] * prompt + [pair] * shared + [-1] * more_chosen + [pair] * more_rejected
        nll += [True] * (prompt + shared + more_chosen) + [False] * more_rejected
        chosen_len.append(shared + more_chosen)
        rejected_len.append(shared + more_rejected)
    order = torch.randperm(len(nll))
    return Rows(
        logps=-torch.rand(len(nll), dtype=dtype) * 3,
        nll=torch.tensor(nll)[order],
        chosen_pair=torch.tensor(chosen)[order],
        rejected_pair=torch.tensor(rejected)[order],
        chosen_len=torch.tensor(chosen_len),
        rejected_len=torch.tensor(rejected_len),
    )


def split(rows: Rows, cut: int) -> Iterator[Rows]:
    """Two micro-batches: pairs before `cut`, and the others; every row goes with its pair, prompts with the first."""
    pair = torch.maximum(rows.chosen_pair, rows.rejected_pair)
    for mine, start, stop in ((pair < cut, 0, cut), (pair >= cut, cut, rows.chosen_len.shape[0])):
        yield Rows(
            logps=rows.logps[mine],
            nll=rows.nll[mine],
            chosen_pair=(rows.chosen_pair[mine] - start).clamp(min=-1),
            rejected_pair=(rows.rejected_pair[mine] - start).clamp(min=-1),
            chosen_len=rows.chosen_len[start:stop],
            rejected_len=rows.rejected_len[start:stop],
        )


def written_out(rows: Rows, *, beta: float) -> tuple[Tensor, dict[str, float]]:
    """Equations 3 to 7 of arXiv:2403.07691 pair by pair in float64, and TRL's metrics as sums."""
    logps = rows.logps.double()
    nll = -logps[rows.nll].sum()
    odds_terms = torch.zeros((), dtype=torch.float64)
    sums: Counter[str] = Counter({"nll_loss": nll.item()})
    for pair in range(rows.chosen_len.shape[0]):
        chosen = logps[rows.chosen_pair == pair].sum() / rows.chosen_len[pair]
        rejected = logps[rows.rejected_pair == pair].sum() / rows.rejected_len[pair]
        odds_chosen = chosen.exp() / (1 - chosen.exp())
        odds_rejected = rejected.exp() / (1 - rejected.exp())
        log_ratio = torch.log(odds_chosen / odds_rejected)
        log_sigmoid = torch.log(torch.sigmoid(log_ratio))
        odds_terms = odds_terms - log_sigmoid
        sums.update(
            {
                "rewards/chosen": beta * chosen.item(),
                "rewards/rejected": beta * rejected.item(),
                "rewards/accuracies": (chosen > rejected).item(),
                "rewards/margins": beta * (chosen - rejected).item(),
                "logps/chosen": chosen.item(),
                "logps/rejected": rejected.item(),
                "log_odds_chosen": log_ratio.item(),
                "log_odds_ratio": log_sigmoid.item(),
            }
        )
    return nll / rows.nll.sum() + beta * odds_terms / rows.chosen_len.shape[0], sums


def totals(rows: Rows) -> dict[str, int]:
    return {"nll_tokens_total": int(rows.nll.sum()), "pairs_total": rows.chosen_len.shape[0]}


def test_loss_gradient_and_metrics_are_those_of_the_equations() -> None:
    rows = make_rows()
    expected, expected_sums = written_out(reference := replace(rows, logps=leaf(rows.logps)), beta=0.3)
    expected.backward()
    result = orpo_loss(
        **(ours := replace(rows, logps=leaf(rows.logps))).arguments(), beta=0.3, **totals(rows)
    )
    result.loss.backward()
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.logps.grad, reference.logps.grad, rtol=1e-5, atol=1e-7)
    assert result.sums.keys() == expected_sums.keys()
    for name, value in result.sums.items():
        assert not value.requires_grad
        assert float(value) == pytest.approx(expected_sums[name], rel=1e-5, abs=1e-6), name
    assert float(result.chosen_logps.sum()) == pytest.approx(expected_sums["logps/chosen"], rel=1e-6)
    assert float(result.rejected_logps.sum()) == pytest.approx(expected_sums["logps/rejected"], rel=1e-6)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def test_gradient_in_float64() -> None:
    rows = make_rows(3, dtype=torch.float64)

    def loss(logps: Tensor) -> Tensor:
        return orpo_loss(**replace(rows, logps=logps).arguments(), beta=0.7, **totals(rows)).loss

    assert torch.autograd.gradcheck(loss, (leaf(rows.logps),))


def test_micro_batches_add_up_to_the_global_batch() -> None:
    rows = make_rows(6)
    whole = orpo_loss(**rows.arguments(), beta=0.5, **totals(rows))
    for cut in range(7):  # 0 and 6: one micro-batch has no pair, and 0 leaves it the prompts alone
        parts = [orpo_loss(**part.arguments(), beta=0.5, **totals(rows)) for part in split(rows, cut)]
        torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=2e-6, atol=0)
        for name, value in whole.sums.items():
            torch.testing.assert_close(sum(part.sums[name] for part in parts), value, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_micro_batch_has_loss_zero_and_a_graph(rows: int) -> None:
    """P = 0 with no row, and with the one dummy row that `pack` makes."""
    logps = torch.full((rows,), -2.0, requires_grad=True)
    none, no_pair = torch.zeros(0, dtype=torch.int64), torch.full((rows,), -1)
    empty = Rows(logps, torch.zeros(rows, dtype=torch.bool), no_pair, no_pair, none, none)
    result = orpo_loss(**empty.arguments(), beta=0.1, nll_tokens_total=10, pairs_total=2)
    result.loss.backward()
    assert result.loss.item() == 0
    assert torch.equal(logps.grad, torch.zeros(rows))
    assert not any(value.any() for value in result.sums.values())
    assert result.chosen_logps.shape == result.rejected_logps.shape == (0,)


def test_certain_responses_stay_finite() -> None:
    """Probability 1 for the chosen, for the rejected, and for both."""
    pair = torch.tensor([0, -1, 1, -1, 2, -1])
    other = torch.tensor([-1, 0, -1, 1, -1, 2])
    logps = torch.tensor([0.0, -1.0, -1.0, 0.0, 0.0, 0.0], requires_grad=True)
    one = torch.ones(3, dtype=torch.int64)
    rows = Rows(logps, pair >= 0, pair, other, one, one)
    result = orpo_loss(**rows.arguments(), beta=0.1, **totals(rows))
    result.loss.backward()
    assert result.loss.isfinite()
    assert logps.grad.isfinite().all()
    assert logps.grad[3] > 0, "a certain rejected response is still pushed down"
    assert all(value.isfinite() for value in result.sums.values())


def test_nan_stays_in_its_pair() -> None:
    rows = make_rows()
    rows.logps[(rows.chosen_pair == 2).nonzero()[0]] = torch.nan
    result = orpo_loss(**rows.arguments(), beta=0.1, **totals(rows))
    assert result.loss.isnan()
    assert result.chosen_logps.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("wrong", [{"nll_tokens_total": 0}, {"pairs_total": 0}])
def test_empty_global_batch_is_refused(wrong: dict[str, int]) -> None:
    rows = make_rows()
    with pytest.raises(ValueError, match="both must be positive"):
        orpo_loss(**rows.arguments(), beta=0.1, **(totals(rows) | wrong))
