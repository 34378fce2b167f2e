"""Every Triton kernel in Triton's interpreter, against the torch backend in fp64.

Triton reads TRITON_INTERPRET when a kernel is defined, so these tests run in a process of their own: the ordinary run
has one test, which starts this file again with the variable set.
"""

import os
from dataclasses import replace

import pytest
import torch
from in_interpreter import passes_in_the_interpreter
from test_statistics import TABLE, case, some_scores

from fusedloss.backends import torch as plain
from fusedloss.backends import triton as engine
from fusedloss.backends.tile import Exponentials, Sums, Tile
from fusedloss.relation import Rest
from fusedloss.statistics import Count, Extreme, LogSumExp, Max, Moments, Score, Sum, SumOf, SumOfSquares, TopK

pytest.importorskip("triton", reason="triton is not installed")
INF = torch.inf
# Half a unit in the last place.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

if not engine.interpreted():

    def test_in_the_interpreter():
        passes_in_the_interpreter(__file__)

    @pytest.mark.parametrize("part", ["linear_cross_entropy", "given_logits or ignored or log_probs", "losses"])
    def test_the_whole_way_in_the_interpreter(part):
        where = os.path.join(os.path.dirname(__file__), "test_device.py")
        passes_in_the_interpreter(where, "-k", f"triton and not torch.float16 and ({part})")

else:
    import triton
    import triton.language as tl
    from fusedloss.kernels import elementwise
    
    from fusedloss.backends import triton_launch

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on infinities and NaN

    def walking(monkeypatch, walk):
        """A tile in one block; in blocks of 64 that one program walks; in blocks that are parts of several programs."""
        assert walk in WALKS
        if walk != "one block":
            monkeypatch.setattr(triton_launch, "BLOCK", 64)
            monkeypatch.setattr(triton_launch, "SUMS_BLOCK", 64)
            monkeypatch.setattr(triton_launch, "GROUPS", 2)
            monkeypatch.setattr(triton_launch, "PROGRAMS", 1 if walk == "walked" else 10)

    WALKS = ("one block", "walked", "split")

    @pytest.fixture
    def walk(request, monkeypatch):
        walking(monkeypatch, request.param)

    def each_walk_with(names, values):
        """Every walk and every value, each at least once: not every pair, for the interpreter is slow."""
        values = list(values)
        count = max(len(values), len(WALKS))
        pairs = [(WALKS[i % len(WALKS)], values[i % len(values)]) for i in range(count)]
        pairs = [(walk, *(value if isinstance(value, tuple) else (value,))) for walk, value in pairs]
        return pytest.mark.parametrize(f"walk, {names}", pairs, indirect=["walk"], ids=str)


