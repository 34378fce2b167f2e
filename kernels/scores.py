"""From raw scores to scores, and what a statistic needs beside them.

Every array here is (R, B): some rows by one block of columns. What belongs to rows is (R,), to columns (B,).
"""

import triton
import triton.language as tl

from .elementwise import tanh_and_slope
from .words import (
    ABOVE,
    AT,
    BELOW,
    BIAS,
    CLASS_SCALE,
    CLASS_SHIFT,
    COLUMN_LEFT_OUT,
    COUNT,
    HIGH,
    LABEL_OF_COLUMN,
    LABEL_OF_ROW,
    LABELS,
    LOW,
    MATRIX,
    MEMORY,
    NONE,
    NUMBER,
    OPERAND,
    PARAMETER_OF_ROW,
    REST,
    ROW,
    SAME,
    SCALE,
    SHARED,
    SOFTCAP,
    TRANSPOSED,
    VALUES,
    VALUES_STRIDE,
    VECTOR,
)


@triton.jit
def wide(number):
    """A number as int64, also where the compiler or the interpreter knows it as a plain integer."""
    return tl.full([], 0, tl.int64) + number


@triton.jit
def places(data, stride, row, column, HOW: tl.constexpr):
    """Where the scores of some rows (R, 1) and columns (R or 1, B) lie; `stride` is that of the memory's rows."""
    if HOW[TRANSPOSED]:
        return data + column.to(tl.int64) * stride + row
    else:
        return data + row * stride + column


@triton.jit
def of_class(vector, row, there, column, inside, HOW: tl.constexpr):
    """A class vector beside a block of scores."""
    if HOW[TRANSPOSED]:
        return tl.load(vector + row, mask=there, other=0.0)[:, None]
    else:
        return tl.load(vector + column, mask=inside, other=0.0)[None, :]


@triton.jit
def scores_of(a, vectors, softcap, scale, row, there, column, inside, HOW: tl.constexpr):
    """z = class_scale · scale · cap(a + bias) + class_shift, dz/da and cap(a + bias), all fp32.

    `vectors` are (bias, class_scale, class_shift). Where a is -inf, z is -inf and the cap 0.
    """
    masked = a == -float("inf")
    cap = a
    if HOW[BIAS]:
        cap += of_class(vectors[0], row, there, column, inside, HOW)
    slope = tl.full([1, 1], 1.0, tl.float32)
    if HOW[SCALE] == NUMBER:
        slope = slope * scale
    if HOW[SCALE] == MEMORY:
        slope = slope * tl.load(scale).to(tl.float32)
    if HOW[CLASS_SCALE]:
        slope = slope * of_class(vectors[1], row, there, column, inside, HOW)
    z, along = cap, slope
    if HOW[SOFTCAP]:
        z, flatness = tanh_and_slope(cap / softcap)
        z = z * softcap
        cap = z
        along = slope * flatness
    z = z * slope
    if HOW[CLASS_SHIFT]:
        z += of_class(vectors[2], row, there, column, inside, HOW)
    if HOW[SOFTCAP] or HOW[SCALE] != NONE or HOW[CLASS_SCALE]:
        z = tl.where(masked, -float("inf"), z)
    return z, along, tl.where(z == -float("inf"), 0.0, cap)


@triton.jit
def wanted(argument, row, SPEC: tl.constexpr):
    """Where the columns lie that SCORE wants of each row."""
    if SPEC[SHARED]:
        return argument[AT] + row * 0
    else:
        return argument[AT] + row * SPEC[COUNT]


@triton.jit
def place_of(rest, row, there, first, columns):
    """Where in the tile the class `rest[row]` lies; −1 where it does not."""
    place = tl.load(rest + row, mask=there, other=-1) - first
    return tl.where((place >= 0) & (place < columns), place, -1).to(tl.int32)


@triton.jit
def seen_by(z, argument, row, there, column, inside, first, columns, SPEC: tl.constexpr):
    """Which scores count: those that are not -inf and that `where` does not hide. Thresholds do not hide NaN."""
    seen = z != -float("inf")
    if SPEC[REST]:
        seen = seen & (column[None, :] != place_of(argument[COLUMN_LEFT_OUT], row, there, first, columns)[:, None])
    if SPEC[LABELS]:
        mine = tl.load(argument[LABEL_OF_ROW] + row, mask=there, other=0)[:, None]
        theirs = tl.load(argument[LABEL_OF_COLUMN] + column, mask=inside, other=0)[None, :]
        if SPEC[LABELS] == SAME:
            seen = seen & (mine == theirs)
        else:
            seen = seen & (mine != theirs)
    if SPEC[ABOVE]:
        low = tl.load(argument[LOW] + row, mask=there, other=0.0)[:, None]
        seen = seen & ((z > low) | (z != z) | (low != low))
    if SPEC[BELOW]:
        high = tl.load(argument[HIGH] + row, mask=there, other=0.0)[:, None]
        seen = seen & ((z < high) | (z != z) | (high != high))
    return seen


@triton.jit
def operand_of(z, argument, row, there, column, inside, SPEC: tl.constexpr):
    """v: ones, a class vector or a matrix."""
    if SPEC[OPERAND] == VECTOR:
        return tl.load(argument[VALUES] + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    elif SPEC[OPERAND] == MATRIX:
        at = argument[VALUES] + row[:, None] * argument[VALUES_STRIDE] + column[None, :]
        return tl.load(at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
    else:
        tl.static_assert(SPEC[OPERAND] == NONE)
        return tl.full([1, 1], 1.0, tl.float32)


@triton.jit
def row_parameter(argument, row, there, SPEC: tl.constexpr):
    """The row parameter as (R, 1), 0 where there is none."""
    if SPEC[ROW]:
        return tl.load(argument[PARAMETER_OF_ROW] + row, mask=there, other=0.0)[:, None]
    else:
        return tl.full([1, 1], 0.0, tl.float32)
