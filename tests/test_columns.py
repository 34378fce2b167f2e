"""The CPU kernels of relations and of statistics of columns against plain PyTorch in fp64."""

import itertools
import math

import pytest
import torch

from fusedloss import statistics as S
from fusedloss.backends import torch as meaning
from fusedloss.backends.tile import Across, Sums, Tile
from fusedloss.relation import Other, Rest, Same, Where

pytestmark = pytest.mark.host

_native = pytest.importorskip("fusedloss._native", reason="the native extension fusedloss._native is not built")
cpu = pytest.importorskip("fusedloss.backends.cpu")

# The tolerance policy is test_native.py's: a value may err by VALUE of its terms' magnitudes, a gradient entry by
# RELATIVE of itself and ROW of the largest in its row; log(1 + ...) inside an exponent costs the gradient SHARPER of both.
VALUE = 1e-6
RELATIVE = 4e-6
ROW = 1e-6
SHARPER = 4.0
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}
INF = math.inf


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    try:
        _native.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    _native.set_isa(None)


# ---- statistics as of the rows of (n, m) scores: the same maker serves both ways of looking --------------------------


def eighths(*shape, r):
    """Scores, thresholds and row parameters: in fp32 they meet, and add up, as they do in fp64."""
    return (torch.randn(*shape, generator=r) * 8).round() / 8


def log_of(function, **options):
    return lambda n, m, where, r: S.LogSumExpOf(function, row=eighths(n, r=r), where=where, **options)


def sum_of(function, **options):
    return lambda n, m, where, r: S.SumOf(function, row=eighths(n, r=r), where=where, **options)


def vector(m, r):
    return torch.where(torch.rand(m, generator=r) < 0.3, 0.0, torch.randn(m, generator=r))


CASES = {
    "score": lambda n, m, where, r: S.Score(at=torch.randint(-1, m, (n, 2), generator=r)),
    "score_shared": lambda n, m, where, r: S.Score(columns=torch.randint(0, m, (3,), generator=r)),
    "logsumexp": lambda n, m, where, r: S.LogSumExp(where=where),
    "logsumexp_falling": lambda n, m, where, r: S.LogSumExp(factor=-1.5, where=where),
    "log_tanh": log_of("log_tanh", factor=0.25, weight=5.0),
    "log_atan": log_of("log_atan", factor=0.0625, weight=4.0),
    "log_relu": log_of("log_relu", factor=0.25, weight=3.0),
    "circle": log_of("circle", factor=0.25, weight=4.0, parameter=0.25),
    "circle_falling": log_of("circle", factor=-0.25, weight=4.0, parameter=0.25),
    "sum": lambda n, m, where, r: S.Sum(where=where),
    "sum_vector": lambda n, m, where, r: S.Sum(vector(m, r), where=where),
    "sum_matrix": lambda n, m, where, r: S.Sum(torch.randn(n, m, generator=r), where=where),
    "count": lambda n, m, where, r: S.Count(where=where),
    "count_vector": lambda n, m, where, r: S.Count(vector(m, r), where=where),
    "sum_of_squares": lambda n, m, where, r: S.SumOfSquares(where=where),
    "moments": lambda n, m, where, r: S.Moments(where=where),
    "expectation": lambda n, m, where, r: S.Expectation(factor=0.7, where=where),
    "expectation_near": lambda n, m, where, r: S.Expectation(vector(m, r), torch.randn(n, generator=r), where=where),
    "softplus": sum_of("softplus"),
    "sigmoid": sum_of("sigmoid", factor=2.0),
    "hinge": sum_of("hinge", factor=-1.0),
    "squared_hinge": sum_of("squared_hinge"),
    "focal": sum_of("focal", parameter=2.0, factor=-1.0),
    "maximum": lambda n, m, where, r: S.Max(where=where),
    "minimum": lambda n, m, where, r: S.Min(where=where),
    "top3": lambda n, m, where, r: S.TopK(3, where=where),
}


def labels(n, m, r):
    return tuple(torch.randint(0, 3, (size,), generator=r) << 33 for size in (n, m))  # they differ above 32 bits only


WHERES = {
    "all": lambda n, m, r: None,
    "rest": lambda n, m, r: Rest(torch.randint(-1, m, (n,), generator=r)),
    "same": lambda n, m, r: Same(*labels(n, m, r)),
    "other": lambda n, m, r: Other(*labels(n, m, r)),
    "same_rest": lambda n, m, r: Same(*labels(n, m, r), without=torch.randint(-1, m, (n,), generator=r)),
    "above": lambda n, m, r: Where(above=eighths(n, r=r)),
    "below": lambda n, m, r: Where(below=eighths(n, r=r)),
    "everything": lambda n, m, r: Other(
        *labels(n, m, r),
        without=torch.randint(-1, m, (n,), generator=r),
        above=eighths(n, r=r) - 2,
        below=eighths(n, r=r) + 2,
    ),
}


