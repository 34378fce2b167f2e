"""Sparsemax and entmax-1.5, and their losses: against sorting in float64, and where the package `entmax` fails."""

import math

import pytest
import tolerance
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import fusedloss as fl
from fusedloss import whole_rows
from fusedloss.losses import entmax15_loss as entmax15_module
from fusedloss.losses import function_of
from fusedloss.losses import sparsemax_loss as sparsemax_module
from fusedloss.sorting import entmax15, sparsemax

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INF, NAN = math.inf, math.nan
OPERATORS = [sparsemax, entmax15]
MODULES = [sparsemax_module, entmax15_module]
operator = pytest.mark.parametrize("f", OPERATORS, ids=lambda f: f.__name__)
losses = pytest.mark.parametrize("module", MODULES, ids=["sparsemax", "entmax15"])


def truth(f, z):
    """p of the last dimension by sorting, in float64."""
    z = z.double()
    u = (z - z.max(-1, keepdim=True).values) / (1 if f is sparsemax else 2)
    falling = u.clamp(min=-2).sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, dtype=F64, device=z.device)
    if f is sparsemax:
        tau = (falling.cumsum(-1) - 1) / count
        size = (falling > tau).sum(-1, keepdim=True)
    else:
        mean = falling.cumsum(-1) / count
        apart = falling.square().cumsum(-1) - count * mean.square()
        tau = mean - ((1 - apart) / count).clamp(min=0).sqrt()
        size = (tau <= falling).sum(-1, keepdim=True)
    r = (u - tau.gather(-1, size - 1)).clamp(min=0)
    return r if f is sparsemax else r.square()


def near(got, wanted, relative=1e-12, absolute=1e-12):
    torch.testing.assert_close(got.double(), wanted.double(), rtol=relative, atol=absolute)


# --- operators --------------------------------------------------------------------------------------------------------


@operator
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dimension(f, dim, backend):
    z = 2 * torch.randn(5, 17, 3, dtype=F64)
    wanted = truth(f, z.movedim(dim, -1)).movedim(-1, dim)
    near(f(z, dim), wanted)
    near(f(z.transpose(0, 2), 2 - dim % 3), wanted.transpose(0, 2))
    near(f(z.expand(2, 5, 17, 3)[:, ::2], dim % 3 + 1), f(z.expand(2, 5, 17, 3)[:, ::2].contiguous(), dim % 3 + 1))


@operator
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
def test_values(f, dtype, size, backend):
    for n in (1, 2, 15, 17, 333):
        z = (size * torch.randn(9, n)).to(dtype)
        before = z.clone()
        p, wanted = f(z), truth(f, z)
        assert p.dtype == dtype and torch.equal(z, before)
        rounded = {F64: 1e-12, F32: 2e-7, BF16: 4e-3, F16: 5e-4}[dtype]
        near(p, wanted, rounded, 1e-13 if dtype == F64 else 1e-7)
        assert torch.equal(f(z), p)
        assert (p.double().sum(-1) - 1).abs().max() < max(1e-12, 2 * rounded)
        assert n == 1 or size < 1 or (p == 0).any()


@operator
def test_the_package(f):
    package = pytest.importorskip("entmax")
    z = 2 * torch.randn(20, 500, dtype=F64, device="cpu")
    near(f(z), getattr(package, f.__name__)(z))


@operator
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_gradient(f, dtype, backend):
    """As autograd has it through the sort; NaN outside the support is not looked at."""
    z = torch.randn(6, 40, dtype=F64).to(dtype).requires_grad_()
    p, g = f(z), torch.randn(6, 40).to(dtype)
    (got,) = torch.autograd.grad(p, z, torch.where(p == 0, NAN, g))
    exact = z.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(truth(f, exact), exact, g.double())
    assert tolerance.error(got, wanted) < {F64: 1e-12, F32: 1e-6, BF16: 1e-2}[dtype]
    assert (got[p == 0] == 0).all()


