"""Statistics as kernels see them: the state of some rows, what a block of scores adds to it, how two states merge.

While a row is walked, its state is a tuple of (R,) tensors: sums within a block are fp32, sums of blocks float64, a
running maximum is fp32 (it is one of the scores). Finished states are float64 and have one form everywhere (words.py).
"""

import triton
import triton.language as tl

from .elementwise import exp, function_and_slope, log_function_and_slope
from .words import (
    COUNT_SEEN,
    EXPECTATION,
    EXTREME,
    FUNCTION,
    KIND,
    LOGSUMEXP,
    LOGSUMEXP_OF,
    MOMENTS,
    OF_DISTANCE,
    OF_OPERAND,
    OF_SCORE,
    SCORE,
    SUM,
    SUM_OF,
    SUM_OF_SQUARES,
)


@triton.constexpr_function
def width_of(SPEC):
    """Numbers of state to a row, of a statistic that is a sum over columns."""
    kind = SPEC[KIND.value]
    if kind in (EXPECTATION.value, MOMENTS.value, LOGSUMEXP_OF.value):
        return 3
    return 2 if kind in (LOGSUMEXP.value, SUM_OF.value) else 1


@triton.jit
def value_of(z, v, row, SPEC: tl.constexpr):
    """v_j of EXPECTATION, (R, B)."""
    if SPEC[FUNCTION] == OF_OPERAND:
        return v
    elif SPEC[FUNCTION] == OF_SCORE:
        return z
    elif SPEC[FUNCTION] == OF_DISTANCE:
        return tl.abs(v - row)
    else:
        return (v - row) * (v - row)


@triton.jit
def total(terms, seen):
    return tl.sum(tl.where(seen, terms, 0.0), 1).to(tl.float64)


@triton.jit
def identity(SPEC: tl.constexpr, R: tl.constexpr):
    """The state of no column; () for what is not summed column by column."""
    zero = tl.zeros([R], tl.float64)
    if SPEC[KIND] == LOGSUMEXP:
        return (tl.full([R], -float("inf"), tl.float32), zero)
    elif SPEC[KIND] == EXPECTATION or SPEC[KIND] == LOGSUMEXP_OF:
        return (tl.full([R], -float("inf"), tl.float32), zero, zero)
    elif SPEC[KIND] == MOMENTS:
        return (zero, zero, zero)
    elif SPEC[KIND] == SUM_OF:
        return (zero, zero)
    elif SPEC[KIND] == SCORE or SPEC[KIND] == EXTREME:
        return ()
    else:
        return (zero,)


@triton.jit
def raised(m, top):
    """(new maximum, what terms are relative to, e^(old − new)): 1 for equal maxima, the common case by far."""
    new = tl.where(top > m, top, m)
    pivot = tl.where(new == -float("inf"), 0.0, new)  # nothing counts so far, or all that does is NaN
    return new, pivot, exp(m - pivot)


@triton.jit
def chan(a, b):
    """(count, mean, M2) of two sets of scores (Chan, Golub, LeVeque 1983)."""
    count = a[0] + b[0]
    share = b[0] / tl.where(count > 0, count, 1.0)
    apart = b[1] - a[1]
    return count, a[1] + apart * share, a[2] + b[2] + apart * apart * a[0] * share


@triton.jit
def exponent_and_slope(z, row, factor, parameter, power, SPEC: tl.constexpr):
    """power · g(u) and g′(u) of LOGSUMEXP_OF; −inf and 0 where g is −inf."""
    g, slope = log_function_and_slope(factor * (z - row), parameter, SPEC[FUNCTION])
    return tl.where(g == -float("inf"), g, power * g), slope


