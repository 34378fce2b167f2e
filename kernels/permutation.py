"""Products with relaxed permutation matrices that are never stored: csrc/permutation.h on a device.

A program has some consecutive places, or items, of one list and walks over those of the other kind that are in their
band, whose two ends it looks for first: away from the peak logits fall, in either argument. Nothing is added across
programs. SoftSort of power 1 goes the way of the others. Exponents are differences in fp64, rounded to fp32; sums are
fp32 along a list and fp64 at the end. Not run on a GPU so far.
"""

import triton
import triton.language as tl

from .elementwise import exp

NEURAL_SORT = tl.constexpr(0)
SOFT_SORT = tl.constexpr(1)
SOFT_SORT_SQUARED = tl.constexpr(2)
WIDTH = tl.constexpr(128)  # places that are looked at side by side in search of a band's end


@triton.jit
def scale_of(tau, RELAXATION: tl.constexpr):
    """What scores are multiplied by."""
    return 1.0 / (tl.sqrt(tau) if RELAXATION == SOFT_SORT_SQUARED else tau)


@triton.jit
def logits(own_x, own_p, other_x, other_p, RELAXATION: tl.constexpr):
    """D / tau, in fp64."""
    if RELAXATION == NEURAL_SORT:
        return own_x * other_x - other_p - own_p
    else:
        apart = own_x - other_x
        return -(apart * apart if RELAXATION == SOFT_SORT_SQUARED else tl.abs(apart))


@triton.jit
def sides(t, tau, begin, lengths, counts, x, a, w, c, RELAXATION: tl.constexpr, BLOCK: tl.constexpr):
    """x, the scores less a middle one, in fp64. D / tau is w_i x_j - a_j - c_i of NeuralSort: a is A less A_1, by its
    steps. Of a list that is not finite x, a and c are NaN. A program has a list."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    first, length, count = tl.load(begin + row), tl.load(lengths + row), tl.load(counts + row)
    t, x, a, w, c = t + first, x + first, a + first, w + first, c + first
    strength, some = tl.load(tau + row), count > 0
    scale = scale_of(strength, RELAXATION)
    top, bottom = tl.load(t, mask=some, other=0.0), tl.load(t + count - 1, mask=some, other=0.0)
    finite = (tl.abs(top) < float("inf")) & (tl.abs(bottom) < float("inf")) & (strength > 0)
    middle = tl.load(t + count // 2, mask=some, other=0.0).to(tl.float64)
    carry = tl.full([], 0, tl.float64)
    for start in range(0, length, BLOCK):
        k = start + lane
        here = k < count
        own = (tl.load(t + k, mask=here, other=0.0).to(tl.float64) - middle) * scale
        own = tl.where(finite, own, float("nan"))
        tl.store(x + k, own, mask=here)
        if RELAXATION == NEURAL_SORT:
            previous = (tl.load(t + k - 1, mask=here & (k > 0), other=0.0).to(tl.float64) - middle) * scale
            step = tl.where(here & (k > 0), (previous - own) * (2 * k - count).to(tl.float64), 0.0)
            sums, weight = carry + tl.cumsum(step, 0), (count - 1 - 2 * k).to(tl.float64)
            carry += tl.sum(step, 0)
            tl.store(a + k, tl.where(finite, sums, float("nan")), mask=here)
            tl.store(w + k, weight, mask=here)
            tl.store(c + k, weight * own - sums, mask=here)


@triton.jit
def border(low, high, near_x, near_p, other_x, other_p, cutoff, LEAVES: tl.constexpr, RELAXATION: tl.constexpr):
    """The first of others [low, high) that is in the band of one, or with LEAVES is not any more; `high` if none is."""
    lane = tl.arange(0, WIDTH)
    while low < high:
        step = (high - low + (WIDTH - 1)) // WIDTH
        at = low + step * lane
        here = at < high
        x = tl.load(other_x + at, mask=here, other=0.0)
        p = tl.load(other_p + at, mask=here, other=0.0) if RELAXATION == NEURAL_SORT else x
        inside = logits(near_x, near_p, x, p, RELAXATION) >= -cutoff
        before = inside if LEAVES else inside == 0
        passed = tl.sum((here & before).to(tl.int64), 0)  # these come first
        high = tl.minimum(high, low + step * passed)
        low = tl.where(passed == 0, low, low + step * (passed - 1) + 1)
    return low


@triton.jit
def block_of(
    lists, firsts, begin, lengths, counts, own_x, own_p, other_x, other_p, cutoff,
    RELAXATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's list, where it begins, how many it has and how many count; its own ones; the ends of their band."""
    program = tl.program_id(0)
    row, first = tl.load(lists + program), tl.load(firsts + program)
    start, length, count = tl.load(begin + row), tl.load(lengths + row), tl.load(counts + row)
    own_x, own_p, other_x, other_p = own_x + start, own_p + start, other_x + start, other_p + start
    live = first < count
    last = tl.minimum(first + BLOCK, count) - 1
    x, p = tl.load(own_x + first, mask=live, other=0.0), tl.load(own_p + first, mask=live, other=0.0)
    low = border(first - first, tl.where(live, first, 0), x, p, other_x, other_p, cutoff, False, RELAXATION)
    x, p = tl.load(own_x + last, mask=live, other=0.0), tl.load(own_p + last, mask=live, other=0.0)
    after, end = tl.where(live, last + 1, 0), tl.where(live, count, 0)
    high = border(after, end, x, p, other_x, other_p, cutoff, True, RELAXATION)
    return row, start, length, count, first + tl.arange(0, BLOCK), low, high


