"""A block of the scores: features of some rows against features of some columns, both on this rank by now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..backends.tile import Across, Sums
from ..plan import Walk, accumulation_dtype, waiting_dtype
from ..relation import MATRIX, ROWS
from ..schedule import Gradients, statistics_sweep
from ..statistics import Score, Statistic
from ..stream import Stream
from ..symmetric import add_single, meant, single
from .ranks import bytes_of, from_bytes, row_bytes

NOBODY = Across((), (), ())
# Tensors of statistics that hold numbers of columns.
_NUMBERS = ("at", "columns", "where.without")


@dataclass(frozen=True, eq=False)
class Product:
    """How features become scores: scale · x · y + bias."""

    scale: float | Tensor
    bias: Tensor | None
    multiply: torch.dtype
    walk: Walk

    def stream(self, x: Tensor, y: Tensor) -> Stream:
        learnt = self.scale if isinstance(self.scale, Tensor) else None
        spec = ops.Spec((), 0.0, 1.0 if learnt is not None else self.scale, str(self.multiply), self.walk)
        shift = None if self.bias is None else self.bias.expand(len(y))
        return ops.stream_of(spec, x, y, None, None, shift, learnt, None)

    def statistics(
        self, x: Tensor, y: Tensor, rows: Sequence[Statistic], columns: Sequence[Statistic] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States of rows, and of columns (statistics of the transposed scores)."""
        if not (len(x) and len(y)):
            return [[s.identity(len(a), a.device) for s in stats] for a, stats in ((x, rows), (y, columns))]
        stream = self.stream(x, y)
        if _few(rows, columns):
            return self._single_states(stream, rows), self._single_states(self.stream(y, x), columns)
        return statistics_sweep(stream, rows, ops.recompute_layout(stream, self.walk, bool(columns)), columns)

    def gradients(
        self, x: Tensor, y: Tensor, rows: Across, columns: Across, needs: Sequence[bool], rounded: bool
    ) -> list[Tensor | None]:
        """Of x, y, scale and bias, where needed; those of x and y in their own types, or not `rounded` to them."""
        formed = self._single_gradients if _few(rows.stats, columns.stats) else self._block_gradients
        dx, dy, *shared = formed(x, y, rows, columns, needs, rounded)
        if rounded:
            dx, dy = [None if d is None else d.to(t.dtype) for d, t in ((dx, x), (dy, y))]
        return [dx, dy, *shared]

    def _block_gradients(self, x, y, rows, columns, needs, rounded) -> list[Tensor | None]:
        wide, some = accumulation_dtype(self.multiply), len(x) and len(y)
        make = torch.empty if some else torch.zeros
        dx, dy = [
            make(t.shape, dtype=waiting_dtype(t.dtype) if rounded else wide, device=t.device) if need else None
            for t, need in ((x, needs[0]), (y, needs[1]))
        ]
        dscale = torch.zeros((), dtype=torch.float64, device=x.device) if needs[2] else None
        shifts = torch.zeros(len(y), dtype=wide, device=x.device) if needs[3] else None
        if some:
            into = Gradients(dx, dy, Sums(class_shift=shifts, scale=dscale))
            ops.fill_gradients(self.stream(x, y), self.walk, rows, columns, into, [dx, dy, shifts, dscale])
        return [dx, dy, dscale, None if shifts is None else shifts.sum(dtype=torch.float64)]

    def _single_gradients(self, x, y, rows, columns, needs, rounded) -> list[Tensor | None]:
        wide = accumulation_dtype(self.multiply)
        shapes = (x.shape, wide), (y.shape, wide), ((), torch.float64), ((), torch.float64)
        found = [torch.zeros(s, dtype=d, device=x.device) if need else None for (s, d), need in zip(shapes, needs)]
        dx, dy, dscale, dbias = found
        for side, a, b, da, db in ((rows, x, y, dx, dy), (columns, y, x, dy, dx)):
            if not (len(a) and len(b)):
                continue
            stream = self.stream(a, b)
            for s, coefficient in zip(side.stats, side.coefficients):
                for at, c in zip(s.columns_of(len(a)).unbind(1), coefficient.unbind(1)):
                    c = torch.where((at >= 0) & (at < len(b)), c, 0.0)
                    add_single(stream, at, c, da, db, Sums(scale=dscale))
                    if dbias is not None:
                        dbias += c.sum()
        return found

    def _single_states(self, stream: Stream, stats: Sequence[Score]) -> list[Tensor]:
        states = []
        for s in stats:
            each = [
                torch.where((at >= 0) & (at < stream.columns), meant(stream, single(stream, at)), 0.0)
                for at in s.columns_of(stream.rows).unbind(1)
            ]
            states.append(torch.stack(each, 1).double())
        return states


def _few(*sides: Sequence[Statistic]) -> bool:
    """Whether only single scores are asked for: no block has to be computed."""
    return all(isinstance(s, Score) and s.at is not None for stats in sides for s in stats)


# --- statistics that look at other columns than they were written for ---


def moved(statistic: Statistic, by: int) -> Statistic:
    """The same statistic where column j is called j + by; a column that is not there then is none."""
    return statistic.with_tensors({name: t + by if name in _NUMBERS else t for name, _, t in statistic.tensors()})


def moved_state(statistic: Statistic, state: Tensor, by: int) -> Tensor:
    """The state of a `moved` statistic: those that find columns remember their numbers."""
    if not hasattr(statistic, "k"):
        return state
    best, found = state.split(statistic.k, 1)
    return torch.cat([best, torch.where(found < 0, found, found + by)], 1)


def facing(side: Across, columns: slice) -> Across:
    """Statistics, states and coefficients as a block sees them that has only these columns, numbered from 0."""
    stats = [moved(s.taking(columns=columns), -columns.start) for s in side.stats]
    return Across(stats, [moved_state(s, t, -columns.start) for s, t in zip(stats, side.states)], side.coefficients)


# --- what belongs to rows, and travels with them ---


def _of_rows(side: Across) -> list[Tensor]:
    carried = [t for s in side.stats for _, role, t in s.tensors() if role in (ROWS, MATRIX)]
    return [*carried, *side.states, *side.coefficients]


def packed(side: Across, rows: int) -> Tensor:
    """(rows, bytes) of all that the statistics of these rows carry and found."""
    parts = [bytes_of(t.expand(rows, *t.shape[1:])) for t in _of_rows(side)]
    return torch.cat(parts, 1) if parts else torch.empty(rows, 0, dtype=torch.uint8)


def unpacked(side: Across, data: Tensor) -> Across:
    """The same side, of those rows that the bytes are from."""
    carried = _of_rows(side)
    pieces = data.split([row_bytes(t) for t in carried], 1)
    parts = iter([from_bytes(piece, t) for piece, t in zip(pieces, carried)])
    stats = [
        s.with_tensors({name: next(parts) if role in (ROWS, MATRIX) else t for name, role, t in s.tensors()})
        for s in side.stats
    ]
    return Across(stats, [next(parts) for _ in side.states], [next(parts) for _ in side.coefficients])
