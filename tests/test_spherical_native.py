"""The compiled steps of the factored layer: against plain PyTorch's, and against dense gradient descent in float64."""

import copy
import mmap
from dataclasses import replace

import pytest
import torch

import fusedloss as fl
from fusedloss import nn
from fusedloss.backends.native import _native
from fusedloss.spherical import engines, factors, native_products, native_steps, steps
from fusedloss.spherical.factors import Factors
from fusedloss.spherical.family import member

F64, F32 = torch.float64, torch.float32
N = 60
LOSSES = {
    "z": nn.SphericalZLoss(a=1.5, b=2.0),
    "taylor": nn.TaylorSoftmaxLoss(),
    "spherical": nn.SphericalSoftmaxLoss(eps=0.1),
    "squared": nn.SquaredErrorLoss(value=2.0, k=3.0, mean_over_classes=False),
    "mean squared": nn.SquaredErrorLoss(),
}
# m, d, K: one example; few, many and as many examples as features; in one slice and in several, also uneven ones.
SHAPES = [(1, 16, 1), (9, 16, 3), (16, 16, 1), (40, 16, 3)]
LARGE = [(70, 90, 2), (100, 70, 1)]
TOLERANCE = {F64: 1e-11, F32: 3e-5}

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(native_products.why_not() is not None, reason=str(native_products.why_not())),
]


@pytest.fixture(params=LOSSES)
def loss(request):
    return member("test", LOSSES[request.param])


def error(got, wanted):
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))


def examples(m, d, k, dtype, n=N):
    """Features, targets with many classes twice, shares of which some are 0, and upstream gradients."""
    share = torch.rand(m, k, dtype=F64) + 0.5
    if k > 1:
        share[::2, 1] = 0
        share[-1] = 0  # an example without a target
    return torch.randn(m, d, dtype=dtype), torch.randint(0, n, (m, k)), share, torch.rand(m, dtype=F64) / m


def twice(d, dtype, n=N):
    p = torch.randn(n, d, dtype=dtype)
    return Factors.of(p), Factors.of(p.clone())


def dense(f):
    return f.p.double() @ f.u + f.offset + f.mean


def dense_step(w, h, target, share, upstream, loss, lr, decay):
    """∂L/∂H and the weight after a step, by autograd on all scores."""
    w, h = w.clone().requires_grad_(), h.double().clone().requires_grad_()
    scores = h @ w.t()
    mean = scores.mean(1)
    away = scores - mean.unsqueeze(1)
    losses = loss.centred(away.gather(1, target), mean, away.square().sum(1), len(w), share).loss
    (losses * upstream).sum().backward()
    return losses.detach(), h.grad, ((1 - lr * decay) * w - lr * w.grad).detach()


def native_step(f, h, target, share, upstream, loss, lr, decay=0.0):
    visit = native_steps.visit(f, h, target, share, loss)
    dh, batch = native_steps.backward(f, visit, upstream)
    native_steps.step(f, batch, lr, decay)
    return visit.losses, dh, batch


def test_it_is_chosen_on_the_cpu():
    f = Factors.of(torch.randn(5, 3))
    assert engines.engine(f) is native_steps
    assert engines.engine(replace(f, p=f.p.t().contiguous().t())) is steps  # classes lie in columns
    assert "spherical compiled steps" in fl.info()


def test_without_a_blas_it_says_so(monkeypatch):
    monkeypatch.setattr(native_products, "_blas", lambda name: None if name == "dtrsm_" else print)
    native_products.why_not.cache_clear()
    try:
        assert native_products.why_not() == "torch's libtorch_cpu has no dtrsm_"
        assert engines.engine(Factors.of(torch.randn(5, 3))) is steps
    finally:
        native_products.why_not.cache_clear()


