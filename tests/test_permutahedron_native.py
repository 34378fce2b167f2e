"""The compiled soft sort and soft rank against pooling written out on Python's floats."""

import math
from itertools import product

import pytest
import torch

from fusedloss.backends.native import _native

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
CODES = {F32: 0, BF16: 1, F16: 2, F64: 3}
KINDS = list(product(("rank", "sort"), (False, True), (False, True)))  # operator, kl, descending
STARTS = 1 << 31

pytestmark = [pytest.mark.host, pytest.mark.skipif(_native is None, reason="no compiled extension")]


# ---- the truth ------------------------------------------------------------------------------------------------------


def log_sum(values):
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def blocks_of(s, w, sort, kl):
    """Starts of the blocks: pooled until the blocks' values fall."""
    first, second = (w, s) if sort else (s, [math.log(v) for v in w] if kl else w)
    blocks = []  # start, end, and sums or logarithms of sums
    for k, (a, b) in enumerate(zip(first, second)):
        block = (k, a, b, 1)
        while blocks:
            start, c, d, count = blocks[-1]
            _, a, b, size = block
            if (c - d <= a - b) if kl else ((c - d) * size <= (a - b) * count):
                block = (start, log_sum([a, c]), log_sum([b, d]), 0) if kl else (start, a + c, b + d, count + size)
                blocks.pop()
            else:
                break
        blocks.append(block)
    return [b[0] for b in blocks]


def truth(x, e, kind):
    """Outputs, order and starts of one row of floats that count, float64."""
    operator, kl, descending = kind
    sort, m = operator == "sort", len(x)
    if any(v != v for v in x):
        return [math.nan] * m, None, None
    sign = 1 if sort == descending else -1
    order = sorted(range(m), key=lambda i: -sign * x[i])
    z = [sign * x[i] for i in order]
    begin = sum(v == math.inf for v in z)
    end = m - sum(v == -math.inf for v in z)
    y, starts = [0.0] * m, [True] * m
    for first, last in ((0, begin), (end, m)):
        for k in range(first, last):
            y[k] = z[k] if sort else m - (first + last - 1) / 2
            starts[k] = sort or k == first
    if begin < end:
        w = [float(m - k) for k in range(begin, end)]
        v = z[begin:end]
        if e == 0:
            found = [k for k in range(len(v)) if sort or k == 0 or v[k] != v[k - 1]]
            s, w_ = ([0.0] * len(v), w) if not sort else (v, w)
            kl = False
        else:
            s, w_ = (v, [u / e for u in w]) if sort else ([u / e for u in v], w)
            found = blocks_of(s, w_, sort, kl)
        for first, last in zip(found, [*found[1:], len(v)]):
            n = last - first
            for k in range(first, last):
                starts[begin + k] = k == first
                if n == 1:
                    value = s[k] if sort else w_[k]
                elif not kl:
                    mean_s = s[first] + math.fsum(u - s[first] for u in s[first:last]) / n
                    mean_w = w_[first] + math.fsum(u - w_[first] for u in w_[first:last]) / n
                    value = (w_[k] - mean_w) + mean_s if sort else mean_w + (s[k] - mean_s)
                elif sort:
                    value = (w_[k] - w_[first]) + s[first]
                    value += log_sum([u - s[first] for u in s[first:last]])
                    value -= log_sum([u - w_[first] for u in w_[first:last]])
                else:
                    value = math.exp(s[k] - s[first] - log_sum([u - s[first] for u in s[first:last]]))
                    value *= math.fsum(w_[first:last])
                y[begin + k] = value
    if sort:
        return [sign * v for v in y], order, starts
    ranks = [0.0] * m
    for k, i in enumerate(order):
        ranks[i] = y[k]
    return ranks, order, starts


def true_rows(x, e, kind, mask=None):
    """`truth` of every row of a tensor (rows, n); e a number or one per row."""
    out = torch.zeros(x.shape, dtype=F64)
    for row in range(len(x)):
        inside = torch.ones_like(x[row], dtype=torch.bool) if mask is None else mask[row]
        y = truth(x[row][inside].double().tolist(), e if isinstance(e, float) else float(e[row]), kind)[0]
        if kind[0] == "rank":
            out[row, inside] = torch.tensor(y, dtype=F64)
        else:
            out[row, : len(y)] = torch.tensor(y, dtype=F64)
    return out