def make(case, where, n, m, seed=1):
    r = torch.Generator().manual_seed(seed)
    return CASES[case](n, m, WHERES[where](n, m, r), r)


# ---- tiles -----------------------------------------------------------------------------------------------------------


def make_tile(n, m, dtype=torch.float32, *, first=0, first_row=0, transformed=False, holes=True, seed=0):
    """Scores of which some, a whole row and a whole column are -inf; behind every row lies what is not ours to read."""
    r = torch.Generator().manual_seed(seed)
    stored = 2 * eighths(n, m + 3, r=r)
    if holes:
        stored[torch.rand(stored.shape, generator=r) < 0.05] = -INF
        if n > 3 and m > 3:
            stored[n // 2], stored[:, m // 2] = -INF, -INF
    stored[:, m:] = math.nan
    ways = {}
    if transformed:
        ways = {"class_shift": torch.full((m,), -0.5), "scale": 1.5, "class_scale": torch.randint(2, 7, (m,), generator=r) / 4}
    return Tile(stored.to(dtype)[:, :m], first, first_row=first_row, **ways)


def wide(tile):
    return Tile(tile.data.double(), tile.first, tile.bias, tile.class_scale, tile.class_shift, tile.softcap, tile.scale,
                tile.first_row)  # fmt: skip


def states_of(backend, tile, stats, down):
    states = [s.identity(tile.data.shape[1 if down else 0], tile.data.device) for s in stats]
    (backend.column_statistics if down else backend.statistics)(tile, stats, states)
    return states


def coefficients_of(stats, size, seed=5):
    r = torch.Generator().manual_seed(seed)
    found = [torch.randn(size, s.outputs, generator=r).double() for s in stats]
    for s, c in zip(stats, found):
        if isinstance(s, S.Moments):
            c[:, 0] = 0
    return found


def check_states(statistic, got, expected, z):
    size = torch.where(z == -INF, 0.0, z).abs()
    if isinstance(statistic, (S.LogSumExp, S.LogSumExpOf, S.Expectation, S.Extreme, S.Score)):
        magnitude = size.amax(1, keepdim=True)
    else:
        magnitude = size.sum(1, keepdim=True) + size.square().sum(1, keepdim=True)
    pairs = [(statistic.value(got), statistic.value(expected))]
    if isinstance(statistic, (S.SumOf, S.LogSumExpOf)):
        pairs.append((statistic.row_slope(got), statistic.row_slope(expected)))
    if isinstance(statistic, S.Extreme):
        pairs.append((got[:, statistic.k :], expected[:, statistic.k :]))
    for a, b in pairs:
        same = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= VALUE * (b.abs() + magnitude + 1))
        assert same.all(), f"{type(statistic).__name__}: {b[~same]} expected, got {a[~same]}"


def check_gradient(got, expected, stats):
    factor = SHARPER if any(isinstance(s, S.LogSumExpOf) for s in stats) else 1.0
    largest = expected.abs().amax(1, keepdim=True) + expected.abs().amax(0, keepdim=True)
    bound = (factor * RELATIVE + ROUNDING[got.dtype]) * expected.abs() + factor * ROW * largest
    close = (got.double() - expected).abs() <= bound
    assert close.all(), f"{expected[~close]} expected, got {got[~close]}"


def gradient_of(backend, tile, stats, states, coefficients, across=None, sums=None, dtype=None):
    out = torch.full_like(tile.data, math.nan, dtype=dtype or tile.data.dtype)
    backend.gradient(tile, out, stats, states, coefficients, sums or Sums(), across)
    return out


def check(tile, stats, below):
    """Statistics of rows and of columns, and the gradient of both."""
    n, m = tile.data.shape
    truth, z = wide(tile), wide(tile).scores()
    mine, theirs = (states_of(meaning, truth, some, down) for some, down in ((stats, False), (below, True)))
    for some, expected, down in ((stats, mine, False), (below, theirs, True)):
        for s, a, b in zip(some, states_of(cpu, tile, some, down), expected):
            check_states(s, a, b, z.t() if down else z)
    coefficients, across = coefficients_of(stats, n), None
    if below:
        across = Across(below, theirs, coefficients_of(below, m, 6))
    expected = gradient_of(meaning, truth, stats, mine, coefficients, across)
    check_gradient(gradient_of(cpu, tile, stats, mine, coefficients, across), expected, [*stats, *below])


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("case", CASES)
def test_every_statistic_and_relation(isa, case, where, dtype):
    """Each alone, of rows and of columns, where the tile is not the first of its scores."""
    n, m = 131, 37
    tile = make_tile(n, m, dtype, first=5, first_row=11)
    check(tile, [make(case, where, n, m + 5).taking(columns=slice(5, None))], [])
    check(tile, [], [make(case, where, m, n + 11).taking(columns=slice(11, None))])


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("n, m", [(1, 1), (1, 65), (65, 1), (7, 63), (64, 64), (65, 65), (225, 17), (3, 2049), (113, 70)])
def test_sizes(isa, n, m, transformed):
    """All statistics in one pass, with changing relations."""
    tile = make_tile(n, m, transformed=transformed)
    made = list(enumerate(zip(CASES, itertools.cycle(WHERES))))
    below = [(i, names) for i, names in made if names[0] != "sum_matrix"]  # one such, and none would be compiled
    check(tile, [make(*names, n, m, i) for i, names in made], [make(*names, m, n, 50 + i) for i, names in below])


