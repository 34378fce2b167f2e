"""Momentum on a weight in factors equals torch.optim.SGD on the dense weight."""

import pytest
import torch

from fusedloss import nn
from fusedloss.spherical import momentum as momenta
from fusedloss.spherical import preconditioned, steps
from fusedloss.spherical.factors import Factors, rebalance
from fusedloss.spherical.family import member
from fusedloss.spherical.steps import Batch

F64, F32 = torch.float64, torch.float32
N, D, STEPS = 2000, 16, 200
LOSSES = {
    "z": (nn.SphericalZLoss(a=1.0, b=5.0), 5.0),
    "taylor": (nn.TaylorSoftmaxLoss(), 0.5),
    "softmax": (nn.SphericalSoftmaxLoss(eps=1.0), 0.2),
    "squared": (nn.SquaredErrorLoss(), 0.01),
}
BOUND = {F64: 1e-12, F32: 3e-6}


def relative(got, truth):
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()


def doubled(w):
    """The factors of [W, 0]: weight and velocity."""
    return Factors.of(torch.nn.functional.pad(w, (0, w.shape[1])))


def dense_loss(of, h, w, target, share):
    """(m,) losses through all scores."""
    o = h @ w.t()
    mean = o.mean(1)
    hit = o.gather(1, target) - mean.unsqueeze(1)
    squares = (o - mean.unsqueeze(1)).square().sum(1)
    return of.centred(hit, mean, squares, o.shape[1], share).loss


def examples(m, k, d=D, dtype=F64):
    h = torch.randn(m, d, dtype=F64) / d**0.5 + 0.3
    target = ((torch.rand(m, 1) ** 3 * N).long() + torch.arange(k)) % N
    share = torch.full((m, k), 1.0 / k, dtype=F64)
    return h.to(dtype), target, share


def weight():
    return torch.randn(N, D, dtype=F64) * 0.3 + 0.1


def gradients(of, h, w, target, share):
    """∂L/∂h and ∂L/∂W of the mean of the rows' losses, by autograd through all scores."""
    h, w = (t.detach().clone().requires_grad_() for t in (h, w))
    return torch.autograd.grad(dense_loss(of, h, w, target, share).mean(), (h, w))


class Dense:
    def __init__(self, w, of, **options):
        self.w = w.clone().requires_grad_()
        self.of, self.sgd = of, torch.optim.SGD([self.w], **options)

    def step(self, h, target, share, lr, most=torch.inf):
        dh, self.w.grad = gradients(self.of, h.to(self.w.dtype), self.w, target, share.to(self.w.dtype))
        self.norm = torch.nn.utils.clip_grad_norm_([self.w], most)
        self.sgd.param_groups[0]["lr"] = lr
        self.sgd.step()
        return dh

    @property
    def v(self):
        return self.sgd.state[self.w]["momentum_buffer"]


class Factored:
    def __init__(self, w, of, weight_decay=0.0, momentum=0.0, nesterov=False, limit=momenta.LIMIT):
        self.f, self.of = doubled(w), of
        self.rest, self.limit, self.passes = (weight_decay, momentum, nesterov), limit, 0

    def visit(self, h, target, share):
        h = torch.nn.functional.pad(h.to(self.f.p.dtype), (0, D))
        return h, steps.visit(self.f, h, target, share, self.of)

    def step(self, h, target, share, lr):
        h, v = self.visit(h, target, share)
        dh, batch = steps.backward(self.f, v, torch.full_like(v.losses, 1 / len(h)))
        momenta.step(self.f, batch, lr, *self.rest)
        if momenta.condition(self.f, lr, self.rest[1]) > self.limit:
            self.passes += 1
            momenta.rebalance(self.f, lr, self.rest[1])
        return dh[:, :D]

    @property
    def w(self):
        return self.f.rows(torch.arange(N))[:, :D]

    @property
    def v(self):
        return self.f.rows(torch.arange(N))[:, D:]