@operator
def test_derivatives_of_any_order(f, backend):
    """The package's entmax15 fails gradgradcheck."""
    z = torch.randn(1, 4, 2, dtype=F64, requires_grad=True)
    mask, rows = torch.tensor([[1, 1], [0, 1], [1, 1], [1, 0]]).bool()[None], torch.tensor([0, 3, 3, 4, 8])
    for call in (lambda t: f(t, 1), lambda t: f(t, 1, mask=mask), lambda t: f(t.reshape(-1), offsets=rows)):
        assert gradcheck(call, (z,)) and gradgradcheck(call, (z,), fast_mode=True)
    weights = torch.randn(4, dtype=F64)

    def third(t):
        (g,) = torch.autograd.grad((f(t, 1).square() * weights[:, None]).sum(), t, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), t, create_graph=True)
        return h

    assert gradcheck(third, (z,), fast_mode=True)


@operator
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_infinities_and_nan(f, dtype, backend):
    """The package crashes where a row is −inf throughout (its issue 19)."""
    rows = [[-INF] * 4, [0.0, -INF, 0.0, -INF], [NAN, 1.0, 2.0, -INF], [INF, 3.0, INF, -INF], [-INF, -5.0, -INF, -INF]]
    z = torch.tensor(rows, dtype=dtype, requires_grad=True)
    wanted = [[0.0] * 4, [0.5, 0, 0.5, 0], [NAN] * 4, [0.5, 0, 0.5, 0], [0.0, 1, 0, 0]]
    p = f(z)
    torch.testing.assert_close(p, torch.tensor(wanted, dtype=dtype), equal_nan=True, rtol=1e-15, atol=0)
    p.backward(torch.arange(20.0).reshape(5, 4).to(dtype))
    assert z.grad[2].isnan().all() and z.grad[[0, 1, 3, 4]].isfinite().all()
    assert (z.grad[[0, 4]] == 0).all() and (z.grad[:, 3][[0, 1, 3, 4]] == 0).all()
    assert (z.grad[1, ::2].abs() > 0).all()


@operator
@pytest.mark.parametrize("size", [1e4, 1e30, 1e-30])
def test_huge_and_tiny(f, size, backend):
    z = size * torch.tensor([[3.0, 1.0, 3.0, -7.0], [1.0, 1.0, 1.0, 1.0], [-2.0, -1.0, -3.0, -2.5]])
    near(f(z), truth(f, z), 1e-7)
    near(f(z.double() - 1e300), torch.full((3, 4), 0.25))


@operator
def test_mask_and_offsets(f, backend):
    z = torch.randn(4, 6, dtype=F64, requires_grad=True)
    mask = torch.rand(4, 6) > 0.4
    mask[1] = False
    masked = f(torch.where(mask, z, NAN), mask=mask)
    for row, keep, p in zip(z, mask, masked):
        near(p[keep], f(row[keep]))
        assert (p[~keep] == 0).all()
    (gradient,) = torch.autograd.grad(masked.square().sum(), z)
    assert (gradient[~mask] == 0).all() and gradient.isfinite().all()
    flat, starts = z.reshape(-1), [0, 0, 1, 5, 5, 20, 24]
    p = f(flat, offsets=torch.tensor(starts, dtype=torch.int32))
    for a, b in zip(starts, starts[1:]):
        near(p[a:b], f(flat[a:b]))


@operator
def test_empty(f, backend):
    for shape in ((0,), (0, 4), (4, 0), (2, 0, 3)):
        z = torch.zeros(shape, requires_grad=True)
        assert f(z).shape == shape
        f(z).sum().backward()
    assert f(torch.zeros(0), offsets=torch.tensor([0, 0])).shape == (0,)
    with pytest.raises(ValueError, match="dimension"):
        f(torch.tensor(1.0))
    with pytest.raises(TypeError, match=f"{f.__name__}: values"):
        f(torch.arange(4))


@operator
def test_mapped(f):
    z, g = torch.randn(5, 4, 7, dtype=F64), torch.randn(5, 4, 7, dtype=F64)
    near(torch.vmap(f, in_dims=1)(z), f(z.transpose(0, 1)))
    near(torch.vmap(lambda t: f(t, 0))(z), f(z, 1))
    op = torch.ops.fusedloss.entmax_backward
    got = torch.vmap(op, (0, 1, None, None), 0)(f(z), g.transpose(0, 1), None, 1)
    near(got, torch.stack([op(f(a), b, None, 1) for a, b in zip(z, g)]))