def test_no_rows_and_no_columns(isa):
    for n, m in ((0, 5), (5, 0)):
        tile, lse = Tile(torch.empty(n, m)), S.LogSumExp()
        (state,) = states_of(cpu, tile, [lse], True)
        assert state.shape == (m, 2) and (state[:, 0] == -INF).all()
        assert gradient_of(cpu, tile, [], [], [], Across([lse], [state], [torch.ones(m, 1)])).shape == (n, m)


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("case", CASES)
def test_tiles_of_rows_in_any_order(case, where):
    """States of columns merged over tiles of rows are those of all rows."""
    tile, s = make_tile(500, 40), make(case, where, 40, 500)
    whole, state = states_of(cpu, tile, [s], True), s.identity(40, "cpu")
    for first, end in ((301, 500), (0, 17), (140, 301), (17, 140)):
        part = Tile(tile.data[first:end], first_row=first)
        cpu.column_statistics(part, [s.taking(columns=slice(first, end))], [state])
    check_states(s, state, whole[0], tile.scores().double().t())


def test_ties_take_the_lowest_row(isa):
    state, s = S.TopK(4).identity(50, "cpu"), S.TopK(4)
    ones = torch.ones(300, 50)
    for first, end in ((200, 300), (0, 200)):
        cpu.column_statistics(Tile(ones[first:end], first_row=first), [s], [state])
    assert (state[:, 4:] == torch.arange(4.0)).all()


@pytest.mark.parametrize("case", ["logsumexp", "expectation", "circle", "moments"])
def test_rising_scores(isa, case):
    """Every block of rows brings a new maximum; sums relative to a stale one would overflow or vanish."""
    tile = make_tile(2000, 33, holes=False)
    tile.data.add_(torch.linspace(-100, 100, 2000)[:, None])
    s = make(case, "all", 33, 2000)
    (got,), (expected,) = (states_of(b, t, [s], True) for b, t in ((cpu, tile), (meaning, wide(tile))))
    scale = 40 if case == "circle" else 1  # its exponents are squares
    check_states(s, got, expected, scale * wide(tile).scores().t())


# ---- what must not happen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(("count", "score"))])
def test_nan_shows_in_its_own_row_and_column_only(isa, case):
    tile = make_tile(150, 70, holes=False)
    tile.data[120, 40] = math.nan
    for down, n, m, at in ((False, 150, 70, 120), (True, 70, 150, 40)):
        s = make(case, "all", n, m)
        (state,) = states_of(cpu, tile, [s], down)
        spoilt = ~s.value(state).isfinite().all(1)
        assert spoilt[at] and spoilt.sum() == 1
        for edge in ("above", "below"):
            s = make(case, edge, n, m)
            (state,) = states_of(cpu, tile, [s], down)
            assert not s.value(state)[at].isfinite().all(), "a threshold hides NaN"


@pytest.mark.parametrize("score", [INF, math.nan])
@pytest.mark.parametrize("case", CASES)
def test_what_has_no_weight_adds_exactly_zero(isa, case, score):
    tile = make_tile(70, 50)
    tile.data[3], tile.data[:, 20] = score, score
    for down, n, m, at in ((False, 70, 50, 3), (True, 50, 70, 20)):
        s = make(case, "rest", n, m)
        states, (c,) = states_of(cpu, tile, [s], down), coefficients_of([s], n)
        c[at] = 0
        given = ([], [], [], Across([s], states, [c])) if down else ([s], states, [c])
        got = gradient_of(cpu, tile, *given)
        assert ((got[:, at] if down else got[at]) == 0).all()
        assert (got[tile.data == -INF] == 0).all()


def test_what_nothing_looks_at_is_exactly_zero(isa):
    n, m = 40, 50
    nobody = Same(torch.zeros(n, dtype=torch.int64), torch.ones(m, dtype=torch.int64))
    tile, s = make_tile(n, m), S.LogSumExp(where=nobody)
    states = states_of(cpu, tile, [s], False)
    assert (s.value(states[0]) == -INF).all()
    assert (gradient_of(cpu, tile, [s], states, [torch.ones(n, 1)]) == 0).all()