@pytest.mark.parametrize("m, k, nesterov", [(8, 1, False), (8, 3, True), (40, 1, True), (40, 3, False)])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_dense_sgd(name, m, k, nesterov):
    """With rebalances on the way, and a learning rate that starts at 0, rises and changes."""
    loss, lr = LOSSES[name]
    of, w = member("test", loss), weight()
    options = dict(weight_decay=1e-3 / lr, momentum=0.9, nesterov=nesterov)
    truth, got = Dense(w, of, lr=lr, **options), Factored(w, of, **options)
    for i in range(STEPS):
        batch, rate = examples(m, k), lr * (i / 20 if i < 20 else 1 if i < 100 else 0.5)
        dh = truth.step(*batch, rate)
        assert relative(got.step(*batch, rate), dh) < 1e-12
    assert relative(got.w, truth.w) < 1e-12 and relative(got.v, truth.v) < 1e-12
    assert relative(truth.w, w) > 0.2 and 2 <= got.passes <= 6


@pytest.mark.parametrize("m, nesterov", [(8, True), (40, False)])
@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_as_near_as_the_dense_one(name, m, nesterov):
    loss, lr = LOSSES[name]
    of, w = member("test", loss), weight().float()
    options = dict(weight_decay=1e-3 / lr, momentum=0.9, nesterov=nesterov)
    truth, dense, got = (
        Dense(w.double(), of, lr=lr, **options),
        Dense(w, of, lr=lr, **options),
        Factored(w, of, **options),
    )
    far, near = 0.0, 0.0
    for _ in range(STEPS):
        batch = examples(m, 1)
        dh = truth.step(*batch, lr)
        far, near = max(far, relative(dense.step(*batch, lr), dh)), max(near, relative(got.step(*batch, lr), dh))
    assert near < 3 * far and relative(got.w, truth.w) < 3 * relative(dense.w, truth.w)


def test_nesterov_where_a_plain_step_would_be_singular():
    """lr · (S + decay) with an eigenvalue of 1: W's own part of U has no inverse, and is moved into P."""
    for m in (8, 40):
        of, w = member("test", LOSSES["squared"][0]), weight()
        h, target, share = examples(m, 1)
        lr = 1 / (torch.linalg.eigvalsh(2 / m * h.t() @ h)[-1].item() + 0.01)
        options = dict(weight_decay=0.01, momentum=0.9, nesterov=True)
        truth, got = Dense(w, of, lr=lr, **options), Factored(w, of, **options)
        for _ in range(3):
            assert relative(got.step(h, target, share, lr), truth.step(h, target, share, lr)) < 1e-12
            assert got.f.u.isfinite().all() and relative(got.f.u @ got.f.inverse, torch.eye(2 * D)) < 1e-10
        assert relative(got.w, truth.w) < 1e-12


def test_clipping_scales_the_batch():
    loss, lr = LOSSES["taylor"]
    of, w = member("test", loss), weight()
    truth, got = Dense(w, of, lr=lr, momentum=0.9), Factored(w, of, momentum=0.9)
    for _ in range(5):
        batch = examples(8, 2)
        truth.step(*batch, lr, most=0.01)
        h, v = got.visit(*batch)
        _, b = steps.backward(got.f, v, torch.full_like(v.losses, 1 / len(h)))
        norm = steps.squared_norm(got.f, b).sqrt()
        assert abs(norm - truth.norm) < 1e-12 * norm and norm > 0.01
        momenta.step(got.f, b.scaled(0.01 / (norm + 1e-6)), lr, 0.0, 0.9)
    assert relative(got.w, truth.w) < 1e-13


@pytest.mark.parametrize("level", [momenta.rebalance, lambda f, lr, momentum: rebalance(f)], ids=["shear", "plain"])
def test_rebalancing_changes_neither_weight_nor_velocity(level):
    loss, lr = LOSSES["z"]
    got = Factored(weight(), member("test", loss), momentum=0.9, limit=torch.inf)
    for _ in range(30):
        got.step(*examples(8, 1), lr)
    w, v, before = got.w, got.v, momenta.condition(got.f, lr, 0.9)
    level(got.f, lr, 0.9)
    assert relative(got.w, w) < 1e-13 and relative(got.v, v) < 1e-13
    assert momenta.condition(got.f, lr, 0.9) < min(before, 1.5)


