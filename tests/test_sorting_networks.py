"""Differentiable sorting networks against matrices and diffsort's numbers, as operators; GroCo's golden number."""

import itertools
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fusedloss.ranking import gro_co_loss
from fusedloss.sorting import SortingNetwork, comparators
from fusedloss.sorting.comparators import DISTRIBUTIONS, Comparator, network

F64 = torch.float64
KINDS = ("odd_even", "bitonic")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)

# diffsort 0.2.0: of [0.3, -1.2, 2, 0.1, 0.25] at steepness 3, the sorted numbers and the gradient of
# sum_i i sorted_i + sum_ij X_ij sin(5 i + j), X its second result.
DIFFSORT = {
    ("odd_even", "cauchy"): (
        [-0.888490542, 0.050305020, 0.265438399, 0.336855072, 1.685892052],
        [2.018803983, 0.151009020, 4.115744534, 1.670172624, 2.044269840],
    ),
    ("odd_even", "logistic"): (
        [-1.137462537, 0.164180269, 0.222194249, 0.225957188, 1.975130831],
        [2.337445879, -0.088066963, 4.181854650, 1.855021011, 1.713745423],
    ),
    ("odd_even", "logistic_phi"): (
        [-1.111402041, 0.141602965, 0.229747026, 0.241991193, 1.948060857],
        [2.516406289, -0.049210314, 4.226724509, 1.652070106, 1.654009409],
    ),
    ("odd_even", "gaussian"): (
        [-1.199941388, 0.191000631, 0.227900001, 0.231041029, 1.999999727],
        [2.550731701, -0.000396838, 4.000013086, 1.794171274, 1.655480778],
    ),
    ("odd_even", "reciprocal"): (
        [-0.573612818, -0.107849125, 0.337336032, 0.481276635, 1.312849276],
        [1.464174861, 0.402550538, 3.962259129, 1.853849780, 2.317165691],
    ),
    ("odd_even", "optimal"): (
        [-1.137500000, 0.120833333, 0.259137988, 0.270028678, 1.937500000],
        [3.114474845, 0.042802178, 4.029218912, 0.919185566, 1.894318499],
    ),
    ("bitonic", "cauchy"): (
        [-0.783318821, 0.224509852, 0.232256248, 0.300466293, 1.476086428],
        [2.182690422, 0.309767741, 4.170056743, 1.723013567, 1.614471528],
    ),
    ("bitonic", "logistic"): (
        [-1.137037303, 0.181885801, 0.189711011, 0.247311031, 1.968129460],
        [2.651244762, -0.014486795, 4.243738300, 1.645714949, 1.473788785],
    ),
    ("bitonic", "logistic_phi"): (
        [-1.109704179, 0.177888188, 0.192534356, 0.259312029, 1.929969607],
        [2.730727639, 0.007525930, 4.327978423, 1.435551347, 1.498216662],
    ),
    ("bitonic", "gaussian"): (
        [-1.199941440, 0.184352430, 0.203525291, 0.262063993, 1.999999726],
        [2.809674811, 0.000068933, 4.000010140, 1.683391861, 1.506854255],
    ),
    ("bitonic", "reciprocal"): (
        [-0.324805948, 0.245132126, 0.305697608, 0.360282439, 0.863693774],
        [1.590051289, 0.815289170, 3.807594167, 1.889909796, 1.897155578],
    ),
    ("bitonic", "optimal"): (
        [-1.116666667, 0.162500000, 0.225833333, 0.282500000, 1.895833333],
        [3.033962897, 0.062195195, 4.039472026, 1.061188666, 1.803181216],
    ),
}  # fmt: skip


def dense(x, kind, distribution="cauchy", steepness=10.0, art_lambda=0.25, descending=False):
    """Of one list (n,): the sorted numbers and P, by a matrix for each comparator."""
    net, curve = network(kind, len(x), descending), Comparator(distribution, art_lambda)
    p = torch.eye(len(x), dtype=x.dtype)
    for low, high in zip(net.low.tolist(), net.high.tolist()):
        share = curve.share(x[high] - x[low], torch.as_tensor(steepness, dtype=x.dtype))
        swap = torch.zeros(len(x), len(x), dtype=x.dtype)
        swap[low, low] = swap[high, high] = -1
        swap[low, high] = swap[high, low] = 1
        p, x = p + share * (swap @ p), x + share * (swap @ x)
    return x, p