@triton.jit
def updated(state, z, v, seen, row, factor, parameter, power, SPEC: tl.constexpr):
    """The state with the scores z (R, B), where `seen`, merged into it; v and row broadcast to z's shape."""
    if SPEC[KIND] == LOGSUMEXP:
        x = tl.where(seen, factor * z, -float("inf"))  # what is not seen adds 0 to the sum: no mask is kept for it
        new, pivot, keep = raised(state[0], tl.max(x, 1))
        return (new, state[1] * keep + tl.sum(exp(x - pivot[:, None]), 1).to(tl.float64))
    elif SPEC[KIND] == EXPECTATION:
        x = tl.where(seen, factor * z, -float("inf"))
        new, pivot, keep = raised(state[0], tl.max(x, 1))
        weight = exp(x - pivot[:, None])
        mean = total(weight * value_of(z, v, row, SPEC), seen)
        return (new, state[1] * keep + tl.sum(weight, 1).to(tl.float64), state[2] * keep + mean)
    elif SPEC[KIND] == LOGSUMEXP_OF:
        x, slope = exponent_and_slope(z, row, factor, parameter, power, SPEC)
        x = tl.where(seen, x, -float("inf"))
        new, pivot, keep = raised(state[0], tl.max(x, 1))
        e = exp(x - pivot[:, None])
        return (new, state[1] * keep + tl.sum(e, 1).to(tl.float64), state[2] * keep + total(e * slope, seen))
    elif SPEC[KIND] == SUM:
        return (state[0] + total(v * z, seen),)
    elif SPEC[KIND] == COUNT_SEEN:
        return (state[0] + total((v != 0).to(tl.float32) + tl.zeros_like(z), seen),)
    elif SPEC[KIND] == SUM_OF_SQUARES:
        return (state[0] + total(z * z, seen),)
    elif SPEC[KIND] == MOMENTS:
        # The pivot is the block's mean but for rounding, which the sum of the deviations makes good.
        count = total(tl.full([1, 1], 1.0, tl.float32) + tl.zeros_like(z), seen)
        some = tl.where(count > 0, count, 1.0)
        pivot = (total(z, seen) / some).to(tl.float32)
        away = z - pivot[:, None]
        sum_away = total(away, seen)
        shift = sum_away / some
        mean = tl.where(count > 0, pivot + shift, 0.0)
        return chan(state, (count, mean, total(away * away, seen) - sum_away * shift))
    else:
        tl.static_assert(SPEC[KIND] == SUM_OF)
        value, slope = function_and_slope(factor * (z - row), parameter, SPEC[FUNCTION])
        return (state[0] + total(value, seen), state[1] + total(slope, seen))


@triton.jit
def finished(state, SPEC: tl.constexpr):
    """The state in its finished form, all float64."""
    if SPEC[KIND] == LOGSUMEXP:
        return (state[0].to(tl.float64), state[1])
    elif SPEC[KIND] == EXPECTATION or SPEC[KIND] == LOGSUMEXP_OF:
        return (state[0].to(tl.float64), state[1], state[2])
    else:
        return state


@triton.jit
def relative(a, b):
    """The larger of two maxima, and the factors that bring sums relative to each of them to it; float64."""
    new = tl.where(b > a, b, a)
    pivot = tl.where(new == -float("inf"), 0.0, new)
    return new, tl.exp(a - pivot), tl.exp(b - pivot)


@triton.jit
def merged(a, b, SPEC: tl.constexpr):
    """One finished state of two."""
    if SPEC[KIND] == LOGSUMEXP:
        m, fa, fb = relative(a[0], b[0])
        return (m, a[1] * fa + b[1] * fb)
    elif SPEC[KIND] == EXPECTATION or SPEC[KIND] == LOGSUMEXP_OF:
        m, fa, fb = relative(a[0], b[0])
        return (m, a[1] * fa + b[1] * fb, a[2] * fa + b[2] * fb)
    elif SPEC[KIND] == MOMENTS:
        return chan(a, b)
    elif SPEC[KIND] == SUM_OF:
        return (a[0] + b[0], a[1] + b[1])
    else:
        return (a[0] + b[0],)


