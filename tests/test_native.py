"""The native tile primitives against plain PyTorch in fp64: every statistic, dtype and instruction set."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.host

_native = pytest.importorskip("fusedloss._native", reason="the native extension fusedloss._native is not built")

# The whole tolerance policy of this file. A value may err by VALUE times the sum of its terms' magnitudes (for a
# logarithm: by VALUE absolutely); a gradient entry by RELATIVE of itself and ROW of the largest in its row. The
# elementary functions are held to FUNCTION of themselves over their whole range.
VALUE = 1e-6
RELATIVE = 4e-6
ROW = 1e-6
FUNCTION = 4e-7
COLUMN_SUM = 1e-6
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

DTYPES = {torch.float32: _native.F32, torch.bfloat16: _native.BF16, torch.float16: _native.F16}
INF = math.inf


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    try:
        _native.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    _native.set_isa(None)


def pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()


# ---- the meaning: statistics in fp64, over the scores that count -----------------------------------------------------


def total(terms, counts):
    return torch.where(counts, terms, 0.0).sum(1)


def weights(z, counts, factor):
    """softmax(factor z) over the scores that count; 0 in a row that has none."""
    x = torch.where(counts, factor * z, -INF)
    top = x.amax(1, keepdim=True).detach()
    e = torch.where(counts, (x - torch.where(top > -INF, top, 0.0)).exp(), 0.0)
    return e, e.sum(1), top.squeeze(1)


def logsumexp(z, counts, s):
    e, norm, top = weights(z, counts, s.factor)
    safe = torch.where(norm > 0, norm, 1.0)
    return torch.where(norm > 0, top + safe.log(), -INF)


def expectation(values):
    def value(z, counts, s):
        e, norm, _ = weights(z, counts, s.factor)
        return total(e * values(z, s), counts) / torch.where(norm > 0, norm, 1.0)

    return value


def sum_of(f):
    return lambda z, counts, s: total(f(s.factor * (z - s.row.double()[:, None]), s), counts)


def moments(z, counts, s):
    count = counts.sum(1)
    mean = total(z, counts) / count.clamp(min=1)
    return torch.stack([mean, total((z - mean[:, None]) ** 2, counts)], 1)


def extreme(z, counts, s):
    key = torch.where(counts, s.factor * z, -INF)
    order = torch.sort(key, dim=1, descending=True, stable=True).indices[:, : s.count]
    return z.gather(1, order)


def focal(u, s):
    return torch.nn.functional.softplus(u, threshold=1000) * u.sigmoid() ** s.parameter


def double_operand(s):
    return s.operand.double()


class Statistic:
    """One wanted statistic with its arrays, its reading of a finished state and its meaning."""

    def __init__(self, kind, meaning, rows, columns, where, *, function=0, count=1, factor=1.0, parameter=0.0, row=False,
                 operand=None, operand_dtype=torch.float32, seed=1):  # fmt: skip
        random = torch.Generator().manual_seed(seed)
        self.kind, self.meaning, self.where, self.function = kind, meaning, where, function
        self.count, self.factor, self.parameter = count, factor, parameter
        self.rows, self.columns = rows, columns
        self.rest = torch.randint(-1, max(columns, 1), (rows,), generator=random)
        self.at = torch.randint(-1, max(columns, 1), (rows, count), generator=random)
        self.row = torch.randn(rows, generator=random) if row else None
        self.operand = None
        if operand is not None:
            shape = (columns,) if operand == "vector" else (rows, columns)
            self.operand = torch.randn(shape, generator=random).to(operand_dtype)
            self.operand[..., ::3] = 0
        self.width = {
            _native.SCORE: count, _native.LOGSUMEXP: 2, _native.SUM: 1, _native.SUM_OF_SQUARES: 1, _native.COUNT: 1, _native.MOMENTS: 3,
            _native.EXPECTATION: 3, _native.SUM_OF: 2, _native.EXTREME: 2 * count,
        }[kind]  # fmt: skip
        self.outputs = {_native.SCORE: count, _native.EXTREME: count, _native.MOMENTS: 2}.get(kind, 1)
        self.state = torch.zeros(rows, self.width, dtype=torch.float64)
        if kind in (_native.LOGSUMEXP, _native.EXPECTATION):
            self.state[:, 0] = -INF
        if kind == _native.EXTREME:
            self.state[:, :count] = -factor * INF
            self.state[:, count:] = -1
        self.coefficient = torch.randn(rows, self.outputs, generator=random)

    def native(self, first_column=0):
        operand = pointer(self.operand)
        if self.operand is not None:
            operand += first_column * self.operand.element_size()
        return _native.Statistic(
            kind=self.kind, where=self.where, function=self.function, count=self.count, factor=self.factor,
            parameter=self.parameter, rest=pointer(self.rest), at=pointer(self.at), at_stride=self.count,
            operand=operand, operand_stride=self.columns if self.operand is not None and self.operand.dim() == 2 else 0,
            operand_dtype=DTYPES[self.operand.dtype] if self.operand is not None else 0, row=pointer(self.row),
            state=pointer(self.state), coefficient=pointer(self.coefficient),
        )  # fmt: skip

    def counts(self, z):
        """Which scores count."""
        counts = z > -INF
        if self.where == _native.REST:
            counts = counts & (torch.arange(z.shape[1])[None, :] != self.rest[:, None])
        return counts

    def expected(self, z):
        if self.kind == _native.SCORE:
            picked = z.gather(1, self.at.clamp(min=0)) if z.shape[1] else z.new_zeros(self.at.shape)
            return torch.where(self.at >= 0, picked, 0.0)
        counts = self.counts(z)
        return self.meaning(torch.where(counts, z, 0.0), counts, self).reshape(z.shape[0], self.outputs)

    def value(self):
        state = self.state
        if self.kind == _native.LOGSUMEXP:
            return (state[:, 0] + state[:, 1].log())[:, None]
        if self.kind == _native.EXPECTATION:
            return torch.where(state[:, 1] > 0, state[:, 2] / state[:, 1], 0.0)[:, None]
        return {_native.MOMENTS: state[:, 1:], _native.EXTREME: state[:, : self.count]}.get(
            self.kind, state[:, : self.outputs]
        )

    def magnitude(self, z):
        """What rounding errors of the value are in proportion to."""
        size = torch.where(self.counts(z), z, 0.0).abs()
        if self.kind == _native.COUNT:
            size = self.operand.double().abs().expand(z.shape)
        if self.operand is not None and self.kind == _native.SUM:
            size = size * self.operand.double().abs()
        if self.kind == _native.MOMENTS:
            return torch.stack([size.mean(1), (size**2).sum(1)], 1)
        if self.kind in (_native.SUM, _native.COUNT, _native.SUM_OF, _native.SUM_OF_SQUARES):
            return size.sum(1, keepdim=True)
        return size.amax(1, keepdim=True) if z.shape[1] else size.new_ones(z.shape[0], 1)

    def check(self, z):
        if self.kind == _native.EXTREME and z.shape[1] < self.count:
            return
        expected, got = self.expected(z), self.value()
        bound = VALUE * (expected.abs().nan_to_num(0, 0, 0) + self.magnitude(z) + 1)
        if self.kind == _native.EXTREME:  # rows with fewer scores than wanted: the rest of the list is empty
            empty = self.state[:, self.count :] < 0
            assert (empty.sum(1) == (self.count - self.counts(z).sum(1)).clamp(min=0)).all()
            expected = torch.where(empty, got, expected)
        same = (expected == got) | ((expected - got).abs() <= bound)
        assert same.all(), f"{expected[~same]} expected, got {got[~same]}"


def make(case, rows, columns, where=None, **more):
    kind, meaning, options = CASES[case]
    return Statistic(kind, meaning, rows, columns, _native.ALL if where is None else where, **options, **more)


def hinge(u, s):
    return u.clamp(min=0)


def softplus(u, s):
    return torch.nn.functional.softplus(u, threshold=1000)


SUM_OF, EXPECTATION = _native.SUM_OF, _native.EXPECTATION
CASES = {
    "score": (_native.SCORE, None, {}),
    "scores": (_native.SCORE, None, dict(count=3)),
    "logsumexp": (_native.LOGSUMEXP, logsumexp, {}),
    "logsumexp_sharp": (_native.LOGSUMEXP, logsumexp, dict(factor=2.5)),
    "logsumexp_falling": (_native.LOGSUMEXP, logsumexp, dict(factor=-1.5)),
    "sum": (_native.SUM, lambda z, c, s: total(z, c), {}),
    "sum_vector": (_native.SUM, lambda z, c, s: total(double_operand(s) * z, c), dict(operand="vector")),
    "sum_matrix": (
        _native.SUM,
        lambda z, c, s: total(double_operand(s) * z, c),
        dict(operand="matrix", operand_dtype=torch.bfloat16),
    ),
    "count": (
        _native.COUNT,
        lambda z, c, s: total((double_operand(s) != 0).double().expand(z.shape), c),
        dict(operand="vector"),
    ),
    "sum_of_squares": (_native.SUM_OF_SQUARES, lambda z, c, s: total(z**2, c), {}),
    "moments": (_native.MOMENTS, moments, {}),
    "expectation": (
        EXPECTATION,
        expectation(lambda z, s: double_operand(s)),
        dict(operand="vector", factor=1.5, function=_native.V_OPERAND),
    ),
    "expectation_half": (
        EXPECTATION,
        expectation(lambda z, s: double_operand(s)),
        dict(operand="matrix", operand_dtype=torch.float16, function=_native.V_OPERAND),
    ),
    "expectation_score": (
        EXPECTATION,
        expectation(lambda z, s: z),
        dict(factor=0.7, function=_native.V_SCORE),
    ),
    "expectation_absolute": (
        EXPECTATION,
        expectation(lambda z, s: (double_operand(s) - s.row.double()[:, None]).abs()),
        dict(operand="vector", row=True, function=_native.V_ABSOLUTE),
    ),
    "expectation_square": (
        EXPECTATION,
        expectation(lambda z, s: (double_operand(s) - s.row.double()[:, None]) ** 2),
        dict(operand="vector", row=True, function=_native.V_SQUARE),
    ),
    "softplus": (SUM_OF, sum_of(softplus), dict(row=True, function=_native.F_SOFTPLUS)),
    "softplus_falling": (SUM_OF, sum_of(softplus), dict(row=True, factor=-1.3, function=_native.F_SOFTPLUS)),
    "sigmoid": (SUM_OF, sum_of(lambda u, s: u.sigmoid()), dict(row=True, factor=2.0, function=_native.F_SIGMOID)),
    "hinge": (SUM_OF, sum_of(hinge), dict(row=True, function=_native.F_HINGE)),
    "squared_hinge": (SUM_OF, sum_of(lambda u, s: hinge(u, s) ** 2), dict(row=True, function=_native.F_SQUARED_HINGE)),
    "focal": (SUM_OF, sum_of(focal), dict(row=True, parameter=2.0, factor=-1.0, function=_native.F_FOCAL)),
    "focal_fraction": (SUM_OF, sum_of(focal), dict(row=True, parameter=0.3, function=_native.F_FOCAL)),
    "maximum": (_native.EXTREME, extreme, {}),
    "minimum": (_native.EXTREME, extreme, dict(factor=-1.0)),
    "top5": (_native.EXTREME, extreme, dict(count=5)),
}
WHERES = {"all": _native.ALL, "rest": _native.REST}


# ---- tiles -----------------------------------------------------------------------------------------------------------


class Tile:
    """Stored values with some -inf, a row pitch wider than the row, and optionally the way from them to scores."""

    def __init__(self, rows, columns, dtype=torch.float32, *, pad=3, softcap=0.0, scale=1.0, classes=False, seed=0,
                 holes=True):  # fmt: skip
        random = torch.Generator().manual_seed(seed)
        stored = torch.randn(rows, columns + pad, generator=random) * 3
        if holes and columns > 2:
            stored[torch.rand(stored.shape, generator=random) < 0.05] = -INF
            stored[rows // 2 : rows // 2 + 1, :columns] = -INF if rows > 2 else 0.5  # a whole row
        if columns:
            stored[: rows // 2, columns - 1] = 4.0  # the last column matters
            stored[rows // 2 + 1 :, columns - 1] = 4.0
        stored[:, columns:] = 1e30  # between the rows: not ours to read
        self.stored = stored.to(dtype)
        self.rows, self.columns, self.dtype, self.stride = rows, columns, dtype, columns + pad
        self.softcap, self.scale = softcap, scale
        self.bias = torch.randn(columns, generator=random) if classes else None
        self.class_scale = torch.rand(columns, generator=random) + 0.5 if classes else None
        self.class_shift = torch.randn(columns, generator=random) if classes else None

    def native(self, data=None, first=0, end=None):
        def part(vector):
            return pointer(vector) + 4 * first if vector is not None else 0

        data = self.stored if data is None else data
        return _native.Tile(
            data=pointer(data) + first * data.element_size(), rows=self.rows,
            columns=(self.columns if end is None else end) - first, stride=self.stride, dtype=DTYPES[self.dtype],
            first_column=first, softcap=self.softcap, scale=self.scale, bias=part(self.bias),
            class_scale=part(self.class_scale), class_shift=part(self.class_shift),
        )  # fmt: skip

    def leaves(self):
        """Stored values (those of -inf as 0, so that autograd stays finite) and what scores are made with, in fp64."""
        stored = self.stored[:, : self.columns].double()
        self.missing = stored == -INF
        leaves = {"stored": torch.where(self.missing, 0.0, stored)}
        for name in ("bias", "class_scale", "class_shift"):
            if getattr(self, name) is not None:
                leaves[name] = getattr(self, name).double()
        leaves["scale"] = torch.tensor(self.scale, dtype=torch.float64)
        return {name: leaf.requires_grad_() for name, leaf in leaves.items()}

    def scores(self, leaves=None):
        leaves = leaves or self.leaves()
        t = leaves["stored"]
        if "bias" in leaves:
            t = t + leaves["bias"]
        if self.softcap:
            t = torch.where(self.missing, -1.0, (t / self.softcap).tanh()) * self.softcap
        z = t * leaves["scale"]
        if "class_scale" in leaves:
            z = z * leaves["class_scale"]
        if "class_shift" in leaves:
            z = z + leaves["class_shift"]
        return torch.where(self.missing, -INF, z)


def run_gradient(tile, statistics, out_dtype=None, sums=None):
    out_dtype = out_dtype or tile.dtype
    out = torch.full((tile.rows, tile.columns + 5), math.nan, dtype=out_dtype)
    _native.gradient(
        tile.native(), pointer(out), out.stride(0), DTYPES[out_dtype], [s.native() for s in statistics], sums
    )
    assert out[:, tile.columns :].isnan().all(), "written past the row"
    return out[:, : tile.columns]


def expected_gradient(tile, statistics):
    leaves = tile.leaves()
    z = tile.scores(leaves)
    loss = sum(
        (s.coefficient.double() * torch.where(s.expected(z) > -INF, s.expected(z), 0.0)).sum() for s in statistics
    )
    loss = loss + 0.0 * leaves["stored"].sum()  # a count alone depends on no score
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(leaves.items(), gradients, strict=True)
    }


def assert_gradient(got, expected, dtype=torch.float32):
    bound = (RELATIVE + ROUNDING[dtype]) * expected.abs() + ROW * expected.abs().amax(1, keepdim=True)
    if dtype == torch.float16:
        bound = bound + 2.0**-25  # half of its smallest number
    close = (got.double() - expected).abs() <= bound  # NaN never is
    assert close.all(), f"{expected[~close]} expected, got {got[~close]}"


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("case", CASES)
def test_value(isa, case, where, dtype):
    tile = Tile(7, 1025, dtype)
    s = make(case, 7, 1025, WHERES[where])
    _native.statistics(tile.native(), [s.native()])
    s.check(tile.scores().detach())


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("score")])
def test_a_dropped_column_is_noticed(case):
    tile = Tile(7, 1025)
    s = make(case, 7, 1025)
    falls = case in ("minimum", "softplus_falling", "logsumexp_falling", "focal")
    tile.stored[:, 1024] = -9.0 if falls else 9.0
    _native.statistics(tile.native(end=1024), [s.native()])
    with pytest.raises(AssertionError):
        s.check(tile.scores().detach())


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 1023, 1024, 1025, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("rows", [0, 1, 3, 7])
def test_sizes(isa, rows, columns):
    """All statistics in one pass, and their gradient, at ragged sizes."""
    tile = Tile(rows, columns)
    wanted = [
        make(case, rows, columns, where, seed=i) for i, (case, where) in enumerate(zip(CASES, itertools.cycle((0, 1))))
    ]
    _native.statistics(tile.native(), [s.native() for s in wanted])
    z = tile.scores().detach()
    for s in wanted:
        s.check(z)
    wanted = [s for s in wanted if s.kind != _native.EXTREME or s.count <= columns]
    if rows:
        assert_gradient(run_gradient(tile, wanted), expected_gradient(tile, wanted)["stored"])


def test_no_columns(isa):
    s = make("logsumexp", 3, 0)
    tile = Tile(3, 0)
    _native.statistics(tile.native(), [s.native()])
    assert (s.value() == -INF).all()
    run_gradient(tile, [s])


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("case", CASES)
def test_columns_in_tiles(isa, case, where):
    """Tiles of a row's columns, merged in any order, are the row."""
    tile = Tile(5, 5000, classes=True)
    s = make(case, 5, 5000, WHERES[where])
    for first, end in [(3001, 5000), (0, 17), (2048, 3001), (17, 2048)]:
        _native.statistics(tile.native(first=first, end=end), [s.native(first)])
    s.check(tile.scores().detach())


