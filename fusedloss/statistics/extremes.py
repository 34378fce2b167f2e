"""Largest and smallest scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..relation import Where
from .base import ROWS, Statistic
from .sums import Score


@dataclass(frozen=True, eq=False)
class Extreme(Statistic):
    """The k largest (factor = 1) or smallest (factor = −1) scores and their columns; ties go to the lowest column."""

    k: int = 1
    factor: float = 1.0
    squeeze: bool = False
    where: Where | None = None
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
        return Score(at=torch.where(self.columns(state) < 0, -1, self.columns(state))).slope(
            z, first, state, coefficient
        )

    def present(self, value, columns):
        return (value[:, 0], columns[:, 0]) if self.squeeze else (value, columns)


def Max(where: Where | None = None) -> Extreme:
    """Largest score and its column, each (N,)."""
    return Extreme(k=1, squeeze=True, where=where)


def Min(where: Where | None = None) -> Extreme:
    """Smallest score and its column, each (N,)."""
    return Extreme(k=1, factor=-1.0, squeeze=True, where=where)


def TopK(k: int, where: Where | None = None) -> Extreme:
    """The k largest scores in falling order and their columns, each (N, k)."""
    return Extreme(k=k, where=where)
