"""Log-sum-exp, of scores and of functions of them, and expectations under the softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..relation import Where
from .base import CLASSES, ROWS, Statistic, summed


def _finite_shift(m: Tensor) -> Tensor:
    """The maximum as a shift: an infinite one is replaced by 0, as in torch.logsumexp."""
    return torch.where(m.isinf(), torch.zeros_like(m), m)


def nothing_yet(rows: int, width: int, device: torch.device) -> Tensor:
    """(−inf, 0, …) per row, filled on the device: a copy from here would have to wait for it."""
    state = torch.zeros(rows, width, dtype=torch.float64, device=device)
    state[:, 0] = -torch.inf
    return state


def _merged_maximum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Common shift of two (shift, sum…) states and the factor that brings each of them to it."""
    m = torch.maximum(a[:, 0], b[:, 0])
    factors = [torch.where(s[:, 0] == -torch.inf, torch.zeros_like(m), torch.exp(s[:, 0] - m)) for s in (a, b)]
    return m, factors[0], factors[1]


def _probability(z: Tensor, factor: float, state: Tensor) -> Tensor:
    """softmax(factor · z) from the (shift, sum…) state; the shift goes first, for it is exact: lse would be rounded."""
    apart = factor * z - state[:, :1].to(z.dtype)
    return torch.where(z == -torch.inf, 0.0, torch.exp(apart - torch.log(state[:, 1:2]).to(z.dtype)))


@dataclass(frozen=True, eq=False)
class LogSumExp(Statistic):
    """log Σ_j exp(factor · s_j). State (m, Σ exp(factor · s_j − m))."""

    factor: float = 1.0
    where: Where | None = None
    width = 2
    roles = (("where", ROWS),)

    def identity(self, rows, device):
        return nothing_yet(rows, self.width, device)

    def of(self, z, first):
        if z.shape[1] == 0:
            return self.identity(z.shape[0], z.device)
        z = self.visible(z, first)
        z = torch.where(z == -torch.inf, z, self.factor * z)
        m = z.detach().amax(-1)
        total = summed(torch.exp(z - _finite_shift(m).unsqueeze(-1)))
        return torch.stack([torch.where(m == -torch.inf, m, _finite_shift(m)).double(), total], 1)

    def merge(self, a, b):
        m, fa, fb = _merged_maximum(a, b)
        return torch.stack([m, a[:, 1] * fa + b[:, 1] * fb], 1)

    def value(self, state):
        total = state[:, 1:]  # 0 only where m is -inf already; log 0 would make the derivative NaN
        return state[:, :1] + torch.log(torch.where(total == 0, 1.0, total))

    def slope(self, z, first, state, coefficient):
        z = self.visible(z, first)
        return coefficient * self.factor * _probability(z, self.factor, state)


@dataclass(frozen=True, eq=False)
class Expectation(Statistic):
    """Σ_j p_j v_j under p = softmax(factor · s).

    ``values``: a class vector (V,), or None for v = s itself (entropy = lse − factor · E[s]).
    ``near``: (N,), then v_j = |values_j − near|^power with power 1 or 2 (constants: no gradient flows into `near`).
    """

    values: Tensor | None = None
    near: Tensor | None = None
    power: int = 1
    factor: float = 1.0
    where: Where | None = None
    width = 3
    roles = (("values", CLASSES), ("near", ROWS), ("where", ROWS))

    def identity(self, rows, device):
        return nothing_yet(rows, self.width, device)

    def _values(self, z: Tensor) -> Tensor:
        if self.values is None:
            return torch.where(z == -torch.inf, 0.0, z)
        values = self.values.to(z.dtype).expand_as(z)
        if self.near is None:
            return values
        distance = (values - self.near.to(z.dtype).unsqueeze(-1)).abs()
        return distance if self.power == 1 else distance.square()

    def of(self, z, first):
        if z.shape[1] == 0:
            return self.identity(z.shape[0], z.device)
        z = self.visible(z, first)
        scaled = torch.where(z == -torch.inf, z, self.factor * z)
        m = scaled.detach().amax(-1)
        weight = torch.exp(scaled - _finite_shift(m).unsqueeze(-1))
        return torch.stack([m.double(), summed(weight), summed(weight * self._values(z))], 1)

    def merge(self, a, b):
        m, fa, fb = _merged_maximum(a, b)
        return torch.stack([m, a[:, 1] * fa + b[:, 1] * fb, a[:, 2] * fa + b[:, 2] * fb], 1)

    def value(self, state):
        norm = state[:, 1:2]  # the mean of nothing is NaN, and must not make the derivative NaN
        return torch.where(norm == 0, torch.nan, state[:, 2:] / torch.where(norm == 0, 1.0, norm))

    def slope(self, z, first, state, coefficient):
        z = self.visible(z, first)
        p = _probability(z, self.factor, state)
        away = self.factor * (self._values(z) - self.value(state).to(z.dtype))
        slope = coefficient * p * (1 + away if self.values is None else away)
        return torch.where(p == 0, 0.0, slope)  # also where nothing counts, and the mean is NaN


