"""A block of the scores: features of some rows against features of some columns, both on this rank by now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..backends.tile import Across, Sums
from ..plan import Walk, accumulation_dtype
from ..relation import MATRIX, ROWS
from ..schedule import Gradients, statistics_sweep
from ..statistics import Score, Statistic
from ..stream import Stream
from ..symmetric import add_single, meant, single
from .ranks import bytes_of, from_bytes

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
        wide, dtypes = accumulation_dtype(self.multiply), (x.dtype, y.dtype)
        make = torch.empty if len(x) and len(y) else torch.zeros
        dx, dy = [
            make(a.shape, dtype=dtype if rounded else wide, device=a.device) if need else None
            for a, dtype, need in zip((x, y), dtypes, needs)
        ]
        dscale = torch.zeros((), dtype=torch.float64, device=x.device) if needs[2] else None
        shifts = torch.zeros(len(y), dtype=wide, device=x.device) if needs[3] else None
        sums = Sums(class_shift=shifts, scale=dscale)
        if len(x) and len(y):
            if _few(rows.stats, columns.stats):
                dx, dy = self._single_gradients(x, y, rows, columns, dx, dy, sums)
            else:
                found = [dx, dy, shifts, dscale]
                ops.fill_gradients(self.stream(x, y), self.walk, rows, columns, Gradients(dx, dy, sums), found)
        return [dx, dy, dscale, None if shifts is None else shifts.sum(dtype=torch.float64)]

    def _single_states(self, stream: Stream, stats: Sequence[Score]) -> list[Tensor]:
        states = []
        for s in stats:
            each = [
                torch.where((at >= 0) & (at < stream.columns), meant(stream, single(stream, at)), 0.0)
                for at in s.columns_of(stream.rows).unbind(1)
            ]
            states.append(torch.stack(each, 1).double())
        return states

    def _single_gradients(self, x, y, rows: Across, columns: Across, dx, dy, sums: Sums) -> list[Tensor | None]:
        wide = accumulation_dtype(self.multiply)
        sum_x, sum_y = [None if d is None else torch.zeros_like(d, dtype=wide) for d in (dx, dy)]
        whole = None if sums.class_shift is None else sums.class_shift[:1]  # only their sum is wanted
        for side, a, b, da, db in ((rows, x, y, sum_x, sum_y), (columns, y, x, sum_y, sum_x)):
            stream = self.stream(a, b)
            for s, coefficient in zip(side.stats, side.coefficients):
                for at, c in zip(s.columns_of(len(a)).unbind(1), coefficient.unbind(1)):
                    c = torch.where((at >= 0) & (at < len(b)), c, 0.0)
                    add_single(stream, at, c, da, db, replace(sums, class_shift=None))
                    if whole is not None:
                        whole += c.sum()
        return [None if d is None else s.to(d.dtype) for d, s in ((dx, sum_x), (dy, sum_y))]


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
    widths = [t.shape[1:].numel() * t.element_size() for t in _of_rows(side)]
    parts = iter([from_bytes(b.clone(), t) for b, t in zip(data.split(widths, 1), _of_rows(side))])
    stats = [
        s.with_tensors({name: next(parts) if role in (ROWS, MATRIX) else t for name, role, t in s.tensors()})
        for s in side.stats
    ]
    return Across(stats, [next(parts) for _ in side.states], [next(parts) for _ in side.coefficients])