@pytest.mark.unpoisoned
def test_compiled():
    def loss(z):
        return sparsemax(z, 1).square().sum() + entmax15(z, 1).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (3, 5, 8):
        z = torch.randn(n, 6, 2, requires_grad=True)
        (got,) = torch.autograd.grad(compiled(z), z)
        (wanted,) = torch.autograd.grad(loss(z), z)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", [0, 1])
def test_ops(kind):
    z, p = torch.randn(3, 5, requires_grad=True), torch.rand(3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.fusedloss.entmax, (z, None, kind))
    torch.library.opcheck(torch.ops.fusedloss.entmax, (z[0], torch.tensor([0, 2, 5]), kind))
    torch.library.opcheck(torch.ops.fusedloss.entmax_backward, (p, z, None, kind))


@operator
@given(st.data())
def test_any_row(f, device, data):
    """Newton's method ends at the answer whatever the row: clusters, geometric steps, ties."""
    n, base = data.draw(st.integers(1, 60)), data.draw(st.floats(0.3, 0.999))
    several = lambda one: torch.tensor(data.draw(st.lists(one, min_size=n, max_size=n)), dtype=F64)
    kinds = {
        "geometric": -(base ** torch.arange(n, dtype=F64)),
        "powers": -(torch.arange(n, dtype=F64) / n) ** data.draw(st.floats(0.05, 20)),
        "ties": several(st.sampled_from([0.0, -0.1, -0.5, -1.0, -2.0])),
        "any": several(st.floats(-3, 3, width=32)),
    }
    z = data.draw(st.floats(0.1, 4)) * kinds[data.draw(st.sampled_from(sorted(kinds)))].double()
    near(f(z), truth(f, z), 1e-9, 1e-13)


@operator
@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_long_rows(f, size):
    z = size * torch.randn(2, 100_000)
    near(f(z), truth(f, z), 3e-7, 1e-12)
    assert (f(z).double().sum(1) - 1).abs().max() < 1e-6


@pytest.mark.host
@operator
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_every_instruction_set_and_number_of_threads(f, dtype):
    native = pytest.importorskip("fusedloss._native")
    z, g = (3 * torch.randn(40, 203)).to(dtype).requires_grad_(), torch.randn(40, 203).to(dtype)
    module, found = MODULES[OPERATORS.index(f)], []
    for name, threads in (("portable", 1), ("avx2", 2), ("avx512", 2), (None, 1), (None, 3)):
        before = torch.get_num_threads()
        try:
            native.set_isa(name)
            torch.set_num_threads(threads)
            p, loss = f(z), function_of(module)(z, torch.arange(40), reduction="sum")
            found.append([p, loss, *torch.autograd.grad(p, z, g), *torch.autograd.grad(loss, z)])
        except RuntimeError as error:
            assert "set_isa" in str(error) or "processor" in str(error) or name in str(error), error
        finally:
            native.set_isa(None)
            torch.set_num_threads(before)
    for one in found:
        for a, b in zip(one, found[-1]):
            near(a, b, {F64: 1e-12, F32: 1e-6}.get(dtype, 1e-2), 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(found[-2], found[-1]))


# --- losses -----------------------------------------------------------------------------------------------------------


@losses
def test_losses_of_the_package(module):
    package = pytest.importorskip("entmax")
    name = module.__name__.rpartition(".")[2]
    z, y = 3 * torch.randn(20, 300, dtype=F64, device="cpu"), torch.randint(0, 300, (20,), device="cpu")
    near(function_of(module)(z, y, reduction="none"), getattr(package, name)(z, y, k=None))