@triton.jit
def side_of(at, here, x, p, RELAXATION: tl.constexpr):
    found = tl.load(x + at, mask=here, other=0.0)
    return found, tl.load(p + at, mask=here, other=0.0) if RELAXATION == NEURAL_SORT else found


@triton.jit
def weights(i, j, pair, d):
    """e^D of pairs but the peak, and D, in fp32 and finite."""
    d = tl.where(pair & (i[:, None] != j[None, :]), tl.maximum(d, -1000.0), -1000.0).to(tl.float32)
    return exp(d), d


@triton.jit
def blank(value, p, live):
    """NaN where the list is not finite, 0 behind the ones that count."""
    return tl.where(live, tl.where(p == p, value, float("nan")), 0.0)


@triton.jit
def banded_sums(
    values, out, rest, deviation, columns, lists, firsts, begin, lengths, counts, own_x, own_p, other_x, other_p,
    cutoff, TRANSPOSED: tl.constexpr, RELAXATION: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):  # fmt: skip
    """Own are places: P v, rest and deviation of values v. TRANSPOSED, own are items: Pᵀ u of values u / (1 + rest).
    COLUMNS of them at a time."""
    row, start, length, count, i, low, high = block_of(
        lists, firsts, begin, lengths, counts, own_x, own_p, other_x, other_p, cutoff, RELAXATION, BLOCK
    )
    live, own = i < count, start + i
    x, p = side_of(own, live, own_x, own_p, RELAXATION)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    wanted, own_at = (column < columns)[:, None], own[None, :] * columns + column[:, None]
    peak = tl.load(values + own_at, mask=live[None, :] & wanted, other=0.0)
    mass = tl.zeros([BLOCK, OTHERS], tl.float32)
    total = tl.zeros([COLUMNS, BLOCK, OTHERS], tl.float32)
    for first in range(low, high, OTHERS):
        j = first + tl.arange(0, OTHERS)
        here, other = j < high, start + j
        other_of = side_of(other, here, other_x, other_p, RELAXATION)
        d = logits(x[:, None], p[:, None], other_of[0][None, :], other_of[1][None, :], RELAXATION)
        e, _ = weights(i, j, live[:, None] & here[None, :], d)
        at = other[None, :] * columns + column[:, None]
        value = tl.load(values + at, mask=here[None, :] & wanted, other=0.0)[:, None, :]
        if TRANSPOSED:
            total += e[None, :, :] * value
        else:
            total += e[None, :, :] * (value - peak[:, :, None])
            mass += e
    found, stored = tl.sum(total.to(tl.float64), 2), (i < length)[None, :] & wanted
    if not TRANSPOSED:
        whole = tl.sum(mass.to(tl.float64), 1)
        found = found / (1.0 + whole)[None, :]
        tl.store(deviation + own_at, blank(found, p[None, :], live[None, :]).to(tl.float32), mask=stored)
        if tl.program_id(1) == 0:
            tl.store(rest + own, blank(whole, p, live).to(tl.float32), mask=i < length)
    tl.store(out + own_at, blank(peak + found, p[None, :], live[None, :]).to(tl.float32), mask=stored)


