"""Statistics of columns."""

from __future__ import annotations

from dataclasses import dataclass

from ..relation import CLASSES, ROWS
from .base import Statistic

_FLIPPED = {ROWS: CLASSES, CLASSES: ROWS}


@dataclass(frozen=True, eq=False)
class Columns(Statistic):
    """A statistic of every column over the rows, where others are of every row over the columns; its value is (M,).

    ``statistic`` is written as if the scores were transposed: its row tensors have one entry per column, its class
    vectors one per row. It comes out of the same pass as the statistics of rows.
    """

    statistic: Statistic

    @property
    def width(self) -> int:
        return self.statistic.width

    @property
    def outputs(self) -> int:
        return self.statistic.outputs

    def tensors(self):
        return tuple((name, _FLIPPED.get(role, role), tensor) for name, role, tensor in self.statistic.tensors())

    def static(self):
        return (type(self).__name__, (("statistic", self.statistic.static()),), ())

    def with_tensors(self, tensors):
        return Columns(self.statistic.with_tensors(tensors))

    def taking(self, rows=None, columns=None):
        return Columns(self.statistic.taking(columns, rows))

    def present(self, value, columns):
        return self.statistic.present(value, columns)


def split(stats) -> tuple[list[Statistic], list[Statistic]]:
    """Statistics of rows, and of columns (as statistics of the transposed scores)."""
    across = [s.statistic for s in stats if isinstance(s, Columns)]
    return [s for s in stats if not isinstance(s, Columns)], across
