"""Gradient of a tile in memory, in place or not, in three steps.

`derivatives` turns states and coefficients into a few fp32 numbers per row, once; `gradient` (or
`gradient_of_exponentials`) turns scores into ∂L/∂a; sums over rows are left in a buffer, one row of it per group of
rows, and added up in order afterwards: no atomics, same bits each time.
"""

import triton
import triton.language as tl

from .elementwise import exp
from .scores import operand_of, row_parameter, scores_of, seen_by, wanted, wide
from .states import derivative, slope, width_of
from .words import (
    CLASS_SCALE,
    COEFFICIENT,
    COUNT,
    COUNT_SEEN,
    EXTREME,
    FACTOR,
    KIND,
    LOGSUMEXP,
    LOGSUMEXP_OF,
    MEMORY,
    MOMENTS,
    NUMBER,
    PARAMETER,
    SCALE,
    SCORE,
    STATE,
    TO_BIAS,
    TO_CLASS_SCALE,
    TO_CLASS_SHIFT,
    TO_LARGEST,
    TO_SCALE,
    WEIGHT,
)


@triton.jit
def numbers_of(pointer, row, there, WIDTH: tl.constexpr):
    """The WIDTH float64 numbers of each row."""
    numbers = ()
    for i in tl.static_range(WIDTH):
        numbers = numbers + (tl.load(pointer + row * WIDTH + i, mask=there, other=0.0).to(tl.float64),)
    return numbers


@triton.jit
def derivative_in(argument, row, there, active, SPEC: tl.constexpr):
    """(`active` or any coefficient is not 0, `derivative`) of one statistic that is a sum over columns."""
    WIDTH: tl.constexpr = width_of(SPEC)
    state = numbers_of(argument[STATE], row, there, WIDTH)
    COEFFICIENTS: tl.constexpr = 3 if SPEC[KIND] == MOMENTS else 1
    coefficient = numbers_of(argument[COEFFICIENT], row, there, COEFFICIENTS)
    for i in tl.static_range(COEFFICIENTS):
        active = active | (coefficient[i] != 0).to(tl.int32)
    factor = argument[FACTOR]
    if SPEC[KIND] == LOGSUMEXP_OF:
        factor = factor * argument[WEIGHT]
    return active, derivative(state, coefficient, factor, there, SPEC)