@pytest.mark.parametrize("dtype", (F64, F32), ids=str)
@pytest.mark.parametrize(
    "m,d,k,name", [(*shape, name) for name in LOSSES for shape in SHAPES + LARGE * (name in ("z", "squared"))]
)
def test_the_phases_mean_what_the_plain_ones_do(m, d, k, name, dtype):
    loss = member("test", LOSSES[name])
    mine, plain = twice(d, dtype)
    for _ in range(2):
        h, target, share, upstream = examples(m, d, k, dtype)
        visit, wanted = native_steps.visit(mine, h, target, share, loss), steps.visit(plain, h, target, share, loss)
        for name, value in vars(wanted).items():
            assert error(getattr(visit, name), value) < TOLERANCE[dtype], name
        (dh, batch), (dh_wanted, wanted) = (
            native_steps.backward(mine, visit, upstream),
            steps.backward(plain, wanted, upstream),
        )
        assert error(dh, dh_wanted) < TOLERANCE[dtype]
        for name, value in vars(wanted).items():
            assert getattr(batch, name).dtype == value.dtype
            assert error(getattr(batch, name), value) < TOLERANCE[dtype], name
        native_steps.step(mine, batch, 0.05, 0.2)
        steps.step(plain, wanted, 0.05, 0.2)
        for name, value in vars(plain).items():
            assert error(getattr(mine, name), value) < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype,tolerance", ((F64, 1e-11), (F32, 1e-4)), ids=str)
@pytest.mark.parametrize("decay", (0.0, 0.3))
@pytest.mark.parametrize("m,d,k", SHAPES)
def test_a_step_is_gradient_descent_on_the_dense_weight(m, d, k, decay, dtype, tolerance, loss):
    f, _ = twice(d, dtype)
    w = dense(f)
    for lr in (0.02, 0.05, 0.0):
        given = examples(m, d, k, dtype)
        losses, dh, w = dense_step(w, *given, loss, lr, decay)
        mine, dh_mine, _ = native_step(f, *given, loss, lr, decay)
        assert error(mine, losses) < tolerance
        assert error(dh_mine, dh) < tolerance
        assert error(dense(f), w) < tolerance
    centred = w - w.mean(0)
    assert error(f.gram, centred.t() @ centred) < tolerance
    assert error(f.inverse @ f.u, torch.eye(d, dtype=F64)) < tolerance


@pytest.mark.parametrize("dtype,tolerance", ((F64, 1e-10), (F32, 3e-3)), ids=str)
@pytest.mark.parametrize("m,d", ((9, 16), (40, 16), (70, 90), (100, 70)))
def test_a_step_far_too_large(m, d, dtype, tolerance):
    """E has entries of all sizes beside its diagonal: rows are exchanged while it is factorised."""
    loss = member("test", LOSSES["squared"])
    f, _ = twice(d, dtype)
    given = examples(m, d, 2, dtype)
    _, _, wanted = dense_step(dense(f), *given, loss, 20.0, 0.01)
    native_step(f, *given, loss, 20.0, 0.01)
    assert error(dense(f), wanted) < tolerance
    assert error(f.inverse @ f.u, torch.eye(d, dtype=F64)) < tolerance


@pytest.mark.parametrize("isa", ("portable", "avx2", "avx512"))
@pytest.mark.parametrize("dtype", (F64, F32), ids=str)
def test_every_instruction_set(isa, dtype):
    loss = member("test", LOSSES["taylor"])
    try:
        _native.set_isa(isa)
    except RuntimeError as missing:
        pytest.skip(str(missing))
    try:
        mine, plain = twice(37, dtype)
        for m in (11, 45):
            h, target, share, upstream = examples(m, 37, 2, dtype)
            native_step(mine, h, target, share, upstream, loss, 0.02, 0.1)
            batch = steps.backward(plain, steps.visit(plain, h, target, share, loss), upstream)[1]
            steps.step(plain, batch, 0.02, 0.1)
        assert error(dense(mine), dense(plain)) < TOLERANCE[dtype]
    finally:
        _native.set_isa(None)


