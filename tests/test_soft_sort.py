"""Soft sort, soft rank and soft Spearman: both engines against the definition, single rows and torchsort."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import fusedloss
from fusedloss.ranking.spearman_loss import CASES, reference
from fusedloss.sorting import permutahedron, projection, soft_rank, soft_sort

spearman_loss = fusedloss.ranking.spearman_loss
OPERATORS = {"rank": soft_rank, "sort": soft_sort}
FOUR = [(name, regularization) for name in OPERATORS for regularization in ("l2", "kl")]
four = pytest.mark.parametrize("name, regularization", FOUR)
inf, nan = math.inf, math.nan
F64 = torch.float64


def distinct(*shape: int, gap: float = 0.05) -> torch.Tensor:
    """float64 values far enough apart for finite differences."""
    n = math.prod(shape)
    return (gap * (torch.randperm(n) - n / 2) + 0.3 * gap * torch.rand(n)).to(F64).reshape(shape)


def truth(name: str, regularization: str, x: torch.Tensor, strength, descending=False) -> torch.Tensor:
    """By the definition, of rows of float64."""
    how = dict(sort=name == "sort", kl=regularization == "kl", descending=descending)
    strengths = torch.as_tensor(strength, dtype=F64).expand(len(x))
    return torch.stack([permutahedron.reference(row, e, **how) for row, e in zip(x, strengths)])


# --- the definition --------------------------------------------------------------------------------------------------


@four
@pytest.mark.parametrize("descending, strength", [(False, 0.01), (True, 0.3), (True, 1.0), (False, 7.0), (True, 40.0)])
def test_values_and_gradients_are_those_of_the_definition(backend, name, regularization, descending, strength):
    x = (2 * torch.randn(2, 7, dtype=F64)).requires_grad_()
    e = torch.tensor([strength, 2 * strength], dtype=F64, requires_grad=True)
    found = OPERATORS[name](x, regularization, e, descending=descending)
    wanted = truth(name, regularization, x, e, descending)
    g = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for a, b in zip(torch.autograd.grad(found, (x, e), g), torch.autograd.grad(wanted, (x, e), g)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@four
@pytest.mark.parametrize(
    "dtype, strength, shape",
    [(F64, 1.0, (1, 1)), (F64, 5.0, (3, 2)), (torch.float32, 0.1, (5, 40)), (F64, 1.0, (5, 40)), (F64, 0.1, (5, 40))],
)
def test_the_same_as_torchsort(backend, name, regularization, dtype, strength, shape):
    torchsort = pytest.importorskip("torchsort")
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    g = torch.randn(shape, dtype=dtype)
    found = OPERATORS[name](x, regularization, strength)
    wanted = getattr(torchsort, f"soft_{name}")(x, regularization, regularization_strength=strength)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, wanted, **tolerance)
    found, wanted = (torch.autograd.grad(y, x, g)[0] for y in (found, wanted))
    torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("name", OPERATORS)
def test_gaps_of_exactly_the_strength_are_pooled(backend, name):
    """Of several gradients the one that torchsort takes too."""
    x = torch.tensor([[1.0, 2, 3, 3, 7]], dtype=F64, requires_grad=True)
    (dx,) = torch.autograd.grad(OPERATORS[name](x)[0, 0], x)
    wanted = [0.75, -0.25, -0.25, -0.25, 0] if name == "rank" else [0.2] * 5
    torch.testing.assert_close(dx, torch.tensor([wanted], dtype=F64))


def test_known_values(backend):
    x = torch.tensor([[8.0, 0, 5, 3, 2, 1, 6, 7, 9]], requires_grad=True)
    assert soft_rank(x).tolist() == [[8, 1, 5, 4, 3, 2, 6, 7, 9]]  # integers are their own distance apart
    assert soft_rank(x, descending=True).tolist() == [[2, 9, 5, 6, 7, 8, 4, 3, 1]]
    assert soft_sort(x, regularization_strength=0.1).tolist() == [[0, 1, 2, 3, 5, 6, 7, 8, 9]]
    whole = soft_sort(x)
    torch.testing.assert_close(whole, torch.arange(9.0)[None] + 5 / 9)
    torch.testing.assert_close(torch.autograd.grad(whole[0, 0], x)[0], torch.full((1, 9), 1 / 9))
    # Two values closer than ε: ranks 1.5 ± half their distance in units of ε; kl shares 3 by their softmax.
    pair = torch.tensor([[0.0, 0.5]], dtype=F64)
    assert soft_rank(pair).tolist() == [[1.25, 1.75]]
    torch.testing.assert_close(soft_rank(pair, "kl"), 3 * pair.softmax(1))


@four
def test_integers_are_computed_in_the_default_type(backend, name, regularization):
    for dtype in (torch.int64, torch.int32, torch.uint8):
        x = torch.tensor([[3, 1, 2, 2]], dtype=dtype)
        found = OPERATORS[name](x, regularization, 1)
        assert found.dtype == torch.float32
        assert torch.equal(found, OPERATORS[name](x.float(), regularization, 1.0))


# --- derivatives -----------------------------------------------------------------------------------------------------


@four
@pytest.mark.parametrize("descending, scale", [(False, 0.06), (True, 1.0)])
def test_first_and_second_derivatives(backend, name, regularization, descending, scale):
    x = distinct(2, 5).requires_grad_()
    e = torch.tensor([scale, 3 * scale], dtype=F64)
    e = (e if name == "rank" else 1 / e).requires_grad_()

    def f(x, e):
        return OPERATORS[name](x, regularization, e, descending=descending)

    assert gradcheck(f, (x, e)) and gradgradcheck(f, (x, e))


@four
def test_derivatives_with_masks_offsets_and_one_strength(backend, name, regularization):
    f = OPERATORS[name]
    x, e = distinct(4, 2).requires_grad_(), torch.tensor(0.15, dtype=F64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
    offsets = torch.tensor([0, 3, 3, 4, 8])
    strength = (lambda e: e) if name == "rank" else (lambda e: 1 / e)
    for g in (
        lambda x, e: f(x, regularization, strength(e), dim=0, mask=mask),
        lambda x, e: f(x.flatten(), regularization, strength(e), offsets=offsets),
    ):
        assert gradcheck(g, (x, e)) and gradgradcheck(g, (x, e), fast_mode=True)


@four
def test_the_third_derivative(backend, name, regularization):
    x = distinct(6).requires_grad_()

    def slope(x):
        y = OPERATORS[name](x, regularization, 0.2 if name == "rank" else 5.0).pow(3).sum()
        return torch.autograd.grad(y, x, create_graph=True)[0]

    assert gradgradcheck(slope, x, fast_mode=True)


@four
def test_only_what_needs_a_gradient_gets_one(backend, name, regularization):
    f = OPERATORS[name]
    x, e = torch.randn(2, 5), torch.tensor(0.7, requires_grad=True)
    assert not f(x, regularization).requires_grad
    f(x, regularization, e).square().sum().backward()
    assert e.grad.dtype == torch.float32 and e.grad.isfinite()
    y = f(x.requires_grad_(), regularization, e.detach()).square().sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * first)
    with torch.no_grad():
        assert not f(x, regularization, e).requires_grad


@pytest.mark.host
@four
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_keeps_the_values_themselves_and_four_bytes_per_item(name, regularization, dtype):
    x = torch.randn(8, 100, dtype=dtype, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        OPERATORS[name](x, regularization)
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    assert sum(t.nbytes for t in saved if t.data_ptr() != x.data_ptr()) == 4 * x.numel()


# --- layouts ---------------------------------------------------------------------------------------------------------


@four
@pytest.mark.parametrize("dim, descending", [(0, True), (1, False), (-1, True)])
def test_any_dimension(backend, name, regularization, dim, descending):
    f, x, g = OPERATORS[name], torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    x.requires_grad_()
    strength = torch.rand([n for k, n in enumerate(x.shape) if k != dim % 3]) + 0.1
    found = f(x, regularization, strength, dim=dim, descending=descending)
    rows, e = x.movedim(dim, -1).reshape(-1, x.shape[dim]), strength.flatten().tolist()
    single = torch.stack([f(row, regularization, s, descending=descending) for row, s in zip(rows, e)])
    assert found.shape == x.shape
    wanted = single.reshape(*strength.shape, -1).movedim(-1, dim)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, x, g), torch.autograd.grad(wanted, x, g))


@four
@pytest.mark.parametrize("descending", [False, True])
def test_masked_rows_are_shorter_rows(backend, name, regularization, descending):
    f, mask = OPERATORS[name], torch.rand(6, 9) > 0.4
    mask[0], mask[1] = True, False
    x = torch.where(mask, torch.randn(6, 9), nan).requires_grad_()  # what lies under a mask is not looked at
    g = torch.where(mask, torch.randn(6, 9), 0.0)
    if name == "sort":
        g = torch.randn(6, 9)
    found = f(x, regularization, 0.6, descending=descending, mask=mask)
    (dx,) = torch.autograd.grad(found, x, g)
    for k in range(6):
        row = x[k][mask[k]].detach().requires_grad_()
        wanted = f(row, regularization, 0.6, descending=descending)
        got = found[k][mask[k]] if name == "rank" else found[k][: len(row)]
        rest = found[k][~mask[k]] if name == "rank" else found[k][len(row) :]
        torch.testing.assert_close(got, wanted)
        assert (rest == 0).all() and (dx[k][~mask[k]] == 0).all()
        upstream = g[k][mask[k]] if name == "rank" else g[k][: len(row)]
        torch.testing.assert_close(dx[k][mask[k]], torch.autograd.grad(wanted, row, upstream)[0])


@four
def test_ragged_rows_are_single_rows(backend, name, regularization):
    f, offsets = OPERATORS[name], torch.tensor([0, 3, 3, 10, 11, 20])
    x, g = torch.randn(20, requires_grad=True), torch.randn(20)
    e = torch.rand(5) + 0.2
    found = f(x, regularization, e, offsets=offsets, descending=True)
    pieces = zip(offsets[:-1].tolist(), offsets[1:].tolist(), e.tolist())
    wanted = torch.cat([f(x[a:b], regularization, s, descending=True) for a, b, s in pieces])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, x, g), torch.autograd.grad(wanted, x, g))
    mask = torch.rand(20) > 0.3
    both = f(x, regularization, 0.5, offsets=offsets, mask=mask)
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        torch.testing.assert_close(both[a:b], f(x[a:b], regularization, 0.5, mask=mask[a:b]))


@four
def test_no_rows_no_items_and_one_item(backend, name, regularization):
    f = OPERATORS[name]
    for shape in ((0, 5), (3, 0), (0,), (2, 0, 4)):
        x = torch.empty(shape, requires_grad=True)
        y = f(x, regularization)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape
    assert f(torch.empty(0), regularization, offsets=torch.tensor([0])).shape == (0,)
    assert f(torch.empty(0), regularization, offsets=torch.tensor([0, 0, 0])).shape == (0,)
    one = torch.tensor([[2.5], [-3.0]], requires_grad=True)
    y = f(one, regularization, 3.0)
    torch.testing.assert_close(y, torch.ones(2, 1) if name == "rank" else one)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), one)[0], torch.full((2, 1), float(name == "sort")))


@four
def test_memory_of_any_layout(backend, name, regularization):
    f, x = OPERATORS[name], torch.randn(6, 8)
    for strided in (x.t(), x[::2, 1::3], x[0].expand(4, 8)):
        strided = strided.detach().requires_grad_()
        plain = strided.detach().clone().contiguous().requires_grad_()
        pair = [f(t, regularization, 0.5) for t in (strided, plain)]
        assert torch.equal(*pair)
        g = torch.randn(pair[0].shape[::-1]).t()
        found, wanted = (torch.autograd.grad(y, t, g)[0] for y, t in zip(pair, (strided, plain)))
        assert torch.equal(found, wanted)


# --- hard limits, ties, ends -----------------------------------------------------------------------------------------


def hard_ranks(x: torch.Tensor) -> torch.Tensor:
    return (x[..., None] > x[..., None, :]).sum(-1) + ((x[..., None] == x[..., None, :]).sum(-1) + 1) / 2


@pytest.mark.parametrize("regularization", ["l2", "kl"])
def test_no_strength_is_the_hard_answer(backend, regularization):
    x = torch.randint(0, 6, (5, 12)).double().requires_grad_()
    e = torch.zeros((), dtype=F64, requires_grad=True)
    for strength in (0.0, 0, e):
        ranks, falling = soft_rank(x, regularization, strength), soft_rank(x, regularization, strength, descending=True)
        assert torch.equal(ranks, hard_ranks(x)) and torch.equal(falling, 13 - hard_ranks(x))
        assert (torch.autograd.grad(ranks.square().sum(), x)[0] == 0).all()
        for descending in (False, True):
            y = soft_sort(x, regularization, strength, descending=descending)
            assert torch.equal(y, x.sort(descending=descending).values)
            got = torch.autograd.grad(y.square().sum(), x)[0]
            assert torch.equal(got, 2 * x)
    for y in (soft_rank(x, regularization, e), soft_sort(x, regularization, e)):
        assert torch.autograd.grad(y.square().sum(), e)[0] == 0
    mixed = soft_rank(x, regularization, torch.tensor([0.0, 1, 0, 2, 0], dtype=F64))
    for k, strength in ((1, 1.0), (3, 2.0)):
        torch.testing.assert_close(mixed[k], soft_rank(x[k], regularization, strength))
    assert torch.equal(mixed[::2], hard_ranks(x)[::2])


@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_small_strength_comes_to_the_hard_answer(backend, regularization, dtype):
    x = torch.randperm(64).to(dtype).reshape(4, 16) / 7
    x[:, 3] = x[:, 8]  # equal values share their rank whatever the strength
    for strength in (1e-4, 1e-12, 1e-30):
        torch.testing.assert_close(soft_rank(x, regularization, strength), hard_ranks(x).to(dtype))
        torch.testing.assert_close(soft_sort(x, regularization, strength), x.sort().values)


@four
def test_a_large_strength_makes_all_equal(backend, name, regularization):
    x = torch.randn(3, 9, dtype=F64)
    found = OPERATORS[name](x, regularization, 1e9)
    wanted = 5.0 if name == "rank" else x.mean(1) if regularization == "l2" else math.log(9) - (-x).logsumexp(1)
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=F64).reshape(-1, 1).expand(3, 9), atol=1e-6, rtol=0)


@four
def test_infinities_stand_at_their_ends(backend, name, regularization):
    x = torch.tensor([1.0, inf, -2.0, -inf, 0.9, inf], requires_grad=True)
    middle = torch.tensor([1.0, -2.0, 0.9], requires_grad=True)
    y, inner = (OPERATORS[name](t, regularization, 1.5) for t in (x, middle))
    if name == "rank":
        torch.testing.assert_close(y[[1, 3, 5]], torch.tensor([5.5, 1.0, 5.5]))
        if regularization == "l2":
            torch.testing.assert_close(y[[0, 2, 4]], inner + 1)
        assert math.isclose(y.sum().item(), 21, rel_tol=1e-6)
    else:
        assert y[0] == -inf and y[4:].tolist() == [inf, inf]
        torch.testing.assert_close(y[1:4], inner)
    g = torch.randn(6)
    (dx,) = torch.autograd.grad(y, x, g)
    assert dx.isfinite().all()
    if name == "rank":
        assert (dx[[1, 3, 5]] == 0).all()
    else:
        torch.testing.assert_close(dx[[0, 2, 4]], torch.autograd.grad(inner, middle, g[1:4])[0])
    for edge in ([inf], [inf, -inf], [-inf, -inf, -inf]):
        y = OPERATORS[name](torch.tensor(edge), regularization)
        assert torch.equal(y, hard_ranks(torch.tensor(edge)) if name == "rank" else torch.tensor(edge).sort().values)


@four
def test_a_nan_spoils_its_own_row_only(backend, name, regularization):
    x = torch.randn(3, 6)
    x[1, 2] = nan
    y = OPERATORS[name](x.requires_grad_(), regularization, 0.8)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y[1].isnan().all() and dx[1].isnan().all()
    assert y[[0, 2]].isfinite().all() and dx[[0, 2]].isfinite().all()
    assert torch.equal(y[0], OPERATORS[name](x[:1], regularization, 0.8)[0])


# --- half precision, accuracy ----------------------------------------------------------------------------------------


@four
@pytest.mark.parametrize("dtype, n", [(torch.float16, 2049), (torch.bfloat16, 100)])
def test_half_precision_is_fp32_of_the_same_values(backend, name, regularization, dtype, n):
    half = torch.randn(2, n).to(dtype).requires_grad_()  # many ties; a peer's sort of 2049 float16 values never ends
    wide = half.detach().float().requires_grad_()
    found, wanted = (OPERATORS[name](x, regularization, 0.01) for x in (half, wide))
    assert found.dtype == (torch.float32 if name == "rank" else dtype)
    torch.testing.assert_close(found, wanted.to(found.dtype))
    g = torch.randn(2, n).to(found.dtype)
    a, b = torch.autograd.grad(found, half, g)[0], torch.autograd.grad(wanted, wide, g.float())[0]
    assert a.dtype == dtype
    torch.testing.assert_close(a, b.to(dtype))


@pytest.mark.host
@four
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_a_long_row(name, regularization, dtype):
    compiled_only()
    half = torch.randn(1, 30_000).to(dtype).requires_grad_()
    exact = half.detach().double().requires_grad_()
    found, wanted = (OPERATORS[name](x, regularization, 1e-4) for x in (half, exact))
    torch.testing.assert_close(found, wanted.to(found.dtype))
    g = torch.randn(1, 30_000).to(found.dtype)
    a, b = torch.autograd.grad(found, half, g)[0], torch.autograd.grad(wanted, exact, g.double())[0]
    torch.testing.assert_close(a, b.to(dtype))


def compiled_only():
    if projection.live(torch.device("cpu")) != "cpu":
        pytest.skip("the compiled kernels did not load; the plain meaning takes long")


@pytest.mark.host
@four
@pytest.mark.parametrize("n, strength", [(1000, 1.0), (1000, 1e-3), (20_000, 1e-4)])
def test_fp32_within_four_ulp_of_the_largest_output(name, regularization, n, strength):
    compiled_only()
    x = torch.randn(1, n)
    p = permutahedron.Projection(name == "sort", regularization == "kl", False, strength)
    wanted = permutahedron.project(p, x.double(), permutahedron.partition(p, x))
    found = OPERATORS[name](x, regularization, strength)
    most = wanted.abs().max().float()
    ulp = torch.nextafter(most, torch.tensor(inf)) - most
    assert (found - wanted).abs().max() <= 4 * ulp


@pytest.mark.host
@four
def test_a_million_items(name, regularization):
    compiled_only()
    x = torch.randn(1, 1_000_000)
    wanted = OPERATORS[name](x.double(), regularization, 1.0)
    found = OPERATORS[name](x, regularization, 1.0)
    most = wanted.abs().max().float()
    assert (found - wanted).abs().max() <= 4 * (torch.nextafter(most, torch.tensor(inf)) - most)
    if name == "sort":
        torch.testing.assert_close(found, x.sort().values)  # at this strength nothing is pooled
    elif regularization == "l2":  # one block
        torch.testing.assert_close(found.double(), 500_000.5 + x.double() - x.double().mean(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shift", [89.0, -104.0, 1e4, -1e4])
def test_kl_does_not_overflow(backend, name, shift):
    x = torch.rand(1, 10, requires_grad=True)
    for strength in (1.0, 0.01, 1e-3):
        y = OPERATORS[name](x + shift, "kl", strength)
        g = torch.randn(1, 10)
        (dx,) = torch.autograd.grad(y, x, g)
        shifted = (x + shift).detach().double().requires_grad_()
        wanted = truth(name, "kl", shifted, strength)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
        if strength != 1e-3 or name == "rank":
            wanted = torch.autograd.grad(wanted, shifted, g.double())[0]
            torch.testing.assert_close(dx.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OPERATORS)
def test_kl_gradients_are_finite_up_to_ten_thousand(backend, name):
    x = (torch.rand(4, 50) * 2e4 - 1e4).requires_grad_()
    for strength in (1.0, 1e-3, 100.0):
        y = OPERATORS[name](x, "kl", strength)
        (dx,) = torch.autograd.grad(y, x, torch.randn(4, 50), create_graph=True)
        assert y.isfinite().all() and dx.isfinite().all()
        assert torch.autograd.grad(dx.square().sum() + 0 * x.sum(), x)[0].isfinite().all()


# --- the engines agree -----------------------------------------------------------------------------------------------

VALUE = some.one_of(
    some.integers(-3, 3), some.floats(-4, 4), some.sampled_from([inf, -inf, 0.0, -0.0, nan, 1e4, 1e-30])
)

STRENGTHS = [0.0, 1e-3, 0.5, 1.0, 3.0, 50.0, -1.0, nan, 1e200]


@pytest.mark.host
@given(some.lists(some.lists(some.tuples(VALUE, some.booleans()), max_size=12), max_size=4), some.data())
def test_engines_agree(rows, data):
    compiled_only()
    name = data.draw(some.sampled_from(["soft_rank", "soft_sort"]))
    kl, descending, masked = (data.draw(some.booleans()) for _ in range(3))
    e = data.draw(some.lists(some.sampled_from(STRENGTHS), min_size=len(rows), max_size=len(rows)))
    items = [item for row in rows for item in row]
    x = torch.tensor([v for v, _ in items], dtype=F64)
    mask = torch.tensor([not out for _, out in items], dtype=torch.bool) if masked else None
    offsets = torch.tensor([0, *torch.tensor([len(row) for row in rows], dtype=torch.int64).cumsum(0).tolist()])
    call = torch.tensor(e, dtype=F64), mask, offsets, 0.0, kl, descending
    y, order = projection.forward(name, x, *call)
    p = projection._projection(name, *call)
    torch.testing.assert_close(y, permutahedron.project(p, x, permutahedron.partition(p, x)), equal_nan=True)
    torch.testing.assert_close(y, permutahedron.project(p, x, order), equal_nan=True)  # what is differentiated twice
    g = torch.randn(len(x), dtype=F64)
    found, wanted = projection.backward(name, g, x, order, *call), permutahedron.project_backward(p, x, order, g)
    torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.host
@four
def test_the_result_does_not_depend_on_the_number_of_threads(name, regularization):
    compiled_only()
    before = torch.get_num_threads()
    x, many = torch.randn(1, 300_000), torch.randn(500, 40)
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for values in (x, many):
                values = values.requires_grad_()
                y = OPERATORS[name](values, regularization, 1e-4)
                found += [y, *torch.autograd.grad(y, values, torch.ones_like(y).cumsum(1))]
        assert all(torch.equal(a, b) for a, b in zip(found, [*found[4:], *found[:4]]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.host
@four
@pytest.mark.parametrize("where", ["host", "cuda"])
def test_the_way_to_a_device(name, regularization, where, monkeypatch):
    """What a CUDA tensor's call does, with the CPU's kernels in the place of the device's."""
    compiled_only()
    native, calls = projection._native, []

    class Device:
        Permutahedron = native.Permutahedron

        def __getattr__(self, name):
            if name.endswith("_workspace"):
                return lambda p: 64
            host = getattr(native, name.removeprefix("cuda_"))
            return lambda p, *rest: (calls.append((name, rest[-3:])), host(p, *rest[:-3]))

    x, e, mask = torch.randn(4, 9), torch.rand(4, dtype=F64), torch.rand(4, 9) > 0.2
    x.requires_grad_()
    e.requires_grad_()
    for options in (dict(mask=mask), dict(offsets=torch.tensor([0, 5, 20, 36, 36]))):
        values = x if "mask" in options else x.flatten()
        wanted = OPERATORS[name](values, regularization, e, **options)
        g = torch.randn_like(wanted)
        expected = torch.autograd.grad(wanted, (x, e), g)
        with monkeypatch.context() as patch:
            answers = iter([where, "cpu", where, "cpu"] if where == "host" else [where, where])
            patch.setattr(projection, "live", lambda device: next(answers))
            if where == "cuda":
                patch.setattr(projection, "_native", Device())
                patch.setattr(projection, "_launch", lambda device, bytes, call: call(1, bytes, 2))
            found = OPERATORS[name](values, regularization, e, **options)
            assert torch.equal(found, wanted)
            for a, b in zip(torch.autograd.grad(found, (x, e), g), expected):
                assert torch.equal(a, b)
    names = [f"cuda_soft_{name}", f"cuda_soft_{name}_backward"]
    assert calls == ([(n, (1, 64, 2)) for n in names] * 2 if where == "cuda" else [])


