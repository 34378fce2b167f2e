"""What is measured of the factored layer: batches, training steps of output layers of many classes, and the check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from math import ceil, log, sqrt

import torch
import torch.nn.functional as F
from harness import OURS, Call, tolerance
from torch import Tensor

import fusedloss as fl
from fusedloss.spherical import FactoredLinear

Shape = tuple[int, int, int]  # n, d, m
WORDS = 793_471  # of the One Billion Word benchmark
HEADS: tuple[Shape, ...] = ((WORDS, 128, 128), (WORDS, 512, 200))
SWEEP = (50_000, 100_000, 200_000, 400_000, WORDS)
GATE_CLASSES = 2000
GATE_STEPS = 3
BATCHES = 16  # that a contender goes through in turn
LR = 0.1
CUTOFFS = (2000, 10_000, 100_000)
SAMPLES = 8192
LOSS = fl.nn.SphericalZLoss(b=5.0)

Batches = Iterator[tuple[Tensor, Tensor]]


def batches(shape: Shape) -> list[tuple[Tensor, Tensor]]:
    """Random features, which want a gradient, and targets of Zipf frequencies, the frequent classes first."""
    n, d, m = shape
    source = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, n + 1)
    targets = torch.multinomial(frequency, BATCHES * m, replacement=True, generator=source).split(m)
    return [(torch.randn(m, d, generator=source).requires_grad_(), target) for target in targets]


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).mul_(shape[-1] ** -0.5).requires_grad_()


# --- the ways: each call is forward, backward and step, and returns the loss and the gradient of the features ---------


def factored(shape: Shape, feed: Batches, **options: object) -> tuple[Call, FactoredLinear]:
    head = FactoredLinear(shape[1], shape[0], LOSS, **options)

    def call():
        h, target = next(feed)
        h.grad = None
        loss = head(h, target)
        loss.backward()
        head.step(LR)
        return loss.detach(), h.grad

    return call, head


def trained(loss: Callable[..., Tensor], parameters: list[Tensor], feed: Batches) -> Call:
    """Of loss(h, target), by SGD in place on all of the parameters."""

    def call():
        h, target = next(feed)
        value = loss(h, target)
        dh, *slopes = torch.autograd.grad(value, (h, *parameters), allow_unused=True)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes):
                if slope is not None:  # a cluster without a target
                    parameter.sub_(slope, alpha=LR)
        return value.detach(), dh

    return call


def dense(w: Tensor, feed: Batches) -> Call:
    return trained(lambda h, target: F.cross_entropy(F.linear(h, w), target), [w], feed)


def fused(w: Tensor, feed: Batches) -> Call:
    return trained(lambda h, target: fl.linear_cross_entropy(h, w, target), [w], feed)


def adaptive(shape: Shape, feed: Batches) -> Call:
    module = torch.nn.AdaptiveLogSoftmaxWithLoss(shape[1], shape[0], [c for c in CUTOFFS if c < shape[0]])
    return trained(lambda h, target: module(h, target).loss, list(module.parameters()), feed)


def sampled(w: Tensor, feed: Batches) -> Call:
    """Softmax over the target and SAMPLES log-uniform classes that the batch shares; only their rows are changed."""
    n = w.shape[0]
    w = w.detach()

    def expected(index: Tensor) -> Tensor:
        return (((index + 2) / (index + 1)).log() * (SAMPLES / log(n + 1))).log()

    def call():
        h, target = next(feed)
        drawn = ((torch.rand(SAMPLES) * log(n + 1)).exp() - 1).long().clamp(max=n - 1)
        near, far = (w[index].requires_grad_() for index in (target, drawn))
        others = h @ far.t() - expected(drawn)
        others = others.masked_fill(target[:, None] == drawn, -torch.inf)
        scores = torch.cat([((h * near).sum(1) - expected(target))[:, None], others], 1)
        value = F.cross_entropy(scores, torch.zeros_like(target))
        dh, *slopes = torch.autograd.grad(value, (h, near, far))
        for index, slope in zip((target, drawn), slopes):
            w.index_add_(0, index, slope, alpha=-LR)
        return value.detach(), dh

    return call


def hierarchical(shape: Shape, feed: Batches) -> Call:
    """Two levels of ⌈√n⌉: softmax over groups of neighbours, then within the target's."""
    n, d, _ = shape
    size = ceil(sqrt(n))
    top, below = weight(ceil(n / size), d), weight(ceil(n / size), size, d).detach()

    def call():
        h, target = next(feed)
        group, within = target // size, target % size
        picked = below[group].requires_grad_()
        value = F.cross_entropy(h @ top.t(), group)
        value = value + F.cross_entropy(torch.bmm(picked, h.unsqueeze(2)).squeeze(2), within)
        dh, slope, picked_slope = torch.autograd.grad(value, (h, top, picked))
        with torch.no_grad():
            top.sub_(slope, alpha=LR)
            below.index_add_(0, group, picked_slope, alpha=-LR)
        return value.detach(), dh

    return call


def contenders(shape: Shape) -> dict[str, Call]:
    """All of them, the dense softmax first; those of one dense weight share it."""
    made, w = batches(shape), weight(*shape[:2])
    return {
        "torch, dense": dense(w, cycle(made)),
        OURS: factored(shape, cycle(made))[0],
        f"{OURS}.linear_cross_entropy": fused(w, cycle(made)),
        "torch, adaptive softmax": adaptive(shape, cycle(made)),
        f"torch, sampled softmax, {SAMPLES}": sampled(w, cycle(made)),
        "torch, hierarchical softmax": hierarchical(shape, cycle(made)),
    }


# --- the gate --------------------------------------------------------------------------------------------------------


def check(shape: Shape) -> None:
    """Loss, gradient of the features and weight of some steps with few classes are those of dense autograd and SGD with
    the same loss, by the tests' tolerance policy: twice the error of doing so in fp32."""
    shape = (GATE_CLASSES, *shape[1:])
    made, start = batches(shape), weight(*shape[:2]).detach()
    call, head = factored(shape, cycle(made))
    head.load_dense(start)
    exact, honest = (start.to(dtype, copy=True).requires_grad_() for dtype in (torch.float64, torch.float32))
    for number, (h, target) in enumerate(made[:GATE_STEPS]):
        truth, fair = (
            trained(lambda h, target: LOSS(h @ w.t(), target), [w], iter([(h.to(w.dtype), target)]))()
            for w in (exact, honest)
        )
        for what, got, true, near in zip(("loss", "dH"), call(), truth, fair):
            tolerance.check(got, true, near, f"{what} of step {number}")
    tolerance.check(head.materialize().weight, exact, honest, "W")
