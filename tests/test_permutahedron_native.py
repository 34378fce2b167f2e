"""The compiled soft sort and soft rank against pooling written out on Python's floats."""

import math
from fractions import Fraction
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
            exact = not kl and e < 1e-6  # where s + w is s
            found = blocks_of(*([Fraction(u) for u in part] if exact else part for part in (s, w_)), sort, kl)
        for first, last in zip(found, [*found[1:], len(v)]):
            n = last - first
            near = [u - s[first] for u in s[first:last]], [u - w_[first] for u in w_[first:last]]
            if n > 1:
                mean_s, mean_w = (math.fsum(u) / n for u in near)
                all_s, all_w = (log_sum(u) for u in near) if kl else (0.0, 0.0)
                total = math.fsum(w_[first:last])
            for k in range(first, last):
                starts[begin + k] = k == first
                if n == 1:
                    value = s[k] if sort else w_[k]
                elif not kl and sort:
                    value = (w_[k] - w_[first] - mean_w) + (s[first] + mean_s)
                elif not kl:
                    value = (w_[first] + mean_w) + (s[k] - s[first] - mean_s)
                elif sort:
                    value = (w_[k] - w_[first]) + s[first] + all_s - all_w
                else:
                    value = math.exp(s[k] - s[first] - all_s) * total
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
        if self.rows and dx.numel():
            step = 1e-13 if dx.dtype == F64 else 1e-6 if dx.dtype == F32 else 1e-2
            size = dx.nan_to_num().abs().max().item()
            torch.testing.assert_close(again, dx, rtol=0, atol=step * size, equal_nan=True)
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


def dense_gradient(x, e, kind, order, g):
    """Of one row, in fp64, from the blocks in `order`: the Jacobian of each block, transposed, times g."""
    operator, kl, descending = kind
    sort, n = operator == "sort", len(x)
    sign = 1.0 if sort == descending else -1.0
    at, block = (order & (STARTS - 1)).long(), (order < 0).cumsum(0) - 1

    def total(values):
        return torch.zeros(n, dtype=F64).index_add(0, block, values)[block]

    z, gradient = sign * x.double()[at], g.double() if sort else g.double()[at]
    first = z[(order < 0).nonzero().flatten()][block]
    share = ((z - first) / (1.0 if sort else e)).exp() if kl else torch.ones(n, dtype=F64)
    share = share / total(share)
    if sort:
        found = share * total(gradient)
    else:
        found = sign / e * (gradient - total(share * gradient))
        if kl:
            found = found * share * total(torch.arange(n, 0, -1, dtype=F64))
    return torch.zeros(n, dtype=F64).index_copy(0, at, found)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("e", [0.0, 1e-30, 1e-3, 0.3, 1.0, 30.0, 1e6])
def test_values(kind, e):
    torch.manual_seed(0)
    sizes = {F64: (1, 2, 3, 64, 256), F32: (7, 257), BF16: (40,), F16: (41,)}
    for dtype, n in ((dtype, n) for dtype in sizes for n in sizes[dtype]):
        x = torch.randn(2 if n < 100 else 1, n, dtype=F64).to(dtype)
        wanted = true_rows(x, e, kind)
        if dtype == F16 and kind[0] == "sort":
            wanted = wanted.to(F16).double()  # which ends at 65504
        close(Engine(x, e, kind).forward(), wanted)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 30, 257])
