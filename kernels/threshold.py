"""Rows of scores through a threshold, p_j = [s z_j − τ]₊^e with Σ p = 1, and their losses: what csrc/threshold.h says,
one program to a row. Not run on a GPU so far.

The row is read once for its maximum, once for each step of Newton's method (five to eight), and once or twice more; it
stays in the device's caches. Scores less the maximum are fp32; τ is float64 and is taken off in two parts, so that a
small p keeps its digits.
"""

import triton
import triton.language as tl

from .scores import wide

ALONE = tl.constexpr(8)  # steps before the interval is halved too
MOST = tl.constexpr(48)


@triton.jit
def shifted(scores, at, columns, top, SQUARE: tl.constexpr):
    """s z less its maximum; −inf beyond the row's end."""
    z = tl.load(scores + at, mask=at < columns, other=-float("inf")).to(tl.float32)
    return tl.where(z == top, 0.0, (z - top) * (0.5 if SQUARE else 1.0))


@triton.jit
def less(u, tau):
    """[u − τ]₊."""
    high = tau.to(tl.float32)
    low = (tau - high.to(tl.float64)).to(tl.float32)
    return tl.maximum((u - high) - low, 0.0)


@triton.jit
def above(scores, columns, top, tau, SQUARE: tl.constexpr, BLOCK: tl.constexpr):
    """Of d = u − τ > 0: how many, Σ d, Σ d², the least."""
    lane = tl.arange(0, BLOCK)
    count, first = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    second, least = tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], float("inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        d = less(shifted(scores, start + lane, columns, top, SQUARE), tau)
        count += tl.where(d > 0, 1.0, 0.0)
        first += d
        second += d * d
        least = tl.minimum(least, tl.where(d > 0, d, float("inf")))
    sums = tl.sum(count.to(tl.float64), 0), tl.sum(first.to(tl.float64), 0), tl.sum(second.to(tl.float64), 0)
    return sums[0], sums[1], sums[2], tl.min(least, 0).to(tl.float64)


@triton.jit
def steps_of(count, first, second, SQUARE: tl.constexpr):
    """From τ to where these entries solve the equation (infinity: nowhere), and Newton's step."""
    if SQUARE:
        root, norm = first * first - count * (second - 1.0), tl.sqrt(second)
        exact = (second - 1.0) / (first + tl.sqrt(tl.where(root < 0, 0.0, root)))
        return tl.where(root < 0, float("inf"), exact), (norm - 1.0) * norm / first
    else:
        return (first - 1.0) / count, (first - 1.0) / count


@triton.jit
def threshold(scores, columns, top, there, SQUARE: tl.constexpr, BLOCK: tl.constexpr):
    """τ, by the steps of csrc/threshold_rows.cpp."""
    tau, right = tl.full([], -1, tl.float64), tl.full([], 0, tl.float64)
    step, going = 0, there
    while going:
        count, first, second, least = above(scores, columns, top, tau, SQUARE, BLOCK)
        exact, newton = steps_of(count, first, second, SQUARE)
        found, moves = exact < least, newton + tau > tau
        tau = tl.where(found, tau + exact, tl.where(moves, tau + newton, tau))
        step += 1
        going = (found == 0) & moves & (step < MOST)
        if going & (step > ALONE):
            middle = tau + (right - tau) * 0.5
            _, half_first, half_second, _ = above(scores, columns, top, middle, SQUARE, BLOCK)
            left = (half_second if SQUARE else half_first) >= 1.0
            tau, right = tl.where(left, middle, tau), tl.where(left, right, middle)
    # d was rounded where it was as large as 1: once more, where it is as large as the answer.
    count, first, second, _ = above(scores, columns, top, tau, SQUARE, BLOCK)
    exact, _ = steps_of(count, first, second, SQUARE)
    return tl.where(there & (tl.abs(exact) < 1e-4), tau + exact, tau)


@triton.jit
def threshold_rows(
    scores, stride, target, factor, losses, out, out_stride, columns,
    SQUARE: tl.constexpr, LOSS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = p or, with a loss, factor (p − y), in the scores' memory or elsewhere; of BLOCK columns at a time."""
    row, lane = wide(tl.program_id(0)), tl.arange(0, BLOCK)
    scores += row * stride
    largest, wrong = tl.full([BLOCK], -float("inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        z = tl.load(scores + start + lane, mask=start + lane < columns, other=-float("inf")).to(tl.float32)
        wrong |= (z != z).to(tl.int32)
        largest = tl.maximum(largest, tl.where(z == z, z, -float("inf")))
    top, bad = tl.max(largest, 0), tl.max(wrong, 0) > 0
    none = top == -float("inf")
    top = tl.where(none, 0.0, top)
    tau = threshold(scores, columns, top, (bad | none) == 0, SQUARE, BLOCK)
    weight, y, others = tl.full([], 1, tl.float64), wide(-1), tl.full([], 0, tl.float64)
    masked = bad
    if LOSS:
        weight, y = tl.load(factor + row).to(tl.float64), tl.load(target + row)
        hit = tl.load(scores + y).to(tl.float32)
        u = tl.where(hit == top, 0.0, (hit - top) * (0.5 if SQUARE else 1.0))
        own, masked = u.to(tl.float64) - tau, hit == -float("inf")
        sums, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            r = less(shifted(scores, start + lane, columns, top, SQUARE), tau)
            r = tl.where(start + lane == y, 0.0, r)
            squares += r * r
            sums += r * r * r if SQUARE else r
        rest, others = tl.sum(sums.to(tl.float64), 0), tl.sum(squares.to(tl.float64), 0)
        beyond, own = tl.where(own < 0, -own, 0.0), tl.where(own > 0, own, 0.0)
        if SQUARE:
            lacks = others / (own + 1.0)
            loss = (lacks * lacks * (own + 2.0) + rest) * 2.0 / 3.0 + beyond * 2.0
        else:
            loss, others = (rest * rest + others) * 0.5 + beyond, rest
        tl.store(losses + row, tl.where(bad, float("nan"), loss))
    if WRITES:
        out += row * out_stride
        scale, own_slope = weight.to(tl.float32), tl.where(masked, 0.0, -weight * others).to(tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + lane
            r = less(shifted(scores, at, columns, top, SQUARE), tau)
            p = scale * (r * r if SQUARE else r)
            p = tl.where(at == y, own_slope, p)
            p = tl.where(bad & (weight != 0), float("nan"), tl.where(weight == 0, 0.0, p))
            tl.debug_barrier()  # an element may be stored by another thread than the one that loaded it
            tl.store(out + at, p.to(out.dtype.element_ty), mask=at < columns)


@triton.jit
def weight_of(p, SQUARE: tl.constexpr):
    if SQUARE:
        return tl.sqrt(p)
    else:
        return tl.where(p == p, tl.where(p == 0, 0.0, 1.0), p)


@triton.jit
def threshold_backward(p, g, out, columns, SQUARE: tl.constexpr, BLOCK: tl.constexpr):
    """∂L/∂z from p and g = ∂L/∂p, contiguous: over the support w (g − Σ w g / Σ w), w = 1 or √p."""
    start_of_row, lane = wide(tl.program_id(0)) * columns, tl.arange(0, BLOCK)
    p, g, out = p + start_of_row, g + start_of_row, out + start_of_row
    weights, sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + lane
        x = tl.load(p + at, mask=at < columns, other=0.0).to(tl.float32)
        w = weight_of(x, SQUARE)
        weights += w
        sums += tl.where(x == 0, 0.0, w * tl.load(g + at, mask=at < columns, other=0.0).to(tl.float32))
    total = tl.sum(weights.to(tl.float64), 0)
    mean = (tl.sum(sums.to(tl.float64), 0) / tl.where(total == 0, 1.0, total)).to(tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + lane
        x = tl.load(p + at, mask=at < columns, other=0.0).to(tl.float32)
        slope = weight_of(x, SQUARE) * (tl.load(g + at, mask=at < columns, other=0.0).to(tl.float32) - mean)
        tl.store(out + at, tl.where(x == 0, 0.0, slope).to(out.dtype.element_ty), mask=at < columns)