@pytest.mark.parametrize("m", (2, 12))
def test_batches_joined_are_one_step(m):
    loss = member("test", LOSSES["taylor"])
    mine, plain = twice(16, F64)
    parts, together = [], []
    for k in (1, 3):
        h, target, share, upstream = examples(m, 16, k, F64)
        parts.append(native_steps.backward(mine, native_steps.visit(mine, h, target, share, loss), upstream)[1])
        together.append(steps.backward(plain, steps.visit(plain, h, target, share, loss), upstream)[1])
    native_steps.step(mine, steps.Batch.join(parts).scaled(0.7), 0.1)
    steps.step(plain, steps.Batch.join(together).scaled(0.7), 0.1)
    assert error(dense(mine), dense(plain)) < 1e-12


@pytest.mark.parametrize("dtype,tolerance", ((F64, 1e-10), (F32, 1e-4)), ids=str)
@pytest.mark.parametrize("m,d", ((1, 8), (4, 8), (8, 8), (20, 8)))
def test_a_singular_e_is_folded_into_p(m, d, dtype, tolerance, monkeypatch):
    """‖h‖² · 2γ · lr = 1 along one direction: U E has no inverse, but the step has a meaning."""
    folded = []
    fold = steps.fold
    monkeypatch.setattr(steps, "fold", lambda *given: (folded.append(True), fold(*given)))
    loss = member("test", nn.SquaredErrorLoss(mean_over_classes=False))  # γ = 1
    f, _ = twice(d, dtype)
    w, (_, target, share, _) = dense(f), examples(m, d, 1, dtype)
    share, h = torch.ones_like(share), torch.zeros(m, d, dtype=dtype)
    h[torch.arange(m), torch.arange(m) % d] = 1
    upstream = 0.5 / h.sum(0)[torch.arange(m) % d].double()  # Hᵀ diag(2 upstream) H has eigenvalues 1 and 0
    _, _, wanted = dense_step(w, h, target, share, upstream, loss, 1.0, 0.0)
    native_step(f, h, target, share, upstream, loss, 1.0)
    assert folded
    assert error(dense(f), wanted) < tolerance
    assert torch.equal(f.u, torch.eye(d, dtype=F64))


@pytest.mark.parametrize("m", (3, 12))
def test_a_step_that_would_make_u_ill_is_folded(m):
    """Both engines agree on when, and W is the same whether it was."""
    loss = member("test", nn.SquaredErrorLoss(mean_over_classes=False))
    h, target, share, upstream = examples(m, 8, 1, F64)
    f, _ = twice(8, F64)
    native_step(f, h, target, share, upstream, loss, 0.2)
    reached = f.condition().item()
    assert reached > 1.05
    start, same = twice(8, F64)
    _, _, wanted = dense_step(dense(start), h, target, share, upstream, loss, 0.2, 0.0)
    batches = [by.backward(x, by.visit(x, h, target, share, loss), upstream)[1] for by, x in ((native_steps, start), (steps, same))]
    for limit, ill in ((reached * 1.0001, False), (reached * 0.9999, True)):
        for engine, x, batch in ((native_steps, start, batches[0]), (steps, same, batches[1])):
            x = copy.deepcopy(x)
            assert engine.step(x, batch, 0.2, 0.0, limit) is ill
            assert torch.equal(x.u, torch.eye(8, dtype=F64)) is ill
            assert error(dense(x), wanted) < 1e-12


@pytest.mark.parametrize("decay", [5.0, -1e9], ids=["small", "large"])
def test_a_u_that_shrinks_or_grows_as_a_whole_is_folded(decay):
    loss = member("test", LOSSES["squared"])
    f, plain = twice(8, F64)
    given = examples(3, 8, 1, F64)
    _, _, wanted = dense_step(dense(f), *given, loss, 0.1, decay)
    for engine, x in ((native_steps, f), (steps, plain)):
        x.u.mul_(2e-6 if decay > 0 else 1.0)
        x.inverse.div_(2e-6 if decay > 0 else 1.0)
        x.p.div_(2e-6 if decay > 0 else 1.0)
        batch = engine.backward(x, engine.visit(x, *given[:3], loss), given[3])[1]
        x.gram.mul_(1.001)
        assert engine.step(x, batch, 0.1, decay)
        assert error(dense(x), wanted) < 1e-11
        away = wanted - wanted.mean(0)
        assert (error(x.gram, away.t() @ away) < 1e-9) is (decay < 0)  # made anew where U had grown


