"""Elementary functions in fp32, in forms that keep their last digits, alike on every target and in the interpreter.

The hardware's 2^x is good to two units in the last place, but x log2(e), rounded, costs |x| / 2 units more: `exp` makes
that good. There is no other transcendental function here: logarithms, tanh and arctangent are rational around it.
"""

import triton
import triton.language as tl

from .words import CIRCLE, FOCAL, HINGE, LOG_ATAN, LOG_RELU, LOG_TANH, SIGMOID, SOFTPLUS, SQUARED_HINGE

LOG2E = tl.constexpr(1.44269502162933349609375)  # log2(e) = LOG2E + LOG2E_LOW, the first an fp32 number
LOG2E_LOW = tl.constexpr(1.925963033500e-8)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x):
    """e^x for x ≤ 88, as every caller's is (scores below their maximum, minus an absolute value); 0 below 2^-126."""
    t = x * LOG2E
    lost = tl.fma(x, LOG2E, -t) + x * LOG2E_LOW
    power = tl.exp2(t)
    # An x of -inf makes `lost` NaN; it is among those that become 0.
    return tl.where(x < -87.336544, 0.0, tl.fma(power, lost * LN2, power))


@triton.jit
def log1p(x):
    """log(1 + x) for −1/2 ≤ x ≤ 1, = 2 artanh(x / (2 + x)): nothing cancels where x is tiny."""
    s = x / (x + 2.0)
    y = s * s
    q = 2.4300932884216309e-1 * y + 2.1427658200263977e-1
    q = q * y + 2.861688435077667e-1
    q = q * y + 3.999887704849243e-1
    q = q * y + 6.666667461395264e-1
    return s * y * q + (s + s)


@triton.jit
def log(x):
    """log x for x ≥ 2^-126: that of the power of two next to x, and log1p of what is left."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the rest is in [√½, √2)
    rest = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    n = exponent.to(tl.float32)
    # log 2 in two parts, of which the first times n is exact.
    found = n * 0.693359375 + (n * -2.12194440e-4 + log1p(rest - 1.0))
    return tl.where(x < float("inf"), found, x)  # NaN passes


@triton.jit
def log_of_one_and(x):
    """log(1 + x) for all x > −1."""
    return tl.where((x >= -0.5) & (x <= 1.0), log1p(x), log(x + 1.0))


@triton.jit
def atan(x):
    """Arctangent: turned by π/2, π/4 or nothing into |x| < tan π/8, and a polynomial there (Cephes, atanf)."""
    a = tl.abs(x)
    far, near = a > 2.414213562373095, a < 0.4142135623730950
    t = tl.where(far, -1.0, tl.where(near, a, a - 1.0)) / tl.where(far, a, tl.where(near, 1.0, a + 1.0))
    y = t * t
    q = 8.05374449538e-2 * y - 1.38776856032e-1
    q = q * y + 1.99777106478e-1
    q = q * y - 3.33329491539e-1
    turned = tl.where(far, 1.5707963267948966, tl.where(near, 0.0, 0.7853981633974483)) + (q * y * t + t)
    return tl.where(x < 0, -turned, turned)


@triton.jit
def tanh_and_slope(x):
    """tanh(x), and its derivative 1 − tanh² without the cancellation that the formula suffers near ±1."""
    e = exp(-2.0 * tl.abs(x))
    d = e + 1.0
    y = x * x
    q = -5.717045161873102e-3 * y + 2.065058797597885e-2
    q = q * y - 5.374349653720856e-2
    q = q * y + 1.3331490755081177e-1
    q = q * y - 3.333328366279602e-1
    large = (1.0 - e) / d
    large = tl.where(x < 0, -large, large)
    return tl.where(tl.abs(x) < 0.625, x * y * q + x, large), 4.0 * e / (d * d)


@triton.jit
def sigmoid(u):
    e = exp(-tl.abs(u))
    return tl.where(u < 0, e, 1.0) / (e + 1.0)


@triton.jit
def softplus(u):
    return tl.where(u > 0, u, 0.0) + log1p(exp(-tl.abs(u)))


@triton.jit
def sigmoid_power(u, gamma):
    """sigmoid(u)^gamma = e^{gamma min(u, 0)} e^{-gamma log1p(e^-|u|)}."""
    # A large exponent rounded once would cost the power its last digits: the part of u that few bits hold goes first,
    # its product is exact for the usual gammas. Below -128 softplus is 0 anyway, and the power must not be 0 · inf.
    low = tl.where(u > 0, 0.0, tl.where(u < -128.0, -128.0, u))
    head = (low.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return exp(gamma * head) * exp(gamma * (low - head - log1p(exp(-tl.abs(u)))))


@triton.jit
def function_and_slope(u, parameter, FUNCTION: tl.constexpr):
    """f(u) and f′(u) of SUM_OF. NaN passes through each of them."""
    if FUNCTION == SOFTPLUS:
        return softplus(u), sigmoid(u)
    elif FUNCTION == SIGMOID:
        e = exp(-tl.abs(u))
        return sigmoid(u), e / ((e + 1.0) * (e + 1.0))
    elif FUNCTION == HINGE:
        return tl.where(u <= 0, 0.0, u), tl.where(u <= 0, 0.0, 1.0)
    elif FUNCTION == SQUARED_HINGE:
        above = tl.where(u <= 0, 0.0, u)
        return above * above, 2.0 * above
    else:
        tl.static_assert(FUNCTION == FOCAL)
        power, p = sigmoid_power(u, parameter), softplus(u)
        return p * power, power * (sigmoid(u) + parameter * p * sigmoid(-u))


@triton.jit
def log_function_and_slope(u, parameter, FUNCTION: tl.constexpr):
    """g(u) and g′(u) of LOGSUMEXP_OF; −inf and 0 where g has no value. NaN passes through each of them."""
    if FUNCTION == LOG_TANH:
        # log(1 + tanh u) = 2u + log 2 − log(1 + e^2u), which cancels near 0.
        tanh, flatness = tanh_and_slope(u)
        low = 2.0 * u + (LN2 - log1p(exp(-2.0 * tl.abs(u))))
        return tl.where(u < -0.5, low, log1p(tl.where(u < -0.5, 0.0, tanh))), 2.0 * sigmoid(-2.0 * u)
    elif FUNCTION == LOG_ATAN:
        angle = atan(u)
        none = angle <= -1.0
        slope = 1.0 / ((angle + 1.0) * (u * u + 1.0))
        return tl.where(none, -float("inf"), log_of_one_and(angle)), tl.where(none, 0.0, slope)
    elif FUNCTION == LOG_RELU:
        none = u <= -1.0
        return tl.where(none, -float("inf"), log_of_one_and(u)), tl.where(none, 0.0, 1.0 / (u + 1.0))
    else:
        tl.static_assert(FUNCTION == CIRCLE)
        above = tl.where(u + parameter <= 0, 0.0, u + parameter)
        return above * (u - parameter), above