@pytest.mark.parametrize("case", ["logsumexp", "expectation_score", "moments"])
def test_rising_and_large_scores(isa, case):
    """Each block brings a new maximum; sums relative to a stale one would overflow or vanish."""
    tile = Tile(2, 9000, holes=False)
    tile.stored[:, :9000] = torch.linspace(-3e4, 3e4, 9000) + torch.randn(2, 9000)
    s = make(case, 2, 9000)
    _native.statistics(tile.native(), [s.native()])
    s.check(tile.scores().detach())


def test_extreme_ties_take_the_lowest_column(isa):
    tile = Tile(2, 3000, holes=False)
    tile.stored[:, :3000] = 1.0
    s = make("top5", 2, 3000)
    for first, end in [(1000, 3000), (0, 1000)]:
        _native.statistics(tile.native(first=first, end=end), [s.native(first)])
    assert s.state[:, 5:].tolist() == [[0, 1, 2, 3, 4]] * 2


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("case", CASES)
def test_gradient(isa, case, where, dtype):
    tile = Tile(7, 1025, dtype)
    s = make(case, 7, 1025, WHERES[where])
    _native.statistics(tile.native(), [s.native()])
    assert_gradient(run_gradient(tile, [s]), expected_gradient(tile, [s])["stored"], dtype)


