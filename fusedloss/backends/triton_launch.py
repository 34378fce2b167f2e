"""From tiles and statistics to launches of the Triton kernels: arguments, block sizes, grids. Imports triton."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import statistics as S
from ..kernels import gradient as gradient_kernels
from ..kernels import matmul as matmul_kernels
from ..kernels import statistics as statistics_kernels
from ..kernels import words as W
from .tile import Across, Exponentials, Sums, Tile
from .triton import LINEAR_KEPT_COLUMNS, interpreted
from .triton_arguments import describe_all, way_of

BLOCK = 4096  # scores in registers of one program, at most
SUMS_BLOCK = 2048  # the same where sums over rows are kept in registers too
SMALLEST = 64  # columns of a block, at least
MOST_KEPT = 16384  # columns to a row of `Exponentials.shift`, at most
LINEAR_ROWS, LINEAR_COLUMNS = 128, 2 * LINEAR_KEPT_COLUMNS  # scores in the accumulators of one program
# Statistics whose arithmetic leaves registers for that many; of rows and columns at once, if no labels are compared.
LIGHT = (S.LogSumExp, S.Score, S.Sum, S.Count)
MOST_PICKED = 8  # columns of a Score that are looked for in each such block
PROGRAMS = 1024  # enough to fill a GPU: below it, columns are split over programs too
GROUPS = 256  # groups of rows that sums over rows are first taken of: a row of fp32 scratch for each
ACROSS_ROWS = 16  # rows of a block whose columns have numbers too: those are loaded once for all of these
# Columns and rows of a transposed block. One warp has 128 columns, four to a thread: its sums need no other thread. A
# list of extremes is for whole columns: there are more programs if they are narrower.
TRANSPOSED, TRANSPOSED_LIST = (128, 8), (32, 64)
PREPARED_ROWS = 128  # rows to a program of the kernels that look at states alone


@dataclass(frozen=True)
class Launch:
    """One launch: what runs, on how many programs, with what arguments, specialised on what."""

    kernel: object
    grid: tuple[int, ...]
    arguments: dict
    constants: dict
    warps: int = 8
    stages: int = 2

    @property
    def options(self) -> dict:
        # FP fusion is what the elementary functions expect of a device; its default differs between versions.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        if 0 not in self.grid:
            self.kernel[self.grid](**self.arguments, **self.constants, **({} if interpreted() else self.options))


def run(launches: Iterator[Launch], device: torch.device) -> None:
    """On the device's own current stream, whichever device is current."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


# --- shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How a tile is cut: R rows × BLOCK columns at a time, of which `step` count, `parts` programs side by side."""

    r: int
    block: int
    step: int
    parts: int
    part_columns: int


