"""The k largest scores of a row: a list, kept as integers whose order is the list's order.

An entry is (key, −column) in one int64, key = factor · z as an integer of the same order. So one integer maximum finds
the largest score, ties go to the lowest column, and NaN comes before all (as in torch.topk).
"""

import triton
import triton.language as tl

from .words import COUNT, SLOTS

EMPTY = tl.constexpr(-(2**63))


@triton.jit
def entry(key, column):
    key = tl.where(key == 0, 0.0, key)  # −0 is no smaller than 0
    bits = tl.where(key != key, float("nan"), key).to(tl.int32, bitcast=True) & tl.where(key != key, 0x7FFFFFFF, -1)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - column.to(tl.int64))


@triton.jit
def key_of(entries):
    ordered = (entries >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def column_of(entries):
    return 0xFFFFFFFF - (entries & 0xFFFFFFFF)


@triton.jit
def loaded_list(state, row, there, factor, SPEC: tl.constexpr):
    """(R, slots) entries in no order: empty ones below all others and all different, slots past the count unused."""
    slot = tl.arange(0, SPEC[SLOTS])
    at = state + row[:, None] * (2 * SPEC[COUNT]) + slot[None, :]
    used = there[:, None] & (slot < SPEC[COUNT])[None, :]
    z = tl.load(at, mask=used, other=0.0).to(tl.float32)
    column = tl.load(at + SPEC[COUNT], mask=used, other=-1.0).to(tl.int64)
    return tl.where(column >= 0, entry(factor * z, column), EMPTY + slot.to(tl.int64)[None, :])


@triton.jit
def with_block(entries, z, seen, ids, factor, SPEC: tl.constexpr):
    """The list after scores z (R, B) of the classes `ids` (B,)."""
    used = (tl.arange(0, SPEC[SLOTS]) < SPEC[COUNT])[None, :]
    new = tl.where(seen, entry(factor * z, ids[None, :]), EMPTY)
    best = tl.max(new, 1)
    last = tl.min(tl.where(used, entries, 2**63 - 1), 1)
    # Scores beyond the last on the list are rare, and the list's order does not matter while it grows.
    while tl.max((best > last).to(tl.int32), 0) > 0:
        replace = used & (entries == last[:, None]) & (best > last)[:, None]
        entries = tl.where(replace, best[:, None], entries)
        new = tl.where(new == best[:, None], EMPTY, new)
        best = tl.max(new, 1)
        last = tl.min(tl.where(used, entries, 2**63 - 1), 1)
    return entries


@triton.jit
def store_list(state, row, there, entries, factor, SPEC: tl.constexpr):
    """Sorted, as a state: scores, then columns."""
    slot = tl.arange(0, SPEC[SLOTS])
    used = (slot < SPEC[COUNT])[None, :]
    entries = tl.sort(tl.where(used, entries, EMPTY), 1, True)
    empty = entries < EMPTY + SPEC[SLOTS]
    at = state + row[:, None] * (2 * SPEC[COUNT]) + slot[None, :]
    z = tl.where(empty, -factor * float("inf"), factor * key_of(entries))
    here = there[:, None] & used
    tl.store(at, z.to(tl.float64), mask=here)
    tl.store(at + SPEC[COUNT], tl.where(empty, -1.0, column_of(entries).to(tl.float64)), mask=here)
