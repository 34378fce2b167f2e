"""Sweeps over the scores of rows with themselves, s_ij = s_ji: half of the blocks are computed, and serve twice.

A block (I, J) right of the diagonal is looked at by the rows I, and by the rows J as its columns. Its gradient is
H = G_IJ + G_JIᵀ, and dX_I += H X_J, dX_J += Hᵀ X_I: 1/2 GEMM for the statistics, 1/2 + 1 for the gradient. On the
diagonal H X_I is enough.
Scores at given columns are few: they are taken, and their gradients added, one by one and in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from math import isqrt

import torch
from torch import Tensor

from .backends.tile import Across, Sums, Tile
from .memory import workspace
from .plan import accumulation_dtype, divided_up, spans
from .schedule import SOME_ROWS, Gradients, corner, taking_across
from .statistics import Extreme, Score, Statistic
from .stream import Stream, narrowed

# Blocks to a side, where they are large enough: those on the diagonal save nothing.
BLOCKS = 4
LEAST_SIDE = 256


def _blocks(stream: Stream, budget: int | None) -> tuple[int, Iterator[tuple[slice, slice]]]:
    """Rows to a block, and the blocks on and right of the diagonal."""
    limits, wide = stream.backend.limits(stream.x.device), accumulation_dtype(stream.dtype).itemsize
    room = limits.pair_bytes if budget is None else min(budget, limits.pair_bytes)
    most = isqrt(room // wide)
    side = max(1, min(stream.rows, most // 64 * 64 or most, max(LEAST_SIDE, divided_up(stream.rows, BLOCKS))))
    pairs = ((rows, columns) for rows in spans(stream.rows, side) for columns in spans(stream.rows, side))
    return side, ((rows, columns) for rows, columns in pairs if columns.start >= rows.start)


def statistics_sweep(stream: Stream, stats: Sequence[Statistic], budget: int | None) -> list[Tensor]:
    """States of all statistics for all rows."""
    device = stream.x.device
    states = [s.identity(stream.rows, device) for s in stats]
    if stream.rows == 0:
        return states
    for s, state in zip(stats, states):
        if isinstance(s, Score):
            for at, into in zip(s.columns_of(stream.rows).unbind(1), state.unbind(1)):
                into.copy_(torch.where((at < 0) | (at >= stream.columns), 0.0, meant(stream, single(stream, at))))
    many = [n for n, s in enumerate(stats) if not isinstance(s, Score)]
    if not many:
        return states
    stats, into = [stats[n] for n in many], [states[n] for n in many]
    side, blocks = _blocks(stream, budget)
    with workspace(device, ((side, side), accumulation_dtype(stream.dtype))) as (buffer,):
        for rows, columns in blocks:
            tile = stream.compute(corner(buffer, rows, columns), stream.input(rows), columns, rows.start)
            stream.backend.statistics(tile, [s.taking(rows, columns) for s in stats], [s[rows] for s in into])
            if columns != rows:
                theirs = [s.taking(columns, rows) for s in stats]
                stream.backend.column_statistics(tile, theirs, [s[columns] for s in into])
    return states


def gradient_sweep(
    stream: Stream,
    stats: Sequence[Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    into: Gradients,
    budget: int | None,
) -> None:
    """Gradients from coefficients ∂L/∂value per row, computing half of the blocks again."""
    backend, wide, sums = stream.backend, accumulation_dtype(stream.dtype), into.sums
    many = [n for n, s in enumerate(stats) if not isinstance(s, (Score, Extreme))]
    chosen = Across([stats[n] for n in many], [states[n] for n in many], [coefficients[n] for n in many])
    side, blocks = _blocks(stream, budget)
    apart = into.x is not None and into.x.dtype != wide
    width = stream.x.shape[1]
    wanted = ((side, side), wide), ((stream.rows if apart else 0, width), wide)
    with workspace(stream.x.device, *wanted) as (buffer, dx_apart):
        dx = dx_apart if apart else into.x
        if dx is not None:
            dx.zero_()
        diagonal = Sums(**{name: torch.zeros_like(total) for name, total in _asked(sums)})
        for rows, columns in blocks if many else ():
            x = stream.input(rows)
            raw = corner(buffer, rows, columns)
            tile = stream.compute(raw, x, columns, rows.start)
            out = narrowed(buffer[: raw.shape[0]], slice(0, raw.shape[1]), stream.dtype)
            mine, below = taking_across(chosen, rows, columns), taking_across(chosen, columns, rows)
            here = (diagonal if columns == rows else sums).taking(columns)
            backend.gradient(tile, out, mine.stats, mine.states, mine.coefficients, here, below)
            if dx is not None:
                backend.gemm(dx[rows], out, stream.weight[columns], accumulate=True)
                if columns != rows:
                    backend.gemm(dx[columns], out.t(), x, accumulate=True)
        for name, total in _asked(sums):  # a block on the diagonal has a pair in both orders, and each has both in H
            total.add_(getattr(diagonal, name), alpha=0.5)
        for s, state, coefficient in zip(stats, states, coefficients):
            if isinstance(s, (Score, Extreme)):
                at = s.columns(state) if isinstance(s, Extreme) else s.columns_of(stream.rows)
                for column, c in zip(at.unbind(1), coefficient.unbind(1)):
                    c = torch.where((column < 0) | (column >= stream.columns), 0.0, c)
                    add_single(stream, column, c, dx, dx, sums)
        if apart:
            into.x.copy_(dx)


def _asked(sums: Sums) -> list[tuple[str, Tensor]]:
    return [(f.name, getattr(sums, f.name)) for f in fields(Sums) if getattr(sums, f.name) is not None]


def single(stream: Stream, at: Tensor) -> Tensor:
    """x_i · w_at(i) (N,) in the accumulation type; of another column where there is no such column."""
    wide, at = accumulation_dtype(stream.dtype), at.clamp(0, stream.columns - 1)
    parts = [
        (stream.input(some).to(wide) * stream.weight.index_select(0, at[some]).to(wide)).sum(1)
        for some in spans(stream.rows, SOME_ROWS)
    ]
    return torch.cat(parts) if parts else at.to(wide)


def meant(stream: Stream, raw: Tensor) -> Tensor:
    """Scores from single products; all columns share their shift."""
    shift = stream.class_shift
    tile = Tile(raw.unsqueeze(1), 0, None, None, None if shift is None else shift[:1], stream.softcap, stream.scale)
    return tile.scores().squeeze(1)


def add_single(stream: Stream, at: Tensor, c: Tensor, dx: Tensor | None, dw: Tensor | None, sums: Sums) -> None:
    """What ∂L/∂s_i,at(i) = c_i gives; c_i is 0 where there is no such column."""
    c, at = c.to(accumulation_dtype(stream.dtype)), at.clamp(0, stream.columns - 1)
    if sums.scale is not None:
        sums.scale.add_((c * single(stream, at)).sum(dtype=torch.float64))
    if sums.class_shift is not None:
        add_at(sums.class_shift, at, c)
    for some in spans(stream.rows, SOME_ROWS):
        factor = (c[some] * stream.scale).unsqueeze(1)
        if dx is not None:
            dx[some] += factor * stream.weight.index_select(0, at[some]).to(dx.dtype)
        if dw is not None:
            add_at(dw, at[some], factor * stream.input(some).to(dw.dtype))


def add_at(into: Tensor, at: Tensor, values: Tensor) -> None:
    """into[at_i] += values_i, the same bits each time."""
    if into.device.type == "cpu":
        into.index_add_(0, at, values)  # in order, where index_put_ would use several threads
    else:
        into.index_put_((at,), values, accumulate=True)  # sorts, where index_add_ would use atomics