def shape_of(
    rows: int, columns: int, step: int, scores: int, whole_rows: bool = False, groups: int = 0, least_rows: int = 1
) -> Shape:
    """`step`: columns that belong together; `scores`: most in registers of one program; `whole_rows`: one program walks
    all columns; `groups`: of rows, if given; `least_rows`: of a block."""
    step = max(1, min(columns, step))
    if step > MOST_KEPT:
        raise ValueError(f"fusedloss: triton: {step} columns to one shift of exponentials; at most {MOST_KEPT}")
    block = max(SMALLEST, triton.next_power_of_2(step))
    # Few rows are spread over programs rather than put side by side in one.
    r = max(least_rows, min(max(1, scores // block), 16, triton.next_power_of_2(max(1, rows // PROGRAMS))))
    return _in_parts(columns, r, block, step, 1 if whole_rows else -(-PROGRAMS // max(1, groups or -(-rows // r))))


def transposed_shape(rows: int, columns: int, whole_rows: bool) -> Shape:
    """Of a tile whose rows are columns in memory."""
    r, block = TRANSPOSED_LIST if whole_rows else TRANSPOSED
    return _in_parts(columns, r, block, block, 1 if whole_rows else -(-2 * PROGRAMS // -(-rows // r)))


def _in_parts(columns: int, r: int, block: int, step: int, parts: int) -> Shape:
    """At most so many parts, each of whole steps."""
    steps = -(-max(1, columns) // step)
    per_part = -(-steps // min(steps, max(1, parts)))
    return Shape(r, block, step, -(-steps // per_part), per_part * step)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


# --- statistics ------------------------------------------------------------------------------------------------------


def statistics(tile: Tile, stats: Sequence[S.Statistic], states: Sequence[Tensor], keep: Exponentials | None) -> None:
    run(statistics_launches(tile, stats, states, keep), tile.data.device)


def column_statistics(tile: Tile, stats: Sequence[S.Statistic], states: Sequence[Tensor]) -> None:
    run(statistics_launches(tile, stats, states, transposed=True), tile.data.device)


def statistics_launches(tile, stats, states, keep=None, transposed: bool = False) -> Iterator[Launch]:
    data = tile.data
    rows, columns = data.shape
    if rows == 0 or columns == 0 or not stats:
        return
    assert data.stride(1) == 1 or columns == 1
    first = tile.first
    if transposed:
        rows, columns, first = columns, rows, tile.first_row
    specs, arguments = describe_all(stats, states)
    way, how = way_of(tile, data, transposed)
    kept = -1 if keep is None else [isinstance(s, S.LogSumExp) and s.factor == 1.0 for s in stats].index(True)
    whole = any(isinstance(s, S.Extreme) for s in stats) or (keep is not None and overlap(keep.data, data))
    if transposed:
        shape = transposed_shape(rows, columns, whole)
    else:
        shape = shape_of(rows, columns, BLOCK if keep is None else keep.block, BLOCK, whole)
    split = shape.parts > 1
    partial = _partial(stats, states, shape.parts, rows)
    yield Launch(
        statistics_kernels.statistics,
        (triton.cdiv(rows, shape.r), shape.parts),
        dict(
            **dict(data=data, stride=data.stride(0), rows=rows, columns=columns, first=first, **way),
            **dict(arguments=arguments, partial=partial),
            **_kept(keep, data),
            **dict(step=shape.step, part_columns=shape.part_columns),
        ),
        dict(SPECS=specs, HOW=how, KEEP=kept, SPLIT=split, R=shape.r, BLOCK=shape.block),
        warps=1 if transposed and not whole else 8,
    )
    if split:
        yield from _merging(stats, specs, arguments, partial, shape.parts, rows)


def _partial(stats, states, parts: int, rows: int) -> Tensor:
    """States of parts of the columns; a stand-in where there is one part."""
    if parts == 1:
        return states[0]
    return torch.empty(len(stats), parts, 3, rows, dtype=torch.float64, device=states[0].device)


def _merging(stats, specs, arguments, partial, parts: int, rows: int) -> Iterator[Launch]:
    if any(not isinstance(s, (S.Score, S.Extreme)) for s in stats):
        yield Launch(
            statistics_kernels.merge_parts,
            (triton.cdiv(rows, PREPARED_ROWS),),
            dict(partial=partial, parts=parts, rows=rows, arguments=arguments),
            dict(SPECS=specs, R=PREPARED_ROWS),
            warps=4,
        )


def _kept(keep: Exponentials | None, stand_in: Tensor) -> dict:
    if keep is None:
        return dict(keep=stand_in, keep_stride=0, shift=stand_in, shift_stride=0)
    return dict(keep=keep.data, keep_stride=keep.data.stride(0), shift=keep.shift, shift_stride=keep.shift.stride(0))


# --- statistics of a product -----------------------------------------------------------------------------------------


def fuses(stats: Sequence[S.Statistic]) -> bool:
    return all(not isinstance(s, S.Extreme) and not (isinstance(s, S.Score) and s.width > MOST_PICKED) for s in stats)


def _light(stats, across) -> bool:
    both = [*stats, *across]
    beside = [s.where for s in both if getattr(s, "where", None) is not None] if across else []
    many = any(where.row_label is not None or where.above is not None or where.below is not None for where in beside)
    return len(both) <= 4 and all(isinstance(s, LIGHT) for s in both) and not many


def linear_statistics(x: Tensor, weight: Tensor, tile: Tile, stats, states, keep, across, below) -> None:
    run(linear_launches(x, weight, tile, stats, states, keep, across, below), x.device)


def linear_launches(
    x, weight, tile, stats, states, keep=None, across=(), below=(), hip=torch.version.hip is not None
) -> Iterator[Launch]:
    (rows, depth), columns = x.shape, weight.shape[0]
    if not fuses([*stats, *across]):
        raise ValueError("fusedloss: triton: these statistics cannot be taken out of a product; ask `fuses` first")
    light = _light(stats, across)
    if keep is not None and (keep.block != LINEAR_KEPT_COLUMNS or not light):
        raise ValueError(
            f"fusedloss: triton: exponentials of a product are kept with a shift for every {LINEAR_KEPT_COLUMNS} "
            f"columns, beside scores and counts; got {keep.block} columns, {[type(s).__name__ for s in stats]}"
        )
    if rows == 0 or columns == 0 or not (stats or across):
        return
    assert x.stride(1) == 1 and weight.stride(1) == 1 and x.dtype == weight.dtype
    specs, arguments = describe_all(stats, states) if stats else ((), (x,))
    way, how = way_of(tile, x)
    kept = -1 if keep is None else [isinstance(s, S.LogSumExp) and s.factor == 1.0 for s in stats].index(True)
    bm, bn, bk = LINEAR_ROWS, LINEAR_COLUMNS if light else LINEAR_COLUMNS // 2, 128 // x.element_size()
    row_blocks, steps = triton.cdiv(rows, bm), triton.cdiv(columns, bn)
    per_part = triton.cdiv(steps, min(steps, triton.cdiv(PROGRAMS, row_blocks)))
    parts = triton.cdiv(steps, per_part)
    partial = _partial(stats, states, parts, rows) if stats else x
    specs_across, of_columns, partial_across = (), (x,), x
    if across:
        specs_across, of_columns = describe_all(across, below)
        partial_across = torch.empty(len(across), row_blocks, 3, columns, dtype=torch.float64, device=x.device)
    yield Launch(
        matmul_kernels.linear_statistics,
        (row_blocks, parts),
        dict(
            **dict(x=x, x_stride=x.stride(0), weight=weight, weight_stride=weight.stride(0)),
            **dict(rows=rows, columns=columns, depth=depth, first=tile.first, first_row=tile.first_row, **way),
            **dict(arguments=arguments, partial=partial, across=of_columns, partial_across=partial_across),
            **dict(**_kept(keep, x), part_columns=per_part * bn),
        ),
        dict(SPECS=specs, ACROSS=specs_across, HOW=how, KEEP=kept, SPLIT=parts > 1, EVEN=depth % bk == 0,
             UPCAST=interpreted(), BM=bm, BN=bn, BK=bk),
        stages=2 if hip else 4,
    )  # fmt: skip
    if parts > 1:
        yield from _merging(stats, specs, arguments, partial, parts, rows)
    if across:
        yield from _merging(across, specs_across, of_columns, partial_across, row_blocks, columns)


# --- gradient --------------------------------------------------------------------------------------------------------


def _prepared(stats, states, coefficients, rows: int, stand_in: Tensor) -> tuple[tuple, tuple, Tensor, list[Launch]]:
    """(specs, arguments, what `derivatives` makes of them, its launch)."""
    if not stats:  # no empty tuple among the arguments of a kernel
        return (), (stand_in,), stand_in, []
    specs, arguments = describe_all(stats, states, coefficients)
    out = torch.empty(1 + 4 * len(specs), rows, dtype=torch.float32, device=stand_in.device)
    grid, given = (triton.cdiv(rows, PREPARED_ROWS),), dict(arguments=arguments, out=out, rows=rows)
    launch = Launch(gradient_kernels.derivatives, grid, given, dict(SPECS=specs, R=PREPARED_ROWS), warps=4)
    return specs, arguments, out, [launch]


class _ColumnSums:
    """Sums over rows: a row of scratch for each group of rows, added up in order when all groups are done."""

    def __init__(self, sums: Sums, rows: int, columns: int, device: torch.device):
        self.wanted = (sums.bias, sums.class_scale, sums.class_shift, sums.scale, sums.largest)
        self.asked = tuple(int(s is not None) for s in self.wanted)
        self.rows, self.columns, self.device = rows, columns, device

    def groups(self, r: int) -> tuple[int, int]:
        """(groups, rows to each)."""
        each = r * triton.cdiv(self.rows, r * GROUPS) if any(self.asked) else r
        return triton.cdiv(self.rows, each), each

    def scratch(self, groups: int, parts: int, stand_in: Tensor) -> tuple[Tensor, ...]:
        self.parts = tuple(
            torch.empty(groups, parts, dtype=torch.float64, device=self.device)
            if place == W.TO_SCALE.value and asked
            else torch.empty(groups, self.columns, dtype=torch.float32, device=self.device)
            if asked
            else stand_in
            for place, asked in enumerate(self.asked)
        )
        return self.parts

    def finish(self) -> None:
        for place, (total, part) in enumerate(zip(self.wanted, self.parts)):
            if total is None:
                continue
            if place == W.TO_SCALE.value:
                total.add_(part.sum())
            elif place == W.TO_LARGEST.value:
                torch.maximum(total, part.amax(0), out=total)
            else:
                total.add_(part.sum(0))


def gradient(tile: Tile, out: Tensor, stats, states, coefficients, sums: Sums, across: Across | None = None) -> None:
    data = tile.data
    rows, columns = data.shape
    if rows == 0 or columns == 0:
        return
    column_sums = _ColumnSums(sums, rows, columns, data.device)
    run(gradient_launches(tile, out, stats, states, coefficients, column_sums, across), data.device)
    column_sums.finish()


def gradient_launches(
    tile, out, stats, states, coefficients, column_sums: _ColumnSums, across: Across | None = None
) -> Iterator[Launch]:
    data = tile.data
    rows, columns = data.shape
    assert (data.stride(1) == 1 and out.stride(1) == 1) or columns == 1
    way, how = way_of(tile, data)
    specs, arguments, numbers, launches = _prepared(stats, states, coefficients, rows, data)
    yield from launches
    below = ((), (), ()) if across is None else (across.stats, across.states, across.coefficients)
    specs_across, of_columns, numbers_across, launches = _prepared(*below, columns, data)
    yield from launches
    narrowing = overlap(out, data) and out.dtype != data.dtype
    scores = SUMS_BLOCK if any(column_sums.asked) else BLOCK
    least, warps = 1, 8
    if specs_across:  # half the block, for the registers' sake; eight scores to a thread, for the loads'
        least, scores = ACROSS_ROWS, scores // 2
        warps = max(1, min(8, scores // 256))
    r = shape_of(rows, columns, scores // least, scores, least_rows=least).r
    groups, each = column_sums.groups(r)
    shape = shape_of(rows, columns, scores // least, scores, narrowing, groups, least)
    yield Launch(
        gradient_kernels.gradient,
        (groups, shape.parts),
        dict(
            **dict(data=data, stride=data.stride(0), out=out, out_stride=out.stride(0), rows=rows, columns=columns),
            **dict(first=tile.first, first_row=tile.first_row, **way, arguments=arguments, numbers=numbers),
            **dict(across=of_columns, numbers_across=numbers_across),
            **dict(sums=column_sums.scratch(groups, shape.parts, data), group_rows=each),
            part_columns=shape.part_columns,
        ),
        dict(SPECS=specs, ACROSS=specs_across, HOW=how, SUMS=column_sums.asked, R=r, BLOCK=shape.block),
        warps=warps,
    )


def gradient_of_exponentials(tile: Tile, kept: Exponentials, stats, states, coefficients, sums: Sums) -> None:
    rows, columns = kept.data.shape
    if rows == 0 or columns == 0:
        return
    if sums.scale is not None or sums.class_scale is not None or tile.softcap:
        raise ValueError("fusedloss: triton: exponentials do not tell scores: no softcap, no sums for the scales")
    column_sums = _ColumnSums(sums, rows, columns, kept.data.device)
    run(exponentials_launches(tile, kept, stats, states, coefficients, column_sums), kept.data.device)
    column_sums.finish()


def exponentials_launches(tile, kept, stats, states, coefficients, column_sums: _ColumnSums) -> Iterator[Launch]:
    data = kept.data
    rows, columns = data.shape
    way, how = way_of(tile, data)
    specs, arguments, numbers, launches = _prepared(stats, states, coefficients, rows, data)
    yield from launches
    scores = SUMS_BLOCK if any(column_sums.asked) else BLOCK
    fine = kept.block < min(columns, scores)
    step = scores if fine else kept.block
    r = shape_of(rows, columns, step, scores).r
    groups, each = column_sums.groups(r)
    shape = shape_of(rows, columns, step, scores, False, groups)
    yield Launch(
        gradient_kernels.gradient_of_exponentials,
        (groups, shape.parts),
        dict(
            **dict(data=data, stride=data.stride(0), shift=kept.shift, shift_stride=kept.shift.stride(0)),
            **dict(shift_columns=kept.block, rows=rows, columns=columns, first=tile.first, step=shape.step),
            **dict(vectors=way["vectors"], scale=way["scale"], arguments=arguments, numbers=numbers),
            **dict(sums=column_sums.scratch(groups, shape.parts, data), group_rows=each),
            part_columns=shape.part_columns,
        ),
        dict(SPECS=specs, HOW=how, SUMS=column_sums.asked, FINE=fine, R=r, BLOCK=shape.block),
    )