@triton.jit
def derivatives(arguments, out, rows, SPECS: tl.constexpr, R: tl.constexpr):
    """out (1 + 4 K, rows) fp32: whether any coefficient of the row is not 0, and `derivative` of each statistic."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = row < rows
    active = tl.zeros([R], tl.int32)
    for k in tl.static_range(len(SPECS)):
        argument = arguments[k]
        if SPECS[k][KIND] == SCORE or SPECS[k][KIND] == EXTREME:
            for c in range(SPECS[k][COUNT]):
                one = tl.load(argument[COEFFICIENT] + row * SPECS[k][COUNT] + c, mask=there, other=0.0)
                active = active | (one != 0).to(tl.int32)
        elif SPECS[k][KIND] != COUNT_SEEN:
            active, found = derivative_in(argument, row, there, active, tl.constexpr(SPECS[k]))
            for i in tl.static_range(4):
                tl.store(out + (1 + 4 * k + i) * wide(rows) + row, found[i], mask=there)
    tl.store(out + row, active.to(tl.float32), mask=there)


@triton.jit
def per_row(numbers, which, rows, row, there):
    """One of the rows of `derivatives`, as (R, 1)."""
    return tl.load(numbers + which * rows + row, mask=there, other=0.0)[:, None]


@triton.jit
def add_picked(g, argument, row, there, column, begin, first, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """The coefficients of a statistic that picks columns, where they are in this block."""
    for c in range(SPEC[COUNT]):
        if SPEC[KIND] == EXTREME:
            at = argument[STATE] + row * (2 * SPEC[COUNT]) + SPEC[COUNT] + c
            place = tl.load(at, mask=there, other=-1.0).to(tl.int64)
        else:
            place = tl.load(wanted(argument, row, SPEC) + c, mask=there, other=-1)
        place = tl.where(place >= 0, place - first - begin, -1)
        here = (place >= 0) & (place < BLOCK)
        if tl.max(here.to(tl.int32), 0) > 0:
            coefficient = tl.load(argument[COEFFICIENT] + row * SPEC[COUNT] + c, mask=there, other=0.0)
            hit = here[:, None] & (column[None, :] - begin == place.to(tl.int32)[:, None])
            g = tl.where(hit, g + coefficient.to(tl.float32)[:, None], g)
    return g


@triton.jit
def larger(most, g):
    """So written, NaN passes, and stays."""
    size = tl.abs(g)
    return tl.where((size > most) | (size != size), size, most)


@triton.jit
def gathered(sums, g, along, cap, vectors, column, inside, HOW: tl.constexpr, SUMS: tl.constexpr):
    """(∂L/∂a, the sums with this block's part), from g = ∂L/∂z."""
    bias, class_scale, class_shift, scale, largest = sums
    if SUMS[TO_CLASS_SHIFT]:
        class_shift += g
    if SUMS[TO_CLASS_SCALE]:
        class_scale += g * cap
    if SUMS[TO_SCALE]:
        part = g * cap
        if HOW[CLASS_SCALE]:
            part *= tl.load(vectors[1] + column, mask=inside, other=0.0)[None, :]
        scale += tl.sum(tl.sum(tl.where(g == 0, 0.0, part), 1), 0).to(tl.float64)
    g = g * along
    if SUMS[TO_BIAS]:
        bias += g
    if SUMS[TO_LARGEST]:
        largest = larger(largest, g)
    return g, (bias, class_scale, class_shift, scale, largest)


@triton.jit
def no_sums(scale, R: tl.constexpr, BLOCK: tl.constexpr):
    zero = tl.zeros([R, BLOCK], tl.float32)
    return (zero, zero, zero, scale, zero)


@triton.jit
def store_sums(sums, into, group, column, inside, columns, vectors, factor, SUMS: tl.constexpr):
    """Column sums of one group of rows into its row of the buffers; the sum for `scale` is stored by the caller."""
    at = group.to(tl.int64) * columns + column
    if SUMS[TO_BIAS]:
        tl.store(into[0] + at, tl.sum(sums[0], 0), mask=inside)
    if SUMS[TO_CLASS_SCALE]:
        tl.store(into[1] + at, tl.sum(sums[1], 0) * factor, mask=inside)
    if SUMS[TO_CLASS_SHIFT]:
        tl.store(into[2] + at, tl.sum(sums[2], 0), mask=inside)
    if SUMS[TO_LARGEST]:
        # The maximum over an axis drops NaN on some targets.
        bad = tl.max((sums[4] != sums[4]).to(tl.int32), 0) > 0
        most = tl.max(tl.where(sums[4] != sums[4], 0.0, sums[4]), 0)
        tl.store(into[4] + at, tl.where(bad, float("nan"), most), mask=inside)


@triton.jit
def score_factor(scale, HOW: tl.constexpr):
    """The number `scale`, however it is given."""
    if HOW[SCALE] == MEMORY:
        return tl.load(scale).to(tl.float32)
    elif HOW[SCALE] == NUMBER:
        return tl.full([], 1.0, tl.float32) * scale
    else:
        return tl.full([], 1.0, tl.float32)


@triton.jit
def slopes(z, arguments, numbers, rows, row, there, column, inside, begin, first, columns, SPECS: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """∂L/∂z of a block: exactly 0 where the score is -inf, and in rows whose coefficients are all 0."""
    g = tl.zeros_like(z)
    for k in tl.static_range(len(SPECS)):
        argument = arguments[k]
        if SPECS[k][KIND] == SCORE or SPECS[k][KIND] == EXTREME:
            g = add_picked(g, argument, row, there, column, begin, first, tl.constexpr(SPECS[k]), BLOCK)
        elif SPECS[k][KIND] != COUNT_SEEN:
            weight = per_row(numbers, 1 + 4 * k, rows, row, there)
            center = per_row(numbers, 2 + 4 * k, rows, row, there)
            offset = per_row(numbers, 3 + 4 * k, rows, row, there)
            level = per_row(numbers, 4 + 4 * k, rows, row, there)
            v = operand_of(z, argument, row, there, column, inside, tl.constexpr(SPECS[k]))
            r = row_parameter(argument, row, there, tl.constexpr(SPECS[k]))
            one = slope(z, v, r, argument[FACTOR], argument[PARAMETER], argument[WEIGHT], weight, center, offset, level,
                        tl.constexpr(SPECS[k]))  # fmt: skip
            seen = seen_by(z, argument, row, there, column, inside, first, columns, tl.constexpr(SPECS[k]))
            g += tl.where(seen, one, 0.0)
    if len(SPECS) > 0:
        active = per_row(numbers, 0, rows, row, there) != 0
        g = tl.where(active & (z != -float("inf")), g, 0.0)
    return g


@triton.jit
def gradient(data, stride, out, out_stride, rows, columns, first, first_row, vectors, softcap, scale, arguments,
             numbers, across, numbers_across, sums, group_rows, part_columns, SPECS: tl.constexpr, ACROSS: tl.constexpr,
             HOW: tl.constexpr, SUMS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out = ∂L/∂a for one group of rows in one part of the columns. `numbers` is what `derivatives` made.

    ACROSS are statistics of columns, as those of rows are of the transposed block; no loads or stores are added but
    those of what belongs to rows and columns.

    `out` may lie in the tile's memory with a narrower type: then its block of columns covers blocks of the tile from
    the same row that are further left, or half of the same one. All columns are one part then, walked from left to
    right, and nobody stores before everybody has loaded this block.
    """
    group, part = tl.program_id(0), tl.program_id(1)
    scale_sum = tl.zeros([], tl.float64)
    end = tl.minimum(columns, (part + 1) * part_columns)
    for begin in range(part * part_columns, end, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < end
        gathering = no_sums(scale_sum, R, BLOCK)
        for top in range(0, group_rows, R):
            row = group.to(tl.int64) * group_rows + top + tl.arange(0, R)
            there = (row < rows) & (top + tl.arange(0, R) < group_rows)
            here = there[:, None] & inside[None, :]
            a = tl.load(data + row[:, None] * stride + column[None, :], mask=here, other=-float("inf")).to(tl.float32)
            tl.debug_barrier()
            z, along, cap = scores_of(a, vectors, softcap, scale, row, there, column, inside, HOW)
            g = slopes(z, arguments, numbers, wide(rows), row, there, column, inside, begin, first, columns,
                       SPECS, BLOCK)  # fmt: skip
            if len(ACROSS) > 0:
                mine, theirs = row.to(tl.int32), column.to(tl.int64)
                below = slopes(tl.trans(z), across, numbers_across, wide(columns), theirs, inside, mine, there,
                               group * group_rows + top, first_row, rows, ACROSS, R)  # fmt: skip
                g += tl.trans(below)
            g, gathering = gathered(gathering, g, along, cap, vectors, column, inside, HOW, SUMS)
            at = out + row[:, None] * out_stride + column[None, :]
            tl.store(at, g.to(out.dtype.element_ty), mask=here)
        scale_sum = gathering[3]
        store_sums(gathering, sums, group, column, inside, columns, vectors, score_factor(scale, HOW), SUMS)
    if SUMS[TO_SCALE]:
        tl.store(sums[3] + group * tl.num_programs(1) + part, scale_sum)


@triton.jit
def gradient_of_exponentials(data, stride, shift, shift_stride, shift_columns, rows, columns, first, step, vectors,
                             scale, arguments, numbers, sums, group_rows, part_columns,
                             SPECS: tl.constexpr, HOW: tl.constexpr, SUMS: tl.constexpr, FINE: tl.constexpr,
                             R: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """∂L/∂a in place of exponentials that LOGSUMEXP kept, `step` ≤ BLOCK columns at a time.

    A row of `shift` is for `shift_columns` columns: a block has one of them, or, where they are FINE, several."""
    group, part = tl.program_id(0), tl.program_id(1)
    end = tl.minimum(columns, (part + 1) * part_columns)
    for begin in range(part * part_columns, end, step):
        column = begin + tl.arange(0, BLOCK)
        inside = column < tl.minimum(end, begin + step)
        along = tl.full([1, 1], 1.0, tl.float32) * score_factor(scale, HOW)
        if HOW[CLASS_SCALE]:
            along = along * tl.load(vectors[1] + column, mask=inside, other=0.0)[None, :]
        gathering = no_sums(tl.zeros([], tl.float64), R, BLOCK)
        if FINE:
            at_shift = (column // shift_columns).to(tl.int64)[None, :] * shift_stride
        else:
            at_shift = tl.full([1, 1], 0, tl.int64) + wide(begin // shift_columns) * shift_stride
        for top in range(0, group_rows, R):
            row = group.to(tl.int64) * group_rows + top + tl.arange(0, R)
            there = (row < rows) & (top + tl.arange(0, R) < group_rows)
            here = there[:, None] & inside[None, :]
            at = data + row[:, None] * stride + column[None, :]
            e = tl.load(at, mask=here, other=0.0).to(tl.float32)
            tl.debug_barrier()  # an element may be stored by another thread than the one that loaded it
            g = tl.zeros_like(e)
            for k in tl.static_range(len(SPECS)):
                if SPECS[k][KIND] == LOGSUMEXP:
                    weight = per_row(numbers, 1 + 4 * k, wide(rows), row, there)
                    center = per_row(numbers, 2 + 4 * k, wide(rows), row, there)
                    known = there[:, None] & inside[None, :] if FINE else there[:, None]
                    factor = weight * exp(tl.load(shift + at_shift + row[:, None], mask=known, other=0.0) - center)
                    factor = tl.where(weight == 0, 0.0, factor)  # whatever the shift is
                    g += tl.where(e == 0, 0.0, e * factor)
            for k in tl.static_range(len(SPECS)):
                if SPECS[k][KIND] == SCORE:
                    g = add_picked(g, arguments[k], row, there, column, begin, first, tl.constexpr(SPECS[k]), BLOCK)
            g = tl.where(per_row(numbers, 0, wide(rows), row, there) != 0, g, 0.0)
            g, gathering = gathered(gathering, g, along, e, vectors, column, inside, HOW, SUMS)
            tl.store(at, g.to(data.dtype.element_ty), mask=here)
        store_sums(gathering, sums, group, column, inside, columns, vectors, 1.0, SUMS)