# ---- the engine -----------------------------------------------------------------------------------------------------


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def wide(dtype):
    return F64 if dtype == F64 else F32


class Engine:
    """The kernels on x (rows, width), or (items,) with offsets."""

    def __init__(self, x, e, kind, mask=None, offsets=None):
        operator, kl, descending = kind
        strengths = e if isinstance(e, torch.Tensor) else None
        rows, width = x.shape if offsets is None else (len(offsets) - 1, int(offsets.diff().max()))
        self.x, self.sort, self.keep = x, operator == "sort", (mask, offsets, strengths)
        self.name, self.rows = f"soft_{operator}", rows
        self.p = _native.Permutahedron(
            rows, width, address(offsets), address(mask), address(strengths), 0.0 if strengths is not None else e,
            CODES[x.dtype], kl, descending,
        )  # fmt: skip

    def forward(self):
        out = torch.full_like(self.x, torch.nan, dtype=self.x.dtype if self.sort else wide(self.x.dtype))
        self.order = torch.full_like(self.x, -7, dtype=torch.int32)
        getattr(_native, self.name)(self.p, address(self.x), address(out), address(self.order))
        return out

    def backward(self, g):
        dx, de = torch.full_like(self.x, torch.nan), torch.full((self.rows,), torch.nan, dtype=F64)
        call = getattr(_native, f"{self.name}_backward")
        call(self.p, address(self.x), address(self.order), address(g), address(dx), address(de))
        again = torch.full_like(dx, torch.nan)
        call(self.p, address(self.x), address(self.order), address(g), address(again), 0)
        assert torch.equal(torch.nan_to_num(again), torch.nan_to_num(dx))
        return dx, de


def close(got, wanted, ulps=4.0):
    """Within so many units in the last place of the largest output of each row, infinities and NaN where they are."""
    step = {F64: 2.0**-40, F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}[got.dtype]
    got = got.double()
    assert torch.equal(got.isnan(), wanted.isnan())
    usual = wanted.isfinite()
    assert torch.equal(torch.where(usual, 0.0, got).nan_to_num(), torch.where(usual, 0.0, wanted).nan_to_num())
    if not wanted.numel():
        return
    size = torch.where(usual, wanted, 0.0).abs().amax(-1, keepdim=True)
    apart = torch.where(usual, got - wanted, 0.0).abs()
    assert (apart <= ulps * step * size).all(), f"{(apart / (step * size)).max():.3g} ulps"


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("e", [0.0, 1e-30, 1e-3, 0.3, 1.0, 30.0, 1e6])
def test_values(kind, e):
    torch.manual_seed(0)
    for n in (1, 2, 3, 7, 64, 191, 192, 193, 400):
        x = torch.randn(2, n, dtype=F64)
        for dtype in (F64, F32, BF16, F16):
            given = x.to(dtype)
            engine = Engine(given, e, kind)
            wanted = true_rows(given, e, kind)
            got = engine.forward()
            if dtype == F16 and kind[0] == "sort":
                wanted = wanted.to(F16).double()  # which ends at 65504
            close(got, wanted)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 30, 192, 193])
def test_finite_differences(kind, n):
    """In fp64, along random directions, in x and in the strength."""
    torch.manual_seed(n)
    x, d = torch.randn(3, n, dtype=F64), torch.randn(3, n, dtype=F64)
    g, h = torch.randn(3, n, dtype=F64), 1e-8  # within one piece, or so
    for e in (0.02, 1.0, 7.0):
        if kind[0] == "sort":
            e = 20 * e
        engine = Engine(x, e, kind)
        engine.forward()
        dx, de = engine.backward(g)
        up, down = (true_rows(x + s * h * d, e, kind) for s in (1, -1))
        along = ((up - down) * g).sum(1) / (2 * h)
        torch.testing.assert_close((dx * d).sum(1), along, rtol=1e-5, atol=1e-5 * n)
        up, down = (true_rows(x, e + s * h, kind) for s in (1, -1))
        torch.testing.assert_close(de, ((up - down) * g).sum(1) / (2 * h), rtol=1e-5, atol=1e-5 * n / e)