# --- operators, compiler, transformations ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", projection.NAMES)
def test_opcheck(backend, name, kl=True):
    """In full of the compiled engine; what the other one may do wrong is its outputs' layout and its inputs."""
    how = {} if backend == "cpu" else dict(test_utils=("test_schema", "test_faketensor"))
    op, back = (getattr(torch.ops.fusedloss, n) for n in (name, f"{name}_backward"))
    x, e = torch.randn(3, 5, requires_grad=True), torch.rand(3, dtype=F64, requires_grad=True)
    ragged = torch.randn(5, requires_grad=True), e, None, torch.tensor([0, 2, 2, 5])
    for rows in ((x, None, torch.rand(3, 5) > 0.3, None), ragged):
        opcheck(op, (*rows, 0.5, kl, True), **how)
        y, order = op(*rows, 0.5, kl, True)
        opcheck(back, (torch.randn_like(y).requires_grad_(), rows[0], order, *rows[1:], 0.5, kl, True), **how)


@pytest.mark.unpoisoned
def test_twelve_sizes_compile_at_most_twice():
    from torch._dynamo.testing import CompileCounterWithBackend

    def f(x, e):
        ragged = soft_rank(x.flatten(), "l2", 0.3, offsets=torch.arange(5, device=x.device) * x.shape[1])
        both = soft_rank(x, "kl", 0.5).square().sum() + soft_sort(x, "l2", e, dim=0).square().sum()
        return both + soft_sort(x, mask=x > 0).pow(3).sum() + ragged.square().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for n in [12, 9, 30, 6, 15, 21, 3, 18, 27, 24, 33, 36]:
        x, e = torch.randn(4, n, requires_grad=True), torch.rand(n, requires_grad=True)
        found, wanted = compiled(x, e), f(x, e)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found, (x, e)), torch.autograd.grad(wanted, (x, e)))
    assert counter.frame_count <= 2