WAYS = {
    "bias_and_class_vectors": dict(classes=True),
    "softcap": dict(softcap=5.0),
    "scale": dict(scale=2.5),
    "everything": dict(classes=True, softcap=4.0, scale=0.7),
    "plain": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_gradient_of_stored_values_and_sums(isa, way):
    tile = Tile(7, 2500, **WAYS[way])
    wanted = [make(case, 7, 2500, where, seed=i) for i, (case, where) in enumerate(
        [("logsumexp", 1), ("score", 0), ("moments", 0), ("sum_vector", 1), ("softplus", 0), ("maximum", 1)])]  # fmt: skip
    _native.statistics(tile.native(), [s.native() for s in wanted])
    sums = {name: torch.ones(2500) for name in ("bias", "class_shift", "class_scale", "largest")}
    sums["scale"] = torch.ones(1, dtype=torch.float64)
    native_sums = _native.Sums(**{name: pointer(sum) for name, sum in sums.items()})
    got, expected = run_gradient(tile, wanted, sums=native_sums), expected_gradient(tile, wanted)
    assert_gradient(got, expected["stored"])

    assert torch.equal(sums["largest"], torch.maximum(got.abs().amax(0), torch.ones(2500)))
    da = expected["stored"]
    size = da.abs().sum(0) * 10 + 1  # of the terms: cap, class scale and 1 / slope are of that order
    expected.setdefault("bias", da.sum(0))
    for name in ("bias", "class_shift", "class_scale"):
        if name in expected:
            assert ((sums[name].double() - 1 - expected[name]).abs() <= COLUMN_SUM * size).all(), name
    assert (sums["scale"] - 1 - expected["scale"]).abs() <= COLUMN_SUM * size.sum()


def test_entries_and_rows_that_do_not_count_are_exactly_zero(isa):
    tile = Tile(7, 1025)
    wanted = [make("logsumexp", 7, 1025, _native.REST), make("sum", 7, 1025), make("score", 7, 1025)]
    wanted[2].at[0] = int((tile.stored[0, :1025] == -INF).nonzero()[0])
    _native.statistics(tile.native(), [s.native() for s in wanted])
    assert wanted[2].value()[0] == -INF
    for s in wanted:
        s.coefficient[1] = 0
    tile.stored[1, 5] = math.nan  # not read
    got = run_gradient(tile, wanted)
    assert (got[tile.stored[:, :1025] == -INF] == 0).all()
    assert (got[3] == 0).all() and (got[1] == 0).all() and (got[0] != 0).any()


def test_infinities_and_nan_show(isa):
    tile = Tile(3, 100, holes=False)
    tile.stored[0, 70] = INF
    tile.stored[1, 70] = math.nan
    lse, top, squares = make("logsumexp", 3, 100), make("maximum", 3, 100), make("softplus", 3, 100)
    wanted = [lse, top, squares]
    _native.statistics(tile.native(), [s.native() for s in wanted])
    assert not lse.value()[:2].isfinite().any() and lse.value()[2].isfinite()
    assert top.value()[0] == INF and top.value()[1].isnan() and top.state[1, 1] == 70
    assert squares.value()[0] == INF and squares.value()[1].isnan()
    out = torch.empty(3, 100)
    _native.gradient(tile.native(), pointer(out), 100, _native.F32, [lse.native()], None)
    assert out[:2].isnan().any(1).all() and out[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_place_and_narrower(isa, dtype):
    tile = Tile(7, 5001)
    wanted = [make("logsumexp", 7, 5001, _native.REST), make("score", 7, 5001)]
    _native.statistics(tile.native(), [s.native() for s in wanted])
    apart = run_gradient(tile, wanted, dtype)
    stride = tile.stride * 4 // dtype.itemsize
    _native.gradient(tile.native(), pointer(tile.stored), stride, DTYPES[dtype], [s.native() for s in wanted], None)
    assert torch.equal(tile.stored.view(dtype)[:, :5001], apart)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 33, 1025, 2048])
