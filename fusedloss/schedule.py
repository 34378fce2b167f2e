"""Schedules: how the tiles of a score matrix are walked.

Two sweeps over two-dimensional blocks, and one walk that fuses them:

* `statistics_sweep`: every block once, nothing kept but the statistics' states (1 GEMM);
* `gradient_sweep`: class blocks outside, row blocks inside, each block computed again and turned into its gradient;
  a block of dW is formed whole, in fp32, and rounded once (3 GEMMs);
* `eager_sweep`: per chunk of rows all classes at once, the tile kept between the two passes (3 GEMMs in all). It needs
  the loss to separate over row chunks, and in half precision an fp32 accumulator for dW.

`plan.py` chooses between eager (3 GEMMs, a tile of rows × V) and the two sweeps (4 GEMMs, hardly any memory).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .backends.tile import Across, Exponentials, Sums
from .memory import workspace
from .plan import Plan, accumulation_dtype, divided_up, half, spans
from .statistics import Count, LogSumExp, Score, Statistic
from .stream import Stream, narrowed

# With fewer numbers to a row of x, the rounding of f · x to half precision does not average out.
FEW_INPUTS = 32
# Rows of dW in fp32 on their way to half precision.
PART_BYTES = 64 << 20
# Rows of single scores that are looked at together.
SOME_ROWS = 512
# Rows out of whose products columns' statistics come at a time: each block of them leaves states of all columns.
FUSED_ROWS = 8192


@dataclass(eq=False)
class Gradients:
    """Buffers that a gradient sweep fills; None where nobody asked."""

    x: Tensor | None
    weight: Tensor | None
    sums: Sums


def statistics_sweep(
    stream: Stream, stats: Sequence[Statistic], layout: Plan, across: Sequence[Statistic] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """States of all statistics for all kept rows, and of those `across`, for all columns. They carry the kept rows."""
    states = [s.identity(stream.rows, stream.x.device) for s in stats]
    below = [s.identity(stream.columns, stream.x.device) for s in across]
    given = stream.weight is None
    if stream.fuses(stats, across) and stream.rows:
        for rows in spans(stream.rows, FUSED_ROWS if across else stream.rows):
            mine, theirs = [s.taking(rows) for s in stats], [s.taking(rows=None, columns=rows) for s in across]
            into = [s[rows] for s in states]
            stream.fused_statistics(stream.input(rows), mine, into, None, theirs, below, rows.start)
        return states, below
    block = (0, 0) if given else (layout.chunk_rows, layout.block_columns)
    with workspace(stream.x.device, (block, accumulation_dtype(stream.dtype))) as (buffer,):
        for rows in spans(stream.rows, layout.chunk_rows):
            x = stream.input(rows)
            mine = [s.taking(rows) for s in stats]
            for columns in spans(stream.columns, layout.block_columns):
                out = x[:, columns] if given else corner(buffer, rows, columns)
                make = stream.tile if given else partial(stream.compute, x=x)
                tile = make(out, columns=columns, first_row=rows.start)
                if stats:
                    stream.backend.statistics(
                        tile, [s.taking(columns=columns) for s in mine], [s[rows] for s in states]
                    )
                if across:
                    theirs = [s.taking(columns, rows) for s in across]
                    stream.backend.column_statistics(tile, theirs, [s[columns] for s in below])
    return states, below


def gradient_sweep(
    stream: Stream,
    stats: Sequence[Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    into: Gradients,
    layout: Plan,
    across: Across | None = None,
    visit: bool = False,
) -> None:
    """Gradients from coefficients ∂L/∂value per row (and, those `across`, per column), computing every block again.

    With `visit` the states are merged into on the way: for coefficients that are known before, and slopes that look at
    no state.
    """
    backend, wait = stream.backend, accumulation_dtype(stream.dtype)
    if stream.weight is None:
        for rows in spans(stream.rows, layout.chunk_rows):
            data = stream.input(rows)
            tile = stream.tile(data, slice(0, stream.columns))
            direct = stream.kept is None and into.x is not None
            out = into.x[rows] if direct else torch.empty_like(data)
            cut = [s[rows] for s in states], [c[rows] for c in coefficients]
            tile = replace(tile, first_row=rows.start)
            below = taking_across(across, slice(0, stream.columns), rows)
            backend.gradient(tile, out, [s.taking(rows) for s in stats], *cut, into.sums, below)
            if into.x is not None and not direct:
                stream.put(into.x, rows, out)
        return
    if stream.rows == 0:  # the gradients are 0 already; a block of dW without rows would stay unwritten
        return

    dx, dw, width = into.x, into.weight, stream.x.shape[1]
    apart = dx is not None and (stream.kept is not None or dx.dtype != wait)
    whole = dw is not None and dw.dtype == wait
    fused = stream.fuses_gradient(stats, across, into.sums)
    wanted = [
        ((layout.chunk_rows, layout.block_columns), stream.dtype if fused else wait),
        ((stream.rows if apart else 0, width), wait),
        ((0 if dw is None or whole else layout.block_columns, width), wait),
    ]
    with workspace(stream.x.device, *wanted) as (buffer, dx_apart, block):
        dx = dx_apart if apart else dx
        for columns in spans(stream.columns, layout.block_columns):
            part = None if dw is None else dw[columns] if whole else block[: columns.stop - columns.start]
            for rows in spans(stream.rows, layout.chunk_rows):
                x = stream.input(rows)
                raw = corner(buffer, rows, columns)
                out = narrowed(buffer[: raw.shape[0]], slice(0, raw.shape[1]), stream.dtype)
                mine, states_here = [s.taking(rows, columns) for s in stats], [s[rows] for s in states]
                asked = into.sums.taking(columns), taking_across(across, columns, rows)
                given = mine, states_here, [c[rows] for c in coefficients], *asked
                if fused:
                    stream.fused_gradient(x, out, columns, rows.start, *given, states_here if visit else None)
                else:
                    tile = stream.compute(raw, x, columns, rows.start)
                    if visit:
                        backend.statistics(tile, mine, states_here)
                    backend.gradient(tile, out, *given)
                if dx is not None:
                    backend.gemm(dx[rows], out, stream.weight[columns], accumulate=columns.start > 0)
                if part is not None:
                    backend.gemm(part, out.t(), x, accumulate=rows.start > 0)
            if part is not None and not whole:
                dw[columns] = part
        if apart:
            stream.put(into.x, slice(0, stream.rows), dx)


def taking_across(across: Across | None, columns: slice, rows: slice) -> Across | None:
    """The part of some columns, over some rows."""
    if across is None:
        return None
    stats = [s.taking(columns, rows) for s in across.stats]
    return Across(stats, [s[columns] for s in across.states], [c[columns] for c in across.coefficients])


def keeps_exponentials(stream: Stream, stats: Sequence[Statistic], sums: Sums) -> bool:
    """Whether exp(s − shift) is all that the gradient needs of a score: one plain log-sum-exp, single scores, no softcap."""
    plain = [s for s in stats if isinstance(s, LogSumExp) and s.factor == 1.0]
    rest = [s for s in stats if not isinstance(s, (Score, Count))]
    return len(plain) == 1 and len(rest) == 1 and not stream.softcap and sums.scale is None and sums.class_scale is None


def eager_sweep(
    stream: Stream,
    stats: Sequence[Statistic],
    step: Callable[[slice, list[Tensor]], list[Tensor]],
    into: Gradients,
    layout: Plan,
    threshold: float,
) -> None:
    """Statistics, loss and gradients chunk by chunk; `step` maps a chunk's states to its coefficients."""
    wide, device, narrow = accumulation_dtype(stream.dtype), stream.x.device, stream.dtype
    width = stream.x.shape[1]
    direct = into.x is not None and stream.kept is None and into.x.dtype == wide
    accumulates = into.weight is not None and layout.accumulator_bytes > 0
    rounds = into.weight is not None and into.weight.dtype != wide and not accumulates  # its blocks, one by one
    kept = layout.exponentials and not layout.in_place
    scratch = kept and narrow != wide and not layout.fused  # scores are computed into a block of their own, kept narrow
    wanted = [
        ((layout.chunk_rows, stream.columns), narrow if kept else wide),
        ((layout.chunk_rows, layout.block_columns if scratch else 0), wide),
        ((layout.chunk_rows if into.x is not None and not direct else 0, width), wide),
        (into.weight.shape if accumulates else (0,), wide),
        ((_part_classes(layout, width) if rounds or threshold > 0 else 0, width), wide),
        ((layout.block_columns if threshold > 0 else 0, width), narrow),
    ]
    with workspace(device, *wanted) as (buffer, scratch, dx, accumulator, part, picked):
        dw = accumulator if accumulates else into.weight
        for rows in spans(stream.rows, layout.chunk_rows):
            chunk = _Chunk(stream, stats, layout, rows, buffer, scratch)
            states = chunk.statistics()
            coefficients = step(rows, states)
            here = None if into.x is None else into.x[rows] if direct else dx[: rows.stop - rows.start]
            factored = None if threshold > 0 else chunk.factored(states, coefficients, into.sums)
            x = chunk.x if factored is None else (chunk.x * factored.rows).to(narrow)
            for columns, out in chunk.gradients(states, coefficients, into.sums, threshold, factored):
                live, weight = None, stream.weight[columns]
                if threshold > 0:
                    live = (~(chunk.largest < threshold)).nonzero().squeeze(1)  # NaN is not filtered out
                    out = stream.backend.take_columns(out, live)
                    weight = torch.index_select(weight, 0, live, out=picked[: len(live)])
                if here is not None:
                    stream.backend.gemm(here, out, weight, accumulate=columns is not chunk.blocks[-1])
                if dw is not None and dw.numel():
                    finish = None if factored is None else partial(factored.add_to_weight, chunk.x, columns.start)
                    _add_to_weight(stream, dw[columns], out, x, live, part, rows.start == 0, finish)
            if here is not None and factored is not None:
                factored.finish_input(here, stream.weight)
            if here is not None and not direct:
                stream.put(into.x, rows, here)
        if dw is not into.weight:
            into.weight.copy_(dw)


