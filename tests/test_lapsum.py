"""LapSum: against its definition in fp64, derivatives of both orders, lists, types, extremes, the peers' defects."""

import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fusedloss.sorting import lapsum_rank, lapsum_sort, lapsum_top_k

F64, inf = torch.float64, torch.inf
both = pytest.mark.parametrize("backend", ["cpu", "torch"], indirect=True)
every_alpha = pytest.mark.parametrize("alpha", [20.0, 0.7, 0.02])
OPERATORS = {
    "rank": lapsum_rank,
    "rank descending": lambda x, alpha, **o: lapsum_rank(x, alpha, descending=True, **o),
    "sort": lapsum_sort,
    "sort descending": lambda x, alpha, **o: lapsum_sort(x, alpha, descending=True, **o),
    "largest": lambda x, alpha, k=2.3, **o: lapsum_top_k(x, k, alpha, **o),
    "smallest": lambda x, alpha, k=2.3, **o: lapsum_top_k(x, k, alpha, largest=False, **o),
}
every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


# --- the definition, of one list in fp64 -----------------------------------------------------------------------------


def laplace(z):
    return torch.where(z <= 0, 0.5 * z.clamp(max=0).exp(), 1 - 0.5 * (-z.clamp(min=0)).exp())


def dense_rank(x, alpha):
    return 0.5 + laplace((x[:, None] - x[None, :]) / alpha).sum(1)


def threshold(x, k, alpha):
    """b with Σ Lap((b − x_i) / alpha) = k, by bisection."""
    low, high = x.min() - 100 * alpha, x.max() + 100 * alpha
    for _ in range(120):
        middle = (low + high) / 2
        below = laplace((middle - x) / alpha).sum() < k
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def gradients(function, *inputs):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    weights = torch.arange(1, out.numel() + 1, device=out.device).to(out.dtype).cos().reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