@triton.jit
def loaded(state, at, there, pitch, SPEC: tl.constexpr):
    """A finished state from memory: number i lies at state + at + i · pitch. The identity where not `there`."""
    low = 0.0
    if SPEC[KIND] == LOGSUMEXP or SPEC[KIND] == EXPECTATION or SPEC[KIND] == LOGSUMEXP_OF:
        low = -float("inf")
    first = tl.load(state + at, mask=there, other=low)
    if SPEC[KIND] == EXPECTATION or SPEC[KIND] == MOMENTS or SPEC[KIND] == LOGSUMEXP_OF:
        second = tl.load(state + at + pitch, mask=there, other=0.0)
        return (first, second, tl.load(state + at + 2 * pitch, mask=there, other=0.0))
    elif SPEC[KIND] == LOGSUMEXP or SPEC[KIND] == SUM_OF:
        return (first, tl.load(state + at + pitch, mask=there, other=0.0))
    else:
        return (first,)


@triton.jit
def store(state, at, there, pitch, values):
    """The inverse of `loaded`."""
    for i in tl.static_range(len(values)):
        tl.store(state + at + i * pitch, values[i], mask=there)


@triton.jit
def derivative(state, coefficient, factor, there, SPEC: tl.constexpr):
    """(weight, center, offset, level): all that the slope needs of rows, in fp32; the arguments are float64.

    What the rounding of `center` loses is made good in `weight` or `offset`.
    """
    zero = tl.zeros_like(state[0])
    if SPEC[KIND] == LOGSUMEXP or SPEC[KIND] == EXPECTATION or SPEC[KIND] == LOGSUMEXP_OF:
        # e^{factor z − S} as e^{factor z − center} correction, S rounded to center. Where no score counts, S = -inf: 0.
        s = state[0] + tl.log(state[1])
        nothing = s == -float("inf")
        center = tl.where(nothing, 0.0, s).to(tl.float32)
        scale = tl.where(nothing, 0.0, coefficient[0] * tl.exp(center - s))
        weight = (scale * factor).to(tl.float32)
        if SPEC[KIND] != EXPECTATION:
            return weight, center, zero.to(tl.float32), zero.to(tl.float32)
        else:
            mean = state[2] / state[1]
            level = mean.to(tl.float32)
            offset = weight * (level - mean)
            if SPEC[FUNCTION] == OF_SCORE:
                offset += scale
            return weight, center, offset.to(tl.float32), level
    elif SPEC[KIND] == MOMENTS:
        weight, center = 2.0 * coefficient[2], state[1].to(tl.float32)
        offset = coefficient[1] / tl.where(state[0] > 0, state[0], 1.0) + weight * (center - state[1])
        return weight.to(tl.float32), center, offset.to(tl.float32), zero.to(tl.float32)
    else:
        weight = coefficient[0]
        if SPEC[KIND] == SUM_OF_SQUARES:
            weight = 2.0 * weight
        if SPEC[KIND] == SUM_OF:
            weight = weight * factor
        return weight.to(tl.float32), zero.to(tl.float32), zero.to(tl.float32), zero.to(tl.float32)


@triton.jit
def slope(z, v, row, factor, parameter, power, weight, center, offset, level, SPEC: tl.constexpr):
    """∂L/∂z of one statistic, (R, B); what `derivative` returned comes as (R, 1)."""
    tl.static_assert(SPEC[KIND] != SCORE and SPEC[KIND] != EXTREME and SPEC[KIND] != COUNT_SEEN)
    if SPEC[KIND] == LOGSUMEXP:
        return weight * exp(factor * z - center)
    elif SPEC[KIND] == EXPECTATION:
        return exp(factor * z - center) * (weight * (value_of(z, v, row, SPEC) - level) + offset)
    elif SPEC[KIND] == LOGSUMEXP_OF:
        x, derived = exponent_and_slope(z, row, factor, parameter, power, SPEC)
        return weight * derived * exp(x - center)
    elif SPEC[KIND] == SUM:
        return weight * v + tl.zeros_like(z)
    elif SPEC[KIND] == SUM_OF_SQUARES:
        return weight * z
    elif SPEC[KIND] == MOMENTS:
        return weight * (z - center) + offset
    else:
        value, derived = function_and_slope(factor * (z - row), parameter, SPEC[FUNCTION])
        return weight * derived
