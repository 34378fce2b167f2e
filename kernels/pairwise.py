"""Sums over the pairs of a list: csrc/pairwise.h on a device.

A program has some consecutive items, of one list or of several, and walks over all partners of each: a pair is computed
once for either item, and nothing is added across programs. Which items are whose partners, and what weights are made
of, come as one number per item. Not run on a GPU so far.
"""

import triton
import triton.language as tl

from .elementwise import exp, log1p

SOFTPLUS = tl.constexpr(0)
LOGISTIC = tl.constexpr(1)
ONE = tl.constexpr(0)  # forms of a pair's weight
GAP = tl.constexpr(1)  # |a_i - a_j|
PRODUCT = tl.constexpr(2)  # |a_i - a_j| (table[|rank_i - rank_j|] + |b_i - b_j|)
OWN = tl.constexpr(3)  # a_i, over all ordered pairs


@triton.jit
def falling(x):
    """(1 / (1 + e^x), its slope's size, e^-|x|)."""
    u = exp(-tl.abs(x))
    part = 1.0 / (1.0 + u)
    return tl.where(x < 0, part, u * part), u * part * part, u


@triton.jit
def value_and_slope(x, FUNCTION: tl.constexpr):
    """f(x) and -f'(x)."""
    down, bell, u = falling(x)
    if FUNCTION == SOFTPLUS:
        return log1p(u) + tl.where(x < 0, -x, 0.0), down
    else:
        return down, bell


@triton.jit
def block_of(begin, stop, items, BLOCK: tl.constexpr):
    """A program's items, whether they are there, the ends of their lists, and those of all their partners."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < items
    low = tl.load(begin + i, mask=there, other=items)
    high = tl.load(stop + i, mask=there, other=0)
    return i, there, low, high, tl.min(low, 0), tl.max(high, 0)


@triton.jit
def pair_sums(scores, relevance, counts, a, b, rank, table, begin, stop, losses, gradient, pairs, items, sigma, scale,
              FUNCTION: tl.constexpr, FORM: tl.constexpr, ALL: tl.constexpr, GAPS: tl.constexpr, TABLE: tl.constexpr,
              BLOCK: tl.constexpr, PARTNERS: tl.constexpr):  # fmt: skip
    """Of each item i: losses and numbers of the pairs that begin with it, and the derivative in its score of all.
    ALL: every item counts. GAPS, TABLE: whether b and the table are there."""
    i, there, low, high, first, last = block_of(begin, stop, items, BLOCK)
    s_i = tl.load(scores + i, mask=there, other=0.0)[:, None]
    r_i = tl.load(relevance + i, mask=there, other=0.0)[:, None]
    counts_i = there
    if not ALL:
        counts_i = there & (tl.load(counts + i, mask=there, other=0) != 0)
    if FORM != ONE:
        a_i = tl.load(a + i, mask=there, other=0.0)[:, None]
    if GAPS:
        b_i = tl.load(b + i, mask=there, other=0.0)[:, None]
    if TABLE:
        rank_i = tl.load(rank + i, mask=there, other=0)[:, None]
    loss = tl.zeros([BLOCK, PARTNERS], tl.float32)
    slope = tl.zeros([BLOCK, PARTNERS], tl.float32)
    number = tl.zeros([BLOCK, PARTNERS], tl.int32)
    for start in range(first, last, PARTNERS):
        j = start + tl.arange(0, PARTNERS).to(tl.int64)
        here = j < last
        counts_j = here
        if not ALL:
            counts_j = here & (tl.load(counts + j, mask=here, other=0) != 0)
        pair = counts_i[:, None] & counts_j[None, :] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        r_j = tl.load(relevance + j, mask=here, other=0.0)[None, :]
        x = (s_i - tl.load(scores + j, mask=here, other=0.0)[None, :]) * sigma
        if FORM == OWN:
            a_j = tl.load(a + j, mask=here, other=0.0)[None, :]
            value, down = value_and_slope(x, FUNCTION)
            _, up = value_and_slope(-x, FUNCTION)
            loss += tl.where(pair, a_i * value, 0.0)
            slope += tl.where(pair, a_j * up - a_i * down, 0.0)
            number += tl.where(pair, 1, 0)
        else:
            above = pair & (r_i > r_j)
            below = pair & (r_i < r_j)
            value, down = value_and_slope(tl.where(below, -x, x), FUNCTION)
            if FORM != ONE:
                weight = tl.abs(a_i - tl.load(a + j, mask=here, other=0.0)[None, :])
                if FORM == PRODUCT:
                    by = tl.zeros([BLOCK, PARTNERS], tl.float32)
                    if GAPS:
                        by = tl.abs(b_i - tl.load(b + j, mask=here, other=0.0)[None, :])
                    if TABLE:
                        apart = tl.abs(rank_i - tl.load(rank + j, mask=here, other=0)[None, :])
                        by += tl.load(table + apart, mask=pair, other=0.0)
                    weight *= by
                value *= weight
                down *= weight
            loss += tl.where(above, value, 0.0)
            slope += tl.where(above, -down, tl.where(below, down, 0.0))
            number += tl.where(above, 1, 0)
    tl.store(losses + i, tl.sum(loss, 1) * scale, mask=there)
    tl.store(gradient + i, tl.sum(slope, 1) * (sigma * scale), mask=there)
    tl.store(pairs + i, tl.sum(number, 1), mask=there)


@triton.jit
def position_sums(scores, counts, upstream, begin, stop, out, items, sigma, ALL: tl.constexpr, BACKWARD: tl.constexpr,
                  BLOCK: tl.constexpr, PARTNERS: tl.constexpr):  # fmt: skip
    """Soft positions, or from their upstream gradients those of the scores."""
    i, there, low, high, first, last = block_of(begin, stop, items, BLOCK)
    s_i = tl.load(scores + i, mask=there, other=0.0)[:, None]
    counts_i = there
    if not ALL:
        counts_i = there & (tl.load(counts + i, mask=there, other=0) != 0)
    if BACKWARD:
        c_i = tl.load(upstream + i, mask=there, other=0.0)[:, None]
    total = tl.zeros([BLOCK, PARTNERS], tl.float32)
    for start in range(first, last, PARTNERS):
        j = start + tl.arange(0, PARTNERS).to(tl.int64)
        here = j < last
        counts_j = here
        if not ALL:
            counts_j = here & (tl.load(counts + j, mask=here, other=0) != 0)
        pair = counts_i[:, None] & counts_j[None, :] & (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        pair = pair & (i[:, None] != j[None, :])
        down, bell, _ = falling((s_i - tl.load(scores + j, mask=here, other=0.0)[None, :]) * sigma)
        if BACKWARD:
            term = bell * (tl.load(upstream + j, mask=here, other=0.0)[None, :] - c_i)
        else:
            term = down
        total += tl.where(pair, term, 0.0)
    found = tl.sum(total, 1)
    if BACKWARD:
        found *= sigma
    else:
        found = tl.where(counts_i, found + 1.0, 0.0)
    tl.store(out + i, found, mask=there)