def close(got, truth, tolerance):
    assert (got.double() - truth).norm() <= tolerance * truth.norm() + 1e-300


def gradient_of(x, upstream, *outputs):
    return torch.autograd.grad(sum((o * u).sum() for o, u in zip(outputs, upstream)), x, retain_graph=True)[0]


# --- what networks are -----------------------------------------------------------------------------------------------


@pytest.mark.host
@every_kind
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 11])
def test_networks_sort_every_input_of_zeros_and_ones(kind, n):
    """Which is every input: the 0-1 principle."""
    net = network(kind, n, False)
    bits = torch.tensor(list(itertools.product([0, 1], repeat=n)))
    for low, high in zip(net.low.tolist(), net.high.tolist()):
        bits[:, [low, high]] = bits[:, [low, high]].sort(1).values
    assert (bits.diff(dim=1) >= 0).all()
    for a, b in zip(net.first.tolist(), net.first.tolist()[1:]):
        wires = torch.cat([net.low[a:b], net.high[a:b]])
        assert len(wires.unique()) == len(wires)


@pytest.mark.host
def test_sizes_of_networks():
    assert network("odd_even", 6, False).layers == 6 and network("odd_even", 6, False).comparators == 15
    assert network("bitonic", 512, False).layers == 45 and network("bitonic", 512, False).comparators == 45 * 256


@pytest.mark.parametrize("kind, distribution", DIFFSORT)
def test_numbers_of_diffsort(kind, distribution, backend):
    x = torch.tensor([[0.3, -1.2, 2.0, 0.1, 0.25]], dtype=F64, requires_grad=True)
    net = SortingNetwork(x, kind, distribution, 3.0)
    by_place, by_entry = torch.arange(5.0, dtype=F64), torch.arange(25.0, dtype=F64).reshape(5, 5).sin()
    found = gradient_of(x, (by_place, by_entry.T), net.sorted, net.dense())
    sorted, gradient = (torch.tensor([t], dtype=F64) for t in DIFFSORT[kind, distribution])
    assert (net.sorted - sorted).abs().max() < 2e-9
    # diffsort keeps 1 / steepness of the gaussian as a float32
    assert (found - gradient).abs().max() < (1e-6 if distribution == "gaussian" else 2e-9)


# --- values and derivatives ------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("distribution, n", [(d, 9) for d in DISTRIBUTIONS] + [("cauchy", 1), ("cauchy", 6)])
def test_against_matrices(kind, distribution, n, backend):
    x = torch.randn(2, n, dtype=F64, requires_grad=True)
    u, w = torch.randn(2, n, dtype=F64), torch.randn(2, n, n, dtype=F64)
    beta = torch.tensor(4.0, dtype=F64, requires_grad=True)
    truth = [torch.stack(part) for part in zip(*(dense(row, kind, distribution, beta) for row in x))]
    net = SortingNetwork(x, kind, distribution, beta)
    for got, right in ((net.sorted, truth[0]), (net.dense(), truth[1])):
        close(got, right, 1e-13)
    found, right = (
        torch.autograd.grad((a * u).sum() + (b * w).sum(), (x, beta), allow_unused=True)
        for a, b in ((net.sorted, net.dense()), truth)
    )
    for got, wanted in zip(found, right):
        close(got if got is not None else torch.zeros(()), wanted if wanted is not None else torch.zeros(()), 1e-11)


@every_kind
@every_distribution
def test_float32(kind, distribution, backend):
    x = torch.randn(3, 40)
    u, w = torch.randn(3, 40), torch.randn(3, 40, 7)
    results = []
    for dtype in (torch.float32, F64):
        y = x.to(dtype).requires_grad_()
        net = SortingNetwork(y, kind, distribution, 5.0)
        out = net.sorted, net @ w.to(dtype), net.T @ w.to(dtype)
        results.append([*out, gradient_of(y, (u, w, w), *out)])
    for got, truth, tolerance in zip(*results, (1e-6, 2e-6, 2e-6, 2e-4)):
        close(got, truth, tolerance)


