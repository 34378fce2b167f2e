"""Statistics: mergeable row summaries of scores.

A statistic is a triple (φ, merge, ψ). ``of`` maps a tile of scores to a small state per row (φ, summed over the tile's
columns), ``merge`` joins the states of two sets of columns (associative, commutative), ``value`` reads the state off,
and ``slope`` is ψ: the derivative of the value in each score, times a coefficient per row. The methods here are plain
PyTorch: they are the meaning that every other backend is tested against. Scores of -inf are skipped by all of them.

States are float64 whatever the scores are: they are a few numbers per row, and sums over 10^5 classes need the digits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from .numerics import softplus
from .relation import Rest, hide

# How a statistic's tensor is cut when a walk looks at some rows and some columns only.
ROWS, CLASSES, MATRIX, IDS = "rows", "classes", "matrix", "ids"


@dataclass(frozen=True, eq=False)
class Statistic:
    """Common part: which columns (`where`), and how the walks slice the tensors that a statistic carries."""

    width: ClassVar[int] = 1  # numbers of state per row
    outputs: ClassVar[int] = 1  # numbers of value per row
    roles: ClassVar[tuple[tuple[str, str], ...]] = ()

    def of(self, z: Tensor, first: int) -> Tensor:
        raise NotImplementedError

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def value(self, state: Tensor) -> Tensor:
        return state[:, : self.outputs]

    def slope(self, z: Tensor, first: int, state: Tensor, coefficient: Tensor) -> Tensor:
        raise NotImplementedError

    def identity(self, rows: int, device: torch.device) -> Tensor:
        return torch.zeros(rows, self.width, dtype=torch.float64, device=device)

    def present(self, value: Tensor, columns: Tensor) -> object:
        """The value as the user of `reduce` sees it."""
        return value[:, 0]

    def visible(self, z: Tensor, first: int) -> Tensor:
        where = getattr(self, "where", None)
        return z if where is None else hide(z, where.column, first)

    def tensors(self) -> tuple[tuple[str, str, Tensor], ...]:
        """(field, role, tensor) of every tensor carried, `where` included."""
        found = []
        for name, role in self.roles:
            carried = getattr(self, name)
            if isinstance(carried, Rest):
                carried = carried.column
            if carried is not None:
                if role == CLASSES and carried.dim() == 2:
                    role = MATRIX
                found.append((name, role, carried))
        return tuple(found)

    def static(self) -> tuple:
        """Everything that is not a tensor: with the tensors' names and roles it is enough to build the statistic again."""
        carried = tuple((name, role) for name, role, _ in self.tensors())
        taken = tuple(name for name, _ in self.roles)
        options = tuple((f.name, getattr(self, f.name)) for f in fields(self) if f.name not in taken)
        return (type(self).__name__, options, carried)

    def taking(self, rows: Tensor | slice | None = None, columns: slice | None = None) -> Statistic:
        """The same statistic for some of the rows and some of the columns."""
        cut = {}
        for name, role, tensor in self.tensors():
            if role in (ROWS, MATRIX) and rows is not None:
                tensor = tensor[rows]
            if role == MATRIX and columns is not None:
                tensor = tensor[:, columns]
            if role == CLASSES and columns is not None:
                tensor = tensor[columns]
            cut[name] = Rest(tensor) if name == "where" else tensor
        return replace(self, **cut)


def build(static: tuple, tensors: list[Tensor]) -> Statistic:
    """Inverse of `Statistic.static` and `Statistic.tensors`; takes its tensors off the front of the list."""
    name, options, carried = static
    values = dict(options)
    for field, _ in carried:
        tensor = tensors.pop(0)
        values[field] = Rest(tensor) if field == "where" else tensor
    return KINDS[name](**values)


def _finite_shift(m: Tensor) -> Tensor:
    """The maximum as a shift: an infinite one is replaced by 0, as in torch.logsumexp."""
    return torch.where(m.isinf(), torch.zeros_like(m), m)