def close(got, truth, tolerance=2e-6, what=""):
    torch.testing.assert_close(
        got.double(), truth.double(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def strided(z, dtype=torch.float32):
    """The same scores in a matrix of which they are some columns."""
    wide = torch.full((z.shape[0], z.shape[1] + 5), torch.nan, dtype=dtype)
    wide[:, 2:-3] = z
    return wide[:, 2:-3]


ROWS, CLASSES = 5, 203  # no multiple of anything
OPTIONS = {
    "plain": {},
    "scale": dict(scale=-0.7),
    "scale in memory": dict(scale=torch.tensor(1.3, dtype=torch.float64)),
    "bias and class vectors": dict(bias=1, class_scale=1, class_shift=1, scale=1.5),
    "softcap": dict(bias=1, class_scale=1, class_shift=1, softcap=2.5, scale=torch.tensor(0.8)),
}


def tiles(z, options, first=0):
    """A tile of some scores with some options, and the same in fp64."""
    given = dict(OPTIONS[options])
    generator = torch.Generator().manual_seed(5)
    for vector in ("bias", "class_scale", "class_shift"):
        if vector in given:
            given[vector] = torch.randn(z.shape[1], generator=generator)
    if "class_scale" in given:  # a negative one would make the largest score of a masked class
        given["class_scale"] = given["class_scale"].abs() + 0.1
    return Tile(z, first, **given), Tile(z.double(), first, **given)


def over_the_rest(name):
    """A statistic of the table, over all columns of some rows and over all but one of others."""
    statistic = case(name, rows=ROWS, classes=CLASSES)[0]
    if isinstance(statistic, Score):
        return statistic
    return replace(statistic, where=Rest(torch.tensor([-1, 4, 5, 3, CLASSES - 1])))


def compare_states(named, states, truths):
    for (name, s), got, truth in zip(named.items(), states, truths):
        size = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 1.0
        if isinstance(s, Extreme):
            assert torch.equal(s.columns(got), s.columns(truth)), name
        close(s.value(got), s.value(truth), 2e-6 * max(1.0, size), name)


if engine.interpreted():

    @each_walk_with("dtype", ROUNDING)
    def test_states_of_all_statistics(walk, dtype):
        z = strided(some_scores(True, ROWS, CLASSES), dtype)
        z[4] = 0.5  # ties
        named = {name: over_the_rest(name) for name in TABLE}
        states, truths = ([s.identity(ROWS, "cpu") for s in named.values()] for _ in range(2))
        for columns in (slice(130, CLASSES), slice(0, 130)):  # merged into what is there
            parts = [s.taking(columns=columns) for s in named.values()]
            engine.statistics(Tile(z[:, columns], columns.start), parts, states)
            plain.statistics(Tile(z[:, columns].double(), columns.start), parts, truths)
        compare_states(named, states, truths)

    @each_walk_with("options", OPTIONS)
    def test_states_under_every_option(walk, options):
        tile, exact = tiles(strided(some_scores(options != "scale", 37, 150)), options)
        t = torch.randint(0, 150, (37,))
        named = {"lse": LogSumExp(where=Rest(t)), "moments": Moments(), "score": Score(t), "top": TopK(3)}
        states, truths = ([s.identity(37, "cpu") for s in named.values()] for _ in range(2))
        engine.statistics(tile, list(named.values()), states)
        plain.statistics(exact, list(named.values()), truths)
        for (name, s), got, truth in zip(named.items(), states, truths):
            close(s.value(got), s.value(truth), 2e-4 if name == "moments" else 1e-5, name)

    def gradients(tile, exact, stats, out, sums=(), keep=None):
        """∂L/∂a and the sums asked for, of both backends; row 1 has no coefficients."""
        rows, columns = tile.data.shape
        states = [s.identity(rows, "cpu") for s in stats]
        plain.statistics(exact, stats, states)
        generator = torch.Generator().manual_seed(6)
        coefficients = [torch.randn(rows, s.outputs, generator=generator) for s in stats]
        for c in coefficients:
            c[1] = 0
        found = []
        for module, t, o in ((engine, tile, out), (plain, exact, torch.empty(rows, columns, dtype=torch.float64))):
            start = {"scale": torch.ones((), dtype=torch.float64)}
            asked = {name: start.get(name, torch.ones(columns)).clone() for name in sums}
            module.gradient(t, o, stats, states, coefficients, Sums(**asked))
            found.append((o, asked))
        return [*found, exact.data == -INF]

    def check(found, dtype=torch.float32, what=""):
        (got, sums), (truth, exact), masked = found
        size = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(
            got.double(), truth, rtol=ROUNDING[dtype] + 1e-5, atol=4e-6 * size, msg=lambda m: f"{what}: {m}"
        )
        assert (got[1] == 0).all() and (got[masked] == 0).all(), what
        for name, column_sum in sums.items():
            close(column_sum, exact[name], 2e-5 * max(1.0, exact[name].abs().max().item()), f"{what}: {name}")

    @pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith("count")])
    def test_gradient_of_each_statistic(name):
        z = strided(some_scores(True, ROWS, CLASSES))
        check(gradients(Tile(z), Tile(z.double()), [over_the_rest(name)], torch.empty(ROWS, CLASSES)), what=name)

    def several(rows, classes, seed=3):
        g = torch.Generator().manual_seed(seed)
        t = torch.randint(0, classes, (rows,), generator=g)
        row, weights = torch.randn(rows, generator=g), torch.rand(rows, classes, generator=g).bfloat16()
        return [LogSumExp(where=Rest(t)), Score(t), Sum(weights), SumOf("softplus", row=row), Max(), Count()]

    ALL_SUMS = ("bias", "class_scale", "class_shift", "scale", "largest")

    @each_walk_with("options", reversed(OPTIONS))
    def test_gradient_and_sums_under_every_option(walk, options):
        rows, classes = 37, 150
        tile, exact = tiles(strided(some_scores(options != "scale", rows, classes)), options, first=7)
        stats = several(rows, classes + 7)
        stats[2] = Sum(torch.randn(classes))
        check(gradients(tile, exact, stats, torch.empty(rows, classes), ALL_SUMS), what=options)

    @each_walk_with("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("sums", [(), ("bias",)])
    def test_gradient_in_place_and_narrower(walk, dtype, sums):
        rows, classes = 9, 333
        buffer = torch.full((rows, classes + 3), torch.nan)
        buffer[:, :classes] = some_scores(True, rows, classes)
        exact = Tile(buffer[:, :classes].double())
        out = buffer.view(dtype)[:, :classes]
        check(gradients(Tile(buffer[:, :classes]), exact, several(rows, classes), out, sums), dtype)
        assert dtype != torch.float32 or buffer[:, classes:].isnan().all()

    @each_walk_with(
        "dtype, block",
        [(torch.bfloat16, 64), (torch.float16, 90), (torch.float32, 64), (torch.bfloat16, 1 << 10)],
    )
    def test_kept_exponentials(walk, dtype, block):
        """In the tile's own memory, rounded: the gradient is the one that the scores give."""
        rows, classes = 9, 333
        z = some_scores(True, rows, classes)
        buffer = torch.full((rows, classes + 3), torch.nan)
        buffer[:, :classes] = z
        tile, exact = tiles(buffer[:, :classes], "bias and class vectors")
        t = torch.where(z[:, 3] == -INF, -1, 3)  # exponentials do not tell a score of -inf
        stats = [Score(t), LogSumExp(where=Rest(torch.full((rows,), 5))), Count()]
        (truth, sums) = gradients(tile, exact, stats, torch.empty(rows, classes), ("bias", "class_shift", "largest"))[1]
        kept = Exponentials(buffer.view(dtype)[:, :classes], torch.empty(-(-classes // block), rows), block)
        states, expected = ([s.identity(rows, "cpu") for s in stats] for _ in range(2))
        plain.statistics(exact, stats, expected)
        engine.statistics(tile, stats, states, kept)
        compare_states(dict(zip("slm", stats)), states, expected)
        generator = torch.Generator().manual_seed(6)
        coefficients = [torch.randn(rows, 1, generator=generator) for _ in stats]
        for c in coefficients:
            c[1] = 0
        got_sums = {name: torch.ones(classes) for name in sums}
        engine.gradient_of_exponentials(replace(tile, data=None), kept, stats, states, coefficients, Sums(**got_sums))
        size = truth.abs().max().item()
        torch.testing.assert_close(
            kept.data.double(),
            truth,
            rtol=3 * ROUNDING[dtype] + 1e-5,
            atol=4e-6 * size + 1e-7 * (dtype == torch.float16),
        )
        assert (kept.data[1] == 0).all() and (kept.data[:, :5][z[:, :5] == -INF] == 0).all()
        for name, got in got_sums.items():
            close(got, sums[name], (2e-5 + 3 * ROUNDING[dtype]) * sums[name].abs().max().item(), name)

    @pytest.mark.parametrize(
        ("dtype", "rows", "classes", "depth"),
        [(torch.float32, 3, 70, 16), (torch.bfloat16, 140, 301, 64), (torch.float16, 5, 333, 41)],
    )
    def test_statistics_of_a_product(dtype, rows, classes, depth, monkeypatch):
        monkeypatch.setattr(triton_launch, "PROGRAMS", 1 if rows == 140 else 4)
        x, w = torch.randn(rows, depth).to(dtype), torch.randn(classes, depth).to(dtype)
        raw = x.double() @ w.double().t()
        tile, exact = tiles(raw, "softcap", first=4)
        tile = replace(tile, data=None)
        t = torch.randint(4, classes + 4, (rows,))
        for stats in ([Score(torch.stack([t, t - 9], 1)), LogSumExp(where=Rest(t)), Count()],
                      [Moments(), LogSumExp(), SumOfSquares(), SumOf("focal", parameter=2.0)]):  # fmt: skip
            keep = None
            if isinstance(stats[0], Score):
                keep = Exponentials(torch.empty(rows, classes, dtype=dtype), torch.empty(-(-classes // 64), rows), 64)
            states, truths = ([s.identity(rows, "cpu") for s in stats] for _ in range(2))
            assert engine.fuses(stats, tile)
            engine.linear_statistics(x, w, tile, stats, states, keep)
            kept = keep and Exponentials(raw.clone(), torch.empty_like(keep.shift), 64)
            plain.statistics(exact, stats, truths, kept)
            for s, got, truth in zip(stats, states, truths):
                close(s.value(got), s.value(truth), 1e-4 if isinstance(s, (Moments, SumOfSquares)) else 1e-5)
            if keep:
                close(keep.shift, kept.shift, 1e-5)
                close(keep.data, kept.data, ROUNDING[dtype] + 2e-5)
        assert not engine.fuses([TopK(2)], tile)

    @each_walk_with("k, factor", [(1, 1.0), (5, -1.0), (5, 1.0), (1, -1.0)])
    def test_extremes_at_the_ends(walk, k, factor):
        z = torch.randn(6, 150)
        z[0], z[1] = 0.0, -INF
        z[0, 70:] = -0.0
        z[2, [3, 140]] = INF
        z[3, 90] = torch.nan
        z[4, 7:] = -INF
        z[5, ::2] = 4.0
        s = Extreme(k=k, factor=factor)
        states, truth = s.identity(6, "cpu"), s.identity(6, "cpu")
        engine.statistics(Tile(z[:, :100]), [s], [states])
        engine.statistics(Tile(z[:, 100:], 100), [s], [states])
        plain.statistics(Tile(z), [s], [truth])
        assert torch.equal(s.columns(states)[:3], s.columns(truth)[:3])
        assert torch.equal(s.columns(states)[4:], s.columns(truth)[4:])
        close(s.value(states)[[0, 1, 2, 4, 5]], s.value(truth)[[0, 1, 2, 4, 5]])
        assert states[3, 0].isnan() and states[3, k] == 90  # NaN before all, as in torch.topk

    def test_infinities_and_nan_show(monkeypatch):
        walking(monkeypatch, "walked")
        z = torch.randn(3, 150)
        z[0, 70], z[1, 70] = INF, torch.nan
        stats = [LogSumExp(), SumOfSquares(), SumOf("softplus"), SumOf("hinge"), Sum()]
        states = [s.identity(3, "cpu") for s in stats]
        engine.statistics(Tile(z), stats, states)
        for s, state in zip(stats, states):
            assert s.value(state).isfinite().tolist() == [[False], [False], [True]]
        out, largest = torch.empty(3, 150), torch.zeros(150)
        coefficients = [torch.ones(3, 1), torch.ones(3, 1)]
        engine.gradient(Tile(z), out, stats[:2], states[:2], coefficients, Sums(largest=largest))
        assert out[:2].isnan().any(1).all() and out[2].isfinite().all() and largest[70].isnan()
        for c in coefficients:  # a row without coefficients has gradient 0 whatever its scores are
            c[:2] = 0
        engine.gradient(Tile(z), out, stats[:2], states[:2], coefficients, Sums())
        assert (out[:2] == 0).all() and (out[2] != 0).all()

    def test_a_wanted_score_of_minus_infinity_has_no_gradient():
        z, out, at = torch.randn(2, 9), torch.empty(2, 9), torch.tensor([4, 8])
        z[0, 4] = -INF
        state = torch.zeros(2, 1, dtype=torch.float64)
        engine.statistics(Tile(z), [Score(at)], [state])
        assert state[0, 0] == -INF and state[1, 0] == z[1, 8]
        engine.gradient(Tile(z), out, [Score(at)], [state], [torch.ones(2, 1)], Sums())
        assert (out[0] == 0).all() and out[1].tolist() == [0.0] * 8 + [1.0]

    @pytest.mark.parametrize("shape", [(0, 7), (4, 0), (1, 1)])
    def test_no_rows_no_columns_one_of_each(shape):
        z, out = torch.randn(shape), torch.empty(shape)
        stats = [LogSumExp(), Moments(), Max()]
        states = [s.identity(shape[0], "cpu") for s in stats]
        engine.statistics(Tile(z), stats, states)
        coefficients = [torch.ones(shape[0], s.outputs) for s in stats]
        engine.gradient(Tile(z), out, stats, states, coefficients, Sums(bias=torch.zeros(shape[1])))
        if 0 not in shape:
            close(stats[0].value(states[0]), z)
            close(out, torch.full_like(z, 3.0))  # lse, mean, max

    def test_rows_that_are_overwritten_have_one_program(monkeypatch):
        """The interpreter runs one program after another: a race would not show."""
        walking(monkeypatch, "split")
        z, lse, top = torch.randn(3, 999), LogSumExp(), Max()
        states = [s.identity(3, "cpu") for s in (lse, top)]
        none = triton_launch._ColumnSums(Sums(), 3, 999, z.device)

        def parts(launches):
            return max(launch.grid[1] for launch in launches if len(launch.grid) == 2)

        def kept(data):
            return Exponentials(data, torch.empty(16, 3), 64)

        def statistics(stats, keep=None):
            return parts(triton_launch.statistics_launches(Tile(z), stats, states[: len(stats)], keep))

        def gradient(out):
            return parts(triton_launch.gradient_launches(Tile(z), out, [lse], states[:1], [torch.ones(3, 1)], none))

        assert statistics([lse]) > 1 and statistics([lse], kept(torch.empty(3, 999))) > 1
        assert statistics([lse, top]) == 1  # its list is not merged
        assert statistics([lse], kept(z.view(torch.bfloat16)[:, :999])) == 1
        assert gradient(torch.empty(3, 999)) > 1 and gradient(z) > 1  # in place in the same type: nothing moves
        assert gradient(z.view(torch.float16)[:, :999]) == 1

    def test_same_bits_each_time():
        results = []
        for _ in range(2):
            z, bias = some_scores(False, 30, 333).float(), torch.zeros(333)
            stats = several(30, 333)
            states = [s.identity(30, "cpu") for s in stats]
            engine.statistics(Tile(z), stats, states)
            engine.gradient(Tile(z), z, stats, states, [torch.ones(30, 1) for _ in stats], Sums(bias=bias))
            results.append([z, bias, *states])
        assert all(torch.equal(a, b) for a, b in zip(*results))

    @triton.jit
    def tabulate(numbers, out, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = at < n
        u = tl.load(numbers + at, mask=here, other=0.0)
        tanh, flatness = elementwise.tanh_and_slope(u)
        tl.store(out + at, elementwise.exp(-tl.abs(u)), mask=here)
        tl.store(out + n + at, elementwise.sigmoid(u), mask=here)
        tl.store(out + 2 * n + at, elementwise.softplus(u), mask=here)
        tl.store(out + 3 * n + at, tanh, mask=here)
        tl.store(out + 4 * n + at, flatness, mask=here)
        tl.store(out + 5 * n + at, elementwise.sigmoid_power(u, 2.0), mask=here)

    def test_functions_to_the_last_digits():
        u = torch.cat([torch.linspace(-43, 43, 50001), torch.logspace(-30, 0, 9000), -torch.logspace(-30, 0, 9000)])
        out = torch.empty(6, u.numel())
        tabulate[(triton.cdiv(u.numel(), 1 << 15),)](u, out, u.numel(), BLOCK=1 << 15)
        x = u.double()
        truths = ((-x.abs()).exp(), x.sigmoid(), torch.logaddexp(x, x * 0), x.tanh(),
                  4 / (2 * x).abs().exp() / (1 + (-2 * x).abs().neg().exp()) ** 2, x.sigmoid() ** 2)  # fmt: skip
        for which, (got, truth) in enumerate(zip(out, truths)):
            error = ((got - truth) / truth).abs()
            assert error.max() <= (1.2e-6 if which == 5 else 4e-7), (which, error.max(), u[error.argmax()])