@every_kind
@pytest.mark.parametrize("channels", [1, 3, 45])
def test_products_are_those_of_the_matrix(kind, channels, backend):
    x = torch.randn(2, 3, 10, dtype=F64, requires_grad=True)
    net = SortingNetwork(x, kind)
    v, w = torch.randn(2, 3, 10, channels, dtype=F64, requires_grad=True), torch.randn(channels, dtype=F64)
    p = net.dense()
    ones = torch.ones(2, 3, 10, dtype=F64)
    for sums in (p.sum(-1), p.sum(-2), net @ ones, net.T @ ones):
        torch.testing.assert_close(sums, ones)
    torch.testing.assert_close(net @ x, net.sorted)
    for got, matrix in ((net @ v, p), (net.T @ v, p.mT)):
        truth = matrix @ v
        torch.testing.assert_close(got, truth)
        found, right = (torch.autograd.grad((t.cos() * w).sum(), (x, v), retain_graph=True) for t in (got, truth))
        for a, b in zip(found, right):
            close(a, b, 1e-11)
    torch.testing.assert_close(net @ v[..., 0], (p @ v)[..., 0])


@every_kind
@pytest.mark.parametrize("distribution", ["cauchy", "logistic_phi", "gaussian"])
def test_derivatives_of_both_orders(kind, distribution, backend):
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    v, beta = torch.randn(2, 3, 2, dtype=F64, requires_grad=True), torch.tensor(2.0, dtype=F64, requires_grad=True)

    def function(x, v, beta):
        net = SortingNetwork(x, kind, distribution, beta)
        return net.sorted, net @ v, net.T @ v

    assert gradcheck(function, (x, v, beta), fast_mode=True)
    assert gradgradcheck(function, (x, v, beta), atol=1e-4, fast_mode=True)


def test_few_rows_of_many_channels(backend):
    """Which are shared out among threads in groups."""
    x = torch.randn(2, 12, dtype=F64, requires_grad=True)
    v, w = torch.randn(2, 2, 12, 300, dtype=F64).unbind()
    net = SortingNetwork(x)
    found = gradient_of(x, (w,), net @ v)
    close(found, gradient_of(x, (w,), net.dense() @ v), 1e-11)


def test_a_long_way_back(backend):
    """Channels whose way back does not fit the scratch memory go it in segments."""
    x = torch.randn(1, 150, dtype=F64, requires_grad=True)
    v, w = torch.randn(2, 1, 150, 33, dtype=F64).unbind()
    net = SortingNetwork(x)
    assert network("odd_even", 150, False).comparators * 32 * 8 > 2 << 20
    close(gradient_of(x, (w,), net @ v), gradient_of(x, (w,), net.dense() @ v), 1e-10)


# --- layouts, types, extremes ----------------------------------------------------------------------------------------


@every_kind
def test_descending_and_dim(kind, backend):
    x = torch.randn(3, 7, 2, dtype=F64)
    net = SortingNetwork(x, kind, dim=1, descending=True)
    rows = x.movedim(1, -1)
    plain = SortingNetwork(-rows, kind)
    torch.testing.assert_close(net.sorted.movedim(1, -1), -plain.sorted)
    torch.testing.assert_close(net.dense(), plain.dense())
    torch.testing.assert_close((net @ x).movedim(1, -1), plain @ rows)
    assert net.sorted.shape == x.shape and net.dense().shape == (3, 2, 7, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, backend):
    x = torch.randn(2, 9).to(dtype)
    found, truth = SortingNetwork(x), SortingNetwork(x.float())
    assert found.sorted.dtype == dtype
    assert torch.equal(found.sorted, truth.sorted.to(dtype)) and torch.equal(found.dense(), truth.dense())
    y = x.clone().requires_grad_()
    SortingNetwork(y).sorted.sum().backward()
    assert y.grad.dtype == dtype


