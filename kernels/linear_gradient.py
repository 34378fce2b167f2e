"""Gradient of scores x Wᵀ out of the accumulators of the product: of a block of scores, only ∂L/∂a is ever in memory.

Programs have rows and classes as those of `linear_statistics` have. A program has all rows of its sums over rows, so
each leaves a row of them; these are added up in order afterwards, as those of `gradient` are.
"""

import triton
import triton.language as tl

from .gradient import gathered, no_sums, score_factor, slopes, store_sums
from .matmul import pick_from_block, product
from .scores import scores_of, wide
from .statistics import start, store_all, update_all
from .words import KIND, SCORE, TO_SCALE


@triton.jit
def halves_of(a, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(a, [BM, 2, BN // 2]), [0, 2, 1]))


@triton.jit
def pieces_of(a, BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr):
    """2 or 4 blocks of columns, from left to right."""
    left, right = halves_of(a, BM, BN)
    if PIECES == 2:
        return left, right
    else:
        return halves_of(left, BM, BN // 2) + halves_of(right, BM, BN // 2)


@triton.jit
def visited_block(states, z, arguments, partial, row, there, column, begin, inside, first, columns,
                  SPECS: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """The states after one more block; scores at columns are merged into theirs at once."""
    for k in tl.static_range(len(SPECS)):
        if SPECS[k][KIND] == SCORE:
            pick_from_block(z, row, there, column, begin, first, columns, arguments[k], tl.constexpr(SPECS[k]), B)
    return update_all(states, z, arguments, row, there, column, inside, first, columns, partial, 0, partial, -1, SPECS)


@triton.jit
def linear_gradient(x, x_stride, weight, weight_stride, out, out_stride, rows, columns, depth, first, first_row,
                    vectors, softcap, scale, arguments, numbers, across, numbers_across, visited, partial, sums,
                    part_columns, SPECS: tl.constexpr, ACROSS: tl.constexpr, VISITED: tl.constexpr, HOW: tl.constexpr,
                    SUMS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
                    PIECES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """out = ∂L/∂a of the scores x Wᵀ; `numbers` and `numbers_across` are what `derivatives` made. The scores are merged
    into the states of the statistics VISITED too. Part p of the grid's second axis takes `part_columns` classes."""
    B: tl.constexpr = BN // PIECES
    begin_row = tl.program_id(0).to(tl.int64) * BM
    row = begin_row + tl.arange(0, BM)
    there = row < rows
    part = tl.program_id(1)
    states = start(visited, row, there, VISITED, BM)
    scale_sum = tl.zeros([], tl.float64)
    end = tl.minimum(columns, (part + 1) * part_columns)
    for begin in range(part * part_columns, end, BN):
        a = product(x, x_stride, weight, weight_stride, begin_row, begin, rows, columns, depth, BM, BN, BK, EVEN,
                    UPCAST)  # fmt: skip
        # Some of the accumulators at a time: what is made of them needs registers too.
        pieces = pieces_of(a, BM, BN, PIECES)
        for piece in tl.static_range(PIECES):
            start_column = begin + piece * B
            column = start_column + tl.arange(0, B)
            inside = column < end
            here = there[:, None] & inside[None, :]
            # Rows beyond the last are the last once more: they must not be summed up.
            a = tl.where(here, pieces[piece], -float("inf"))
            z, along, cap = scores_of(a, vectors, softcap, scale, row, there, column, inside, HOW)
            g = slopes(z, arguments, numbers, wide(rows), row, there, column, inside, start_column, first, columns,
                       SPECS, B)  # fmt: skip
            if len(ACROSS) > 0:
                mine, theirs = row.to(tl.int32), column.to(tl.int64)
                below = slopes(tl.trans(z), across, numbers_across, wide(columns), theirs, inside, mine, there,
                               begin_row.to(tl.int32), first_row, rows, ACROSS, BM)  # fmt: skip
                g += tl.trans(below)
            g, gathering = gathered(no_sums(scale_sum, BM, B), g, along, cap, vectors, column, inside, HOW, SUMS)
            scale_sum = gathering[3]
            store_sums(gathering, sums, tl.program_id(0), column, inside, columns, vectors, score_factor(scale, HOW),
                       SUMS)  # fmt: skip
            at = tl.arange(0, BM)[:, None] * out_stride + tl.arange(0, B)[None, :]
            corner = out + begin_row * out_stride + wide(start_column)
            tl.store(corner + at, g.to(out.dtype.element_ty), mask=here)
            # Last, for the registers' sake.
            if len(VISITED) > 0:
                states = visited_block(states, z, visited, partial, row, there, column, start_column, inside, first,
                                       columns, VISITED, B)  # fmt: skip
    if SUMS[TO_SCALE]:
        tl.store(sums[3] + tl.program_id(0) * tl.num_programs(1) + part, scale_sum)
    store_all(states, visited, partial, part, tl.num_programs(1), row, rows, there, SPLIT, VISITED)