@pytest.mark.parametrize("engine", (native_steps, steps), ids=lambda engine: engine.__name__)
@pytest.mark.parametrize("m", (3, 12))
def test_a_decay_that_keeps_nothing(m, engine):
    loss = member("test", LOSSES["squared"])
    f, _ = twice(8, F64)
    given = examples(m, 8, 1, F64)
    _, _, wanted = dense_step(dense(f), *given, loss, 0.5, 2.0)
    h, target, share, upstream = given
    engine.step(f, engine.backward(f, engine.visit(f, h, target, share, loss), upstream)[1], 0.5, 2.0)
    assert error(dense(f), wanted) < 1e-10


def test_rows_of_equal_scores_have_no_gradient():
    loss = member("test", LOSSES["z"])
    f = Factors.of(torch.ones(N, 8, dtype=F64))
    h, target, share, upstream = examples(5, 8, 1, F64)
    visit = native_steps.visit(f, h, target, share, loss)
    assert torch.allclose(visit.losses, steps.visit(f, h, target, share, loss).losses)
    dh, batch = native_steps.backward(f, visit, upstream)
    native_steps.step(f, batch, 1.0)
    assert not dh.any() and torch.equal(dense(f), torch.ones(N, 8, dtype=F64))


def test_no_examples_change_nothing(loss):
    f, before = twice(8, F32)
    _, dh, _ = native_step(f, *examples(0, 8, 1, F32), loss, 1.0, 0.5)
    assert dh.shape == (0, 8)
    assert all(torch.equal(getattr(f, name), value) for name, value in vars(before).items())


def test_what_lies_apart_in_memory(loss):
    mine, other = twice(8, F32)
    wide = torch.empty(N, 20)
    wide[:, :8] = mine.p
    mine = replace(mine, p=wide[:, :8])
    h, target, share, upstream = examples(6, 8, 2, F32)
    share, upstream = share[:, :1].expand(-1, 2), upstream[:1].expand(6)
    apart = h.t().contiguous().t(), target.t().contiguous().t(), share, upstream
    together = h, target, share.contiguous(), upstream.contiguous()
    results = [native_step(f, *given, loss, 0.1) for f, given in ((mine, apart), (other, together))]
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2]))
    assert torch.equal(mine.p, other.p)
    assert wide[:, 8:].isnan().all()  # what torch.empty left there
    batch = results[1][2]
    native_steps.step(mine, replace(batch, h=h.t().contiguous().t(), t=batch.t[:1].expand(6)), 0.1)
    native_steps.step(other, replace(batch, t=batch.t[:1].expand(6).contiguous()), 0.1)
    assert torch.equal(mine.p, other.p) and torch.equal(mine.mean, other.mean)