def test_finite_differences(kind, n):
    """In fp64, along random directions, in x and in the strength."""
    torch.manual_seed(n)
    rows, h = 2 if n < 100 else 1, 1e-8  # within one piece, or so
    x, d, g = (torch.randn(rows, n, dtype=F64) for _ in range(3))
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


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_gradients(kind, dtype):
    torch.manual_seed(1)
    for n, e in product((1, 5, 256, 257, 4096), (1e-3, 0.1, 1e3)):
        x = torch.randn(1, n).to(dtype)
        engine = Engine(x, e, kind)
        engine.forward()
        g = torch.randn(1, n).to(dtype if engine.sort else wide(dtype))
        dx, _ = engine.backward(g)
        wanted = dense_gradient(x[0], e, kind, engine.order[0], g[0])[None]
        close(dx, wanted.to(F16).double() if dtype == F16 else wanted, 8.0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mask_offsets_and_strengths(kind):
    """Rows of ragged lists, parts of them masked, each with a strength of its own, are rows by themselves."""
    torch.manual_seed(2)
    lengths = [0, 5, 1, 300, 0, 40, 700]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    e = torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0, 30.0, 0.1], dtype=F64)
    for dtype in (F64, F32, BF16):
        x, mask = torch.randn(sum(lengths)).to(dtype), torch.rand(sum(lengths)) < 0.7
        g = torch.randn(sum(lengths)).to(dtype if kind[0] == "sort" else wide(dtype))
        x[~mask] = torch.nan  # nobody looks
        engine = Engine(x, e, kind, mask, offsets)
        y, (dx, de) = engine.forward(), engine.backward(g)
        for row, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
            inside = mask[first:end]
            m = int(inside.sum())
            alone = Engine(x[first:end][inside][None].contiguous(), float(e[row]), kind)
            own_y = alone.forward()[0]
            gradient = g[first : first + m] if engine.sort else g[first:end][inside]
            own_dx, own_de = alone.backward(gradient[None].contiguous())
            assert de[row] == own_de[0]
            assert torch.equal(dx[first:end][inside], own_dx[0]) and (dx[first:end][~inside] == 0).all()
            order = engine.order[first:end]
            assert (order[m:] < 0).all()
            at = (order & (STARTS - 1)).long()
            assert torch.equal(at.sort().values, torch.arange(end - first))
            assert torch.equal(at[m:], (~inside).nonzero().flatten())
            assert torch.equal(inside.nonzero().flatten()[(alone.order[0] & (STARTS - 1)).long()], at[:m])
            if engine.sort:
                assert torch.equal(y[first : first + m], own_y) and (y[first + m : end] == 0).all()
            else:
                assert torch.equal(y[first:end][inside], own_y) and (y[first:end][~inside] == 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ties(kind):
    """Equal items, +0 and -0 among them, in many blocks or one: the first of them comes first, and they share."""
    torch.manual_seed(3)
    for n, dtype in ((9, F64), (9, F16), (200, F32), (300, F64), (5000, F32)):
        x = torch.randint(-2, 3, (1, n)).to(dtype) * torch.tensor([1.0, -1.0]).repeat(n)[:n].to(dtype)
        for e in (0.0, 1e-30, 0.01, 1.0, 50.0) if n < 1000 else (0.01,):
            engine = Engine(x, e, kind)
            got = engine.forward()
            y, order, starts = truth((x[0].double() + 0.0).tolist(), e, kind)
            close(got, torch.tensor(y, dtype=F64)[None])
            assert (engine.order[0] & (STARTS - 1)).tolist() == order
            if kind[0] == "rank":
                assert all(len(got[x == value].unique()) == 1 for value in x.unique())
                if e == 0:
                    assert engine.backward(torch.randn(1, n, dtype=wide(dtype)))[0].count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("n", [12, 300])
def test_infinities(kind, n):
    torch.manual_seed(4)
    inf = math.inf
    for e in (0.0, 1e-3, 1.0):
        x = torch.randn(6, n, dtype=F64)
        x[0, 3], x[1, :2], x[2, 5:7], x[3, 1], x[3, 8], x[4] = inf, -inf, inf, -inf, inf, inf
        x[5, ::2], x[5, 1::2] = inf, -inf
        engine = Engine(x, e, kind)
        close(engine.forward(), true_rows(x, e, kind))
        g = torch.randn(6, n, dtype=F64)
        dx, de = engine.backward(g)
        assert dx.isfinite().all() and de.isfinite().all()
        if kind[0] == "rank":
            assert (dx[x.isinf()] == 0).all()
        else:
            at = (engine.order & (STARTS - 1)).long()
            assert torch.equal(dx[x.isinf()], torch.empty_like(dx).scatter_(1, at, g)[x.isinf()])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nan_and_bad_strengths(kind):
    x = torch.randn(4, 300)
    x[1, 7] = torch.nan
    e = torch.tensor([1.0, 1.0, -1.0, torch.nan], dtype=F64)
    engine = Engine(x, e, kind)
    assert engine.forward().isnan().all(1).tolist() == [False, True, True, True]
    dx, de = engine.backward(torch.randn(4, 300))
    assert dx.isnan().all(1).tolist() == de.isnan().tolist() == [False, True, True, True]
    assert not dx[0].isnan().any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_extremes(kind):
    """Values and strengths of any size: nothing overflows; gaps wide against the strength give the hard answer."""
    torch.manual_seed(5)
    for dtype, sizes in ((F32, (1e-38, 1e4, 1e30, 3e38)), (F64, (1e-300, 1e300, 1.7e308))):
        for size, n, e in product(sizes, (20, 400), (1e-30, 1.0, 1e30)):
            x = (torch.rand(1, n, dtype=F64) * 2 - 1).to(dtype) * size
            engine = Engine(x, e, kind)
            got = engine.forward()
            assert got.isfinite().all()
            hard = Engine(x, 0.0, kind)
            if kind[0] == "rank" and size >= 1e4 * n * e:
                assert torch.equal(got, hard.forward())
            if kind[0] == "sort" and size * e < 0.1:
                assert torch.equal(got, hard.forward())
            dx, _ = engine.backward(torch.randn(1, n, dtype=dtype))
            if 1e-4 <= size * e and e >= 1 and size < 1e300:
                assert dx.isfinite().all()


@pytest.mark.parametrize("operator", ["rank", "sort"])
def test_kl_far_away(operator):
    """A peer's gradient is NaN beyond 88."""
    torch.manual_seed(6)
    for shift, scale in product((0.0, 89.0, -104.0, 1e4, -1e4), (1.0, 100.0, 5000.0)):
        x = torch.randn(1, 300, dtype=F64) * scale + shift
        engine = Engine(x, 1.0, (operator, True, False))
        close(engine.forward(), true_rows(x, 1.0, (operator, True, False)))
        g = torch.randn(1, 300, dtype=F64)
        dx, _ = engine.backward(g)
        close(dx, dense_gradient(x[0], 1.0, (operator, True, False), engine.order[0], g[0])[None])


def test_empty():
    for kind, shape in product(KINDS, [(0, 5), (3, 0), (0, 0)]):
        engine = Engine(torch.empty(shape), 1.0, kind)
        assert engine.forward().shape == shape
        dx, de = engine.backward(torch.empty(shape))
        assert dx.shape == shape and (de == 0).all()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bits_do_not_depend_on_threads(kind, threads):
    """Threads over rows, and over the pieces of one row, whose blocks reach over several pieces or lie within one."""
    torch.manual_seed(7)
    long = [(1, 150_001, F32, (1e-6, 1e-4, 1.0)), (1, 70_000, F64, (1.0,))]
    for rows, n, dtype, es in ((50, 200, F32, (1.0,)), *([] if kind[2] else long)):
        for e in es:
            e = e if kind[0] == "rank" else 1e5 * e
            x = torch.randn(rows, n, dtype=dtype)
            g = torch.randn(rows, n, dtype=dtype)
            found = []
            for count in (1, 2, 5):
                threads(count)
                engine = Engine(x, e, kind)
                found.append((engine.forward(), engine.order, *engine.backward(g)))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other))
            if rows == 1:
                dx = dense_gradient(x[0], e, kind, found[0][1][0], g[0])[None] if e < 1e-3 or e == 1.0 else None
                if dx is not None:
                    close(found[0][2], dx, 8.0)


