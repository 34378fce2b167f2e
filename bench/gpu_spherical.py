"""What `make gpu` measures of the factored layer: a whole step of SGD, beside that of a dense layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from harness import OURS, Call
from torch import Tensor

import fusedloss as fl
from fusedloss import backends
from fusedloss.losses import spherical_z_loss
from fusedloss.spherical import engines, steps
from fusedloss.spherical.factors import Factors
from fusedloss.spherical.family import member

SHAPES = ((793471, 128, 128), (793471, 512, 200))  # classes, features, examples; the second: One Billion Word's layer
QUICK = ((300, 16, 8),)
LR = 0.1
ROWS = 1 << 16  # of a weight at a time, where the gate looks at all of it
OTHERS = 64  # classes that are no targets, whose rows the gate looks at
ALLOWED = 1e-5


@dataclass
class Factored:
    """Losses, gradient of the features, and the step of the factored layer under the Z-loss."""

    f: Factors
    h: Tensor
    target: Tensor
    engine: ModuleType
    graph: object = None
    result: tuple[Tensor, ...] = ()

    def __post_init__(self):
        self.share = torch.ones(len(self.h), 1, dtype=torch.float64, device=self.h.device)
        self.loss = member("bench", fl.nn.SphericalZLoss())

    def __call__(self):
        visited = self.engine.visit(self.f, self.h, self.target[:, None], self.share, self.loss)
        dh, batch = self.engine.backward(self.f, visited, self.share[:, 0] / len(self.h))
        self.engine.step(self.f, batch, LR)
        return visited.losses.mean(), dh

    def rows(self, index: Tensor) -> Tensor:
        return self.f.rows(index)

    def reference(self, scores: Tensor) -> Tensor:
        return spherical_z_loss.reference(scores, self.target).mean()


class Graphed(Factored):
    """The same, recorded at the first call and replayed."""

    def __call__(self):
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                super().__call__()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.result = super().__call__()
            self.graph = graph
        self.graph.replay()
        return tuple(t.clone() for t in self.result)


@dataclass
class Dense:
    """The same of a dense layer under cross-entropy: fp32, the step in place."""

    w: Tensor
    h: Tensor
    target: Tensor
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self):
        h, w = self.h.detach().requires_grad_(), self.w.requires_grad_()
        value = self.loss(h, w, self.target)
        dh, dw = torch.autograd.grad(value, (h, w))
        with torch.no_grad():
            w.sub_(dw, alpha=LR)
        return value.detach(), dh

    def rows(self, index: Tensor) -> Tensor:
        return self.w.detach()[index]

    def reference(self, scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, self.target)


def products(f: Factors, h: Tensor) -> Call:
    """The floor: the products of a factored step, in whichever of its two forms that is."""
    m, d = h.shape
    square, small, out = h.new_ones(d, d), h.new_ones(m, m), h.new_ones(m, d)

    def call():
        for _ in range(4):  # H Q, H Uᵀ, of the gathered rows with U, H U⁻¹
            torch.mm(h, square, out=out)
        if m < d:
            for _ in range(2):  # H Hᵀ, half of M
                torch.mm(h, h.t(), out=small)
            torch.mm(small, h, out=out)
        for _ in range(4):  # the changes of U, U⁻¹ and Q, Jᵀ J
            torch.mm(h.t(), h, out=square)
        return ()

    return call


def dense(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.t(), target)


def contenders(shape: tuple[int, int, int], device: torch.device) -> dict[str, Call]:
    n, d, m = shape
    random = torch.Generator(device).manual_seed(0)
    w = torch.randn(n, d, generator=random, device=device) * d**-0.5
    h = torch.randn(m, d, generator=random, device=device)
    target = torch.randint(0, n, (m,), generator=random, device=device)
    ours = Factored(Factors.of(w.clone()), h, target, engines.engine(Factors.of(w[:1].clone())))
    calls: dict[str, Call] = {"floor: products": products(ours.f, h), OURS: ours}
    triton = backends.triton
    if triton.supports(device, h.dtype) and triton.why_not() is None:
        from fusedloss.spherical import device_steps

        if ours.engine is not device_steps:
            calls[f"{OURS}, triton"] = Factored(Factors.of(w.clone()), h, target, device_steps)
        if device.type == "cuda":
            calls[f"{OURS}, triton, CUDA graph"] = Graphed(Factors.of(w.clone()), h, target, device_steps)
    calls[f"{OURS}, plain torch"] = Factored(Factors.of(w.clone()), h, target, steps)
    calls[f"{OURS}, dense linear_cross_entropy"] = Dense(w.clone(), h, target, fl.linear_cross_entropy)
    return calls | {"torch, dense": Dense(w, h, target, dense)}


def check(call: Factored | Dense) -> None:
    """Loss, gradient of the features, and some rows of the weight after the step, against fp64 on all scores."""
    everything, h = torch.arange(len(call.f.p) if isinstance(call, Factored) else len(call.w)), call.h.double()
    blocks = [index.to(h.device) for index in everything.split(ROWS)]
    scores = torch.cat([h @ call.rows(index).double().t() for index in blocks], 1).requires_grad_()
    truth = call.reference(scores)
    (g,) = torch.autograd.grad(truth, scores)
    expected = sum(g[:, index] @ call.rows(index).double() for index in blocks)
    some = torch.cat([call.target, torch.arange(0, len(everything), -(-len(everything) // OTHERS), device=h.device)])
    weight = call.rows(some).double() - LR * (g[:, some].t() @ h)
    moved = (g[:, some].t() @ h).norm() * LR
    loss, dh = call()
    named = {"loss": (loss, truth), "dH": (dh, expected), "W": (call.rows(some), weight)}
    for name, (got, exact) in named.items():
        error = ((got.double() - exact).norm() / exact.norm()).item()
        assert error <= ALLOWED, f"{name}: relative error {error:.3g}"
    assert moved > 3 * ALLOWED * weight.norm(), "the step is too short to be seen"


def cases(
    device: torch.device, quick: bool, only: list[int] | None
) -> Iterator[tuple[str, dict[str, Call], Callable[[Call], None]]]:
    """(case, contenders, check) one after the other."""
    for n, d, m in QUICK if quick else SHAPES if only is None else [SHAPES[i] for i in only]:
        yield f"factored {m}x{d}x{n}", contenders((n, d, m), device), check
