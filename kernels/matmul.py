"""Statistics of scores x Wᵀ out of the accumulators of the product: no tile of scores is ever in memory.

One program has BM rows of x and a part of the classes, BN at a time. Programs that run together share their classes, so
that W is read from main memory once; x stays in the second-level cache.
"""

import triton
import triton.language as tl

from .scores import scores_of, wanted, wide
from .statistics import start, store_all, update_all
from .words import COUNT, KIND, SCORE, STATE


@triton.jit
def product(x, x_stride, weight, weight_stride, begin_row, begin, rows, columns, depth, BM: tl.constexpr,
            BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """x[row] · weight[column]ᵀ of BM rows from `begin_row` and BN classes from `begin` on, fp32.

    Operands keep their type up to the product, for the matrix units' sake; only the interpreter, whose half-precision
    products are wrong, gets them as fp32. Addresses are one 64-bit number and 32-bit offsets, for the registers' sake.
    """
    depths = tl.arange(0, BK)
    # Rows and classes beyond the last are the last once more: their products are thrown away.
    row = tl.minimum(tl.arange(0, BM), (rows - 1 - begin_row).to(tl.int32))
    column = tl.minimum(tl.arange(0, BN), columns - 1 - begin)
    left = x + begin_row * x_stride
    right = weight + wide(begin) * weight_stride
    at_left = row[:, None] * x_stride + depths[None, :]
    at_right = column[None, :] * weight_stride + depths[:, None]
    sums = tl.zeros([BM, BN], tl.float32)
    for k in range(0, depth, BK):
        if EVEN:
            a, b = tl.load(left + at_left), tl.load(right + at_right)
        else:
            a = tl.load(left + at_left, mask=(depths < depth - k)[None, :], other=0.0)
            b = tl.load(right + at_right, mask=(depths < depth - k)[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        left += BK
        right += BK
    return sums


@triton.jit
def pick_from_block(z, row, there, column, begin, first, columns, argument, SPEC: tl.constexpr, BN: tl.constexpr):
    """SCORE: each wanted column is in one block of one program, so its state is merged into at once; not where it lies
    beyond the last one here, in another tile."""
    for c in range(SPEC[COUNT]):
        place = tl.load(wanted(argument, row, SPEC) + c, mask=there, other=-1) - first
        place = tl.where(place < columns, place - begin, -1)
        here = there & (place >= 0) & (place < BN)
        if tl.max(here.to(tl.int32), 0) > 0:
            hit = column[None, :] - begin == place.to(tl.int32)[:, None]
            found = tl.sum(tl.where(hit & (z == z), z, 0.0), 1)
            found = tl.where(tl.max((hit & (z != z)).to(tl.int32), 1) > 0, float("nan"), found)
            at = argument[STATE] + row * SPEC[COUNT] + c
            tl.store(at, tl.load(at, mask=here, other=0.0) + found.to(tl.float64), mask=here)


@triton.jit
def states_of_columns(z, arguments, partial, row, there, begin_row, first_row, rows, column, inside, columns,
                      SPECS: tl.constexpr, BM: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Statistics of a block's columns over its rows, into a buffer for `merge_parts`: a part is a block of rows."""
    z = tl.trans(tl.where(there[:, None], z, -float("inf")))  # rows beyond the last are the last once more
    row, column = row.to(tl.int32), column.to(tl.int64)
    for k in tl.static_range(len(SPECS)):
        if SPECS[k][KIND] == SCORE:
            pick_from_block(z, column, inside, row, begin_row.to(tl.int32), first_row, rows, arguments[k],
                            tl.constexpr(SPECS[k]), BM)  # fmt: skip
    states = start(arguments, column, inside, SPECS, B)
    states = update_all(states, z, arguments, column, inside, row, there, first_row, rows, partial, 0, partial, -1,
                        SPECS)  # fmt: skip
    store_all(states, arguments, partial, tl.program_id(0), tl.num_programs(0), column, columns, inside, True, SPECS)


@triton.jit
def linear_statistics(x, x_stride, weight, weight_stride, rows, columns, depth, first, first_row, vectors, softcap,
                      scale, arguments, partial, across, partial_across, keep, keep_stride, shift, shift_stride,
                      part_columns, SPECS: tl.constexpr, ACROSS: tl.constexpr, HOW: tl.constexpr, KEEP: tl.constexpr,
                      SPLIT: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr,
                      BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Merge the scores x Wᵀ into the states of the rows; the statistic KEEP (−1: none) leaves its exponentials, with a
    shift for every BN / 2 columns. Part p of the grid's second axis takes `part_columns` classes, a multiple of BN.
    ACROSS are statistics of columns, of which the states of each block of rows are left apart."""
    begin_row = tl.program_id(0).to(tl.int64) * BM
    row = begin_row + tl.arange(0, BM)
    there = row < rows
    part = tl.program_id(1)
    states = start(arguments, row, there, SPECS, BM)
    end = tl.minimum(columns, (part + 1) * part_columns)
    for begin in range(part * part_columns, end, BN):
        a = product(x, x_stride, weight, weight_stride, begin_row, begin, rows, columns, depth, BM, BN, BK, EVEN,
                    UPCAST)  # fmt: skip
        # Half of the accumulators at a time: what is made of them needs registers too.
        halves = tl.split(tl.permute(tl.reshape(a, [BM, 2, BN // 2]), [0, 2, 1]))
        for half in tl.static_range(2):
            start_column = begin + half * (BN // 2)
            column = start_column + tl.arange(0, BN // 2)
            inside = column < end
            a = tl.where(inside[None, :], halves[half], -float("inf"))
            z, _, _ = scores_of(a, vectors, softcap, scale, row, there, column, inside, HOW)
            for k in tl.static_range(len(SPECS)):
                if SPECS[k][KIND] == SCORE:
                    pick_from_block(z, row, there, column, start_column, first, columns, arguments[k],
                                    tl.constexpr(SPECS[k]), BN // 2)  # fmt: skip
            states = update_all(states, z, arguments, row, there, column, inside, first, columns, keep, keep_stride,
                                shift + wide(start_column // (BN // 2)) * shift_stride, KEEP, SPECS)  # fmt: skip
            if len(ACROSS) > 0:
                states_of_columns(z, across, partial_across, row, there, begin_row, first_row, rows, column, inside,
                                  columns, ACROSS, BM, BN // 2)  # fmt: skip
    store_all(states, arguments, partial, part, tl.num_programs(1), row, rows, there, SPLIT, SPECS)