def _merged_maximum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Common shift of two (shift, sum…) states and the factor that brings each of them to it."""
    m = torch.maximum(a[:, 0], b[:, 0])
    factors = [torch.where(s[:, 0] == -torch.inf, torch.zeros_like(m), torch.exp(s[:, 0] - m)) for s in (a, b)]
    return m, factors[0], factors[1]


def _probability(z: Tensor, factor: float, state: Tensor) -> Tensor:
    """softmax(factor · z) from the (shift, sum…) state; the shift goes first, for it is exact: lse would be rounded."""
    apart = factor * z - state[:, :1].to(z.dtype)
    return torch.where(z == -torch.inf, 0.0, torch.exp(apart - torch.log(state[:, 1:2]).to(z.dtype)))


def _total(terms: Tensor) -> Tensor:
    return terms.sum(-1, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Score(Statistic):
    """The score itself at given columns. Give one of

    ``at``: (N,) or (N, k) int64, columns of each row; the value has the same shape.
    ``columns``: (k,) int64, the same columns for all rows; the value is (N, k).
    """

    at: Tensor | None = None
    columns: Tensor | None = None
    roles = (("at", ROWS), ("columns", IDS))

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
class LogSumExp(Statistic):
    """log Σ_j exp(factor · s_j). State (m, Σ exp(factor · s_j − m))."""

    factor: float = 1.0
    where: Rest | None = None
    width = 2
    roles = (("where", ROWS),)

    def identity(self, rows, device):
        return torch.tensor([-torch.inf, 0.0], dtype=torch.float64, device=device).repeat(rows, 1)

    def of(self, z, first):
        if z.shape[1] == 0:
            return self.identity(z.shape[0], z.device)
        z = torch.where(z == -torch.inf, z, self.factor * z)
        z = self.visible(z, first)
        m = z.detach().amax(-1)
        total = _total(torch.exp(z - _finite_shift(m).unsqueeze(-1)))
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
class Sum(Statistic):
    """Σ_j w_j s_j. ``weights``: None (ones), a class vector (V,), or a matrix (N, V), such as target probabilities."""

    weights: Tensor | None = None
    where: Rest | None = None
    roles = (("weights", CLASSES), ("where", ROWS))

    def of(self, z, first):
        z = self.visible(z, first)
        weighted = z if self.weights is None else z * self.weights.to(z.dtype)
        return _total(torch.where(z == -torch.inf, 0.0, weighted)).unsqueeze(1)

    def slope(self, z, first, state, coefficient):
        z = self.visible(z, first)
        weights = torch.ones_like(z) if self.weights is None else self.weights.to(z.dtype)
        return torch.where(z == -torch.inf, 0.0, coefficient * weights)


@dataclass(frozen=True, eq=False)
class Mass(Statistic):
    """Σ_j w_j over the classes whose score is not -inf: what a masked class takes out of a weighted mean. No gradient.

    ``weights`` as in `Sum`; None counts the classes.
    """

    weights: Tensor | None = None
    where: Rest | None = None
    roles = (("weights", CLASSES), ("where", ROWS))

    def of(self, z, first):
        seen = (self.visible(z, first) != -torch.inf).to(z.dtype)
        return _total(seen if self.weights is None else seen * self.weights.to(z.dtype)).unsqueeze(1)

    def slope(self, z, first, state, coefficient):
        return torch.zeros_like(z)


@dataclass(frozen=True, eq=False)
class SumOfSquares(Statistic):
    """Σ_j s_j²."""

    where: Rest | None = None
    roles = (("where", ROWS),)

    def of(self, z, first):
        z = self.visible(z, first)
        return _total(torch.where(z == -torch.inf, 0.0, z).square()).unsqueeze(1)

    def slope(self, z, first, state, coefficient):
        z = self.visible(z, first)
        return 2 * coefficient * torch.where(z == -torch.inf, 0.0, z)


@dataclass(frozen=True, eq=False)
class Moments(Statistic):
    """(count, mean, M2 = Σ_j (s_j − mean)²), merged by Chan's rule: no cancellation when |mean| ≫ deviation."""

    where: Rest | None = None
    width = 3
    outputs = 3
    roles = (("where", ROWS),)

    def of(self, z, first):
        z = self.visible(z, first)
        seen = z != -torch.inf
        count = _total(seen.to(z.dtype))
        mean = _total(torch.where(seen, z, 0.0)) / count.clamp(min=1)
        away = torch.where(seen, z - mean.unsqueeze(-1).to(z.dtype), 0.0)
        return torch.stack([count, mean, _total(away.square())], 1)

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
    where: Rest | None = None
    width = 3
    roles = (("values", CLASSES), ("near", ROWS), ("where", ROWS))

    identity_state = (-torch.inf, 0.0, 0.0)

    def identity(self, rows, device):
        return torch.tensor(self.identity_state, dtype=torch.float64, device=device).repeat(rows, 1)

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
        return torch.stack([m.double(), _total(weight), _total(weight * self._values(z))], 1)

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
        return coefficient * p * (1 + away if self.values is None else away)


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
    where: Rest | None = None
    width = 2
    roles = (("row", ROWS), ("where", ROWS))

    def _u(self, z: Tensor) -> tuple[Tensor, Tensor]:
        seen = z != -torch.inf
        row = 0.0 if self.row is None else self.row.to(z.dtype).unsqueeze(-1)
        return self.factor * (torch.where(seen, z, 0.0) - row), seen

    def of(self, z, first):
        u, seen = self._u(self.visible(z, first))
        f, slope = FUNCTIONS[self.function]
        return torch.stack([_total(torch.where(seen, g(u, self.parameter), 0.0)) for g in (f, slope)], 1)

    def slope(self, z, first, state, coefficient):
        u, seen = self._u(self.visible(z, first))
        return torch.where(seen, coefficient * self.factor * FUNCTIONS[self.function][1](u, self.parameter), 0.0)


