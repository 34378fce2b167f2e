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

from ..checks import fixed
from ..relation import CLASSES, IDS, MATRIX, ROWS, Where

__all__ = ["CLASSES", "IDS", "MATRIX", "ROWS", "Statistic", "summed"]


@dataclass(frozen=True, eq=False)
class Statistic:
    """Common part: which columns (`where`), and how the walks slice the tensors that a statistic carries."""

    width: ClassVar[int] = 1  # numbers of state per row
    outputs: ClassVar[int] = 1  # numbers of value per row
    stateless: ClassVar[bool] = False  # whether `slope` looks at no state
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
        return z if where is None else where.hide(z, first)

    def row_slope(self, states: Tensor) -> Tensor:
        """(N, 1): derivative of the value in the row parameter ``row``, of statistics that have one."""
        raise NotImplementedError

    def tensors(self) -> tuple[tuple[str, str, Tensor], ...]:
        """(field, role, tensor) of every tensor carried; those of `where` are called where.<field>."""
        found = []
        for name, role in self.roles:
            carried = getattr(self, name)
            if isinstance(carried, Where):
                found += [(f"{name}.{field}", part, tensor) for field, part, tensor in carried.tensors()]
            elif carried is not None:
                if role == CLASSES and carried.dim() == 2:
                    role = MATRIX
                found.append((name, role, carried))
        return tuple(found)

    def static(self) -> tuple:
        """Everything that is not a tensor: with the tensors' names and roles it is enough to build the statistic again."""
        carried = tuple((name, role) for name, role, _ in self.tensors())
        taken = tuple(name for name, _ in self.roles)
        options = tuple((f.name, fixed(getattr(self, f.name))) for f in fields(self) if f.name not in taken)
        where = getattr(self, "where", None)
        if where is not None and not where.same:
            options += (("where.same", False),)
        return (type(self).__name__, options, carried)

    def with_tensors(self, tensors: dict[str, Tensor]) -> Statistic:
        """The same statistic with other tensors, called as `tensors` calls them."""
        own = {name: tensor for name, tensor in tensors.items() if "." not in name}
        inner = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if "." in name}
        if inner:
            own["where"] = self.where.with_tensors(inner)
        return replace(self, **own)

    def taking(self, rows: Tensor | slice | None = None, columns: Tensor | slice | None = None) -> Statistic:
        """The same statistic for some of the rows and some of the columns."""
        cut = {}
        for name, role, tensor in self.tensors():
            if role in (ROWS, MATRIX) and rows is not None:
                tensor = tensor[rows]
            if role == MATRIX and columns is not None:
                tensor = tensor[:, columns]
            if role == CLASSES and columns is not None:
                tensor = tensor[columns]
            cut[name] = tensor
        return self.with_tensors(cut)


def summed(terms: Tensor) -> Tensor:
    """Sum over the tile's columns, in float64."""
    return terms.sum(-1, dtype=torch.float64)
