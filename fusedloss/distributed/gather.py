"""The exchange "gather": features are gathered once, and each rank computes the strips of its rows and of its columns.

Backward gathers what is known of each row (labels, states, coefficients: a few numbers), and each rank computes the
gradients of its own features: those of other ranks' features are never formed, and do not travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from ..backends.tile import Across
from ..statistics import Statistic
from .block import NOBODY, Product, facing, packed, unpacked
from .ranks import Ranks, gathered, span


class Gather:
    """Features x of this rank's rows and y of its columns (None: the same)."""

    def __init__(self, ranks: Ranks, x: Tensor, y: Tensor | None):
        self.ranks, self.x, self.y = ranks, x, y

    @cached_property
    def all_x(self) -> Tensor:
        return gathered(self.ranks.group, self.x, self.ranks.rows)

    @cached_property
    def all_y(self) -> Tensor:
        return self.all_x if self.y is None else gathered(self.ranks.group, self.y, self.ranks.columns)

    def statistics(
        self, product: Product, rows: Sequence[Statistic], columns: Sequence[Statistic]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States of this rank's rows, and of its columns."""
        if self.y is None:  # the same strip
            states, _ = product.statistics(self.x, self.all_x, [*rows, *columns])
            return states[: len(rows)], states[len(rows) :]
        mine = product.statistics(self.x, self.all_y, rows)[0] if rows else []
        return mine, product.statistics(self.y, self.all_x, columns)[0] if columns else []

    def gradients(self, product: Product, rows: Across, columns: Across, needs: Sequence[bool]) -> list[Tensor | None]:
        """Of this rank's x and y, and its part of those of scale and bias."""
        want_x, want_y, *shared = needs
        if self.y is None:
            everybody = self._everybody(rows, self.ranks.rows)
            both = facing(everybody, span(self.ranks.rows, self.ranks.rank))
            return product.gradients(self.x, self.all_x, rows, both, (want_x, False, *shared), rounded=True)
        by_rows = want_x or not want_y  # the strip that scale and bias are taken from
        dx, dy, dscale, dbias = None, None, None, None
        if want_x or any(shared):
            all_columns = facing(self._everybody(columns, self.ranks.columns), span(self.ranks.rows, self.ranks.rank))
            needed = (want_x, False, *[by_rows and s for s in shared])
            dx, _, dscale, dbias = product.gradients(self.x, self.all_y, rows, all_columns, needed, rounded=True)
        if want_y:
            all_rows = facing(self._everybody(rows, self.ranks.rows), span(self.ranks.columns, self.ranks.rank))
            needed = (True, False, *[not by_rows and s for s in shared])
            dy, _, *other = product.gradients(self.y, self.all_x, columns, all_rows, needed, rounded=True)
            dscale, dbias = (dscale, dbias) if by_rows else other
        return [dx, dy, dscale, dbias]

    def _everybody(self, side: Across, counts: Sequence[int]) -> Across:
        """The same side of all ranks."""
        if not side.stats:
            return NOBODY
        return unpacked(side, gathered(self.ranks.group, packed(side, counts[self.ranks.rank]), counts))