@dataclass(eq=False)
class Factored:
    """∂L/∂a_ij = f_i · e_ij but for the single scores that were asked for.

    So G W = f ∘ (E W) and Gᵀ X = Eᵀ (f ∘ X) need no G: no second pass over the tile. The single scores add c_i W_at(i) to
    row i of the one and c_i X_i to row at(i) of the other, in fp32. It takes a shift that all columns share, and numbers
    that float16 has not.
    """

    rows: Tensor  # (n, 1): f
    single: list[tuple[Tensor, Tensor]]  # of each wanted column: at (n,), negative for none, and c (n,)

    def finish_input(self, dx: Tensor, weight: Tensor) -> None:
        """From E W to dX."""
        dx.mul_(self.rows)
        for at, c in self.single:
            for some in spans(len(at), SOME_ROWS):
                rows = (at[some] >= 0).nonzero().squeeze(1) + some.start
                dx.index_add_(0, rows, weight.index_select(0, at[rows]).to(dx.dtype) * c[rows, None])

    def add_to_weight(self, x: Tensor, first: int, skipped: int, part: Tensor) -> None:
        """To `part`, rows of dW from class `first` + `skipped` on, what the single scores give."""
        for at, c in self.single:
            place = at - (first + skipped)
            rows = ((at >= 0) & (place >= 0) & (place < len(part))).nonzero().squeeze(1)
            for some in rows.split(SOME_ROWS):
                part.index_add_(0, place[some], x.index_select(0, some).to(part.dtype) * c[some, None])


