"""Scores at given columns, and plain sums over the scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import softplus
from ..relation import Where
from .base import CLASSES, IDS, ROWS, Statistic, summed


@dataclass(frozen=True, eq=False)
class Score(Statistic):
    """The score itself at given columns. Give one of

    ``at``: (N,) or (N, k) int64, columns of each row; the value has the same shape.
    ``columns``: (k,) int64, the same columns for all rows; the value is (N, k).
    """

    at: Tensor | None = None
    columns: Tensor | None = None
    stateless = True
    roles = (("at", ROWS), ("columns", IDS))

    def columns_of(self, rows: int) -> Tensor:
        """(rows, k) columns of each row, negative for none."""
        return self._wanted().expand(rows, -1)

    def _wanted(self) -> Tensor:
        if self.columns is not None:
            return self.columns.unsqueeze(0)
        return self.at if self.at.dim() == 2 else self.at.unsqueeze(-1)

    @property
    def width(self) -> int:
        return self._wanted().shape[1]

    outputs = width

    def _inside(self, z: Tensor, first: int) -> tuple[Tensor, Tensor]:
        index = self._wanted().expand(z.shape[0], -1) - first
        inside = (index >= 0) & (index < z.shape[1])
        return torch.where(inside, index, 0), inside

    def of(self, z, first):
        if z.shape[1] == 0:
            return self.identity(z.shape[0], z.device)
        index, inside = self._inside(z, first)
        return torch.where(inside, z.gather(1, index), 0.0).double()

    def slope(self, z, first, state, coefficient):
        index, inside = self._inside(z, first)
        return torch.zeros_like(z).scatter_add(1, index, (coefficient * inside).to(z.dtype))

    def present(self, value, columns):
        return value[:, 0] if self.at is not None and self.at.dim() == 1 else value


@dataclass(frozen=True, eq=False)
class Sum(Statistic):
    """Σ_j w_j s_j. ``weights``: None (ones), a class vector (V,), or a matrix (N, V), such as target probabilities."""

    weights: Tensor | None = None
    where: Where | None = None
    stateless = True
    roles = (("weights", CLASSES), ("where", ROWS))

    def of(self, z, first):
        z = self.visible(z, first)
        weighted = z if self.weights is None else z * self.weights.to(z.dtype)
        return summed(torch.where(z == -torch.inf, 0.0, weighted)).unsqueeze(1)

    def slope(self, z, first, state, coefficient):
        z = self.visible(z, first)
        weights = torch.ones_like(z) if self.weights is None else self.weights.to(z.dtype)
        return torch.where(z == -torch.inf, 0.0, coefficient * weights)


@dataclass(frozen=True, eq=False)
class Count(Statistic):
    """Number of classes whose score is not -inf and whose weight is not 0: it tells what masks took away. No gradient.

    ``weights`` as in `Sum`; None counts them all.
    """

    weights: Tensor | None = None
    where: Where | None = None
    stateless = True
    roles = (("weights", CLASSES), ("where", ROWS))

    def of(self, z, first):
        seen = (self.visible(z, first) != -torch.inf).to(z.dtype)
        return summed(seen if self.weights is None else seen * (self.weights != 0)).unsqueeze(1)

    def slope(self, z, first, state, coefficient):
        return torch.zeros_like(z)


@dataclass(frozen=True, eq=False)
class SumOfSquares(Statistic):
    """Σ_j s_j²."""

    where: Where | None = None
    stateless = True
    roles = (("where", ROWS),)

    def of(self, z, first):
        z = self.visible(z, first)
        return summed(torch.where(z == -torch.inf, 0.0, z).square()).unsqueeze(1)

    def slope(self, z, first, state, coefficient):
        z = self.visible(z, first)
        return 2 * coefficient * torch.where(z == -torch.inf, 0.0, z)


@dataclass(frozen=True, eq=False)
class Moments(Statistic):
    """(count, mean, M2 = Σ_j (s_j − mean)²), merged by Chan's rule: no cancellation when |mean| ≫ deviation."""

    where: Where | None = None
    width = 3
    outputs = 3
    roles = (("where", ROWS),)

    def of(self, z, first):
        z = self.visible(z, first)
        seen = z != -torch.inf
        count = summed(seen.to(z.dtype))
        mean = summed(torch.where(seen, z, 0.0)) / count.clamp(min=1)
        away = torch.where(seen, z - mean.unsqueeze(-1).to(z.dtype), 0.0)
        return torch.stack([count, mean, summed(away.square())], 1)

    def merge(self, a, b):
        count = a[:, 0] + b[:, 0]
        share = b[:, 0] / count.clamp(min=1)
        apart = b[:, 1] - a[:, 1]
        return torch.stack([count, a[:, 1] + apart * share, a[:, 2] + b[:, 2] + apart.square() * a[:, 0] * share], 1)

    def slope(self, z, first, state, coefficient):
        z = self.visible(z, first)
        state = state.to(z.dtype)
        per_mean = coefficient[:, 1:2] / state[:, :1].clamp(min=1)
        return torch.where(z == -torch.inf, 0.0, per_mean + 2 * coefficient[:, 2:3] * (z - state[:, 1:2]))

    def present(self, value, columns):
        return value.unbind(1)