@pytest.mark.unpoisoned
def test_an_annealed_strength_does_not_compile_again():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def f(x, strength):
        return soft_rank(x, "kl", strength) + soft_sort(x, "kl", strength)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    x = torch.randn(3, 8)
    for strength in (0.5, 0.25, 0.75, 2.0, 5.0):
        torch.testing.assert_close(compiled(x, strength), f(x, strength))
    assert counter.frame_count <= 2


@four
def test_vmap(backend, name, regularization):
    x, e = torch.randn(4, 3, 6, dtype=F64), torch.rand(4, 3, dtype=F64) + 0.3
    mask = torch.rand(4, 3, 6) > 0.3

    def f(x, e, mask=None, offsets=None):
        return OPERATORS[name](x, regularization, e, mask=mask, offsets=offsets)

    def loss(*arguments):
        return f(*arguments).pow(3).sum()

    wanted = f(x, e, mask)
    torch.testing.assert_close(torch.vmap(f)(x, e, mask), wanted)
    torch.testing.assert_close(torch.vmap(torch.vmap(f))(x, e, mask), wanted)
    by_last = torch.vmap(f, in_dims=(2, None))(x, e[:, 0])
    torch.testing.assert_close(by_last, torch.stack([f(t, e[:, 0]) for t in x.unbind(2)]))
    torch.testing.assert_close(
        torch.vmap(f, in_dims=(None, None, 0))(x[0], 0.7, mask), f(x[:1].expand(4, 3, 6), 0.7, mask)
    )
    strengths = torch.tensor([0.3, 1.0, 4.0], dtype=F64)
    torch.testing.assert_close(
        torch.vmap(f, in_dims=(None, 0))(x, strengths), torch.stack([f(x, s) for s in strengths])
    )
    torch.testing.assert_close(torch.vmap(lambda x: f(x, 0.7))(x), f(x, 0.7))
    offsets = torch.tensor([0, 2, 2, 6])
    ragged = torch.vmap(lambda x, e: f(x, e, None, offsets))(x[:, 0], e)
    torch.testing.assert_close(ragged, torch.stack([f(a, b, None, offsets) for a, b in zip(x[:, 0], e)]))

    leaf, strength = x.clone().requires_grad_(), e.clone().requires_grad_()
    wanted = torch.autograd.grad(loss(leaf, strength, mask), (leaf, strength))
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss, (0, 1)))(x, e, mask), wanted)
    torch.testing.assert_close(torch.func.grad(lambda *a: torch.vmap(loss)(*a).sum(), (0, 1))(x, e, mask), wanted)
    row, one = x[0, 0], e[0, 0]
    wanted = torch.autograd.functional.hessian(lambda x: loss(x, one), row)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))
    torch.testing.assert_close(hessian(row, one), wanted)
    torch.testing.assert_close(torch.vmap(hessian)(x[0], e[0])[0], wanted)


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_errors_name_what_was_wrong(name):
    f, x = OPERATORS[name], torch.randn(3, 4)
    for error, word, arguments, options in (
        (ValueError, "regularization", (x, "entropy"), {}),
        (ValueError, "regularization_strength", (x, "l2", -1.0), {}),
        (TypeError, "regularization_strength", (x, "l2", nan), {}),
        (TypeError, "regularization_strength", (x, "l2", inf), {}),
        (TypeError, "regularization_strength", (x, "l2", "strong"), {}),
        (ValueError, "regularization_strength", (x, "l2", torch.ones(4)), {}),
        (ValueError, "regularization_strength", (x, "l2", torch.ones(1, 1)), {}),
        (ValueError, "regularization_strength", (x, "l2", torch.tensor(-1.0)), {}),
        (ValueError, "regularization_strength", (x, "l2", torch.tensor([1.0, nan, 1.0])), {}),
        (IndexError, "dim", (x,), dict(dim=2)),
        (ValueError, "mask", (x,), dict(mask=torch.ones(3, dtype=torch.bool))),
        (TypeError, "mask", (x,), dict(mask=torch.ones(3, 4))),
        (ValueError, "offsets", (x[0],), dict(offsets=torch.tensor([0, 3]))),
        (ValueError, "values", (torch.tensor(1.0),), {}),
        (TypeError, "values", ([1.0],), {}),
        (TypeError, "values", (x.to(torch.complex64),), {}),
    ):
        with pytest.raises(error, match=f"soft_{name}: {word}"):
            f(*arguments, **options)