@pytest.mark.parametrize("way", ["plain", "bias_and_class_vectors"])
def test_gradient_of_kept_exponentials(isa, way, columns, dtype):
    """Exponentials kept in the fp32 tile's own memory, rounded to dtype, give the gradient that the scores give."""
    tile = Tile(7, columns, **WAYS[way])
    wanted = [make(case, 7, columns, where) for case, where in [("logsumexp", 1), ("score", 0), ("count", 1)]]
    missing = tile.scores().detach() == -INF
    for s in wanted:
        s.coefficient[1] = 0
        s.at[missing.gather(1, s.at.clamp(min=0)) | (s.at < 0)] = -1  # exponentials do not tell a score of -inf
    expected = expected_gradient(tile, wanted)
    z = tile.scores().detach()
    shift, stride = torch.full((7,), math.nan), tile.stride * 4 // dtype.itemsize
    kept = _native.Statistic(
        kind=_native.LOGSUMEXP, where=_native.REST, rest=pointer(wanted[0].rest), state=pointer(wanted[0].state),
        coefficient=pointer(wanted[0].coefficient), keep=pointer(tile.stored), keep_stride=stride,
        keep_dtype=DTYPES[dtype], keep_shift=pointer(shift),
    )  # fmt: skip
    natives = [kept, *(s.native() for s in wanted[1:])]
    _native.statistics(tile.native(), natives)
    for s in wanted:
        s.check(z)
    largest, bias = torch.zeros(columns), torch.zeros(columns)
    sums = _native.Sums(bias=pointer(bias), largest=pointer(largest))
    out = _native.Tile(
        data=pointer(tile.stored), rows=7, columns=columns, stride=stride, dtype=DTYPES[dtype],
        class_scale=pointer(tile.class_scale), scale=tile.scale,
    )  # fmt: skip
    _native.gradient_of_exponentials(out, natives, sums)
    got = tile.stored.view(dtype)[:, :columns]
    bound = (RELATIVE + 2 * ROUNDING[dtype]) * (expected["stored"].abs() + 1e-3) + ROW
    assert ((got.double() - expected["stored"]).abs() <= bound).all()
    assert (got[1] == 0).all()
    assert ((bias.double() - got.double().sum(0)).abs() <= 7 * bound.amax(0)).all()
    assert ((largest.double() - got.double().abs().amax(0)).abs() <= bound.amax(0)).all()


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            tile = Tile(64, 5000)
            wanted = [make(case, 64, 5000, _native.REST) for case in CASES]
            _native.statistics(tile.native(), [s.native() for s in wanted])
            results.append([run_gradient(tile, wanted), *(s.state for s in wanted)])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# ---- elementary functions and conversions ----------------------------------------------------------------------------