@triton.jit
def banded_slopes(
    r, v, deviation, columns, tau, dt, total, moment, along, lists, firsts, begin, lengths, counts, own_x, own_p,
    other_x, other_p, cutoff, PLACES: tl.constexpr, RELAXATION: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """With d_ij = e^D sum_c r_ic (v_jc - v_ic - deviation_ic) of places i and items j ≠ i: of own items the sums of
    -d D / tau² into along; of d and d (j - i) into NeuralSort's total and moment; of SoftSort's derivatives in t_j into
    moment. PLACES, own are SoftSort's places: dt, of their items' moment and the derivatives in t_i."""
    row, start, length, count, i, low, high = block_of(
        lists, firsts, begin, lengths, counts, own_x, own_p, other_x, other_p, cutoff, RELAXATION, BLOCK
    )
    live, own = i < count, start + i
    x, p = side_of(own, live, own_x, own_p, RELAXATION)
    all_total = tl.zeros([BLOCK, OTHERS], tl.float32)
    all_moment = tl.zeros([BLOCK, OTHERS], tl.float32)
    all_along = tl.zeros([BLOCK, OTHERS], tl.float32)
    for first in range(low, high, OTHERS):
        j = first + tl.arange(0, OTHERS)
        here, other = j < high, start + j
        other_of = side_of(other, here, other_x, other_p, RELAXATION)
        d = logits(x[:, None], p[:, None], other_of[0][None, :], other_of[1][None, :], RELAXATION)
        slope, d = weights(i, j, live[:, None] & here[None, :], d)
        factor = tl.zeros([BLOCK, OTHERS], tl.float32)
        for column in range(columns):
            own_at, at = own * columns + column, other * columns + column
            mine = tl.load(v + own_at, mask=live, other=0.0)[:, None]
            theirs = tl.load(v + at, mask=here, other=0.0)[None, :]
            if PLACES:
                weight = tl.load(r + own_at, mask=live, other=0.0)[:, None]
                change = theirs - mine - tl.load(deviation + own_at, mask=live, other=0.0)[:, None]
            else:
                weight = tl.load(r + at, mask=here, other=0.0)[None, :]
                change = mine - theirs - tl.load(deviation + at, mask=here, other=0.0)[None, :]
            factor += weight * change
        slope *= factor
        if RELAXATION == NEURAL_SORT:
            apart = (i[:, None] - j[None, :]).to(tl.float32)
        else:
            apart = (x[:, None] - other_of[0][None, :]).to(tl.float32)
            if RELAXATION == SOFT_SORT:
                apart = tl.where(apart > 0, 1.0, tl.where(apart < 0, -1.0, 0.0))
        all_moment += slope * apart
        if RELAXATION == NEURAL_SORT:
            all_total += slope
        if not PLACES:
            all_along += slope * d
    strength, stored = tl.load(tau + row), i < length
    found = tl.sum(all_moment.to(tl.float64), 1)
    if RELAXATION != NEURAL_SORT:
        found *= scale_of(strength, RELAXATION) * (-2.0 if RELAXATION == SOFT_SORT_SQUARED else -1.0)
    if PLACES:
        found += tl.load(moment + own, mask=live, other=0.0)
        tl.store(dt + own, blank(found, p, live).to(tl.float32), mask=stored)
    else:
        tl.store(moment + own, blank(found, p, live), mask=stored)
        if RELAXATION == NEURAL_SORT:
            tl.store(total + own, blank(tl.sum(all_total.to(tl.float64), 1), p, live), mask=stored)
        tl.store(along + own, blank(tl.sum(all_along.to(tl.float64), 1) / -strength, p, live), mask=stored)


@triton.jit
def later(at, value, next_at, next_value):
    found = next_at >= 0
    return tl.where(found, next_at, at), tl.where(found, next_value, value)


@triton.jit
def neural_slopes(t, tau, total, diagonal, moment, dt, begin, lengths, counts, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """tau dt_j = 2 moment_j + Σ C_k over k before j − Σ C_k over k behind j + (how many behind − how many before it
    have j's score) C_j, with C = total + diagonal; equal scores are neither before nor behind each other. First along
    the list, then BACK. A program has a list."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    first, length, count = tl.load(begin + row), tl.load(lengths + row), tl.load(counts + row)
    t, total, diagonal, moment, dt = t + first, total + first, diagonal + first, moment + first, dt + first
    strength = tl.load(tau + row)
    carry, group_sum = tl.full([], 0, tl.float64), tl.full([], 0, tl.float64)
    group = tl.full([], 0, tl.int64)
    for start in range(0, length, BLOCK):
        k = start + lane
        here = k < count
        at = tl.where(here, count - 1 - k, k) if BACK else k
        score = tl.load(t + at, mask=here, other=0.0)
        previous = tl.load(t + (at + 1 if BACK else at - 1), mask=here & (k > 0), other=0.0)
        own = tl.load(total + at, mask=here, other=0.0) + tl.load(diagonal + at, mask=here, other=0.0)
        before = carry + (tl.cumsum(own, 0) - own)
        opens = here & ((k == 0) | (score != previous))
        where, sums = tl.associative_scan((tl.where(opens, k, -1), tl.where(opens, before, 0.0)), 0, later)
        where, sums = later(group, group_sum, where, sums)
        carry += tl.sum(own, 0)
        group = tl.max(where, 0)
        group_sum = tl.sum(tl.where(lane == BLOCK - 1, sums, 0.0), 0)
        found = sums + (where - k).to(tl.float64) * own
        if BACK:
            found = (tl.load(moment + at, mask=here, other=0.0) - found) / strength
            tl.store(dt + at, tl.where(here, found, 0.0).to(tl.float32), mask=k < length)
        else:
            tl.store(moment + at, 2.0 * tl.load(moment + at, mask=here, other=0.0) + found, mask=here)