# g and g' of LogSumExpOf, by name; the last argument is the statistic's parameter m. `circle` is Circle loss's
# [u + m]₊ (u − m), whose weight [u + m]₊ is a constant for the derivative, as the paper has it.
LOG_FUNCTIONS = {
    "log_tanh": (lambda u, _: torch.log1p(torch.tanh(u)), lambda u, _: 1 - torch.tanh(u)),
    "log_atan": (lambda u, _: torch.log1p(torch.atan(u)), lambda u, _: 1 / ((1 + torch.atan(u)) * (1 + u * u))),
    "log_relu": (lambda u, _: torch.log(torch.relu(u + 1)), lambda u, _: 1 / (1 + u)),
    "circle": (lambda u, m: torch.relu(u + m).detach() * (u - m), lambda u, m: torch.relu(u + m)),
}


@dataclass(frozen=True, eq=False)
class LogSumExpOf(Statistic):
    """log Σ_j exp(weight · g(u_j)) with u_j = factor · (s_j − row). State (m, Σ e, Σ e · g′), e = exp(weight · g − m).

    ``function``: log_tanh (g = log(1 + tanh u)), log_atan (log(1 + atan u), u > −1.557), log_relu (log [1 + u]₊), or
    circle ([u + parameter]₊ (u − parameter), its bracket constant for the derivative). A column whose g is −∞ is skipped.
    ``row``: (N,) parameter such as the positive's score; its own gradient is returned by `reduce`.
    """

    function: str = "log_tanh"
    factor: float = 1.0
    weight: float = 1.0
    parameter: float = 0.0
    row: Tensor | None = None
    where: Where | None = None
    width = 3
    roles = (("row", ROWS), ("where", ROWS))

    def identity(self, rows, device):
        return nothing_yet(rows, self.width, device)

    def _exponents(self, z: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """(weight · g, g′); −inf and 0 where the column does not count."""
        z = self.visible(z, first)
        seen = z != -torch.inf
        row = 0.0 if self.row is None else self.row.to(z.dtype).unsqueeze(-1)
        u = self.factor * (torch.where(seen, z, 0.0) - row)
        if self.function == "log_relu":
            seen = seen & ~(u <= -1)
        if self.function == "log_atan":
            seen = seen & ~(u <= -1.5574077246549023)  # atan u = −1
        u = torch.where(seen, u, 0.0)
        g, slope = LOG_FUNCTIONS[self.function]
        return torch.where(seen, self.weight * g(u, self.parameter), -torch.inf), torch.where(
            seen, slope(u, self.parameter), 0.0
        )

    def of(self, z, first):
        if z.shape[1] == 0:
            return self.identity(z.shape[0], z.device)
        exponent, slope = self._exponents(z, first)
        m = exponent.detach().amax(-1)
        e = torch.exp(exponent - _finite_shift(m).unsqueeze(-1))
        return torch.stack([torch.where(m == -torch.inf, m, _finite_shift(m)).double(), summed(e), summed(e * slope)], 1)

    def merge(self, a, b):
        m, fa, fb = _merged_maximum(a, b)
        return torch.stack([m, a[:, 1] * fa + b[:, 1] * fb, a[:, 2] * fa + b[:, 2] * fb], 1)

    def value(self, state):
        total = state[:, 1:2]
        return state[:, :1] + torch.log(torch.where(total == 0, 1.0, total))

    def row_slope(self, states):
        return -self.factor * self.weight * states[:, 2:3] / torch.where(states[:, 1:2] == 0, 1.0, states[:, 1:2])

    def slope(self, z, first, state, coefficient):
        exponent, slope = self._exponents(z, first)
        return coefficient * self.factor * self.weight * slope * _probability(exponent, 1.0, state)