@losses
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_the_margin(module, dtype, backend):
    """Exactly 0, loss and gradient, where the target leads by the margin; all digits just before."""
    f, margin = function_of(module), 1.0 if module is sparsemax_module else 2.0
    z = torch.tensor([[margin, 0.0, -3.0, -INF], [100 + 2 * margin, 100.0, 100.0, 100.0]], dtype=dtype)
    z.requires_grad_()
    loss = f(z, torch.tensor([0, 0]), reduction="none")
    assert (loss == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert (gradient == 0).all()
    gap = 2.0**-6 if dtype in (BF16, F16) else 2.0**-20
    z = torch.tensor([[margin - gap, 0.0]], dtype=dtype, requires_grad=True)
    loss = f(z, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, z)
    if module is sparsemax_module:  # p = (1 − g/2, g/2)
        wanted, slope = gap**2 / 4, gap / 2
    else:  # r₁ − r₂ = 1 − g/2 with r₁² + r₂² = 1
        d = 1 - gap / 2
        r = gap * (1 - gap / 4) / (d + math.sqrt(2 - d * d))  # (√(2 − d²) − d) / 2, without cancelling
        wanted, slope = ((r * r / (1 + r + d)) ** 2 * (2 + r + d) + r**3) * 2 / 3, r * r
    near(loss, torch.tensor(wanted, dtype=F64), 1e-6 if dtype != F64 else 1e-9, 0)
    near(gradient, torch.tensor([[-slope, slope]], dtype=F64), {F64: 1e-9, F32: 1e-6}.get(dtype, 1e-2), 0)


@losses
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_infinite_scores(module, dtype, backend):
    f = function_of(module)
    rows = [[-INF] * 3, [0.0, -INF, 0.0], [NAN, 1.0, 2.0], [INF, 3.0, -INF], [INF, 3.0, 1.0], [-INF, 7.0, -INF]]
    z = torch.tensor(rows, dtype=dtype, requires_grad=True)
    y = torch.tensor([0, 1, 0, 0, 1, 1])
    loss = f(z, y, reduction="none")
    wanted = torch.tensor([INF, INF, NAN, 0.0, INF, 0.0], dtype=loss.dtype)
    torch.testing.assert_close(loss, wanted, equal_nan=True)
    (gradient,) = torch.autograd.grad(f(z, y, reduction="sum"), z)
    exact = torch.tensor([[0.0] * 3, [0.5, 0, 0.5], [NAN] * 3, [0.0] * 3, [1.0, -1, 0], [0.0] * 3], dtype=dtype)
    torch.testing.assert_close(gradient, exact, equal_nan=True)
    (gradient,) = torch.autograd.grad(f(z, y, row_weight=torch.zeros(6), reduction="sum"), z)
    assert (gradient == 0).all()


@losses
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored(module, reduction, backend):
    """The package's losses ignore no index below 0, its default −100 among them."""
    f, x, w = function_of(module), torch.randn(6, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    y = torch.tensor([1, -100, 2, 0, -100, 8])
    keep = y >= 0
    for scores in (x @ w.t(), fl.linear_scores(x, w)):
        loss = f(scores, y, reduction=reduction)
        inner = f((x @ w.t())[keep], y[keep], reduction=reduction)
        near(loss[keep] if reduction == "none" else loss, inner, 1e-6, 1e-6)
        dx, dw = torch.autograd.grad(loss.sum(), (x, w), retain_graph=True)
        assert (dx[~keep] == 0).all()
        for got, wanted in zip((dx, dw), torch.autograd.grad(inner.sum(), (x, w))):
            assert tolerance.error(got, wanted) < 1e-6
        empty = f(scores, torch.full((6,), -100), reduction=reduction)
        assert (empty == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(empty.sum(), (x, w), retain_graph=True))
    assert f(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.int64)).item() == 0
    assert f(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64)).item() == 0


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap and scale": {"bias": True, "softcap": 3.0, "scale": 0.7},
    "learned scale": {"scale": True, "temperature": 2.0},
}