def test_empty_and_odd_shapes(backend):
    for shape in ((0, 5), (3, 0), (1,), (6,), (2, 1, 3)):
        x = torch.randn(shape, requires_grad=True)
        net = SortingNetwork(x, "bitonic")
        assert net.sorted.shape == shape and net.dense().shape == (*shape[:-1], shape[-1], shape[-1])
        (net.sorted.sum() + net.dense().sum()).backward()
        assert x.grad.shape == shape
    x = torch.randn(10, 4).t()
    assert torch.equal(SortingNetwork(x).sorted, SortingNetwork(x.contiguous()).sorted)


@every_kind
@every_distribution
def test_ties_and_extremes(kind, distribution, backend):
    inf = torch.inf
    x = torch.tensor([[1.0, inf, -2.0, -inf, inf], [0.0] * 5, [3e38, -3e38, 1e38, 0, 1]], requires_grad=True)
    net = SortingNetwork(x, kind, distribution, 50.0)
    assert not net.sorted.isnan().any() and not net.dense().isnan().any()
    sorted = net.sorted[0]
    assert sorted[0] == -inf and (sorted[3:] == inf).all() and (sorted[1:3].sum() + 1).abs() < 1e-5
    assert torch.equal(net.sorted[1], torch.zeros(5))
    (gradient,) = torch.autograd.grad(net.sorted[1].sum() + net.dense()[0].sum(), x)
    torch.testing.assert_close(gradient[1], torch.ones(5))
    assert not gradient.isnan().any() and SortingNetwork(torch.tensor([1.0, torch.nan])).sorted.isnan().all()


def test_equal_bits_and_untouched_inputs(backend):
    x, v = torch.randn(3, 64), torch.randn(3, 64, 40)
    before = x.clone(), v.clone()
    first, again = (SortingNetwork(x, "bitonic") @ v for _ in range(2))
    assert torch.equal(first, again) and torch.equal(x, before[0]) and torch.equal(v, before[1])


def test_large(backend):
    """Of the identity's columns a few, where diffsort holds gigabytes."""
    x = torch.rand(2, 1024, requires_grad=True)
    net = SortingNetwork(x, "bitonic", steepness=1e6)
    torch.testing.assert_close(net.sorted, x.sort().values, rtol=0, atol=1e-3)
    (net @ x.detach()).square().sum().backward()
    assert x.grad.isfinite().all()


# --- as operators ----------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
def test_compiled_without_a_graph_break():
    def function(x, v, beta):
        net = SortingNetwork(x, "bitonic", steepness=beta)
        return net.sorted.square().sum() + (net @ v).square().sum() + (net.T @ v).cos().sum()

    comparators.network.cache_clear()  # the compiler must not be the first to make one
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, v = torch.randn(2, 6), torch.randn(2, 6, 3)
    for beta in (torch.tensor(2.0, requires_grad=True), 3.0):
        results = []
        for f in (compiled, function):
            y = x.clone().requires_grad_()
            wanted = [y, beta] if isinstance(beta, torch.Tensor) else [y]
            value = f(y, v, beta)
            results.append([value, *torch.autograd.grad(value, wanted)])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@pytest.mark.unpoisoned