class _Chunk:
    """Some rows of the eager schedule, with all their columns in `buffer`."""

    def __init__(self, stream: Stream, stats: Sequence[Statistic], layout: Plan, rows: slice, buffer, scratch):
        count, wide = rows.stop - rows.start, accumulation_dtype(stream.dtype)
        self.stream, self.fused, self.scratch = stream, layout.fused, scratch if scratch.numel() else None
        self.x, self.tile = stream.input(rows), buffer[:count]
        self.stats = [s.taking(rows) for s in stats]
        self.blocks = list(spans(stream.columns, layout.block_columns))
        self.parts = [[s.taking(columns=columns) for s in self.stats] for columns in self.blocks]
        self.kept: list[Exponentials | None] = [None] * len(self.blocks)
        self.largest: Tensor | None = None
        if layout.exponentials:
            block = layout.kept_columns
            shape = len(self.blocks), divided_up(layout.block_columns, block), count
            shifts = torch.empty(shape, dtype=wide, device=stream.x.device)
            self.kept = [
                Exponentials(self.narrow(columns), shift[: divided_up(columns.stop - columns.start, block)], block)
                for columns, shift in zip(self.blocks, shifts)
            ]

    def narrow(self, columns: slice) -> Tensor:
        return narrowed(self.tile, columns, self.stream.dtype)

    def statistics(self) -> list[Tensor]:
        states = [s.identity(self.tile.shape[0], self.tile.device) for s in self.stats]
        if self.fused:
            self.stream.fused_statistics(self.x, self.stats, states, self.kept[0])
            return states
        for columns, part, kept in zip(self.blocks, self.parts, self.kept):
            raw = self.tile if self.scratch is None else self.scratch[: len(self.tile)]
            raw = raw[:, columns] if self.scratch is None else raw[:, : columns.stop - columns.start]
            self.stream.backend.statistics(self.stream.compute(raw, self.x, columns), part, states, kept)
        return states

    def factored(self, states, coefficients, sums: Sums) -> Factored | None:
        """The gradient as a factor per row times the kept exponentials, where it is that."""
        narrow = half(self.stream.dtype) and self.x.shape[1] < FEW_INPUTS
        if self.kept[0] is None or self.tile.device.type != "cpu" or self.stream.dtype == torch.float16 or narrow:
            return None
        shifts = torch.cat([kept.shift for kept in self.kept])
        plain = self.stream.class_scale is None and all(s is None for s in (sums.bias, sums.class_shift, sums.largest))
        if not plain or not (shifts == shifts[0]).all():
            return None
        (lse,) = [n for n, s in enumerate(self.stats) if isinstance(s, LogSumExp)]
        weight, value = coefficients[lse].double(), self.stats[lse].value(states[lse])
        factor = torch.where(weight == 0, 0.0, weight * torch.exp(shifts[0, :, None] - value))
        silent = (factor == 0).squeeze(1)
        if silent.any():  # 0 whatever its scores are, also NaN
            for kept in self.kept:
                kept.data[silent] = 0
        single = []
        for s, state, coefficient in zip(self.stats, states, coefficients):
            if isinstance(s, Score):
                at = torch.where((coefficient == 0) | (state == -torch.inf), -1, s.columns_of(len(state)))
                single += zip(at.unbind(1), (coefficient * self.stream.scale).to(shifts.dtype).unbind(1))
        return Factored((factor * self.stream.scale).to(shifts.dtype), single)

    def gradients(
        self, states, coefficients, sums: Sums, threshold: float, factored: Factored | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The blocks' gradients (or what they are `factored` into), the last first: it is still in the caches."""
        backend, stream = self.stream.backend, self.stream
        for columns, part, kept in reversed(list(zip(self.blocks, self.parts, self.kept))):
            if factored is not None:
                yield columns, kept.data
                continue
            mine = sums.taking(columns)
            if threshold > 0:
                self.largest = torch.zeros(
                    columns.stop - columns.start, dtype=accumulation_dtype(stream.dtype), device=self.tile.device
                )
                mine = replace(mine, largest=self.largest)
            tile = stream.tile(self.tile[:, columns], columns)
            if kept is not None:
                out = kept.data
                backend.gradient_of_exponentials(tile, kept, part, states, coefficients, mine)
            else:
                out = self.narrow(columns)
                backend.gradient(tile, out, part, states, coefficients, mine)
            yield columns, out


def _part_classes(layout: Plan, width: int) -> int:
    """Classes of dW that are formed at a time before they are rounded."""
    return max(1, min(layout.block_columns, PART_BYTES // max(1, 4 * width)))


def _add_to_weight(
    stream: Stream,
    dw: Tensor,
    out: Tensor,
    x: Tensor,
    live: Tensor | None,
    part: Tensor,
    first: bool,
    finish: Callable[[int, Tensor], None] | None,
) -> None:
    """dW block (+)= outᵀ x, or only its `live` classes when the others were filtered out; `part` is scratch for some.
    `finish` adds what else belongs to the classes from one on, in fp32."""
    if live is None and dw.dtype == part.dtype:
        stream.backend.gemm(dw, out.t(), x, accumulate=not first)
        if finish is not None:
            finish(0, dw)
        return
    if live is not None and first:
        dw.zero_()
    add = live is not None and not first
    for classes in spans(out.shape[1], part.shape[0]):
        here, these = part[: classes.stop - classes.start], None if live is None else live[classes]
        if add:
            torch.index_select(dw, 0, these, out=here)
        stream.backend.gemm(here, out[:, classes].t(), x, accumulate=add)
        if finish is not None:
            finish(classes.start, here)
        if live is None:  # the only chunk: rounded once, here
            dw[classes] = here
        else:
            dw.index_copy_(0, these, here.to(dw.dtype))


def corner(buffer: Tensor, rows: slice, columns: slice) -> Tensor:
    return buffer[: rows.stop - rows.start, : columns.stop - columns.start]
