"""Tiled log-probs against all logits at once, in float64 and in their own precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_ds.loss import token_logps
from tests.loss.dense import Problem, dense_logps, float64_reference, fp32_bounds, make_problem

HEADS = [
    pytest.param({}, id="plain"),
    pytest.param({"bias": True, "scale": 0.25}, id="bias-scale"),
    pytest.param({"softcap": 3.0}, id="softcap"),
    pytest.param({"bias": True, "softcap": 3.0, "scale": -0.5}, id="all"),
]
TILES = [
    pytest.param({}, id="defaults"),
    pytest.param({"tile_rows": 1, "tile_columns": 1}, id="1x1"),
    pytest.param({"tile_rows": 5, "tile_columns": 64}, id="5x64"),
    pytest.param({"tile_rows": 23, "tile_columns": 300}, id="23x300"),
    pytest.param({"tile_rows": 9, "tile_columns": 50, "logits_cache_mib": 1}, id="cached"),
]


def run(problem: Problem, **tiles: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients of sum(grad * logps), ours."""
    logps = token_logps(problem.hidden, problem.weight, **problem.options, **tiles)
    gradients = torch.autograd.grad(logps, list(problem.tensors.values()), problem.grad.to(logps.dtype))
    return logps.detach(), dict(zip(problem.tensors, gradients, strict=True))


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("head", HEADS)
def test_fp32_is_within_worst_case_rounding_of_float64(head: dict, tiles: dict) -> None:
    problem = make_problem(**head)
    logps, gradients = run(problem, **tiles)
    expected, expected_gradients = float64_reference(problem)
    bounds = fp32_bounds(problem)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=bounds["logps"])
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), expected_gradients[name], rtol=0, atol=bounds[name])


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_the_derivatives_in_float64(head: dict) -> None:
    problem = make_problem(**head, rows=7, hidden_rows=5, width=3, vocab=11, dtype=torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        options = problem.options | ({"bias": tensors[2]} if head.get("bias") else {})
        return token_logps(*tensors[:2], **options, tile_rows=3, tile_columns=4)

    assert torch.autograd.gradcheck(function, tuple(problem.tensors.values()))


def test_no_further_from_float64_than_the_dense_fp32_head() -> None:
    """Tiles cost no accuracy: the error is of the size of the error that torch's own fp32 log_softmax makes."""
    problem = make_problem(rows=400, hidden_rows=400, width=64, vocab=2000)
    logps, _ = run(problem, tile_rows=150, tile_columns=333)
    exact, _ = float64_reference(problem)
    with torch.no_grad():
        dense = dense_logps(problem, problem.tensors)
    ours, theirs = (logps - exact).square().mean().sqrt(), (dense - exact).square().mean().sqrt()
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiles", TILES)
def test_half_precision_inputs_are_computed_in_fp32(dtype: torch.dtype, tiles: dict) -> None:
    """Sums are fp32 over all tiles: a gradient is rounded to its own dtype once, a hidden row's once a use."""
    problem = make_problem(bias=True, dtype=dtype)
    logps, gradients = run(problem, **tiles)
    expected, expected_gradients = float64_reference(problem)
    bounds = fp32_bounds(problem)
    unit, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=bounds["logps"])
    for name in ("weight", "bias"):
        assert gradients[name].dtype == dtype
        torch.testing.assert_close(
            gradients[name].double(), expected_gradients[name], rtol=unit, atol=bounds[name] + smallest * unit
        )
    # A row used n times is n parts, each at most 2 |g| max|W| and each rounded, and n running sums of them.
    uses = problem.index.bincount(problem.grad.abs(), minlength=problem.hidden.shape[0])
    largest_sum = 2 * uses * problem.weight.detach().abs().max()
    allowed = bounds["hidden"] + 2 * problem.index.bincount(minlength=len(uses)) * unit * largest_sum
    assert gradients["hidden"].dtype == dtype
    assert ((gradients["hidden"].double() - expected_gradients["hidden"]).abs() <= allowed[:, None]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiles", TILES)
def test_half_precision_products_on_a_gpu(dtype: torch.dtype, tiles: dict) -> None:
    """Operands are half, sums fp32: log-probs as exact as on a CPU, and D and g h rounded before dW and dh."""
    problem = make_problem(bias=True, dtype=dtype)
    expected, expected_gradients = float64_reference(problem)
    bounds, unit = fp32_bounds(problem), torch.finfo(dtype).eps / 2
    total = problem.grad.abs().sum()
    largest = {name: tensor.detach().abs().max() for name, tensor in problem.tensors.items()}
    rounded = {"hidden": 6 * largest["weight"], "weight": 6 * largest["hidden"], "bias": 2}
    for name in ("hidden", "weight", "bias"):
        setattr(problem, name, problem.tensors[name].detach().cuda().requires_grad_())
    for name in ("index", "label", "grad"):
        setattr(problem, name, getattr(problem, name).cuda())
    logps, gradients = run(problem, **tiles)
    torch.testing.assert_close(logps.double().cpu(), expected, rtol=0, atol=bounds["logps"])
    for name, gradient in gradients.items():
        allowed = bounds[name] + float(unit * total * rounded[name])
        torch.testing.assert_close(gradient.double().cpu(), expected_gradients[name], rtol=0, atol=allowed)


def test_mixed_dtypes_compute_in_the_wider() -> None:
    problem = make_problem(bias=True)
    problem.hidden = problem.hidden.detach().bfloat16().requires_grad_()
    logps, gradients = run(problem)
    expected, _ = float64_reference(problem)
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=fp32_bounds(problem)["logps"])
    assert {name: gradient.dtype for name, gradient in gradients.items()} == {
        "hidden": torch.bfloat16,
        "weight": torch.float32,
        "bias": torch.float32,
    }