def one_column(stored, kind, **options):
    """The state of a statistic for each number alone: a tile of one column."""
    stored = stored.contiguous()
    state = torch.zeros(stored.numel(), 2 if kind == SUM_OF else 1, dtype=torch.float64)
    tile_options = {name: options.pop(name) for name in ("softcap",) if name in options}
    tile = _native.Tile(
        data=pointer(stored), rows=stored.numel(), columns=1, stride=1, dtype=DTYPES[stored.dtype], **tile_options
    )
    _native.statistics(tile, [_native.Statistic(kind=kind, state=pointer(state), **options)])
    return state


def assert_function(got, expected):
    error = ((got - expected) / expected).abs()
    assert error.max() <= FUNCTION, f"relative error {error.max():.2e} at result {expected[error.argmax()]:.3e}"


NUMBERS = torch.cat([torch.linspace(-86, 86, 100001), torch.logspace(-30, 0, 20000), -torch.logspace(-30, 0, 20000)])


def test_sigmoid_and_its_slope_to_the_last_digits(isa):
    """Below -17 the sigmoid is the exponential: this is the exponential's test too."""
    state, u = one_column(NUMBERS, SUM_OF, function=_native.F_SIGMOID), NUMBERS.double()
    assert_function(state[:, 0], u.sigmoid())
    assert_function(state[:, 1], u.sigmoid() * (-u).sigmoid())
    assert (one_column(torch.tensor([-104.0, -1e30]), SUM_OF, function=_native.F_SIGMOID) == 0).all()