@pytest.mark.unpoisoned
def test_what_is_not_there_has_a_shape():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, 4, dtype=torch.float16, requires_grad=True)
        y = soft_rank(x, mask=torch.ones(3, 4, dtype=torch.bool))
        y.sum().backward()
    assert y.shape == (3, 4) and y.dtype == torch.float32 and x.grad.dtype == torch.float16
    assert soft_sort(torch.empty(3, 4, device="meta"), dim=0).shape == (3, 4)


def test_modules(backend):
    x, mask = torch.randn(5, 3), torch.rand(5, 3) > 0.2
    rank = fusedloss.nn.SoftRank("kl", 0.5, dim=0, descending=True)
    torch.testing.assert_close(rank(x, mask=mask), soft_rank(x, "kl", 0.5, dim=0, descending=True, mask=mask))
    assert "dim=0" in repr(rank)
    sort = fusedloss.nn.SoftSort(regularization_strength=torch.nn.Parameter(torch.tensor(2.0)))
    sort(x).square().sum().backward()
    assert [n for n, _ in sort.named_parameters()] == ["regularization_strength"]
    assert sort.regularization_strength.grad.isfinite()
    fixed = fusedloss.nn.SoftSort(regularization_strength=torch.tensor(2.0))
    assert "regularization_strength" in fixed.state_dict() and torch.equal(fixed(x), sort(x))


