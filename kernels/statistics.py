"""Statistics of a tile in memory: one program per few rows (and part of the columns), walking blocks of columns."""

import triton
import triton.language as tl

from .elementwise import exp
from .extremes import loaded_list, store_list, with_block
from .scores import operand_of, places, row_parameter, scores_of, seen_by, wanted, wide
from .states import finished, identity, loaded, merged, raised, store, updated, width_of
from .words import COUNT, EXTREME, FACTOR, KIND, PARAMETER, SCORE, SLOTS, STATE, TRANSPOSED, WEIGHT


@triton.jit
def start(arguments, row, there, SPECS: tl.constexpr, R: tl.constexpr):
    """The states of all statistics before the first column."""
    states = ()
    for k in tl.static_range(len(SPECS)):
        if SPECS[k][KIND] == EXTREME:
            entries = loaded_list(arguments[k][STATE], row, there, arguments[k][FACTOR], tl.constexpr(SPECS[k]))
            states = states + ((entries,),)
        else:
            states = states + (identity(tl.constexpr(SPECS[k]), R),)
    return states


@triton.jit
def pick_scores(data, stride, row, there, first, columns, vectors, softcap, scale, argument, HOW: tl.constexpr,
                SPEC: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """SCORE: fetched from where they lie in the tile; each has one place, so its state is merged into at once."""
    slot = tl.arange(0, SPEC[SLOTS])
    here = there[:, None] & (slot < SPEC[COUNT])[None, :]
    place = tl.load(wanted(argument, row, SPEC)[:, None] + slot[None, :], mask=here, other=-1) - first
    here = here & (place >= 0) & (place < columns)
    a = tl.load(places(data, stride, row[:, None], place, HOW), mask=here, other=0.0).to(tl.float32)
    if HOW[TRANSPOSED]:
        z, _, _ = scores_of(a, vectors, softcap, scale, row, there, slot, slot >= 0, HOW)
    else:  # the columns of each row are others
        flat_place, flat_here = tl.reshape(place, [R * SPEC[SLOTS]]), tl.reshape(here, [R * SPEC[SLOTS]])
        flat = tl.reshape(a, [1, R * SPEC[SLOTS]])
        z, _, _ = scores_of(flat, vectors, softcap, scale, row, there, flat_place, flat_here, HOW)
        z = tl.reshape(z, [R, SPEC[SLOTS]])
    at = argument[STATE] + row[:, None] * SPEC[COUNT] + slot[None, :]
    tl.store(at, tl.load(at, mask=here, other=0.0) + z.to(tl.float64), mask=here)


@triton.jit
def kept_block(state, z, seen, row, there, column, inside, keep, keep_stride, shift):
    """LOGSUMEXP of factor 1 that keeps its exponentials, relative to this block's maximum."""
    z = tl.where(seen, z, -float("inf"))
    top = tl.max(z, 1)
    pivot = tl.where(top == -float("inf"), 0.0, top)
    e = exp(z - pivot[:, None])
    some = tl.max(inside.to(tl.int32), 0)  # a block may lie beyond the last column, and has no shift then
    tl.store(shift + row, pivot, mask=there.to(tl.int32) * some > 0)
    # May overwrite the tile, as far as this block and those to the left of it. It is safe: every value stored depends
    # on `top`, which no thread has before all threads' loads of this block are in it.
    at = keep + row[:, None] * keep_stride + column[None, :]
    tl.store(at, e.to(keep.dtype.element_ty), mask=there[:, None] & inside[None, :])
    new, common, factor = raised(state[0], top)
    return (new, state[1] * factor + tl.sum(e, 1).to(tl.float64) * exp(top - common))


@triton.jit
def update_all(states, z, arguments, row, there, column, inside, first, columns, keep, keep_stride, shift,
               KEEP: tl.constexpr, SPECS: tl.constexpr):  # fmt: skip
    """All states after one more block."""
    result = ()
    for k in tl.static_range(len(SPECS)):
        one = states[k]
        argument = arguments[k]
        if SPECS[k][KIND] != SCORE:
            seen = seen_by(z, argument, row, there, column, inside, first, columns, tl.constexpr(SPECS[k]))
            if k == KEEP:
                one = kept_block(one, z, seen, row, there, column, inside, keep, keep_stride, shift)
            elif SPECS[k][KIND] == EXTREME:
                one = (with_block(one[0], z, seen, first + column, argument[FACTOR], tl.constexpr(SPECS[k])),)
            else:
                v = operand_of(z, argument, row, there, column, inside, tl.constexpr(SPECS[k]))
                r = row_parameter(argument, row, there, tl.constexpr(SPECS[k]))
                one = updated(one, z, v, seen, r, argument[FACTOR], argument[PARAMETER], argument[WEIGHT],
                              tl.constexpr(SPECS[k]))  # fmt: skip
        result = result + (one,)
    return result


@triton.jit
def store_all(states, arguments, partial, part, parts, row, rows, there, SPLIT: tl.constexpr, SPECS: tl.constexpr):
    """Into the states proper, merged; or, where columns are split, into a buffer for `merge_parts`."""
    for k in tl.static_range(len(SPECS)):
        state = arguments[k][STATE]
        if SPECS[k][KIND] == EXTREME:
            store_list(state, row, there, states[k][0], arguments[k][FACTOR], tl.constexpr(SPECS[k]))
        elif SPECS[k][KIND] != SCORE:
            mine = finished(states[k], tl.constexpr(SPECS[k]))
            if SPLIT:
                store(partial, wide(k * parts + part) * 3 * rows + row, there, rows, mine)
            else:
                at = row * len(mine)
                before = loaded(state, at, there, 1, tl.constexpr(SPECS[k]))
                store(state, at, there, 1, merged(before, mine, tl.constexpr(SPECS[k])))


@triton.jit
def statistics(data, stride, rows, columns, first, vectors, softcap, scale, arguments, partial, keep, keep_stride,
               shift, shift_stride, step, part_columns,
               SPECS: tl.constexpr, HOW: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Merge a tile into the states of its rows; the statistic KEEP (−1: none) leaves its exponentials.

    `step` ≤ BLOCK columns at a time; part p of the grid's second axis takes `part_columns` of them, a multiple of step.
    Where TRANSPOSED, the rows are the memory's columns: nothing else changes.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = row < rows
    part = tl.program_id(1)
    if part == 0:
        for k in tl.static_range(len(SPECS)):
            if SPECS[k][KIND] == SCORE:
                pick_scores(data, stride, row, there, first, columns, vectors, softcap, scale, arguments[k], HOW,
                            tl.constexpr(SPECS[k]), R)  # fmt: skip
    if KEEP >= 0:
        tl.debug_barrier()  # what was picked may be overwritten from here on
    states = start(arguments, row, there, SPECS, R)
    end = tl.minimum(columns, (part + 1) * part_columns)
    for begin in range(part * part_columns, end, step):
        column = begin + tl.arange(0, BLOCK)
        inside = column < tl.minimum(end, begin + step)
        at = places(data, stride, row[:, None], column[None, :], HOW)
        a = tl.load(at, mask=there[:, None] & inside[None, :], other=-float("inf")).to(tl.float32)
        z, _, _ = scores_of(a, vectors, softcap, scale, row, there, column, inside, HOW)
        states = update_all(states, z, arguments, row, there, column, inside, first, columns, keep, keep_stride,
                            shift + wide(begin // step) * shift_stride, KEEP, SPECS)  # fmt: skip
    store_all(states, arguments, partial, part, tl.num_programs(1), row, rows, there, SPLIT, SPECS)


@triton.jit
def merge_parts_of(partial, k, parts, rows, row, there, into, SPEC: tl.constexpr):
    at = row * width_of(SPEC)
    state = loaded(into, at, there, 1, SPEC)
    for part in range(parts):
        state = merged(state, loaded(partial, wide(k * parts + part) * 3 * rows + row, there, rows, SPEC), SPEC)
    store(into, at, there, 1, state)


@triton.jit
def merge_parts(partial, parts, rows, arguments, SPECS: tl.constexpr, R: tl.constexpr):
    """The states of parts of the columns, merged from left to right into the states proper."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    for k in tl.static_range(len(SPECS)):
        if SPECS[k][KIND] != SCORE and SPECS[k][KIND] != EXTREME:
            merge_parts_of(partial, k, parts, rows, row, row < rows, arguments[k][STATE], tl.constexpr(SPECS[k]))
