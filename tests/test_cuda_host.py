"""The CUDA kernels, executed on the host: threads, barriers and shuffles played by tests/cuda_host, fp64 truth beside.

Two builds, of 64 and of 256 threads to a block at most: the same columns are then one window or many, of one block of
threads or shared by several. More builds leave one barrier out each, and must be caught.
"""

import dataclasses
import itertools
import math

import pytest
import torch

T = pytest.importorskip("test_native", reason="the native extension fusedloss._native is not built")
import host_cuda  # noqa: E402  (needs the extension too)

import fusedloss  # noqa: E402
from fusedloss import _native, backends  # noqa: E402
from fusedloss import statistics as S
from fusedloss.backends import cuda  # noqa: E402
from fusedloss.backends import torch as meaning
from fusedloss.backends.tile import Across, Exponentials, Sums, Tile  # noqa: E402
from fusedloss.relation import Other, Rest, Same, Where  # noqa: E402

pytestmark = [pytest.mark.host, pytest.mark.skipif(host_cuda.missing() is not None, reason=str(host_cuda.missing()))]

INF = math.inf
WINDOW = {64: 1024, 256: 4096}  # columns that a block of threads holds at once
# Not "list": without it a thread may read a half-written entry, but fibers change over at waits only.
BARRIERS = ("reduction", "loaded")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_host")
    built = {}

    def library(threads, without="none"):
        key = threads, without
        if key not in built:
            defines = f"FL_MOST_THREADS={threads}", f"FL_WITHOUT_BARRIER={without}"
            built[key] = host_cuda.build(folder, f"kernels_{threads}_{without}", *defines)
        return built[key]

    return library


@pytest.fixture(autouse=True)
def one_thread():
    """Nothing here is large enough for more, and on a busy machine threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=WINDOW)
def kernels(request, libraries, monkeypatch):
    """The kernels in place of the extension's, in test_native too."""
    library = libraries(request.param)
    library.seed(1)
    monkeypatch.setattr(T, "_native", library)
    return library


small = pytest.mark.parametrize("kernels", [64], indirect=True)  # where more threads would only take longer


def groups(rows, columns, size=_native.CUDA_STATISTICS):
    """All statistics, as many at once as a pass takes."""
    wanted = [T.make(case, rows, columns, where, seed=i) for i, (case, where) in enumerate(zip(T.CASES, itertools.cycle((0, 1))))]
    return [wanted[i : i + size] for i in range(0, len(wanted), size)]


# ---- each statistic, in the words of test_native ---------------------------------------------------------------------


@small
@pytest.mark.parametrize("dtype", T.DTYPES, ids=str)
@pytest.mark.parametrize("where", T.WHERES)
@pytest.mark.parametrize("case", T.CASES)
def test_value_and_gradient(kernels, case, where, dtype):
    T.test_value(None, case, where, dtype)
    T.test_gradient(None, case, where, dtype)


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 255, 256, 257, 1017, 1024, 1025, 2049, 5000])
@pytest.mark.parametrize("rows", [0, 1, 3, 7])
def test_sizes(kernels, rows, columns):
    """All statistics and their gradient at ragged sizes. Rows this few are shared by blocks of threads."""
    tile = T.Tile(rows, columns, pad=columns % 4)
    z = tile.scores().detach()
    for wanted in groups(rows, columns):
        kernels.statistics(tile.native(), [s.native() for s in wanted])
        for s in wanted:
            s.check(z)
        wanted = [s for s in wanted if s.kind != _native.EXTREME or s.count <= columns]
        if rows:
            T.assert_gradient(T.run_gradient(tile, wanted), T.expected_gradient(tile, wanted)["stored"])


@small
@pytest.mark.parametrize("rows, columns", [(515, 1300), (200, 5000)])
def test_rows_that_blocks_of_threads_walk_alone(kernels, rows, columns):
    tile = T.Tile(rows, columns)
    z = tile.scores().detach()
    for wanted in groups(rows, columns):
        kernels.statistics(tile.native(), [s.native() for s in wanted])
        for s in wanted:
            s.check(z)


@small
@pytest.mark.parametrize("case", [case for case in T.CASES if case != "scores"])
def test_columns_in_tiles(kernels, case):
    T.test_columns_in_tiles(None, case, "rest")


@pytest.mark.parametrize("case", ["logsumexp", "expectation_score", "moments"])
def test_rising_and_large_scores(kernels, case):
    T.test_rising_and_large_scores(None, case)


@pytest.mark.parametrize("way", T.WAYS)
def test_gradient_of_stored_values_and_sums(kernels, way):
    T.test_gradient_of_stored_values_and_sums(None, way)