@pytest.mark.parametrize("dtype", (F64, F32), ids=str)
@pytest.mark.parametrize("m,d", ((110, 140), (140, 100)))
@pytest.mark.parametrize("name", ("z", "squared"))  # a short series, and factors of E
def test_same_bits_each_time_and_for_any_number_of_threads(m, d, dtype, name):
    loss = member("test", LOSSES[name])
    first, _ = twice(d, dtype)
    given = [examples(m, d, 2, dtype, n=40) for _ in range(2)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (2, 1, 2):
            torch.set_num_threads(count)
            f = Factors(**{name: value.clone() for name, value in vars(first).items()})
            found = [native_step(f, *one, loss, 0.05, 0.1)[:2] for one in given]
            factors.multiply(f.p, f.u)
            results.append([*sum(found, ()), *vars(f).values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_classes_beyond_2_to_the_31_numbers(loss):
    """8 GiB of addresses, of which a few rows are touched."""
    d, n = 8, (1 << 28) + 100
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    try:
        addresses = mmap.mmap(-1, n * d * 4, flags=flags)
    except OSError as refused:
        pytest.skip(f"no 8 GiB of addresses: {refused}")
    p = torch.frombuffer(addresses, dtype=F32).view(n, d)
    target = torch.tensor([[n - 1], [n - 2], [5], [n - 1]])
    rows = torch.tensor([5, n - 2, n - 1])
    p[rows] = torch.randn(3, d)
    few = p[rows].clone()
    eye, zero = torch.eye(d, dtype=F64), torch.zeros(d, dtype=F64)
    mine = Factors(p, eye, eye.clone(), eye * 3.0, zero, zero.clone())
    small = replace(
        mine, p=few, **{name: getattr(mine, name).clone() for name in ("u", "inverse", "gram", "offset", "mean")}
    )
    h, share, upstream = torch.randn(4, d), torch.ones(4, 1, dtype=F64), torch.ones(4, dtype=F64)
    visit = native_steps.visit(mine, h, target, share, loss)
    here = torch.searchsorted(rows, target)
    assert error(visit.picked, few[here[:, 0]] * visit.alpha.float()) < 1e-6
    batch = native_steps.backward(mine, visit, upstream)[1]
    native_steps.step(mine, batch, 0.01)
    native_steps.step(small, replace(batch, target=here), 0.01)  # P's change does not depend on n
    assert error(p[rows], small.p) < 1e-6
    assert not torch.equal(small.p, p.new_zeros(3, d))


@pytest.mark.parametrize("dtype", (F64, F32), ids=str)
def test_multiply_in_place(dtype):
    p, k = torch.randn(700, 13, dtype=dtype), torch.randn(13, 13, dtype=F64)
    wanted = p.double() @ k
    wide = torch.empty(700, 20, dtype=dtype)
    wide[:, :13] = p
    factors.multiply(p, k.t().contiguous().t())
    factors.multiply(wide[:, :13], k)
    assert error(p, wanted) < TOLERANCE[dtype]
    assert torch.equal(p, wide[:, :13]) and wide[:, 13:].isnan().all()


def test_what_is_wrong_is_said_and_changes_nothing():
    loss = member("test", LOSSES["z"])
    f, before = twice(8, F32)
    h, target, share, upstream = examples(5, 8, 1, F32)
    for given in (
        (h.double(), target, share),
        (h[:, :7], target, share),
        (h, target.int(), share),
        (h[:4], target, share),
        (h, target, share.float()),
    ):
        with pytest.raises(ValueError, match=r"fusedloss\.spherical: (h|target|share): expected a contiguous"):
            native_steps.visit(f, *given, loss)
    for wrong in (-1, N):
        target[3] = wrong
        with pytest.raises(RuntimeError, match=f"visit: target {wrong} of example 3 is not one of {N} classes"):
            native_steps.visit(f, h, target, share, loss)
    target[3] = 0
    visit = native_steps.visit(f, h, target, share, loss)
    with pytest.raises(ValueError, match="upstream: expected a contiguous"):
        native_steps.backward(f, visit, upstream.float())
    batch = native_steps.backward(f, visit, upstream)[1]
    with pytest.raises(ValueError, match="gh: expected a contiguous"):
        native_steps.step(f, replace(batch, gh=batch.gh[:4]), 0.1)
    with pytest.raises(RuntimeError, match="step: target 60 of example 0"):
        native_steps.step(f, replace(batch, target=target + N), 0.1)
    with pytest.raises(ValueError, match="gram: expected a contiguous"):
        native_steps.step(replace(f, gram=f.gram.float()), batch, 0.1)
    with pytest.raises(ValueError, match="k: expected a contiguous"):
        native_products.multiply(f.p, torch.eye(7))
    assert all(torch.equal(getattr(f, name), value) for name, value in vars(before).items())
