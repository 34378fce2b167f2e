"""What similarities need of the Triton kernels, in Triton's interpreter: relations by label and threshold, functions
under the logarithm, statistics of columns, and the gradient of rows and columns at once. Against the torch backend.

As in test_triton_interpreter.py, the ordinary run starts this file again with TRITON_INTERPRET=1.
"""

import math

import pytest
import torch
from in_interpreter import passes_in_the_interpreter
from test_statistics import some_scores
from test_triton_interpreter import ROUNDING, close, compare_states, tiles

import fusedloss as fl
from fusedloss import schedule
from fusedloss.backends import torch as plain
from fusedloss.backends import triton as engine
from fusedloss.backends.tile import Across, Sums, Tile
from fusedloss.relation import Other, Rest, Same, Where
from fusedloss.statistics import (
    LOG_FUNCTIONS,
    Columns,
    Count,
    Expectation,
    LogSumExp,
    LogSumExpOf,
    Max,
    Min,
    Moments,
    Score,
    Sum,
    SumOf,
    SumOfSquares,
    TopK,
)

pytest.importorskip("triton", reason="triton is not installed")
INF = torch.inf
ROWS, COLUMNS, FIRST_ROW, FIRST = 13, 131, 3, 7  # no multiple of anything

if not engine.interpreted():

    def test_similarities_in_the_interpreter():
        passes_in_the_interpreter(__file__)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def relation(kind, rows, columns, first):
    """A `where` for a tile whose columns start at `first`: some hide everything in some rows, some nothing."""
    g = generator(rows)
    without = torch.randint(first - 1, first + columns + 1, (rows,), generator=g)
    without[::5] = -1
    labels = [torch.randint(0, 4, (n,), generator=generator(7)) + 2**40 for n in (rows, columns)]  # no 32-bit numbers
    labels[0][3] = 17
    low, high = torch.randn(rows, generator=g) - 1, torch.randn(rows, generator=g) + 1
    low[3], high[4] = INF, torch.nan
    return {
        "all": None,
        "rest": Rest(without),
        "same": Same(*labels),
        "other": Other(*labels),
        "above": Where(above=low),
        "below": Where(below=high),
        "everything": Same(*labels, without=without, above=low, below=high),
        "other below": Other(*labels, below=high.double()),
    }[kind]


RELATIONS = ("all", "rest", "same", "other", "above", "below", "everything", "other below")


def statistics(where, rows, columns, first):
    """Every statistic, for rows × columns."""
    g = generator(columns)
    vector, row = torch.randn(columns, generator=g), torch.randn(rows, generator=g)
    at = torch.randint(first, first + columns, (rows, 2), generator=g)
    matrix = torch.rand(rows, columns, generator=g).bfloat16() - 0.2
    named = {
        "score": Score(at),
        "score-columns": Score(columns=first + torch.tensor([0, 5, columns - 1])),
        "logsumexp": LogSumExp(where=where),
        "logsumexp-minus": LogSumExp(-1.5, where=where),
        "sum": Sum(vector, where=where),
        "sum-matrix": Sum(matrix, where=where),
        "count": Count(vector > 0, where=where),
        "squares": SumOfSquares(where=where),
        "moments": Moments(where=where),
        "expectation-scores": Expectation(where=where),
        "distance": Expectation(vector, row, where=where),
        "sum-of": SumOf("softplus", row=row, factor=-1.3, where=where),
        "focal": SumOf("focal", parameter=2.0, where=where),
        "max": Max(where=where),
        "min": Min(where=where),
        "top": TopK(3, where=where),
    }
    for function in LOG_FUNCTIONS:
        named[function] = LogSumExpOf(function, 0.8, 3.0, 0.25, where=where)
        named[f"{function}-row"] = LogSumExpOf(function, -0.7, 2.0, -0.1, row, where=where)
    return named


def table_of(kind, across=False):
    """Statistics of the rows of the tile, or of its columns."""
    size = (COLUMNS, ROWS, FIRST_ROW) if across else (ROWS, COLUMNS, FIRST)
    return statistics(relation(kind, *size), *size)


NAMES = list(table_of("all"))


def scores():
    """Some of -inf, a row of them and a column."""
    z = some_scores(True, ROWS, COLUMNS)
    z[:, 9] = -INF
    return z.float()


