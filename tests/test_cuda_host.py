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
from fusedloss.backends.tile import Exponentials, Sums, Tile  # noqa: E402
from fusedloss.relation import Rest  # noqa: E402

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
def backend(kernels, monkeypatch):
    """backends/cuda.py with tensors of the host."""

    def launch(device, size, call):
        with host_cuda.Workspace(size) as memory:
            call(*memory)

    monkeypatch.setattr(cuda, "_native", kernels)
    monkeypatch.setattr(cuda, "_launch", launch)
    return cuda


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


@pytest.fixture
def as_native(monkeypatch):
    return lambda library: monkeypatch.setattr(T, "_native", library)


@pytest.mark.parametrize("threads", WINDOW)
def test_the_order_of_threads_does_not_change_a_bit(libraries, as_native, threads):
    library = libraries(threads)
    as_native(library)
    for one, two in zip(battery(library, 1), battery(library, 2), strict=True):
        assert torch.equal(one, two)


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