@small
@pytest.mark.parametrize("rows", [31, 33, 100])
def test_sums_over_many_rows(kernels, rows):
    """More rows than one thread adds up."""
    tile = T.Tile(rows, 700, **T.WAYS["everything"])
    wanted = [T.make("logsumexp", rows, 700), T.make("score", rows, 700)]
    kernels.statistics(tile.native(), [s.native() for s in wanted])
    sums = {name: torch.ones(700) for name in ("bias", "class_shift", "class_scale", "largest")}
    sums["scale"] = torch.ones(1, dtype=torch.float64)
    got = T.run_gradient(tile, wanted, sums=_native.Sums(**{name: T.pointer(sum) for name, sum in sums.items()}))
    expected = T.expected_gradient(tile, wanted)
    size = got.double().abs().sum(0) * 10 + 1
    for name in ("bias", "class_shift", "class_scale"):
        assert ((sums[name].double() - 1 - expected[name]).abs() <= T.COLUMN_SUM * size).all(), name
    assert (sums["scale"] - 1 - expected["scale"]).abs() <= T.COLUMN_SUM * size.sum()
    assert torch.equal(sums["largest"], torch.maximum(got.abs().amax(0), torch.ones(700)))


def test_what_does_not_count_is_zero_and_infinities_show(kernels):
    T.test_entries_and_rows_that_do_not_count_are_exactly_zero(None)
    T.test_infinities_and_nan_show(None)
    T.test_extreme_ties_take_the_lowest_column(None)
    T.test_no_columns(None)


def test_a_maximum_that_is_not_a_number_stays(kernels):
    tile = T.Tile(70, 40, holes=False)
    tile.stored[3, 5] = math.nan
    s, largest = T.make("sum_of_squares", 70, 40), torch.zeros(40)
    kernels.statistics(tile.native(), [s.native()])
    T.run_gradient(tile, [s], sums=_native.Sums(largest=T.pointer(largest)))
    assert largest[5].isnan() and largest[torch.arange(40) != 5].isfinite().all()