def pair(z, **options):
    """A tile, and the same in fp64."""
    return [Tile(data, FIRST, first_row=FIRST_ROW, **options) for data in (z, z.double())]


def coefficients_of(stats, count, silent):
    found = [torch.randn(count, s.outputs, generator=generator(n)) for n, s in enumerate(stats)]
    for c in found:
        c[silent] = 0
    return found


if engine.interpreted():
    import triton
    import triton.language as tl
    from fusedloss.kernels import elementwise
    from fusedloss.kernels.words import LOG_RELU, LOG_TANH
    from test_triton_interpreter import walking

    from fusedloss.backends import triton_launch

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on infinities and NaN

    @pytest.mark.parametrize("across", [False, True], ids=["rows", "columns"])
    @pytest.mark.parametrize("kind", RELATIONS)
    def test_states(kind, across, monkeypatch):
        monkeypatch.setattr(triton_launch, "PROGRAMS", 8 if across and kind in ("rest", "everything") else 1)
        named = table_of(kind, across)
        tile, exact = pair(scores())
        states, truths = ([s.identity(COLUMNS if across else ROWS, "cpu") for s in named.values()] for _ in range(2))
        for backend, t, into in ((engine, tile, states), (plain, exact, truths)):
            (backend.column_statistics if across else backend.statistics)(t, list(named.values()), into)
        compare_states(named, states, truths)
        for name in [name for name in named if name.endswith("-row") or name == "sum-of"]:
            place = NAMES.index(name)
            got, truth = (named[name].row_slope(s[place]) for s in (states, truths))
            close(got, truth, 2e-6 * max(1.0, truth.abs().max().item()), name)

    @pytest.mark.parametrize("options", ["plain", "scale in memory", "bias and class vectors", "softcap"])
    def test_columns_under_every_option(options):
        """What belongs to classes belongs to columns, also where these are looked at as rows. In two tiles."""
        z = scores()
        tile, exact = tiles(z, options)
        stats = [LogSumExp(), Score(torch.arange(COLUMNS) % ROWS), Moments(), TopK(2)]
        states, truths = ([s.identity(COLUMNS, "cpu") for s in stats] for _ in range(2))
        for rows in (slice(0, 6), slice(6, ROWS)):
            for backend, t, into in ((engine, tile, states), (plain, exact, truths)):
                part = Tile(t.data[rows], 0, t.bias, t.class_scale, t.class_shift, t.softcap, t.scale, rows.start)
                backend.column_statistics(part, stats, into)
        for s, got, truth in zip(stats, states, truths):
            close(s.value(got), s.value(truth), 1e-5)

    def gradients(stats, below, z, out, dtype=torch.float32, sums=(), silent=(1, 2), **options):
        """∂L/∂a and the sums asked for, of both backends. No coefficients: row silent[0], column silent[1]."""
        tile, exact = pair(z, **options)
        states, of_columns = [s.identity(ROWS, "cpu") for s in stats], [s.identity(COLUMNS, "cpu") for s in below]
        plain.statistics(exact, stats, states)
        plain.column_statistics(exact, below, of_columns)
        mine, theirs = coefficients_of(stats, ROWS, silent[0]), coefficients_of(below, COLUMNS, silent[1])
        found, asked = [], []
        for backend, t, o in ((engine, tile, out), (plain, exact, torch.empty(ROWS, COLUMNS, dtype=torch.float64))):
            start = {"scale": torch.ones((), dtype=torch.float64)}
            asked.append({name: start.get(name, torch.ones(COLUMNS)).clone() for name in sums})
            across = Across(below, of_columns, theirs) if below else None
            backend.gradient(t, o, stats, states, mine, Sums(**asked[-1]), across)
            found.append(o.double())
        what = [type(s).__name__ for s in (*stats, *below)]
        size = max(1.0, found[1][found[1].isfinite()].abs().max().item())
        torch.testing.assert_close(
            *found, rtol=ROUNDING[dtype] + 1e-5, atol=4e-6 * size, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )
        assert (found[0][exact.data == -INF] == 0).all() and found[0][silent] == 0, what
        for name, truth in asked[1].items():
            close(asked[0][name], truth, 2e-5 * max(1.0, truth.abs().max().item()), f"{what}: {name}")

    @pytest.mark.parametrize("name", [name for name in NAMES if name != "count"])
    def test_gradient_of_each_statistic(name):
        """Of rows and columns, or of columns alone, each under another relation."""
        for alone in (False, True):
            number = 2 * NAMES.index(name) + alone
            mine, theirs = (RELATIONS[(number + n) % len(RELATIONS)] for n in (0, 3))
            stats = [] if alone else [table_of(mine)[name]]
            gradients(stats, [table_of(theirs, True)[name]], scores(), torch.empty(ROWS, COLUMNS))

    def several(across):
        size = (COLUMNS, ROWS, FIRST_ROW) if across else (ROWS, COLUMNS, FIRST)
        named = statistics(relation("everything", *size), *size)
        return [LogSumExp(0.8, relation("rest", *size)), *(named[n] for n in ("score", "log_tanh-row", "top", "sum"))]

    @pytest.mark.parametrize("walk", ["one block", "walked", "split"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("sums", [(), ("bias", "class_scale", "class_shift", "scale", "largest")], ids=["", "sums"])
    def test_gradient_in_place_with_sums(walk, dtype, sums, monkeypatch):
        walking(monkeypatch, walk)
        buffer = torch.full((ROWS, COLUMNS + 3), torch.nan)
        buffer[:, :COLUMNS] = scores()
        vectors = {name: torch.randn(COLUMNS) for name in ("bias", "class_shift")} if sums else {}
        out = buffer.view(dtype)[:, :COLUMNS]
        gradients(several(False), several(True), buffer[:, :COLUMNS], out, dtype, sums, scale=1.3, **vectors)

    def test_no_coefficients_no_gradient():
        """Whatever the score is that a silent row and a silent column share; another's NaN shows."""
        z = scores()
        z[1, 2] = torch.nan
        z[5, 6] = torch.nan
        out = torch.empty(ROWS, COLUMNS)
        gradients([LogSumExp(), SumOfSquares()], [LogSumExp(), SumOf("hinge")], z, out)
        assert out[5, 6].isnan()

    @pytest.mark.parametrize("shape", [(0, 7), (4, 0), (1, 1)])
    def test_no_rows_no_columns_one_of_each(shape):
        z, out = torch.randn(shape), torch.empty(shape)
        states = [LogSumExp().identity(n, "cpu") for n in shape]
        engine.statistics(Tile(z), [LogSumExp()], states[:1])
        engine.column_statistics(Tile(z), [LogSumExp()], states[1:])
        across = Across([LogSumExp()], states[1:], [torch.ones(shape[1], 1)])
        engine.gradient(Tile(z), out, [LogSumExp()], states[:1], [torch.ones(shape[0], 1)], Sums(), across)
        if 0 not in shape:
            close(states[1], states[0])
            close(out, torch.full_like(z, 2.0))

    @pytest.mark.parametrize("kind", ["same", "everything"])
    def test_statistics_of_a_product(kind, monkeypatch):
        monkeypatch.setattr(triton_launch, "LINEAR_ROWS", 8)
        monkeypatch.setattr(triton_launch, "PROGRAMS", 1 if kind == "same" else 4)
        x, y = torch.randn(ROWS, 16).bfloat16(), torch.randn(COLUMNS, 16).bfloat16() * 0.25
        tile, exact = pair(x.float() @ y.float().t())
        names = ("logsumexp", "moments", "circle", "log_atan-row")
        theirs = table_of(kind, True)
        for stats, below in (
            ([table_of(kind)["logsumexp"], table_of(kind)["count"]], []),
            ([table_of(kind)[n] for n in names], [theirs["sum"], theirs["score"]]),
            ([table_of(kind)["score"], LogSumExp()], [theirs["logsumexp"], LogSumExp()]),
            ([], [theirs[n] for n in ("moments", "log_tanh-row", "score-columns")]),
        ):
            states, truths = ([s.identity(n, "cpu") for n, part in ((ROWS, stats), (COLUMNS, below)) for s in part]
                              for _ in range(2))  # fmt: skip
            assert engine.fuses(stats, tile, below)
            engine.linear_statistics(x, y, tile, stats, states[: len(stats)], None, below, states[len(stats) :])
            plain.statistics(exact, stats, truths[: len(stats)])
            plain.column_statistics(exact, below, truths[len(stats) :])
            for s, got, truth in zip([*stats, *below], states, truths):
                close(s.value(got), s.value(truth), 1e-5, type(s).__name__)
        assert not engine.fuses([], tile, [TopK(2)])

    @pytest.mark.parametrize(
        ("symmetric", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)]
    )
    def test_the_whole_way(symmetric, dtype, monkeypatch):
        """Several blocks each way, against the dense scores in fp64."""
        monkeypatch.setattr(triton_launch, "PROGRAMS", 1)
        monkeypatch.setattr(triton_launch, "LINEAR_ROWS", 8)
        monkeypatch.setattr(schedule, "FUSED_ROWS", 12)
        x, y = torch.randn(21, 8).to(dtype), torch.randn(33, 8).to(dtype)
        y = x if symmetric else y
        n, m, me = len(x), len(y), torch.arange(len(x))
        labels, others = torch.randint(0, 4, (n,)), torch.randint(0, 4, (m,))
        others = labels if symmetric else others
        stats = [LogSumExp(where=Rest(me)), Score((me + 3) % n), Columns(Moments()), Columns(LogSumExp(1.3)),
                 LogSumExpOf("circle", 1.0, 3.0, 0.25, where=Same(labels, others, without=me)),
                 Columns(SumOf("hinge", where=Other(others, labels)))]  # fmt: skip
        if dtype == torch.float32:  # without it, half-precision statistics come out of the product
            stats.append(Max(Other(labels, others)))

        def found(backend, wide):
            given = [t.to(wide).requires_grad_() for t in ([x] if symmetric else [x, y])]
            given += [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, -1.0)]
            scores = fl.similarity_scores(given[0], given[1] if not symmetric else None, scale=given[-2],
                                          bias=given[-1], backend=backend, memory_budget=1200)  # fmt: skip
            values = (scores if backend == "triton" else scores.dense()).reduce(*stats)
            flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
            loss = sum((v * torch.linspace(0.1, 1, len(v))).sum() for v in flat if v.is_floating_point())
            return loss.detach(), torch.autograd.grad(loss, given)

        (loss, got), (truth, exact) = found("triton", dtype), found("torch", torch.float64)
        close(loss, truth, 2e-6 * truth.abs().item() + 1e-5)
        for g, e in zip(got, exact):
            assert (g.double() - e).norm() <= (2e-5 if dtype == torch.float32 else 6e-3) * e.norm()

    @triton.jit
    def tabulate(numbers, out, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = at < n
        u = tl.load(numbers + at, mask=here, other=1.0)
        tl.store(out + at, elementwise.log(tl.abs(u)), mask=here)
        tl.store(out + n + at, elementwise.atan(u), mask=here)
        g, slope = elementwise.log_function_and_slope(u, 0.0, LOG_TANH)
        tl.store(out + 2 * n + at, g, mask=here)
        tl.store(out + 3 * n + at, slope, mask=here)
        g, slope = elementwise.log_function_and_slope(tl.abs(u) - 0.9375, 0.0, LOG_RELU)
        tl.store(out + 4 * n + at, g, mask=here)

    def test_functions_to_the_last_digits():
        u = torch.cat([torch.linspace(-20, 20, 40001), torch.logspace(-30, 30, 9000), -torch.logspace(-30, 0, 9000)])
        u[u == 0] = 1
        out = torch.empty(5, u.numel())
        tabulate[(triton.cdiv(u.numel(), 1 << 15),)](u, out, u.numel(), BLOCK=1 << 15)
        x = u.double()
        log_tanh = torch.where(x < -0.5, 2 * x + math.log(2) - (2 * x.clamp(max=0)).exp().log1p(), x.tanh().log1p())
        relu = (u.abs() - 0.9375).double().log1p()
        for which, truth in enumerate((x.abs().log(), x.atan(), log_tanh, 2 * (-2 * x).sigmoid(), relu)):
            error = (out[which] - truth).abs() / truth.abs().clamp(min=1e-30)
            assert error.max() <= 4e-7, (which, error.max(), u[error.argmax()])