@both
@every_alpha
def test_against_the_definition(alpha, backend):
    x = torch.randn(9, dtype=F64)
    x[3] = x[7]
    tight = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(lapsum_rank(x, alpha), dense_rank(x, alpha), **tight)
    torch.testing.assert_close(lapsum_rank(x, alpha, descending=True), dense_rank(-x, alpha), **tight)
    truth = torch.stack([threshold(x, i + 0.5, alpha) for i in range(9)])
    torch.testing.assert_close(lapsum_sort(x, alpha), truth, **tight)
    torch.testing.assert_close(lapsum_sort(x, alpha, descending=True), truth.flip(0), **tight)
    for k in (0.2, 1, 3.7, 8.9):
        truth = laplace((threshold(x, k, alpha) - x) / alpha)
        torch.testing.assert_close(lapsum_top_k(x, k, alpha, largest=False), truth, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(lapsum_top_k(-x, k, alpha), truth, rtol=1e-10, atol=1e-12)


@both
@pytest.mark.parametrize("alpha", [20.0, 0.3])
@every_operator
def test_derivatives_of_both_orders(operator, alpha, backend):
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    alphas = torch.tensor([alpha, 1.5 * alpha], dtype=F64, requires_grad=True)
    inputs = (x, alphas)
    if operator in (OPERATORS["largest"], OPERATORS["smallest"]):
        inputs += (torch.tensor([1.7, 2.4], dtype=F64, requires_grad=True),)
    assert gradcheck(operator, inputs, fast_mode=alpha > 1)
    assert gradgradcheck(operator, inputs, atol=1e-4, fast_mode=True)


@both
@every_operator
def test_float32_and_half(operator, backend):
    x, alpha = torch.randn(3, 50), torch.tensor([3.0, 0.3, 0.01])
    truth = gradients(operator, x.double(), alpha.double())
    for got, right in zip(gradients(operator, x, alpha), truth):
        assert got.dtype == torch.float32
        assert (got - right).norm() <= 1e-6 * right.norm()
    for dtype in (torch.bfloat16, torch.float16):
        y = x.to(dtype).requires_grad_()
        found, single = operator(y, 0.3), operator(y.detach().float(), 0.3)
        assert torch.equal(found, single.to(found.dtype))
        ranks = operator in (OPERATORS["rank"], OPERATORS["rank descending"])
        assert found.dtype == (torch.float32 if ranks else dtype)
        found.float().sum().backward()
        assert y.grad.dtype == dtype


@both
@given(
    x=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    alpha=st.floats(1e-6, 1e6),
    share=st.floats(0, 1),
)
def test_sums_bounds_and_order(x, alpha, share, backend):
    """What must hold whatever the values and alpha."""
    x = torch.tensor(x, dtype=F64)
    n, k = len(x), share * len(x)
    p = lapsum_top_k(x, k, alpha)
    assert (p >= 0).all() and (p <= 1).all() and abs(p.sum().item() - k) <= 1e-12 * n
    order = x.argsort(stable=True)
    for rising in (p[order], lapsum_rank(x, alpha)[order], lapsum_sort(x, alpha)):
        assert (rising.diff() >= -1e-9 * rising.abs().max()).all()
    assert abs(lapsum_rank(x, alpha).sum().item() - n * (n + 1) / 2) <= 1e-11 * n * n
    for found in gradients(lambda x, a, k: lapsum_top_k(x, k, a), x, torch.tensor(alpha), torch.tensor(k, dtype=F64)):
        assert found.isfinite().all()


# --- edges -----------------------------------------------------------------------------------------------------------


@both
def test_edges_of_k(backend):
    """p is 0 at k = 0 and 1 at k = n; the derivative in k is the limit of densities that have vanished themselves."""
    x, alpha = torch.randn(6, dtype=F64), 0.4
    for k, sign, level in ((0.0, 1, 0.0), (6.0, -1, 1.0)):
        p, dx, dk = gradients(lambda x, k: lapsum_top_k(x, k, alpha), x, torch.tensor(k, dtype=F64))
        assert torch.equal(p, torch.full_like(p, level)) and not dx.any()
        weights = torch.arange(1.0, 7.0, dtype=F64).cos()
        torch.testing.assert_close(dk, (weights * (sign * x / alpha).softmax(0)).sum())
    p, dx, dk = gradients(lambda x, k: lapsum_top_k(x, k, alpha), x, torch.tensor(7.5, dtype=F64))
    assert (p == 1).all() and not dx.any() and dk == 0
    # Two clusters far apart, one of them wanted: the densities at the threshold are below the smallest number.
    far = torch.tensor([1e3, 1e3, -1e3, -1e3, -1e3], dtype=F64)
    p, dx, dk = gradients(lambda x, k: lapsum_top_k(x, k, alpha), far, torch.tensor(2.0, dtype=F64))
    assert torch.equal(p, (far > 0).to(F64)) and not dx.any()
    weights = torch.arange(1.0, 6.0, dtype=F64).cos()
    torch.testing.assert_close(dk, (weights[:2].mean() + weights[2:].mean()) / 2)


@both
def test_limits_of_alpha(backend):
    x = torch.tensor([0.3, -1.0, 0.3, 2.0, -1.0, 0.0], dtype=F64)
    torch.testing.assert_close(lapsum_rank(x, 1e-9), torch.tensor([4.5, 1.5, 4.5, 6, 1.5, 3], dtype=F64))
    torch.testing.assert_close(lapsum_sort(x, 1e-9), x.sort().values)
    torch.testing.assert_close(lapsum_top_k(x, 2, 1e-9), torch.tensor([0.5, 0, 0.5, 1, 0, 0], dtype=F64))
    torch.testing.assert_close(lapsum_rank(x, 1e12), torch.full_like(x, 3.5))
    torch.testing.assert_close(lapsum_top_k(x, 2, 1e12), torch.full_like(x, 1 / 3))


@both
@every_operator
def test_values_far_from_zero(operator, backend):
    """Only differences count: a shift by 2^40 changes no digit that is there."""
    x, alpha = (torch.randn(20, dtype=F64) * 64).round() / 64, torch.tensor(0.1, dtype=F64)
    near, moved = gradients(operator, x, alpha), gradients(operator, x + 2.0**40, alpha)
    if operator in (OPERATORS["sort"], OPERATORS["sort descending"]):
        moved[0] = moved[0] - 2.0**40
        torch.testing.assert_close(moved[0], near[0], rtol=0, atol=3e-4)
    else:
        torch.testing.assert_close(moved[0], near[0])
    for a, b in zip(moved[1:], near[1:]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@both
def test_infinite_and_nan(backend):
    x = torch.tensor([[1.0, inf, -2.0, -inf, inf], [1.0, torch.nan, 0, 2, 3], [0.0, 1, 2, 3, 4]], dtype=F64)
    for operator in OPERATORS.values():
        found = gradients(lambda x: operator(x, 0.5), x)
        for t in found:
            assert t[1].isnan().all() and not t[[0, 2]].isnan().any()
        assert not found[1][0][x[0].isinf()].any()
    alone = torch.tensor([1.0, -2.0], dtype=F64)
    assert torch.equal(lapsum_rank(x, 0.5)[0][[1, 3, 4]], torch.tensor([4.5, 1, 4.5], dtype=F64))
    torch.testing.assert_close(lapsum_rank(x, 0.5)[0][[0, 2]], 1 + lapsum_rank(alone, 0.5))
    assert torch.equal(lapsum_sort(x, 0.5)[0], torch.cat([x.new_tensor([-inf]), lapsum_sort(alone, 0.5), x[0, [1, 1]]]))
    for k, rest in ((2.5, 0.5), (1.0, 0.0), (4.5, 2.0)):
        p = lapsum_top_k(x, k, 0.5)[0]
        assert torch.equal(p[[1, 3, 4]], torch.tensor([1.0, 0, 1], dtype=F64))
        torch.testing.assert_close(p[[0, 2]], lapsum_top_k(alone, rest, 0.5))


# --- lists -----------------------------------------------------------------------------------------------------------


@both
@every_operator
def test_mask_and_offsets_are_single_lists(operator, backend):
    x, alpha = torch.randn(4, 9, dtype=F64), torch.tensor([2.0, 0.5, 1.0, 0.1], dtype=F64)
    mask = torch.rand(4, 9) > 0.4
    mask[2] = False
    padded = torch.where(mask, x, torch.nan)
    function = lambda x, a: operator(x, a, mask=mask)
    out, dx, dalpha = gradients(function, padded, alpha)
    weights = torch.arange(1, 37, device=x.device).to(F64).cos().reshape(4, 9)
    sorts = operator in (OPERATORS["sort"], OPERATORS["sort descending"])
    for i in range(4):
        row = x[i][mask[i]].requires_grad_()
        a = alpha[i].clone().requires_grad_()
        single = operator(row, a)
        places = torch.arange(9) < len(row) if sorts else mask[i]
        torch.testing.assert_close(out[i][places], single)
        assert not out[i][~places].any() and not dx[i][~mask[i]].any()
        found = torch.autograd.grad((single * weights[i][places]).sum(), (row, a))
        torch.testing.assert_close(dx[i][mask[i]], found[0])
        torch.testing.assert_close(dalpha[i], found[1])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    flat = operator(x[mask], alpha, offsets=offsets)
    torch.testing.assert_close(flat, torch.cat([operator(x[i][mask[i]], alpha[i]) for i in range(4)]))
    some = torch.rand(len(flat)) > 0.3
    both_ways = operator(torch.where(some, x[mask], torch.nan), alpha, mask=some, offsets=offsets)
    bounds = offsets.tolist()
    for i, (first, end) in enumerate(zip(bounds, bounds[1:])):
        alone = operator(x[mask][first:end], alpha[i], mask=some[first:end])
        torch.testing.assert_close(both_ways[first:end], alone)


@both
@every_operator
def test_shapes(operator, backend):
    for shape in ((0, 5), (3, 0), (1,), (6,), (2, 1, 3)):
        x = torch.randn(shape, requires_grad=True)
        found = operator(x, 0.5)
        assert found.shape == shape
        found.sum().backward()
        assert x.grad.shape == shape
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(operator(x, 0.5, dim=1), operator(x.movedim(1, -1).contiguous(), 0.5).movedim(-1, 1))
    alpha = torch.rand(3, 5) + 0.1
    torch.testing.assert_close(operator(x, alpha, dim=1)[2, :, 4], operator(x[2, :, 4], alpha[2, 4]))
    torch.testing.assert_close(operator(x, alpha[:, :1], dim=1)[2, :, 4], operator(x[2, :, 4], alpha[2, 0]))


@both
def test_learnable_k_per_list(backend):
    x, k = torch.randn(3, 8), torch.tensor([1.5, 4.0, 7.9], requires_grad=True)
    p = lapsum_top_k(x, k, 0.3)
    torch.testing.assert_close(p.sum(1), k)
    torch.testing.assert_close(torch.autograd.grad(p.sum(), k)[0], torch.ones(3))


def test_large():
    """A million values: ranks and thresholds of a grid are known."""
    n = 1 << 20
    x = torch.randperm(n).float().requires_grad_()
    ranks = lapsum_rank(x, 3.0)
    middle = (x > 200) & (x < n - 200)
    assert ((ranks - x - 1).abs()[middle] <= 0.07).all()  # to the rounding of float32
    ranks.sum().backward()
    assert x.grad.abs().max() < 1e-5
    p = lapsum_top_k(x.detach(), 1000.0, 3.0)
    assert abs(p.double().sum().item() - 1000) < 1e-3


# --- peers' defects --------------------------------------------------------------------------------------------------


@both
@every_operator
def test_alpha_may_be_a_plain_number(operator, backend):
    """The official code's soft_rank(x, alpha=1.0), its default, raises in backward."""
    x = torch.randn(7, requires_grad=True)
    operator(x, 1.0).square().sum().backward()
    assert x.grad.isfinite().all()


def test_backward_of_ranks_is_linear():
    """The official code takes n² steps: 450 ms for 10 000 values, five minutes for this list."""
    x = torch.randn(1 << 18, requires_grad=True)
    loss = lapsum_rank(x, 0.01).square().mean()
    start = time.perf_counter()
    loss.backward()
    assert time.perf_counter() - start < 30


# --- as operators ----------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
def test_compiled_without_a_graph_break():
    def function(x, k, alpha, mask, offsets):
        first = lapsum_top_k(x, k, alpha, mask=mask).square().sum() + lapsum_rank(x, 0.3).square().sum()
        return first + lapsum_sort(x.reshape(-1), alpha, offsets=offsets).cos().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(2, 6), torch.rand(2, 6) > 0.3
    offsets = torch.tensor([0, 5, 12])
    for alpha in (torch.tensor([2.0, 0.3]), torch.tensor(0.5)):
        inputs = x, torch.tensor([1.0, 2.5]), alpha
        results = [gradients(lambda *t: f(*t, mask, offsets).reshape(1), *inputs) for f in (function, compiled)]
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@both
@pytest.mark.unpoisoned
def test_opcheck(backend):
    """In full of the compiled engine; what the other one may do wrong is its outputs' layout and its inputs."""
    how = {} if backend == "cpu" else dict(test_utils=("test_schema", "test_faketensor"))
    check = partial(torch.library.opcheck, **how)
    op, x = torch.ops.fusedloss, torch.randn(2, 4, dtype=F64, requires_grad=True)
    alpha, k = (torch.tensor(t, dtype=F64, requires_grad=True) for t in ([1.0, 2.0], [1.0, 2.5]))
    mask, g = torch.tensor([[True, False, True, True]] * 2), torch.randn(2, 4, dtype=F64)
    for name in ("rank", "sort"):
        forward, backward = (getattr(op, f"lapsum_{name}{s}").default for s in ("", "_backward"))
        check(forward, (x, alpha, mask, None, True))
        order = forward(x, alpha, None, None, False)[1]
        check(backward, (x.detach(), alpha.detach(), None, None, False, order, g))
    check(op.lapsum_top_k.default, (x, k, alpha, None, None, True))
    state = op.lapsum_top_k(x, k, alpha, None, None, True)[1].detach()
    arguments = (x.detach(), k.detach(), alpha.detach(), None, None, True, state, g)
    check(op.lapsum_top_k_backward.default, arguments)


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda x: lapsum_rank(x, 0.0), r"lapsum_rank: alpha: expected a number in \(0"),
        (lambda x: lapsum_sort(x, torch.tensor([1.0, -1.0])), "lapsum_sort: alpha: expected numbers above 0"),
        (lambda x: lapsum_top_k(x, -1), "lapsum_top_k: k: expected a number in"),
        (lambda x: lapsum_top_k(x, torch.ones(3)), "lapsum_top_k: k: expected a number, or a tensor that broadcasts"),
        (lambda x: lapsum_top_k(x, 1, mask=torch.ones(2, 2, dtype=torch.bool)), "lapsum_top_k: mask: expected shape"),
    ],
)
def test_errors(call, expected):
    with pytest.raises(ValueError, match=expected):
        call(torch.randn(2, 3))
    with pytest.raises(TypeError, match="lapsum_rank: values: expected a floating-point tensor"):
        lapsum_rank(torch.arange(3))


@both
@every_operator
def test_equal_bits_and_untouched_inputs(operator, backend):
    x = torch.randn(5, 40)
    before = x.clone()
    first, again = (gradients(operator, x, torch.tensor(0.4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and torch.equal(x, before)