@pytest.mark.parametrize("dtype", T.DTYPES, ids=str)
def test_in_place_and_narrower(kernels, dtype):
    T.test_in_place_and_narrower(None, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_place_and_narrower_with_sums(kernels, dtype):
    """The sums are those of the gradient before it is rounded."""
    tile = T.Tile(40, 3001)
    wanted = [T.make("logsumexp", 40, 3001), T.make("score", 40, 3001)]
    kernels.statistics(tile.native(), [s.native() for s in wanted])
    bias, exact = torch.zeros(3001), T.run_gradient(tile, wanted)
    sums = _native.Sums(bias=T.pointer(bias))
    kernels.gradient(
        tile.native(), T.pointer(tile.stored), tile.stride * 2, T.DTYPES[dtype], [s.native() for s in wanted], sums
    )
    assert torch.equal(tile.stored.view(dtype)[:, :3001], exact.to(dtype))
    assert ((bias - exact.sum(0)).abs() <= 1e-6 * (1 + exact.abs().sum(0))).all()


@small
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(kernels, dtype):
    T.test_every_half_is_read_exactly(None, dtype)
    bits = torch.randint(-(2**31), 2**31, (1, 50000), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.randn(1, 5000), torch.randn(1, 5000) * 2.0**-14], 1)
    tile, weighted = T.Tile(1, 60000, holes=False), T.make("sum_vector", 1, 60000)
    weighted.operand, weighted.coefficient[:] = values, 1
    torch.testing.assert_close(T.run_gradient(tile, [weighted], dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- kept exponentials -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", T.DTYPES, ids=str)
@pytest.mark.parametrize("columns, block", [(1, 4), (33, 33), (1000, 1024), (2048, 1024), (3001, 640), (2500, 37), (50, 3)])
@pytest.mark.parametrize("way", ["plain", "bias_and_class_vectors"])
@pytest.mark.parametrize("apart", [False, True], ids=["in_the_tile", "apart"])
def test_kept_exponentials(kernels, apart, way, columns, block, dtype):
    """Exponentials, relative to each block's own maximum, and the gradient that they give."""
    rows = 7
    tile = T.Tile(rows, columns, pad=columns % 3, **T.WAYS[way])
    wanted = [T.make(case, rows, columns, where) for case, where in [("logsumexp", 1), ("score", 0), ("count", 1)]]
    z = tile.scores().detach()
    for s in wanted:
        s.coefficient[1] = 0
        s.at[(z == -INF).gather(1, s.at.clamp(min=0)) | (s.at < 0)] = -1  # exponentials do not tell a score of -inf
    expected = T.expected_gradient(tile, wanted)["stored"]
    counts = wanted[0].counts(z)
    keep = torch.full((rows, tile.stride), math.nan, dtype=dtype) if apart else tile.stored
    stride = keep.stride(0) * keep.dtype.itemsize // dtype.itemsize
    shift = torch.full((-(-columns // block), rows), math.nan)
    kept = _native.Statistic(
        kind=_native.LOGSUMEXP, where=_native.REST, rest=T.pointer(wanted[0].rest), state=T.pointer(wanted[0].state),
        coefficient=T.pointer(wanted[0].coefficient), keep=T.pointer(keep), keep_stride=stride,
        keep_dtype=T.DTYPES[dtype], keep_block=block, keep_shift=T.pointer(shift),
    )  # fmt: skip
    natives = [kept, *(s.native() for s in wanted[1:])]
    kernels.statistics(tile.native(), natives)
    for s in wanted:
        s.check(z)

    e = keep.view(dtype)[:, :columns]
    for number, part in enumerate(shift):
        here = slice(number * block, (number + 1) * block)
        seen = torch.where(counts[:, here], z[:, here], -INF)
        top = seen.amax(1)
        assert ((part.double() - torch.where(top == -INF, 0.0, top)).abs() <= 1e-6 * (1 + top.abs().nan_to_num(0, 0, 0))).all()
        exact = (seen - part.double()[:, None]).exp()
        assert ((e[:, here].double() - exact).abs() <= (3e-6 + T.ROUNDING[dtype]) * exact + 2.0**-24).all()
    assert (e[~counts] == 0).all()

    out = _native.Tile(
        data=T.pointer(keep), rows=rows, columns=columns, stride=stride, dtype=T.DTYPES[dtype],
        class_scale=T.pointer(tile.class_scale), scale=tile.scale,
    )  # fmt: skip
    bias, largest = torch.zeros(columns), torch.zeros(columns)
    kernels.gradient_of_exponentials(out, natives, _native.Sums(bias=T.pointer(bias), largest=T.pointer(largest)))
    got = keep.view(dtype)[:, :columns].double()
    bound = (T.RELATIVE + 2 * T.ROUNDING[dtype]) * (expected.abs() + 1e-3) + T.ROW
    assert ((got - expected).abs() <= bound).all()
    assert (got[1] == 0).all()
    assert ((bias.double() - got.sum(0)).abs() <= rows * bound.amax(0)).all()
    assert ((largest.double() - got.abs().amax(0)).abs() <= bound.amax(0)).all()


def test_what_was_left_out_stays_zero_whatever_the_factor(kernels):
    e, state = torch.ones(1, 20), torch.tensor([[0.0, 20.0]], dtype=torch.float64)
    e[0, 3], shift, coefficient = 0, torch.zeros(1, 1), torch.tensor([INF])
    tile = _native.Tile(data=T.pointer(e), rows=1, columns=20, stride=20, dtype=_native.F32)
    kept = dict(keep_block=20, keep_shift=T.pointer(shift), coefficient=T.pointer(coefficient))
    kernels.gradient_of_exponentials(tile, [_native.Statistic(kind=_native.LOGSUMEXP, state=T.pointer(state), **kept)])
    assert e[0, 3] == 0 and (e[0, :3] == INF).all() and (e[0, 4:] == INF).all()


# ---- the backend against plain PyTorch -------------------------------------------------------------------------------


@pytest.fixture
def as_backend(monkeypatch):
    """backends/cuda.py with tensors of the host, and the kernels of a library."""

    def launch(device, size, call):
        with host_cuda.Workspace(size) as memory:
            call(*memory)

    def use(library):
        monkeypatch.setattr(cuda, "_native", library)
        monkeypatch.setattr(cuda, "_launch", launch)
        return cuda

    return use


@pytest.fixture
def backend(kernels, as_backend):
    return as_backend(kernels)


def random_statistics(rows, columns):
    target, row = torch.randint(0, columns, (rows,)), torch.randn(rows)
    rest, weights = Rest(target), torch.rand(columns)
    return [
        [S.LogSumExp(where=rest), S.Score(at=target), S.Count(where=rest), S.Sum(weights=weights)],
        [S.LogSumExp(factor=0.5), S.Moments(), S.SumOfSquares(where=rest), S.Extreme(k=3, where=rest)],
        [S.Expectation(), S.Expectation(values=weights, near=row, power=2), S.Extreme(k=2, factor=-1.0)],
        [S.Score(columns=torch.tensor([0, columns - 1])), *(S.SumOf(f, row=row) for f in ("softplus", "hinge", "sigmoid"))],
        [S.Sum(weights=torch.rand(rows, columns).half()), S.Score(at=torch.randint(-1, columns, (rows, 2)))],
    ]


@pytest.mark.parametrize("dtype", T.DTYPES, ids=str)
def test_backend_is_what_torch_says(backend, dtype):
    rows, columns = 5, 1500
    data = (torch.randn(rows, columns) * 2).to(dtype)
    data[1, 7] = -INF
    vectors = dict(bias=torch.randn(columns), class_scale=torch.rand(columns) + 0.5, class_shift=torch.randn(columns))
    ways = {}, dict(scale=0.7, **vectors), dict(scale=torch.tensor(1.3)), dict(scale=torch.tensor(-0.7), **vectors)
    for stats, options in itertools.product(random_statistics(rows, columns), ways):
        tile = Tile(data, **options)
        states = [[s.identity(rows, data.device) for s in stats] for _ in range(2)]
        for which, mine in zip((backend, meaning), states):
            which.statistics(tile, stats, mine)
        for s, got, expected in zip(stats, *states):
            torch.testing.assert_close(s.value(got), s.value(expected), rtol=2e-5, atol=2e-4)
        coefficients = [torch.randn(rows, s.outputs) for s in stats]
        for s, c in zip(stats, coefficients):
            if isinstance(s, S.Moments):
                c[:, 0] = 0
        outs, gathered = [], []
        for which in (backend, meaning):
            sums = Sums(bias=torch.zeros(columns), largest=torch.zeros(columns), scale=torch.zeros((), dtype=torch.float64))
            outs.append(torch.empty(rows, columns))
            which.gradient(tile, outs[-1], stats, states[1], coefficients, sums)
            gathered.append((sums.bias, sums.largest, sums.scale))
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
        for got, expected in zip(*gathered):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", T.DTYPES, ids=str)
def test_backend_keeps_what_torch_keeps(backend, dtype):
    rows, columns, block = 5, 1500, 400
    data, target = torch.randn(rows, columns) * 2, torch.randint(0, columns, (rows,))
    stats = [S.LogSumExp(where=Rest(target)), S.Score(at=target)]
    coefficients = [torch.randn(rows, 1) for _ in stats]
    results = []
    for which in (backend, meaning):
        tile = Tile(data.clone())
        states = [s.identity(rows, data.device) for s in stats]
        kept = Exponentials(tile.data.view(dtype)[:, :columns], torch.empty(-(-columns // block), rows), block)
        which.statistics(tile, stats, states, kept)
        before = kept.data.clone()
        which.gradient_of_exponentials(tile, kept, stats, states, coefficients, Sums())
        results.append((before.float(), kept.shift, kept.data.float()))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-5 + 2 * T.ROUNDING[dtype], atol=1e-6)


# ---- relations, functions under a log-sum-exp, statistics of columns -------------------------------------------------


def of(kind, **options):
    return lambda rows, columns, where: kind(**options, where=where)


def of_row(kind, **options):
    return lambda rows, columns, where: kind(**options, row=torch.randn(rows), where=where)


SUMS = {
    "logsumexp": of(S.LogSumExp),
    "logsumexp_falling": of(S.LogSumExp, factor=-1.3),
    **{f: of_row(S.LogSumExpOf, function=f, factor=0.1, weight=5.0) for f in ("log_tanh", "log_atan", "log_relu")},
    "log_tanh_falling": of(S.LogSumExpOf, function="log_tanh", factor=-0.4, weight=-2.0),
    "circle": of_row(S.LogSumExpOf, function="circle", parameter=0.25, factor=0.4, weight=3.0),
    "sum": lambda rows, columns, where: S.Sum(weights=torch.randn(columns), where=where),
    "count": lambda rows, columns, where: S.Count(weights=torch.arange(columns) % 3, where=where),
    "sum_of_squares": of(S.SumOfSquares),
    **{f: of_row(S.SumOf, function=f, factor=-0.7) for f in ("softplus", "sigmoid", "hinge", "squared_hinge")},
    "focal": of_row(S.SumOf, function="focal", parameter=2.0),
    "moments": of(S.Moments),
    "expectation": of(S.Expectation),
    "distance": lambda rows, columns, where: S.Expectation(torch.randn(columns), torch.randn(rows), 2, 0.7, where),
}


def labels(count):
    return torch.randint(-1, 3, (count,)) << 33  # they differ above 32 bits only


RELATIONS = {
    "all": lambda rows, columns, first: None,
    "rest": lambda rows, columns, first: Rest(torch.randint(-1, columns, (rows,)) + first),
    "same": lambda rows, columns, first: Same(labels(rows), labels(columns), without=torch.arange(rows) + first),
    "other": lambda rows, columns, first: Other(labels(rows), labels(columns)),
    "above": lambda rows, columns, first: Where(above=torch.randn(rows)),
    "everything": lambda rows, columns, first: Other(
        labels(rows),
        labels(columns),
        without=torch.arange(rows) + first,
        above=torch.randn(rows) - 2,
        below=torch.randn(rows) + 2,
    ),
}


def some_tile(rows, columns, dtype=torch.float32, **options):
    """A tile somewhere in the middle, with holes and a row and a column of nothing else; and the same in float64."""
    data = torch.randn(rows, columns + 3) * 2
    data[torch.rand(data.shape) < 0.05] = -INF
    data[rows // 2], data[:, columns // 3] = -INF, -INF
    data = data.to(dtype)[:, :columns]
    if "bias" in options:
        options = options | {name: torch.rand(columns) + 0.5 for name in ("bias", "class_scale", "class_shift")}
    if options:
        options["scale"] = torch.tensor(0.8)
    return tuple(Tile(data.to(dtype), 7, first_row=11, **options) for dtype in (dtype, torch.float64))


def some_statistic(name, where, rows, columns, first):
    return SUMS[name](rows, columns, RELATIONS[where](rows, columns, first))


def finished(tile, stats, across):
    """States of statistics of rows and of columns, as plain PyTorch has them in float64."""
    states = [s.identity(tile.data.shape[0], tile.data.device) for s in stats]
    below = [s.identity(tile.data.shape[1], tile.data.device) for s in across]
    meaning.statistics(tile, stats, states)
    meaning.column_statistics(tile, across, below)
    return states, below


def assert_values(stats, got, expected):
    for s, mine, truth in zip(stats, got, expected, strict=True):
        mine, truth = s.value(mine), s.value(truth)
        size = truth[truth.isfinite()].abs().max() if truth.isfinite().any() else 0.0
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=2e-6 * (1 + float(size)), equal_nan=True)


SHAPES = [(1, 1), (3, 300), (66, 33), (150, 9), (5, 1100), (200, 70)]


@pytest.mark.parametrize("where", RELATIONS)
@pytest.mark.parametrize("name", SUMS)
@small
def test_values_of_rows_and_columns(backend, monkeypatch, name, where):
    """Two tiles one below the other, or side by side, are merged."""
    monkeypatch.setattr(backend, "plain", None)  # nothing is left to PyTorch
    for rows, columns in SHAPES:
        tile, exact = some_tile(rows, columns, **({"bias": 1} if columns == 300 else {}))
        stats = [some_statistic(name, where, rows, columns, 7), some_statistic("count", where, rows, columns, 7)]
        across = [some_statistic(name, where, columns, rows, 11), some_statistic("count", where, columns, rows, 11)]
        expected = finished(exact, stats, across)
        states = [s.identity(rows, tile.data.device) for s in stats]
        below = [s.identity(columns, tile.data.device) for s in across]
        cut = rows // 2
        for part in (slice(0, cut), slice(cut, rows)):
            upper = dataclasses.replace(tile, data=tile.data[part], first_row=11 + part.start)
            backend.statistics(upper, [s.taking(part) for s in stats], [s[part] for s in states])
            backend.column_statistics(upper, [s.taking(None, part) for s in across], below)
        assert_values(stats, states, expected[0])
        assert_values(across, below, expected[1])


@pytest.mark.parametrize("where", RELATIONS)
@pytest.mark.parametrize("name", SUMS)
@small
def test_gradient_through_rows_and_columns(backend, monkeypatch, name, where):
    monkeypatch.setattr(backend, "plain", None)
    for rows, columns in SHAPES:
        options = {"bias": 1, "softcap": 9.0} if columns == 300 else {}
        tile, exact = some_tile(rows, columns, **options)
        stats = [some_statistic(name, where, rows, columns, 7)]
        across = [some_statistic(name, where, columns, rows, 11)]
        check_gradient(backend, tile, exact, stats, across)


def check_gradient(backend, tile, exact, stats, across):
    """Against plain PyTorch in float64, where some coefficients are 0, in place and with sums; its bits."""
    rows, columns = tile.data.shape
    states, below = finished(exact, stats, across)
    coefficients = [torch.randn(len(state), s.outputs) for s, state in zip(stats, states)]
    down = [torch.randn(len(state), s.outputs) for s, state in zip(across, below)]
    through = Across(across, below, down) if across else None
    for s, state, c in zip((*stats, *across), (*states, *below), (*coefficients, *down)):
        c[::4] = 0
        c[s.value(state).isnan()] = 0  # the mean of nothing
        if isinstance(s, S.Moments):
            c[:, 0] = 0
    found = []
    for which, given, wide in ((backend, tile, torch.float32), (meaning, exact, torch.float64)):
        vectors = {n: torch.zeros(columns, dtype=wide) for n in ("bias", "class_shift", "class_scale", "largest")}
        sums = Sums(**vectors, scale=torch.zeros((), dtype=torch.float64))
        out = torch.full((rows, columns), math.nan, dtype=wide)
        arguments = stats, states, coefficients
        which.gradient(given, out, *arguments, sums, through)
        found.append((out, sums))
    (got, sums), (truth, true_sums) = found
    size = truth.abs().nan_to_num(0, 0, 0)
    bound = 2e-5 * size + 2e-6 * (1 + size.max())
    close = (got == truth) | ((got - truth).abs() <= bound) | (got.isnan() & truth.isnan())
    assert close.all(), f"{truth[~close][:9]} expected, got {got[~close][:9]}"
    assert (got[tile.data == -INF] == 0).all()
    assert (got[::4, ::4] == 0).all()
    room = 2 * (1 + tile.capped(tile.data.float()).nan_to_num(0, 0, 0).abs().max()) * bound.sum(0)
    for field, most in (*((n, room) for n in ("bias", "class_shift", "class_scale", "largest")), ("scale", room.sum())):
        mine, theirs = getattr(sums, field).double(), getattr(true_sums, field)
        assert ((mine - theirs).abs() <= most).all(), field
    narrow = torch.bfloat16 if tile.data.dtype == torch.float32 else tile.data.dtype
    apart, inside = torch.empty(rows, columns, dtype=narrow), tile.data.clone()
    for out, data in ((apart, tile.data), (inside.view(narrow)[:, :columns], inside)):
        given = dataclasses.replace(tile, data=data)
        backend.gradient(given, out, stats, states, coefficients, Sums(), through)
    assert torch.equal(apart, inside.view(narrow)[:, :columns])
    return got, apart, sums.bias, sums.scale


@pytest.mark.parametrize("dtype", T.DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns", [(3, 5000), (700, 40), (90, 1100)])
def test_many_statistics_at_once(backend, monkeypatch, rows, columns, dtype):
    monkeypatch.setattr(backend, "plain", None)
    tile, exact = some_tile(rows, columns, dtype)
    pairs = [("logsumexp", "everything"), ("sum", "rest"), ("circle", "same"), ("moments", "above")]
    stats = [some_statistic(*pair, rows, columns, 7) for pair in pairs]
    across = [some_statistic(*pair, columns, rows, 11) for pair in pairs]
    states, below = finished(exact, stats, across)
    mine = [s.identity(rows, tile.data.device) for s in stats], [s.identity(columns, tile.data.device) for s in across]
    backend.statistics(tile, stats, mine[0])
    backend.column_statistics(tile, across, mine[1])
    assert_values(stats, mine[0], states)
    assert_values(across, mine[1], below)
    picks = [S.Score(at=torch.randint(-1, columns, (rows,)) + 7), S.Extreme(k=2, where=stats[0].where)]
    check_gradient(backend, tile, exact, [*stats[:2], *picks], across)


@small
def test_what_single_scores_of_columns_need_is_left_to_pytorch(backend):
    tile, exact = some_tile(70, 40)
    across = [S.Score(at=torch.randint(0, 70, (40,)) + 11), S.Extreme(k=2), S.LogSumExp()]
    expected = finished(exact, [], across)[1]
    states = [s.identity(40, tile.data.device) for s in across]
    backend.column_statistics(tile, across, states)
    assert_values(across, states, expected)


@small
def test_silent_rows_and_columns_add_zero_whatever_their_scores(backend):
    """A row that has no coefficients and that no column looks at, and a column the same way; of NaN."""
    data = torch.randn(70, 40)
    data[2], data[:, 3], data[9, 9] = math.nan, math.nan, -INF
    aside, below_it = Rest(torch.full((70,), 3)), Rest(torch.full((40,), 2))
    stats = [S.LogSumExp(where=aside), S.SumOfSquares(where=aside)]
    across = [S.LogSumExp(where=below_it), S.Moments(where=below_it), S.Expectation(where=below_it)]
    tile = Tile(data, scale=0.5, softcap=30.0)
    states, below = finished(tile, stats, across)
    coefficients, down = [torch.ones(70, 1) for _ in stats], [torch.ones(40, s.outputs) for s in across]
    for c, silent in (*((c, 2) for c in coefficients), *((c, 3) for c in down)):
        c[silent] = 0
    down[1][:, 0] = 0  # the count's
    out, sums = torch.empty(70, 40), Sums(bias=torch.zeros(40), scale=torch.zeros((), dtype=torch.float64))
    for gathered in (sums, Sums()):
        backend.gradient(tile, out, stats, states, coefficients, gathered, Across(across, below, down))
        assert (out[2] == 0).all() and (out[:, 3] == 0).all() and out[9, 9] == 0
        assert out.isfinite().all() and (out != 0).sum() == 69 * 39 - 1
    assert sums.bias.isfinite().all() and sums.scale.isfinite()


@small
def test_labels_beside_kept_exponentials(backend):
    rows, columns, block = 40, 1500, 400
    data = torch.randn(rows, columns) * 2
    where = Same(labels(rows), labels(columns), without=torch.arange(rows), below=torch.full((rows,), 3.0))
    stats = [S.LogSumExp(where=where), S.Score(at=torch.arange(rows)), S.Count(where=where)]
    coefficients = [torch.randn(rows, 1) for _ in stats]
    results = []
    for which in (backend, meaning):
        tile = Tile(data.clone())
        states = [s.identity(rows, data.device) for s in stats]
        kept = Exponentials(tile.data.view(torch.bfloat16)[:, :columns], torch.empty(-(-columns // block), rows), block)
        which.statistics(tile, stats, states, kept)
        before = kept.data.clone()
        which.gradient_of_exponentials(tile, kept, stats, states, coefficients, Sums())
        values = [s.value(state) for s, state in zip(stats, states)]
        results.append((before.float(), kept.shift, kept.data.float(), *values))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=2e-2 if got.dtype == torch.float32 else 1e-5, atol=1e-6)


# ---- order, barriers, errors -----------------------------------------------------------------------------------------


def battery(library, seed):
    """Something of everything that threads tell one another; checked, and its bits for comparison."""
    library.seed(seed)
    results = []
    for rows in (3, 520):
        columns = 2 * WINDOW[64] + 100 if rows == 3 else WINDOW[64] + 100
        tile = T.Tile(rows, columns)
        z = tile.scores().detach()
        names = ["logsumexp_sharp", "moments", "top5", "expectation_score", "score"]
        wanted = [T.make(case, rows, columns, where=1) for case in names[: 5 if rows == 3 else 3]]
        library.statistics(tile.native(), [s.native() for s in wanted])
        for s in wanted:
            s.check(z)
            results.append(s.state)
    tile = T.Tile(3, 2500)
    soft = T.make("logsumexp", 3, 2500)
    library.statistics(tile.native(), [soft.native()])
    soft.check(tile.scores().detach())
    results.append(soft.state)
    scale = torch.zeros(1, dtype=torch.float64)
    apart = T.run_gradient(tile, [soft], torch.bfloat16, _native.Sums(scale=T.pointer(scale)))
    library.gradient(tile.native(), T.pointer(tile.stored), tile.stride * 2, _native.BF16, [soft.native()], None)
    assert torch.equal(tile.stored.view(torch.bfloat16)[:, :2500], apart)
    return [*results, apart, scale]


def values_battery(backend, pairs):
    """Statistics of rows, that several windows are read for, and of columns, that several blocks share; checked."""
    torch.manual_seed(1)
    tile, exact = some_tile(130, 2 * WINDOW[64] + 100)
    rows, columns = tile.data.shape
    stats = [some_statistic(*pair, rows, columns, 7) for pair in pairs]
    across = [some_statistic(*pairs[0], columns, rows, 11)]
    expected = finished(exact, stats, across)
    found = [s.identity(rows, tile.data.device) for s in stats], [s.identity(columns, tile.data.device) for s in across]
    backend.statistics(tile, stats, found[0])
    backend.column_statistics(tile, across, found[1])
    assert_values(stats, found[0], expected[0])
    assert_values(across, found[1], expected[1])
    return [*found[0], *found[1]]


def gradient_battery(backend):
    torch.manual_seed(1)
    tile, exact = some_tile(40, 2500)
    across = [some_statistic("logsumexp", "other", 2500, 40, 11), some_statistic("hinge", "rest", 2500, 40, 11)]
    return check_gradient(backend, tile, exact, [some_statistic("logsumexp", "same", 40, 2500, 7)], across)


def softmax_battery(backend):
    return values_battery(backend, [("logsumexp", "same")])


def exponents_battery(backend):
    return values_battery(backend, [("log_tanh", "other"), ("logsumexp_falling", "above")])


# What has a barrier in it; a block of threads that walks down columns exchanges nothing.
NEWER = {
    "softmax": ("reduction", softmax_battery),
    "exponents": ("reduction", exponents_battery),
    "sums": ("reduction", gradient_battery),
    "in_place": ("loaded", gradient_battery),
}


@pytest.fixture
def as_native(monkeypatch):
    return lambda library: monkeypatch.setattr(T, "_native", library)


@pytest.mark.parametrize("threads", WINDOW)
def test_the_order_of_threads_does_not_change_a_bit(libraries, as_native, threads):
    library = libraries(threads)
    as_native(library)
    for one, two in zip(battery(library, 1), battery(library, 2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("part", ["softmax", "exponents", "sums"])
def test_the_order_of_threads_changes_nothing_of_columns(libraries, as_backend, part):
    library = libraries(64)
    results = []
    for seed in (1, 2):
        library.seed(seed)
        results.append(NEWER[part][1](as_backend(library)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("part", NEWER)
def test_a_missing_barrier_is_noticed_with_relations_and_columns(libraries, as_backend, part):
    barrier, run = NEWER[part]
    library = libraries(64, barrier)
    library.seed(1)
    with pytest.raises((AssertionError, RuntimeError)):
        run(as_backend(library))


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_noticed(libraries, as_native, barrier):
    library = libraries(64, barrier)
    as_native(library)
    with pytest.raises((AssertionError, RuntimeError)):
        battery(library, 1)


def test_what_the_device_refuses(kernels):
    tile, s = T.Tile(3, 40), T.make("logsumexp", 3, 40)
    with pytest.raises(RuntimeError, match="9 statistics, expected 0 to 8"):
        kernels.statistics(tile.native(), [s.native()] * 9)
    with pytest.raises(RuntimeError, match="workspace is null"):
        kernels.cuda_gradient(tile.native(), T.pointer(tile.stored), tile.stride, 0, [s.native()], None, [], 0, 0, 0)
    with pytest.raises(RuntimeError, match="are needed"):
        kernels.cuda_gradient(tile.native(), T.pointer(tile.stored), tile.stride, 0, [s.native()], None, [], 64, 16, 0)
    keep = dict(state=T.pointer(s.state), keep=T.pointer(tile.stored), keep_stride=tile.stride, keep_shift=64)
    with pytest.raises(RuntimeError, match="keep_block is 8192"):
        kernels.statistics(tile.native(), [_native.Statistic(kind=_native.LOGSUMEXP, keep_block=8192, **keep)])
    with pytest.raises(RuntimeError, match="beside FL_SCORE and FL_COUNT only"):
        kept = _native.Statistic(kind=_native.LOGSUMEXP, keep_block=40, **keep)
        kernels.statistics(tile.native(), [kept, T.make("sum", 3, 40).native()])


@pytest.fixture
def live(backend, monkeypatch):
    """The engine on top of it all, with a GPU's limits: exponentials kept in the fp32 tile, several shifts to a row."""
    limits = dataclasses.replace(backend.limits(None), kept_columns=512)
    for name, value in (
        ("why_not", lambda: None),
        ("supports", lambda device, dtype: True),
        ("gemm", meaning.gemm),
        ("limits", lambda device: limits),
    ):
        monkeypatch.setattr(backend, name, value)
    monkeypatch.setattr(backends, "BACKENDS", (backend, meaning))
    return backend


@small
def test_a_learnable_scale_is_not_waited_for(live, monkeypatch):
    waited, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda t: (waited.append(t.data_ptr()), item(t))[1])
    x, y, target = torch.randn(40, 16), torch.randn(300, 16) / 2, torch.randint(0, 300, (40,))
    results = []
    for dtype, name in ((torch.float32, "cuda"), (torch.float64, "torch")):
        leaves = [t.to(dtype).requires_grad_() for t in (x, y, torch.tensor(1.7))]
        scores = fusedloss.linear_scores(leaves[0], leaves[1], scale=leaves[2], backend=name)
        loss = fusedloss.cross_entropy(scores, target)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
        assert leaves[2].data_ptr() not in waited
    for got, expected in zip(*results):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm()


@small
@pytest.mark.parametrize("symmetric", [False, True])
def test_similarities(live, monkeypatch, symmetric):
    """Statistics of rows and of columns in one sweep, and of half a symmetric matrix; nothing is left to PyTorch."""
    rows, columns = 37, 37 if symmetric else 53
    x, y, own, theirs = torch.randn(rows, 8), torch.randn(columns, 8), labels(rows), labels(columns)
    theirs = own if symmetric else theirs
    me = torch.arange(rows)

    def loss(scores):
        softest, rest, circle, hinge, down, alike = scores.reduce(
            S.LogSumExp(), S.LogSumExp(where=Rest(me)),
            S.LogSumExpOf("circle", parameter=0.25, weight=3.0, where=Same(own, theirs, below=torch.full((rows,), 2.0))),
            S.Columns(S.SumOf("hinge", where=Other(theirs, own))), S.Columns(S.LogSumExp(factor=1.3)),
            S.Sum(where=Same(own, theirs, without=me)),
        )  # fmt: skip
        return sum((v * torch.linspace(0.1, 1, len(v))).sum() for v in (softest, rest, circle, hinge, down, alike))

    results = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "cuda")):
        if backend == "cuda":
            monkeypatch.setattr(live, "plain", None)
        leaves = [t.to(dtype).requires_grad_() for t in (x, y, torch.tensor(2.5), torch.tensor(-1.0))]
        pair = leaves[0], leaves[0] if symmetric else leaves[1]
        options = dict(normalize=True, memory_budget=2000, backend=backend)
        found = loss(fusedloss.similarity_scores(*pair, scale=leaves[2], bias=leaves[3], **options))
        leaves = leaves[::2] + leaves[3:] if symmetric else leaves
        results.append((found, *torch.autograd.grad(found, leaves)))
    for expected, got in zip(*results, strict=True):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule, smoothing", [("eager", 0.0), ("eager", 0.1), ("recompute", 0.1)])
def test_a_whole_loss(live, monkeypatch, schedule, smoothing, dtype):
    x, w, target = torch.randn(40, 16), torch.randn(1500, 16) / 2, torch.randint(0, 1500, (40,))
    target[3] = -100
    passes = []
    for name in ("gradient", "gradient_of_exponentials"):
        monkeypatch.setattr(live, name, lambda *a, name=name, run=getattr(live, name): (passes.append(name), run(*a)))
    gradients = []
    for type, how in ((dtype, dict(schedule=schedule, backend="cuda")), (torch.float64, dict(backend="torch"))):
        leaves = [each.to(dtype).to(type).requires_grad_() for each in (x, w)]
        loss = fusedloss.cross_entropy(fusedloss.linear_scores(*leaves, **how), target, label_smoothing=smoothing)
        gradients.append((loss, *torch.autograd.grad(loss, leaves)))
    assert set(passes) == {"gradient" if smoothing else "gradient_of_exponentials"}
    tolerance = 3 * T.ROUNDING[dtype] + 1e-5
    for got, expected in zip(*gradients):
        assert (got.double() - expected).norm() <= tolerance * expected.norm()