def test_softplus_to_the_last_digits(isa):
    state, u = one_column(NUMBERS, SUM_OF, function=_native.F_SOFTPLUS), NUMBERS.double()
    assert_function(state[:, 0], torch.logaddexp(torch.zeros_like(u), u))
    assert_function(state[:, 1], u.sigmoid())


def test_focal_to_the_last_digits(isa):
    numbers = NUMBERS[NUMBERS.abs() < 28]
    u, gamma = numbers.double(), 2.0
    state = one_column(numbers, SUM_OF, function=_native.F_FOCAL, parameter=gamma)
    p, s = torch.logaddexp(torch.zeros_like(u), u), u.sigmoid()
    assert (((state[:, 0] / (p * s**gamma)) - 1).abs() <= 3 * FUNCTION).all()
    assert (((state[:, 1] / (s**gamma * (s + gamma * p * (-u).sigmoid()))) - 1).abs() <= 3 * FUNCTION).all()


def test_softcap_to_the_last_digits(isa):
    got = one_column(NUMBERS, _native.SUM, softcap=1.0)[:, 0]
    assert_function(got, NUMBERS.double().tanh())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_read_exactly(isa, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    got, expected = one_column(every, _native.SUM)[:, 0], every.double()
    expected[expected == -INF] = 0
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_as_torch_rounds(isa, dtype):
    bits = torch.randint(-(2**31), 2**31, (1, 400000), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    random = torch.cat([bits.view(torch.float32), torch.randn(1, 200000), torch.randn(1, 200000) * 2.0**-14], 1)
    ties = torch.arange(0, 2**15).to(torch.int16).view(dtype).float()
    ties = torch.cat([ties, (ties[:-1] + ties[1:]) / 2, torch.tensor([65519.99, 65520.0, INF, -INF, math.nan])])
    values = torch.cat([random, ties[None], -ties[None]], 1)
    columns = values.shape[1]
    out, one, state = torch.empty(columns, dtype=dtype), torch.ones(1), torch.zeros(1, dtype=torch.float64)
    tile_data = torch.zeros(columns)
    tile = _native.Tile(data=pointer(tile_data), rows=1, columns=columns, stride=columns, dtype=_native.F32)
    weighted = _native.Statistic(
        kind=_native.SUM, operand=pointer(values), state=pointer(state), coefficient=pointer(one)
    )
    _native.gradient(tile, pointer(out), columns, DTYPES[dtype], [weighted], None)
    expected = values[0].to(dtype)
    same = (out.view(torch.int16) == expected.view(torch.int16)) | (out.isnan() & expected.isnan())
    assert same.all(), (values[0][~same], out[~same], expected[~same])


# ---- the surface -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(tile=dict(data=0)), "data is null"),
        (dict(tile=dict(rows=-1)), "-1 rows"),
        (dict(tile=dict(dtype=9)), "dtype 9"),
        (dict(tile=dict(softcap=-1.0)), "softcap"),
        (dict(statistic=dict(kind=99)), "kind 99"),
        (dict(statistic=dict(where=32)), "where 32"),
        (dict(statistic=dict(where=_native.SAME | _native.OTHER)), "where 6"),
        (dict(statistic=dict(where=_native.SAME)), "without labels"),
        (dict(statistic=dict(where=_native.ABOVE)), "without above"),
        (dict(statistic=dict(where=_native.REST)), "without rest"),
        (dict(statistic=dict(state=0)), "state is null"),
        (dict(statistic=dict(count=2)), "count is 2"),
        (dict(statistic=dict(kind=_native.SCORE)), "without columns"),
        (dict(statistic=dict(kind=EXPECTATION)), "has none"),
        (dict(statistic=dict(kind=SUM_OF, function=17)), "fl_function 17"),
        (dict(statistic=dict(kind=_native.EXTREME, factor=2.0)), "factor"),
        (dict(gradient=dict(out=0)), "out is null"),
        (dict(gradient=dict(out_dtype=4)), "out_dtype 4"),
        (dict(gradient=dict(out_stride=3)), "out_stride 3"),
        (dict(statistic=dict(coefficient=0)), "coefficient is null"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    data, state, coefficient = torch.zeros(2, 4), torch.zeros(2, 8, dtype=torch.float64), torch.zeros(2, 8)
    tile = dict(data=pointer(data), rows=2, columns=4, stride=4, dtype=_native.F32) | wrong.get("tile", {})
    statistic = dict(kind=_native.SUM, state=pointer(state), coefficient=pointer(coefficient)) | wrong.get(
        "statistic", {}
    )
    arguments = dict(out=pointer(data), out_stride=4, out_dtype=_native.F32) | wrong.get("gradient", {})
    with pytest.raises(RuntimeError, match=message):
        _native.gradient(_native.Tile(**tile), statistics=[_native.Statistic(**statistic)], sums=None, **arguments)


def test_one_shift_for_all_kept_columns():
    data, state, shift = torch.zeros(2, 4), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2)
    tile = _native.Tile(data=pointer(data), rows=2, columns=4, stride=4, dtype=_native.F32)
    kept = _native.Statistic(
        kind=_native.LOGSUMEXP, state=pointer(state), keep=pointer(data), keep_stride=4, keep_block=2,
        keep_shift=pointer(shift), coefficient=pointer(shift),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="4 columns in blocks of 2 are more than the 1 shifts"):
        _native.statistics(tile, [kept])
    with pytest.raises(RuntimeError, match="keep_block is 2, but these kernels know one shift"):
        _native.gradient_of_exponentials(tile, [kept], None)


def test_unknown_instruction_set():
    with pytest.raises(RuntimeError, match="sse9"):
        _native.set_isa("sse9")
    assert _native.isa() in ("avx512", "avx2", "portable")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps to see the loaded libraries")
@pytest.mark.parametrize("order", ["import torch, fusedloss._native", "import fusedloss._native, torch"])
def test_one_openmp_runtime(order):
    """Two OpenMP runtimes in a process would fight for the cores."""
    code = (
        order
        + "; print({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'libomp' in l or 'iomp5' in l})"
    )
    loaded = eval(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert len(loaded) == 1, loaded
