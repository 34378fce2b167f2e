"""Momentum on a weight in factors equals torch.optim.SGD on the dense weight."""

import pytest
import torch

from fusedloss import nn
from fusedloss.losses.centred import gather_centred
from fusedloss.spherical import momentum as momenta
from fusedloss.spherical import steps
from fusedloss.spherical.factors import Factors, rebalance
from fusedloss.spherical.family import member
from fusedloss.spherical.steps import Batch

F64, F32 = torch.float64, torch.float32
N, D, STEPS = 2000, 16, 200
LOSSES = {
    "z": (nn.SphericalZLoss(a=1.0, b=5.0), 20.0),
    "taylor": (nn.TaylorSoftmaxLoss(), 0.5),
    "softmax": (nn.SphericalSoftmaxLoss(eps=0.1), 0.2),
    "squared": (nn.SquaredErrorLoss(), 0.01),
}


def relative(got, truth):
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()


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


class Dense:
    def __init__(self, w, of, **options):
        self.w = w.clone().requires_grad_()
        self.of, self.sgd = of, torch.optim.SGD([self.w], **options)

    def step(self, h, target, share, lr):
        h = h.to(self.w.dtype).requires_grad_()
        self.sgd.zero_grad()
        dense_loss(self.of, h, self.w, target, share.to(self.w.dtype)).mean().backward()
        self.sgd.param_groups[0]["lr"] = lr
        self.sgd.step()
        return h.grad


class Factored:
    def __init__(self, w, of, weight_decay=0.0, momentum=0.0, nesterov=False, limit=8.0, lr=0):
        self.f, self.of = momenta.double(Factors.of(w.clone())), of
        self.rest, self.limit, self.passes = (weight_decay, momentum, nesterov), limit, 0

    def step(self, h, target, share, lr):
        h = torch.nn.functional.pad(h.to(self.f.p.dtype), (0, h.shape[1]))
        v = steps.visit(self.f, h, target, share, self.of)
        dh, batch = steps.backward(self.f, v, torch.full_like(v.losses, 1 / len(h)))
        momenta.step(self.f, batch, lr, *self.rest)
        if momenta.condition(self.f) > self.limit:
            self.passes += 1
            momenta.rebalance(self.f, lr, self.rest[1])
        return dh[:, : h.shape[1] // 2]

    @property
    def w(self):
        return self.f.rows(torch.arange(len(self.f.p)))[:, : self.f.p.shape[1] // 2]


@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy", "nesterov"])
@pytest.mark.parametrize("m, k", [(8, 1), (8, 3), (40, 1), (40, 3)])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_dense_sgd(name, m, k, nesterov):
    loss, lr = LOSSES[name]
    options = dict(weight_decay=1e-3 / lr, momentum=0.9, nesterov=nesterov)
    w = torch.randn(N, D, dtype=F64) * 0.3 + 0.1
    of = member("test", loss)
    truth, got = Dense(w, of, lr=lr, **options), Factored(w, of, **options)
    worst = 0
    for i in range(STEPS):
        batch = examples(m, k)
        rate = lr * (1 if i < 100 else 0.5)
        worst = max(worst, relative(got.step(*batch, rate), truth.step(*batch, rate)))
    assert worst < 1e-12 and relative(got.w, truth.w) < 1e-12