@losses
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype, budget", [(F64, 1), (F32, 4000), (F32, None), (BF16, 1), (BF16, 4000)], ids=str)
def test_linear_scores(module, options, dtype, budget, backend):
    """Any number of chunks, down to single rows, against the dense scores in float64."""
    f, options = function_of(module), dict(options)
    x, w = torch.randn(13, 40).to(dtype).requires_grad_(), (torch.randn(50, 40) / 3).to(dtype).requires_grad_()
    trained, y = [x, w], torch.randint(0, 50, (13,))
    if options.get("bias"):
        options["bias"] = torch.randn(50).to(dtype).requires_grad_()
        trained.append(options["bias"])
    if options.get("scale") is True:
        options["scale"] = torch.tensor(1.3, dtype=F64 if dtype == F64 else F32, requires_grad=True)
        trained.append(options["scale"])
    weights = torch.rand(13, dtype=F64, requires_grad=True)
    loss = f(fl.linear_scores(x, w, memory_budget=budget, **options), y, row_weight=weights, weight=torch.arange(50.0))
    exact = [t.detach().double().requires_grad_() for t in trained]
    names = [n for n in ("bias", "scale") if isinstance(options.get(n), torch.Tensor)]
    same = {**options, **dict(zip(names, exact[2:]))}
    z = exact[0] @ exact[1].t() + same.get("bias", 0.0)
    z = same["softcap"] * torch.tanh(z / same["softcap"]) if "softcap" in same else z
    z = z * same.get("scale", 1.0) / same.get("temperature", 1.0)
    factor = torch.arange(50.0, dtype=F64)[y] * weights
    wanted = (module.reference(z, y) * factor).sum() / factor.sum()
    near(loss, wanted, {F64: 1e-12, F32: 1e-5, BF16: 1e-5}[dtype])
    pairs = zip(torch.autograd.grad(loss, [*trained, weights]), torch.autograd.grad(wanted, [*exact, weights]))
    for got, gradient in pairs:
        assert tolerance.error(got, gradient) < {F64: 1e-11, F32: 1e-5, BF16: 1e-2}[dtype]


@losses
@pytest.mark.parametrize("bias", [False, True])
def test_memory(module, bias, monkeypatch):
    """The scores in memory stay within the budget, two tiles of them where the options' gradients ask for two."""
    workspace, taken = whole_rows.workspace, []

    def watched(device, *wanted):
        taken.append(sum(math.prod(shape) * dtype.itemsize for shape, dtype in wanted[:1]) * (1 + bias))
        return workspace(device, *wanted)

    monkeypatch.setattr(whole_rows, "workspace", watched)
    x, w = torch.randn(300, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    b = torch.randn(500, requires_grad=True) if bias else None
    scores = fl.linear_scores(x, w, bias=b, memory_budget=40_000)
    function_of(module)(scores, torch.zeros(300, dtype=torch.int64)).backward()
    assert len(taken) == 1 and 20_000 < taken[0] <= 40_000


@losses
def test_given_logits_in_half_precision(module, backend):
    """The gradient of float16 logits waits in float32 for a loss scale."""
    f, y = function_of(module), torch.randint(0, 100, (300,))
    z = torch.randn(300, 100).to(F16).requires_grad_()
    scale = 2.0**20
    (got,) = torch.autograd.grad(scale * f(z, y), z)
    exact = z.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(scale * module.reference(exact, y).mean(), exact)
    assert tolerance.error(got, wanted) < 1e-3


@losses
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(module, linear, reduction):
    f = function_of(module)
    x, w, b = (torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((3, 2), (4, 2), (4,)))
    y, weight = torch.tensor([0, -100, 3]), torch.rand(3, dtype=F64, requires_grad=True)

    def loss(x, w, b, weight):
        scores = fl.linear_scores(x, w, bias=b, softcap=5.0) if linear else x @ w.t() + b
        return f(scores, y, row_weight=weight, reduction=reduction).square()

    assert gradcheck(loss, (x, w, b, weight)) and gradgradcheck(loss, (x, w, b, weight), fast_mode=True)
    total = loss(x, w, b, weight).sum()  # a second backward computes again
    for got, again in zip(*(torch.autograd.grad(total, (x, w, b), retain_graph=True) for _ in range(2))):
        near(got, again)


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    "module, linear, reduction",
    [(sparsemax_module, True, "mean"), (entmax15_module, True, "none"), (entmax15_module, False, "mean")],
)
def test_compiled_losses(module, linear, reduction):
    f, w = function_of(module), torch.randn(9, 5, requires_grad=True)

    def loss(x, y):
        scores = fl.linear_scores(x, w, softcap=9.0) if linear else x @ w.t()
        return f(scores, y, reduction=reduction)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (4, 7):
        x, y = torch.randn(n, 5, requires_grad=True), torch.randint(0, 9, (n,))
        y[0] = -100
        got, wanted = compiled(x, y), loss(x, y)
        near(got, wanted, 1e-6, 1e-6)
        for a, b in zip(torch.autograd.grad(got.sum(), (x, w)), torch.autograd.grad(wanted.sum(), (x, w))):
            near(a, b, 1e-5, 1e-6)