def test_rows_that_shrink_without_end_are_moved_in_time():
    """No gradient, no decay: the condition stays, while U's rows part by momentum^t."""
    got = Factored(weight(), member("test", LOSSES["z"][0]), momentum=0.5)
    got.step(*examples(8, 1), 1.0)
    momenta.rebalance(got.f, 1.0, 0.5)
    v, h = got.v, examples(8, 1)
    for _ in range(40):
        got.step(*h[:2], torch.zeros_like(h[2]), 1.0)
    assert relative(got.v, v * 0.5**40) < 1e-10 and got.f.p.isfinite().all()
    assert 3 <= got.passes <= 8


def test_no_rows_no_step_and_no_momentum_no_doubling():
    f = doubled(weight())
    before = [t.clone() for t in vars(f).values()]
    none = torch.zeros(0, 2 * D, dtype=F64)
    empty, zero = torch.zeros(0, dtype=F64), torch.zeros(0, 1)
    batch = Batch(zero.double(), empty, empty, none, zero.long(), none, none, none)
    momenta.step(f, batch, 0.1, 0.1, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(before, vars(f).values()))
    with pytest.raises(ValueError, match=r"momentum.step: momentum: expected a number in \(0, 1\), got 0"):
        momenta.step(f, batch, 0.1, 0.1, 0.0)


# --- right preconditioners --------------------------------------------------------------------------------------------


def orthogonal(g):
    left, sizes, right = torch.linalg.svd(g, full_matrices=False)
    seen = sizes > 1e-7 * sizes[0]
    return left[:, seen] @ right[seen]


@pytest.mark.parametrize("m, k, dtype", [(8, 3, F64), (40, 1, F64), (40, 1, F32)])
@pytest.mark.parametrize("kind, lr", [("muon", 0.02), ("shampoo", 0.05), ("matrix", 0.1)])
@pytest.mark.parametrize("name", LOSSES)
def test_right_preconditioner(name, kind, lr, m, k, dtype):
    loss, scale = LOSSES[name]
    of, w = member("test", loss), weight().to(dtype)
    f, w, start = Factors.of(w.clone()), w.double(), w.double()
    matrix = scale / 5 * torch.randn(D, D, dtype=F64)
    right = {"muon": preconditioned.Muon(), "shampoo": preconditioned.Shampoo(1e-3), "matrix": matrix}[kind]
    bound = BOUND[dtype] * (5 if kind == "muon" and dtype == F32 else 1)  # small singular values of G, from GᵀG
    summed = 1e-3 * torch.eye(D, dtype=F64)
    for _ in range(50):
        h, target, share = examples(m, k)
        dh, g = gradients(of, h, w, target, share)
        summed += g.t() @ g
        sizes, vectors = torch.linalg.eigh(summed)
        moved = {"muon": orthogonal, "matrix": lambda g: g @ matrix}.get(
            kind, lambda g: g @ (vectors / sizes.sqrt()) @ vectors.t()
        )
        w = (1 - lr * 0.01) * w - lr * moved(g)
        v = steps.visit(f, h.to(dtype), target, share, of)
        got, batch = steps.backward(f, v, torch.full_like(v.losses, 1 / m))
        assert relative(got, dh) < bound
        preconditioned.step(f, batch, lr, 0.01, right)
        if f.condition() > 8:
            rebalance(f)
    assert relative(f.rows(torch.arange(N)), w) < bound and relative(w, start) > 0.01


def test_a_singular_right_preconditioner_is_moved_into_the_classes():
    of, w = member("test", LOSSES["squared"][0]), weight()
    h, target, share = examples(40, 1)
    f, s = Factors.of(w.clone()), 2 / 40 * h.t() @ h
    _, g = gradients(of, h, w, target, share)
    v = steps.visit(f, h, target, share, of)
    preconditioned.step(
        f, steps.backward(f, v, torch.full_like(v.losses, 1 / 40))[1], 0.5, 0.0, 2 * torch.linalg.inv(s)
    )
    assert relative(f.rows(torch.arange(N)), w - g @ torch.linalg.inv(s)) < 1e-12
