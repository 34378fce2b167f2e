"""Launches of kernels/linear_gradient.py: the gradient of a block of scores out of the product. Imports triton."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from .. import statistics as S
from ..kernels import linear_gradient as kernels
from . import triton_launch as base
from .tile import Across, Sums, Tile
from .triton import interpreted
from .triton_arguments import describe_all, way_of

PIECES = 4  # of a program's accumulators, one after the other turned into gradients
MOST_SLOPES = 4  # statistics, beside scores and counts, whose slopes registers are left for


def fuses_gradient(stats, across: Across | None) -> bool:
    both = [*stats, *(() if across is None else across.stats)]
    return base.fuses(both) and sum(not isinstance(s, (S.Score, S.Count)) for s in both) <= MOST_SLOPES


def _visits_lightly(stats) -> bool:
    """Whether registers are left for a wide block of columns beside these states: those of a sigmoid loss."""
    softplus = [s for s in stats if isinstance(s, S.SumOf) and s.function == "softplus" and s.where is None]
    scores = [s for s in stats if isinstance(s, S.Score)]
    return len(softplus) + len(scores) == len(stats) <= 2


def linear_gradient(
    x: Tensor, weight: Tensor, tile: Tile, out: Tensor, stats, states, coefficients, sums: Sums, across, visit_states
) -> None:
    if out.numel() == 0:
        return
    column_sums = base._ColumnSums(sums, *out.shape, x.device)
    given = stats, states, coefficients, column_sums, across, visit_states
    base.run(launches(x, weight, tile, out, *given), x.device)
    column_sums.finish()


def launches(
    x, weight, tile, out, stats, states, coefficients, column_sums, across=None, visit_states=None,
    hip=torch.version.hip is not None,
) -> Iterator[base.Launch]:  # fmt: skip
    (rows, depth), columns = x.shape, weight.shape[0]
    below = ((), (), ()) if across is None else (across.stats, across.states, across.coefficients)
    if not fuses_gradient(stats, across):
        raise ValueError("fusedloss: triton: this gradient cannot come out of a product; ask `fuses_gradient` first")
    assert x.stride(1) == 1 and weight.stride(1) == 1 and out.stride(1) == 1 and x.dtype == weight.dtype
    way, how = way_of(tile, x)
    specs, arguments, numbers, prepared = base._prepared(stats, states, coefficients, rows, x)
    yield from prepared
    specs_across, of_columns, numbers_across, prepared = base._prepared(*below, columns, x)
    yield from prepared
    specs_visited, visited = ((), (x,)) if visit_states is None or not stats else describe_all(stats, visit_states)
    few = _visits_lightly(stats) if specs_visited else base._light(stats, below[0])
    bm, bn = base.LINEAR_ROWS, base.LINEAR_COLUMNS if few and not hip else base.LINEAR_COLUMNS // 2
    bk = 128 // x.element_size()
    row_blocks, steps = triton.cdiv(rows, bm), triton.cdiv(columns, bn)
    per_part = triton.cdiv(steps, min(steps, triton.cdiv(base.PROGRAMS, row_blocks)))
    parts = triton.cdiv(steps, per_part)
    partial = base._partial(stats, visit_states, parts, rows) if specs_visited else x
    yield base.Launch(
        kernels.linear_gradient,
        (row_blocks, parts),
        dict(
            **dict(x=x, x_stride=x.stride(0), weight=weight, weight_stride=weight.stride(0)),
            **dict(out=out, out_stride=out.stride(0), rows=rows, columns=columns, depth=depth),
            **dict(first=tile.first, first_row=tile.first_row, **way, arguments=arguments, numbers=numbers),
            **dict(across=of_columns, numbers_across=numbers_across, visited=visited, partial=partial),
            **dict(sums=column_sums.scratch(row_blocks, parts, x), part_columns=per_part * bn),
        ),
        dict(SPECS=specs, ACROSS=specs_across, VISITED=specs_visited, HOW=how, SUMS=column_sums.asked,
             SPLIT=parts > 1, EVEN=depth % bk == 0, UPCAST=interpreted(), PIECES=PIECES, BM=bm, BN=bn, BK=bk),
        stages=2 if hip else 4,
    )  # fmt: skip
    if specs_visited and parts > 1:
        yield from base._merging(stats, specs_visited, visited, partial, parts, rows)