@pytest.mark.parametrize("head", HEADS)
def test_cache_changes_no_bit(head: dict) -> None:
    """0, some and all of the logits kept: 256 x 2048 fp32 logits are 2 MiB, so 1 MiB keeps about half of them."""
    problem = make_problem(**head, rows=256, vocab=2048)
    results = [run(problem, tile_rows=100, tile_columns=500, logits_cache_mib=mib) for mib in (0, 1, 8)]
    for logps, gradients in results[1:]:
        assert torch.equal(logps, results[0][0])
        for name, gradient in gradients.items():
            assert torch.equal(gradient, results[0][1][name]), name


def test_cached_tiles_survive_a_second_backward() -> None:
    problem = make_problem()
    logps = token_logps(problem.hidden, problem.weight, **problem.options, tile_rows=5, logits_cache_mib=1)
    first = torch.autograd.grad(logps, (problem.hidden, problem.weight), problem.grad, retain_graph=True)
    second = torch.autograd.grad(logps, (problem.hidden, problem.weight), problem.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("head", HEADS)
def test_frozen_head_gives_the_same_hidden_gradient_and_no_other(head: dict, tiles: dict) -> None:
    problem = make_problem(**head)
    _, expected = float64_reference(problem)
    for tensor in problem.tensors.values():
        tensor.requires_grad_(tensor is problem.hidden)
    token_logps(problem.hidden, problem.weight, **problem.options, **tiles).backward(problem.grad)
    torch.testing.assert_close(
        problem.hidden.grad.double(), expected["hidden"], rtol=0, atol=fp32_bounds(problem)["hidden"]
    )
    assert problem.weight.grad is None
    assert problem.bias is None or problem.bias.grad is None


@pytest.mark.parametrize(
    ("wanted", "cache_mib", "products"),
    [
        pytest.param({"hidden", "weight"}, 0, 4, id="trained"),
        pytest.param({"hidden", "weight"}, 1, 3, id="trained-cached"),
        pytest.param({"hidden"}, 0, 2, id="frozen"),
        pytest.param({"weight"}, 0, 3, id="head-only"),
        pytest.param(set(), 1, 1, id="evaluation"),
    ],
)
def test_number_of_matrix_products(wanted: set[str], cache_mib: int, products: int) -> None:
    """Products of R x H x V multiply-adds, counted as torch dispatches them."""

    class CountProducts(TorchDispatchMode):
        multiply_adds = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm):
                left, right = args[-2:]
                self.multiply_adds += left.shape[0] * left.shape[1] * right.shape[1]
            return func(*args, **(kwargs or {}))

    problem = make_problem()
    for name, tensor in problem.tensors.items():
        tensor.requires_grad_(name in wanted)
    with CountProducts() as count:
        logps = token_logps(
            problem.hidden,
            problem.weight,
            **problem.options,
            tile_rows=9,
            tile_columns=50,
            logits_cache_mib=cache_mib,
        )
        if wanted:
            logps.backward(problem.grad)
    assert count.multiply_adds == products * problem.index.shape[0] * problem.weight.numel()


def test_without_grad_mode_nothing_is_kept() -> None:
    problem = make_problem()
    with torch.no_grad():
        logps = token_logps(problem.hidden, problem.weight, **problem.options, logits_cache_mib=1)
    assert logps.grad_fn is None
    torch.testing.assert_close(logps, run(problem)[0], rtol=0, atol=0)


