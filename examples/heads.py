"""The output layers that are compared: each with its own optimizer, tuned by itself (docs/spherical.md says how)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss


class Head(nn.Module):
    """`loss(h, target)`, `step(rate)` after backward, `scores(h)` to rank classes by; `rows` in a batch."""

    name: str
    settings: str
    rows: int
    lr: float
    optimizer: torch.optim.Optimizer

    def loss(self, h: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def scores(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, rate: float) -> None:
        """`rate`: the schedule's share of the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.lr
        self.optimizer.step()
        self.optimizer.zero_grad()


class Spherical(Head):
    """Z-loss on a layer in factors: plain SGD, whose step does not look at the classes."""

    name = "Z-loss, factored"

    def __init__(self, width: int, classes: int, rows=256, lr=100.0, a=0.1, b=100.0) -> None:
        super().__init__()
        self.rows, self.lr, self.settings = rows, lr, f"SGD {lr:g}, a {a:g}, b {b:g}, batch {rows}"
        self.layer = fusedloss.spherical.FactoredLinear(width, classes, fusedloss.nn.SphericalZLoss(a=a, b=b))

    def loss(self, h: Tensor, target: Tensor) -> Tensor:
        return self.layer(h, target)

    def scores(self, h: Tensor) -> Tensor:
        return self.layer.logits(h)

    def step(self, rate: float) -> None:
        self.layer.step(rate * self.lr)


class Softmax(Head):
    """The ordinary one: all scores, then cross-entropy."""

    name = "softmax, torch"

    def __init__(self, width: int, classes: int, rows=64, lr=1e-2) -> None:
        super().__init__()
        self.rows, self.lr, self.settings = rows, lr, f"Adam {lr:g}, batch {rows}"
        self.weight = nn.Parameter(torch.randn(classes, width) * 0.01)
        self.optimizer = torch.optim.Adam([self.weight], fused=True)

    def loss(self, h: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, self.weight), target)

    def scores(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight)


class FusedSoftmax(Softmax):
    """The same loss, and no score matrix."""

    name = "softmax, fusedloss"

    def loss(self, h: Tensor, target: Tensor) -> Tensor:
        return fusedloss.linear_cross_entropy(h, self.weight, target)


class Adaptive(Head):
    """Grave et al. 2017: frequent words in a first softmax, the others in clusters of ever narrower features."""

    name = "adaptive softmax"

    def __init__(self, width: int, classes: int, rows=256, lr=1e-2, first=4000, narrower=4.0) -> None:
        super().__init__()
        self.rows, self.lr, self.settings = rows, lr, f"Adam {lr:g}, batch {rows}"
        first = min(first, classes // 5)
        cutoffs = [cut for cut in (first, 5 * first, 25 * first) if cut < classes]
        self.layer = nn.AdaptiveLogSoftmaxWithLoss(width, classes, cutoffs, div_value=narrower)
        self.optimizer = torch.optim.Adam(self.layer.parameters(), fused=True)

    def loss(self, h: Tensor, target: Tensor) -> Tensor:
        return self.layer(h, target).loss

    def scores(self, h: Tensor) -> Tensor:
        return self.layer.log_prob(h)


HEADS = {"spherical": Spherical, "fused": FusedSoftmax, "softmax": Softmax, "adaptive": Adaptive}

# (a, b) of the Z-loss for --sweep: sharp ones with b from nothing to far, then soft ones.
SWEEP = [
    {"a": a, "b": b} for a, b in ((1, 0), (1, 5), (1, 13), (1, 100), (0.1, 40), (0.1, 100), (0.1, 300), (0.03, 100))
]