def test_info_says_who_sorts(backend):
    assert "sorting" in fusedloss.info()


# --- soft Spearman ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CASES, ids=str)
def test_spearman_is_the_correlation_of_ranks(backend, options):
    scores, relevance = torch.randn(4, 8, dtype=F64, requires_grad=True), torch.randint(0, 4, (4, 8)).double()
    found = spearman_loss(scores, relevance, reduction="none", **options)
    wanted = torch.stack([reference(s, r, **options) for s, r in zip(scores, relevance)])
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found.sum(), scores), torch.autograd.grad(wanted.sum(), scores)):
        torch.testing.assert_close(a, b)
    mask = torch.rand(4, 8) > 0.3
    padded = spearman_loss(torch.where(mask, scores, nan), relevance, mask=mask, reduction="none", **options)
    single = [spearman_loss(s[m], r[m], **options) for s, r, m in zip(scores, relevance, mask)]
    torch.testing.assert_close(padded, torch.stack(single))
    offsets = torch.tensor([0, 5, 5, 32])
    ragged = spearman_loss(scores.flatten(), relevance.flatten(), offsets=offsets, reduction="none", **options)
    torch.testing.assert_close(ragged[0], spearman_loss(scores.flatten()[:5], relevance.flatten()[:5], **options))
    assert ragged[1] == 0