@losses
def test_ops_of_losses(module):
    z, keep = torch.randn(4, 5, requires_grad=True), torch.tensor([True, False, True, True])
    y = torch.tensor([0, 0, 2, 4])
    key = function_of(module).on_statistics.key
    text = fl.logits_scores(z).spec((), key)
    streams = (z, None, None, None, None, None)
    torch.library.opcheck(torch.ops.fusedloss.row_losses, (text, *streams, keep, [y]))
    needs = [True] + [False] * 5
    torch.library.opcheck(torch.ops.fusedloss.eager_gradient, (text, *streams, keep, torch.rand(4), [y], [], needs))


@losses
def test_many_classes(module):
    """fp32 against float64 at 10⁵ classes."""
    z, y = torch.randn(2, 100_000, requires_grad=True), torch.tensor([5, 77_777])
    loss = function_of(module)(z, y, reduction="sum")
    exact = z.detach().double().requires_grad_()
    wanted = module.reference(exact, y).sum()
    near(loss, wanted, 2e-7)
    assert tolerance.error(torch.autograd.grad(loss, z)[0], torch.autograd.grad(wanted, exact)[0]) < 1e-7


@losses
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_frozen_inputs_and_class_vectors(module, linear, dtype):
    """Whichever of the tensors are trained, their gradients are those of all at once."""
    f, y = function_of(module), torch.tensor([0, -100, 3, 5])
    x, w = torch.randn(4, 3).to(dtype), torch.randn(6, 3).to(dtype)
    parts = [x if linear else (x @ w.t()), w, *(torch.rand(6, dtype=F64 if dtype == F64 else F32) for _ in range(3))]

    def gradients(trained):
        leaves = [t.clone().requires_grad_(n in trained) for n, t in enumerate(parts)]
        given = fl.linear_scores(*leaves[:2], bias=leaves[2].to(dtype)) if linear else fl.logits_scores(leaves[0])
        loss = f(given.adjusted(leaves[3], leaves[4]), y)
        return torch.autograd.grad(loss, [leaves[n] for n in trained])

    used = (0, 1, 2, 3, 4) if linear else (0, 3, 4)
    together = dict(zip(used, gradients(used)))
    for n in used:
        assert tolerance.error(gradients((n,))[0], together[n]) < (1e-12 if dtype == F64 else 1e-2)
    leaves = [t.double().requires_grad_() for t in parts]
    z = (leaves[0] @ leaves[1].t() + leaves[2]) if linear else leaves[0]
    truth = module.reference((z * leaves[3] + leaves[4])[y >= 0], y[y >= 0]).mean()
    for n, wanted in zip(used, torch.autograd.grad(truth, [leaves[n] for n in used])):
        assert tolerance.error(together[n], wanted) < (1e-12 if dtype == F64 else 2e-2)


def test_offsets_changed_before_the_backward_are_noticed():
    x, offsets = torch.randn(6, requires_grad=True), torch.tensor([0, 2, 6])
    p = entmax15(x, offsets=offsets)
    offsets[1] = 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        p.square().sum().backward()


def test_forward_mode_is_refused_and_not_dropped():
    x = torch.randn(2, 3)
    with pytest.raises(NotImplementedError, match="entmax15: values: expected reverse-mode derivatives"):
        torch.func.jvp(entmax15, (x,), (x,))