def test_certain_token_has_logp_exactly_zero_and_no_gradient() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weight = torch.zeros(1000, 2)
    weight[7] = 1e4
    weight.requires_grad_()
    index, label = torch.tensor([0, 1, 1]), torch.tensor([7, 7, 8])
    logps = token_logps(hidden, weight, index=index, label=label, tile_columns=300)
    assert logps.tolist() == [0.0, 0.0, -1e4]
    logps[:2].sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_logits_of_ten_thousand_keep_their_digits() -> None:
    """Ties at +1e4 and -1e4: logp is -log 2 to fp32, though log-sum-exp itself could only hold it to 1e-3."""
    bias = torch.full((500,), -1e4)
    bias[[3, 444]] = 1e4
    hidden, weight = torch.zeros(1, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    logps = token_logps(
        hidden, weight, bias=bias, index=torch.tensor([0]), label=torch.tensor([3]), tile_columns=64
    )
    torch.testing.assert_close(logps, torch.tensor([-0.6931471805599453]), rtol=1e-6, atol=0)
    logps.sum().backward()
    torch.testing.assert_close(hidden.grad[0], (weight[3] - weight[444]).detach() / 2, rtol=1e-6, atol=1e-6)
    assert weight.grad.isfinite().all()


def test_masked_run_of_the_vocabulary_has_probability_zero() -> None:
    """A bias of -inf (a token that must not be predicted), over whole tiles and first in line."""
    problem = make_problem(bias=True)
    masked = slice(0, 128)
    problem.label = problem.label.clamp(min=128)
    with torch.no_grad():
        problem.bias[masked] = -torch.inf
    logps, gradients = run(problem, tile_rows=6, tile_columns=64)
    with torch.no_grad():
        expected = dense_logps(problem, problem.tensors)
    torch.testing.assert_close(logps, expected)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert not gradients["weight"][masked].any()


def test_nan_in_one_hidden_state_stays_in_its_rows() -> None:
    problem = make_problem()
    with torch.no_grad():
        problem.hidden[3] = torch.nan
    logps, _ = run(problem, tile_rows=4, tile_columns=64)
    assert torch.equal(logps.isnan(), problem.index == 3)
    assert logps.isnan().any()


def test_no_rows_give_zero_gradients() -> None:
    problem = make_problem(rows=0, bias=True)
    logps, gradients = run(problem)
    assert logps.shape == (0,)
    for name, tensor in problem.tensors.items():
        assert torch.equal(gradients[name], torch.zeros_like(tensor))


def test_strided_inputs() -> None:
    problem = make_problem(width=6)
    expected, expected_gradients = run(problem)
    strided = make_problem(width=6)
    strided.index, strided.label, strided.grad = problem.index, problem.label, problem.grad
    strided.hidden = problem.hidden.detach().T.contiguous().T.requires_grad_()
    strided.weight = problem.weight.detach().repeat(1, 2)[:, :6].requires_grad_()
    assert not strided.hidden.is_contiguous()
    assert not strided.weight.is_contiguous()
    logps, gradients = run(strided, tile_rows=8, tile_columns=100)
    bounds = fp32_bounds(problem)
    torch.testing.assert_close(logps, expected, rtol=0, atol=2 * bounds["logps"])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=2 * bounds[name])


def test_weight_may_be_freed_and_gathered_again_between_forward_and_backward() -> None:
    """What ZeRO-3 does to a parameter: its data is freed after forward and another copy comes for backward."""
    problem = make_problem()
    _, expected = run(problem)
    gathered = problem.weight.detach().clone()
    storage = StorageWeakRef(problem.weight.untyped_storage())
    logps = token_logps(problem.hidden, problem.weight, **problem.options)
    problem.weight.data = torch.empty(0)
    assert storage.expired(), "the graph still holds the gathered weight"
    problem.weight.data = gathered
    logps.backward(problem.grad)
    assert torch.equal(problem.weight.grad, expected["weight"])
    assert torch.equal(problem.hidden.grad, expected["hidden"])


def test_weight_that_is_not_gathered_in_backward_is_an_error() -> None:
    problem = make_problem()
    logps = token_logps(problem.hidden, problem.weight, **problem.options)
    problem.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"\[0\] in backward and was \[301, 12\] in forward: ZeRO-3"):
        logps.backward(problem.grad)


def test_second_derivative_is_refused() -> None:
    problem = make_problem()
    logps = token_logps(problem.hidden, problem.weight, **problem.options)
    (gradient,) = torch.autograd.grad(logps.square().sum(), problem.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden \[N, H\] and weight \[V, H\]; got \[2, 3, 4\]"),
        ({"weight": torch.zeros(5, 3)}, r"got \[17, 12\] and \[5, 3\]"),
        ({"weight": torch.zeros(0)}, "ZeRO-3 has partitioned"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, r"int64 \[3\] and torch.int64 \[23\]"),
        ({"label": torch.zeros(23, dtype=torch.int32)}, "torch.int32"),
        ({"label": torch.full((23,), 301)}, r"label\[0\] is 301, outside the head's vocabulary of 301"),
        ({"label": torch.full((23,), -100)}, "Leave rows to ignore"),
        ({"bias": torch.zeros(7)}, r"bias is \[7\]"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"tile_rows": 0}, "tile_rows is 0"),
        ({"tile_columns": 0}, "tile_columns is 0"),
        ({"logits_cache_mib": -1}, "logits_cache_mib is -1"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    problem = make_problem()
    arguments = {"hidden": problem.hidden, "weight": problem.weight, **problem.options, **change}
    with pytest.raises(ValueError, match=message):
        token_logps(**arguments)