def test_spearman_without_strength_is_spearman(backend):
    stats = pytest.importorskip("scipy.stats")
    scores, relevance = torch.randint(0, 9, (30,)).double(), torch.randint(0, 5, (30,)).double()
    rho = stats.spearmanr(scores, relevance).statistic
    assert math.isclose(1 - spearman_loss(scores, relevance, regularization_strength=0.0).item(), rho, abs_tol=1e-12)


def test_spearman_of_constant_lists(backend):
    scores = torch.stack([torch.full((6,), 0.3), torch.randn(6)]).requires_grad_()
    relevance = torch.stack([torch.arange(6.0), torch.ones(6)])
    losses = spearman_loss(scores, relevance, reduction="none")
    assert losses.tolist() == [1, 1]
    assert (torch.autograd.grad(losses.sum(), scores)[0] == 0).all()
    assert spearman_loss(torch.randn(1), torch.ones(1)) == 1
    half = torch.randn(2, 9).half().requires_grad_()
    loss = spearman_loss(half, torch.rand(2, 9), regularization_strength=1e4)  # ranks 1e-4 apart
    wanted = spearman_loss(half.double(), torch.rand(2, 9), regularization_strength=1e4)
    assert loss.dtype == torch.float32 and loss.isfinite() and wanted.isfinite()
    loss.backward()
    assert half.grad.abs().max() > 0