@pytest.mark.parametrize("kind", [k for k in KINDS if not k[2]], ids=str)
def test_pieces(kind):
    """A long row, cut into pieces, whose blocks are joined again: no block is left to pool, and none is too large."""
    torch.manual_seed(8)
    x = torch.randn(1, 66_000, dtype=F64)
    for e in (1e-5, 1.0) if kind[1] else (1e-5,):
        e = e if kind[0] == "rank" else 1e5 * e
        y, order, starts = truth(x[0].tolist(), e, kind)
        engine = Engine(x, e, kind)
        close(engine.forward(), torch.tensor(y, dtype=F64)[None])
        assert (engine.order[0] & (STARTS - 1)).tolist() == order
        assert (engine.order[0] < 0).tolist() == starts


@pytest.mark.parametrize("kind", [k for k in KINDS if not k[2]], ids=str)
def test_long_rows(kind):
    """fp32 against fp64: at most 4 units in the last place of the largest output. A peer is off by 127 in 10."""
    torch.manual_seed(9)
    for n, e in ((1_000_000 if kind == ("rank", True, False) else 100_000, 1.0), (100_000, 1e-3)):
        x, g = torch.randn(1, n), torch.randn(1, n)
        single, double = Engine(x, e, kind), Engine(x.double(), e, kind)
        close(single.forward(), double.forward())
        assert torch.equal(single.order, double.order)
        close(single.backward(g)[0], double.backward(g.double())[0])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_smallest_strengths(kind):
    """Of strengths below 1e-300, which numbers divided by overflow, the answer is the hard one."""
    torch.manual_seed(11)
    for dtype, n in ((F64, 20), (F32, 300)):
        x, g = torch.randn(1, n).to(dtype).repeat(1, 2), torch.randn(1, 2 * n).to(dtype)
        hard = Engine(x, 0.0, kind)
        wanted = hard.forward(), *hard.backward(g)
        for e in (5e-324, 1e-310, 1e-301):
            engine = Engine(x, e, kind)
            found = engine.forward(), *engine.backward(g)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted))
        close(Engine(x, 1e-299, kind).forward(), wanted[0].double())


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets(isa):
    torch.manual_seed(12)
    cases = []
    for kind, (n, dtype, e) in product(KINDS, ((5, F64, 1.0), (70, F32, 0.01), (257, BF16, 0.1), (5000, F32, 1.0))):
        x, g = torch.randn(1, n).to(dtype), torch.randn(1, n)
        engine = Engine(x, e, kind)
        cases.append((engine, engine.forward(), engine.order, g.to(dtype if engine.sort else wide(dtype)), e, kind))
    try:
        _native.set_isa(isa)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        for engine, wanted, order, g, e, kind in cases:
            close(engine.forward(), wanted.double())
            assert torch.equal(engine.order & (STARTS - 1), order & (STARTS - 1))
            dx, _ = engine.backward(g)
            close(dx, dense_gradient(engine.x[0], e, kind, engine.order[0], g[0])[None], 8.0)
    finally:
        _native.set_isa(None)


@pytest.mark.parametrize("n", [2049, 100_000])
def test_half_precision_of_long_rows(n):
    """A peer's loop never ends at 2049 items of float16."""
    torch.manual_seed(10)
    for dtype, kind in zip((BF16, F16, F16, BF16), (k for k in KINDS if not k[2])):
        x = torch.randn(1, n).to(dtype)
        engine, double = Engine(x, 1.0, kind), Engine(x.double(), 1.0, kind)
        close(engine.forward(), double.forward(), 2.0)
        assert torch.equal(engine.order, double.order)