def test_opcheck(backend):
    """In full of the compiled engine; what the other one may do wrong is its outputs' layout and its inputs."""
    how = {} if backend == "cpu" else dict(test_utils=("test_schema", "test_faketensor"))
    check = partial(torch.library.opcheck, **how)
    spec = ("bitonic", False, "cauchy", 0.25)
    x, beta = torch.randn(2, 5, dtype=F64, requires_grad=True), torch.tensor(2.0, dtype=F64, requires_grad=True)
    v, op = torch.randn(2, 5, 3, dtype=F64, requires_grad=True), torch.ops.fusedloss
    sorted, gaps = op.network_sort(x, beta, None, *spec)
    gaps = gaps.detach().requires_grad_()
    check(op.network_sort.default, (x, beta, None, *spec))
    check(op.network_sort.default, (x, beta, torch.tensor([1, 3]), *spec))
    check(op.network_push.default, (gaps, beta, v, True, *spec))
    arguments = (gaps.detach(), beta.detach(), torch.randn(2, 5, dtype=F64), torch.randn(gaps.shape, dtype=F64), *spec)
    check(op.network_sort_backward.default, arguments)
    arguments = (gaps.detach(), beta.detach(), v.detach(), torch.randn(2, 5, 3, dtype=F64), False, True, *spec)
    check(op.network_push_backward.default, arguments)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"kind": "bubble"}, "kind: expected one of"),
        ({"distribution": "normal"}, "distribution: expected one of"),
        ({"steepness": 0.0}, r"steepness: expected a number in \(0"),
        ({"steepness": torch.ones(2)}, "steepness: expected a number"),
        ({"art_lambda": 2.0}, "art_lambda: expected a number"),
    ],
)
def test_errors(arguments, expected):
    with pytest.raises(ValueError, match=f"SortingNetwork: {expected}"):
        SortingNetwork(torch.randn(2, 3), **arguments)
    with pytest.raises(ValueError, match="SortingNetwork: operand: expected shape"):
        SortingNetwork(torch.randn(2, 3)) @ torch.randn(2, 4)
    with pytest.raises(TypeError, match="SortingNetwork: values: expected a floating-point tensor"):
        SortingNetwork(torch.arange(3))


# --- GroCo -----------------------------------------------------------------------------------------------------------


def test_gro_co_golden(backend):
    scores = torch.tensor([[-0.2, 0.1, 0.35, 0.3, 0.6], [0.0, 0.4, 0.5, 0.2, 0.7]], dtype=F64, requires_grad=True)
    loss = gro_co_loss(scores, torch.tensor([0, 0, 0, 1, 1]).expand(2, 5), k=3)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == pytest.approx(0.442116915, abs=2e-9)
    row = torch.tensor([0.015090034, 0.02084862, 0.039199616, -0.045447489, -0.029690782], dtype=F64)
    assert (gradient[0] - row).abs().max() < 2e-9


def test_gro_co_takes_the_hardest_negatives_whatever_the_order(backend):
    scores, relevance = torch.randn(2, 30, dtype=F64, requires_grad=True), torch.randint(0, 3, (2, 30))
    relevance[:, :2] = torch.tensor([0, 1])
    loss = gro_co_loss(scores, relevance, k=4)
    mix = torch.randperm(30)
    torch.testing.assert_close(gro_co_loss(scores[:, mix], relevance[:, mix], k=4), loss)
    negatives = torch.where(relevance > 0, -torch.inf, scores)
    hard = (negatives >= negatives.topk(4).values[:, -1:]) | (relevance > 0)
    torch.testing.assert_close(gro_co_loss(scores, relevance, mask=hard, k=9), loss)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert torch.equal(gradient != 0, hard)


def test_gro_co_derivatives_and_errors(backend):
    scores = torch.randn(2, 6, dtype=F64, requires_grad=True)
    relevance = torch.tensor([[0, 1, 0, 2, 0, 0], [0, 0, 0, 0, 0, 1]])
    beta = torch.tensor(2.0, dtype=F64, requires_grad=True)
    function = lambda s, b: gro_co_loss(s, relevance, k=2, steepness=b)
    for check in (gradcheck, gradgradcheck):
        assert check(function, (scores, beta), fast_mode=True)
    with pytest.raises(ValueError, match="gro_co_loss: k"):
        gro_co_loss(scores, relevance, k=0)


def test_forward_mode_is_refused_and_not_dropped():
    x = torch.randn(2, 3)
    with pytest.raises(NotImplementedError, match="SortingNetwork: values: expected reverse-mode derivatives"):
        torch.func.jvp(lambda x: SortingNetwork(x).sorted, (x,), (x,))
    with pytest.raises(NotImplementedError, match="SortingNetwork: operand: expected reverse-mode derivatives"):
        torch.func.jvp(lambda v: SortingNetwork(x) @ v, (x,), (x,))