@dataclass(frozen=True, eq=False)
class Extreme(Statistic):
    """The k largest (factor = 1) or smallest (factor = −1) scores and their columns; ties go to the lowest column."""

    k: int = 1
    factor: float = 1.0
    squeeze: bool = False
    where: Rest | None = None
    roles = (("where", ROWS),)

    @property
    def width(self) -> int:
        return 2 * self.k

    @property
    def outputs(self) -> int:
        return self.k

    def identity(self, rows, device):
        state = torch.full((rows, self.width), -1.0, dtype=torch.float64, device=device)
        state[:, : self.k] = -self.factor * torch.inf
        return state

    def _best(self, score: Tensor, column: Tensor) -> Tensor:
        """The k best of (score, column) pairs; a stable sort keeps the lowest column first among equals."""
        by_column = torch.argsort(torch.where(column < 0, torch.inf, column), dim=1, stable=True)
        score, column = score.gather(1, by_column), column.gather(1, by_column)
        order = torch.argsort(self.factor * score, dim=1, descending=True, stable=True)[:, : self.k]
        return torch.cat([score.gather(1, order), column.gather(1, order)], 1)

    def of(self, z, first):
        z = self.visible(z, first)
        column = torch.arange(first, first + z.shape[1], device=z.device, dtype=torch.float64).expand_as(z)
        # A score of -inf is no candidate: it looks like an empty slot.
        empty = z == -torch.inf
        score = torch.where(empty, -self.factor * torch.inf, z).double()
        column = torch.where(empty, -1.0, column)
        none = self.identity(z.shape[0], z.device)
        return self._best(torch.cat([score, none[:, : self.k]], 1), torch.cat([column, none[:, self.k :]], 1))

    def merge(self, a, b):
        return self._best(*(torch.cat([a[:, s], b[:, s]], 1) for s in (slice(None, self.k), slice(self.k, None))))

    def columns(self, state: Tensor) -> Tensor:
        return state[:, self.k :].long()

    def slope(self, z, first, state, coefficient):
        # The columns were found under `where`; nothing is left to hide.
        return Score(at=torch.where(self.columns(state) < 0, -1, self.columns(state))).slope(z, first, state, coefficient)

    def present(self, value, columns):
        return (value[:, 0], columns[:, 0]) if self.squeeze else (value, columns)


def Max(where: Rest | None = None) -> Extreme:
    """Largest score and its column, each (N,)."""
    return Extreme(k=1, squeeze=True, where=where)


def Min(where: Rest | None = None) -> Extreme:
    """Smallest score and its column, each (N,)."""
    return Extreme(k=1, factor=-1.0, squeeze=True, where=where)


def TopK(k: int, where: Rest | None = None) -> Extreme:
    """The k largest scores in falling order and their columns, each (N, k)."""
    return Extreme(k=k, where=where)


KINDS = {kind.__name__: kind for kind in (Score, LogSumExp, Sum, Mass, SumOfSquares, Moments, Expectation, SumOf, Extreme)}