def test_same_bits_each_time_whatever_the_threads():
    tile, threads, results = make_tile(700, 300), torch.get_num_threads(), []
    stats = [make(case, where, 700, 300) for case, where in zip(CASES, itertools.cycle(WHERES))]
    below = [make(case, where, 300, 700) for case, where in zip(CASES, itertools.cycle(WHERES)) if case != "sum_matrix"]
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            mine, theirs = states_of(cpu, tile, stats, False), states_of(cpu, tile, below, True)
            across = Across(below, theirs, coefficients_of(below, 300))
            got = gradient_of(cpu, tile, stats, mine, coefficients_of(stats, 700), across)
            results.append([*mine, *theirs, got])
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_with_sums(isa, dtype):
    """`out` in the tile's own memory, and what is gathered beside it, where columns look too."""
    n, m = 70, 130
    tile = make_tile(n, m, transformed=True)
    stats, below = [S.LogSumExp()], [make("logsumexp", "same_rest", m, n), make("score", "all", m, n)]
    mine, theirs = states_of(cpu, tile, stats, False), states_of(cpu, tile, below, True)
    given = (stats, mine, coefficients_of(stats, n), Across(below, theirs, coefficients_of(below, m)))

    def sums(kind):
        fields = ("bias", "class_scale", "class_shift", "largest")
        return Sums(scale=torch.zeros((), dtype=torch.float64), **{f: torch.zeros(m, dtype=kind) for f in fields})

    got, expected = sums(torch.float32), sums(torch.float64)
    truth = gradient_of(meaning, wide(tile), *given, expected)
    apart = gradient_of(cpu, tile, *given, got, dtype)
    check_gradient(apart, truth, stats)
    for field in ("bias", "class_scale", "class_shift", "scale", "largest"):
        a, b = getattr(got, field).double(), getattr(expected, field)
        assert ((a - b).abs() <= VALUE * 10 * (1 + truth.abs().sum(0).max())).all(), field
    buffer = tile.data.as_strided((n, m + 3), (m + 3, 1))
    out = buffer.view(dtype)[:, :m]
    cpu.gradient(tile, out, *given[:3], Sums(), given[3])
    assert torch.equal(out, apart)


# ---- elementary functions --------------------------------------------------------------------------------------------


def of_single_scores(scores, s):
    (state,) = states_of(cpu, Tile(scores.unsqueeze(1)), [s], False)
    return state[:, 0], state[:, 2]


def assert_near(got, expected, bound):
    assert ((got - expected).abs() <= bound).all()


def test_logarithm_to_the_last_digits(isa):
    """1 + u is exact here."""
    y = torch.cat([torch.arange(1, 4096) / 4096, torch.arange(4096, 2**20, 97) / 4096, 2.0 ** torch.arange(1, 24)])
    value, slope = of_single_scores(y - 1, S.LogSumExpOf("log_relu"))
    assert_near(value, y.double().log(), 4e-7 * y.double().log().abs())
    assert_near(slope, 1 / y.double(), 4e-7 / y.double())
    outside, _ = of_single_scores(torch.tensor([-1.0, -2.0, -1e30]), S.LogSumExpOf("log_relu"))
    assert (outside == -INF).all()


NUMBERS = torch.cat([torch.linspace(-1.2, 60, 100001), torch.logspace(-30, 30, 20000), -torch.logspace(-30, 0, 20000)])


def test_arc_tangent_to_the_last_digits(isa):
    u = NUMBERS.double()
    value, slope = of_single_scores(NUMBERS, S.LogSumExpOf("log_atan"))
    assert_near(value.exp(), 1 + u.atan(), 4e-7)
    assert_near(value, u.atan().log1p(), 1e-6 * (1 + u.atan().log1p().abs()))
    exact = 1 / ((1 + u.atan()) * (1 + u * u))
    assert_near(slope, exact, 1e-6 * exact / (1 + u.atan()).clamp(max=1) + 1e-37)


def test_log_tanh_far_out(isa):
    """Where tanh is -1 to the last digit, its logarithm is a line still."""
    u = torch.linspace(-40, 40, 100001)
    value, slope = of_single_scores(u, S.LogSumExpOf("log_tanh"))
    exact = math.log(2) - torch.nn.functional.softplus(-2 * u.double(), threshold=100)
    assert_near(value, exact, 3e-7 * (1 + exact.abs()))
    assert_near(slope, 2 * torch.sigmoid(-2 * u.double()), 1e-6 * 2 * torch.sigmoid(-2 * u.double()))