def _sigmoid_power(u: Tensor, gamma: float) -> Tensor:
    """sigmoid(u)^γ without a 0/0 for u → −∞."""
    return torch.exp(-gamma * softplus(-u))


# f and f' of SumOf, by name; the last argument is the statistic's parameter.
FUNCTIONS = {
    "softplus": (lambda u, _: softplus(u), lambda u, _: torch.sigmoid(u)),
    "sigmoid": (lambda u, _: torch.sigmoid(u), lambda u, _: torch.sigmoid(u) * torch.sigmoid(-u)),
    "hinge": (lambda u, _: torch.relu(u), lambda u, _: (u > 0).to(u.dtype)),
    "squared_hinge": (lambda u, _: torch.relu(u).square(), lambda u, _: 2 * torch.relu(u)),
    "focal": (
        lambda u, g: _sigmoid_power(u, g) * softplus(u),
        lambda u, g: _sigmoid_power(u, g) * (g * torch.sigmoid(-u) * softplus(u) + torch.sigmoid(u)),
    ),
}


@dataclass(frozen=True, eq=False)
class SumOf(Statistic):
    """Σ_j f(u_j) with u_j = factor · (s_j − row).

    ``function``: softplus, sigmoid, hinge (max(0,u)), squared_hinge, focal (sigmoid(u)^parameter · softplus(u)).
    ``row``: (N,) parameter such as a threshold; its own gradient −factor · Σ f′(u_j) is returned by `reduce`.
    """

    function: str = "softplus"
    factor: float = 1.0
    parameter: float = 0.0
    row: Tensor | None = None
    where: Where | None = None
    width = 2
    stateless = True
    roles = (("row", ROWS), ("where", ROWS))

    def _u(self, z: Tensor) -> tuple[Tensor, Tensor]:
        seen = z != -torch.inf
        row = 0.0 if self.row is None else self.row.to(z.dtype).unsqueeze(-1)
        return self.factor * (torch.where(seen, z, 0.0) - row), seen

    def of(self, z, first):
        u, seen = self._u(self.visible(z, first))
        f, slope = FUNCTIONS[self.function]
        return torch.stack([summed(torch.where(seen, g(u, self.parameter), 0.0)) for g in (f, slope)], 1)

    def row_slope(self, states):
        return -self.factor * states[:, 1:2]

    def slope(self, z, first, state, coefficient):
        u, seen = self._u(self.visible(z, first))
        return torch.where(seen, coefficient * self.factor * FUNCTIONS[self.function][1](u, self.parameter), 0.0)
