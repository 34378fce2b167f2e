"""The gradient of scores out of the Triton product, in Triton's interpreter, against the torch backend in fp64.

As in test_triton_interpreter.py, the ordinary run starts this file again with TRITON_INTERPRET=1.
"""

from dataclasses import replace

import pytest
import torch
from in_interpreter import passes_in_the_interpreter
from test_triton_interpreter import ROUNDING, close

import fusedloss as fl
from fusedloss import schedule
from fusedloss.backends import torch as plain
from fusedloss.backends import triton as engine
from fusedloss.backends.tile import Across, Sums, Tile
from fusedloss.relation import Other, Rest, Same
from fusedloss.statistics import Expectation, LogSumExp, LogSumExpOf, Max, Moments, Score, Sum, SumOf

pytest.importorskip("triton", reason="triton is not installed")
ROWS, COLUMNS, FIRST_ROW, FIRST = 13, 203, 3, 7  # no multiple of anything
BF16, FP16 = torch.bfloat16, torch.float16

if not engine.interpreted():

    def test_gradients_of_products_in_the_interpreter():
        passes_in_the_interpreter(__file__)


def labels(count, seed):
    return torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed))


def lists():
    """name: (statistics of rows, of columns); those named visited are stateless, and no rows have others."""
    own = FIRST + torch.arange(ROWS)
    mine, theirs = labels(ROWS, 1), labels(COLUMNS, 2)
    at = torch.stack([own, own + COLUMNS - 20], 1)
    at[4] = -1
    return {
        "entropy": ([LogSumExp(where=Rest(own)), Score(own)], []),
        "labels": ([LogSumExp(where=Other(mine, theirs)), Sum(where=Same(mine, theirs, without=own))], []),
        "others": ([LogSumExpOf("circle", 0.8, 3.0, 0.25), Moments(), Expectation()], []),
        "rows and columns": (
            [LogSumExp(where=Rest(own)), Score(at)],
            [LogSumExp(1.3, where=Other(theirs, mine)), Score(torch.arange(COLUMNS) % ROWS + FIRST_ROW), Moments()],
        ),
        "columns": ([], [LogSumExp(), SumOf("softplus")]),
        "visited": ([SumOf("softplus"), Score(at)], []),
        "visited by groups": ([SumOf("hinge", row=torch.randn(ROWS)), Sum(where=Same(mine, theirs))], []),
        "nothing": ([], []),
    }


if engine.interpreted():
    from fusedloss.backends import triton_launch

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on infinities and NaN
    VECTORS = ("bias", "class_scale", "class_shift")

    def options_of(which):
        if which == "plain":
            return {}
        if which == "scale":
            return {"scale": torch.tensor(1.3, dtype=torch.float64), "class_shift": torch.full((COLUMNS,), -0.5)}
        vectors = {name: torch.randn(COLUMNS) for name in VECTORS}
        return {"scale": 0.7, "softcap": 2.5, **vectors}

    @pytest.mark.parametrize("programs", [1, 4], ids=["walked", "split"])
    @pytest.mark.parametrize(
        ("name", "options", "dtype", "depth"),
        [
            ("entropy", "plain", BF16, 64),
            ("entropy", "everything", FP16, 19),
            ("labels", "scale", BF16, 19),
            ("others", "scale", FP16, 19),
            ("rows and columns", "scale", BF16, 19),
            ("rows and columns", "everything", FP16, 64),
            ("columns", "scale", BF16, 19),
            ("visited", "scale", BF16, 19),
            ("visited by groups", "everything", BF16, 100),
            ("nothing", "plain", BF16, 19),
        ],
    )
    def test_gradient_of_a_product(name, options, dtype, depth, programs, monkeypatch):
        monkeypatch.setattr(triton_launch, "LINEAR_ROWS", 8)
        monkeypatch.setattr(triton_launch, "PROGRAMS", programs)
        stats, below = lists()[name]
        x, y = torch.randn(ROWS, depth).to(dtype), (torch.randn(COLUMNS, depth) * depth**-0.5).to(dtype)
        given = options_of(options)
        exact = Tile(x.double() @ y.double().t(), FIRST, first_row=FIRST_ROW, **given)
        assert engine.fuses_gradient(stats, Across(below, [], []), Sums(), exact)
        states, of_columns = ([s.identity(n, "cpu") for s in part] for n, part in ((ROWS, stats), (COLUMNS, below)))
        visits = name.startswith("visited")
        if not visits:
            plain.statistics(exact, stats, states)
        plain.column_statistics(exact, below, of_columns)
        mine, theirs = [torch.randn(ROWS, s.outputs) for s in stats], [torch.randn(COLUMNS, s.outputs) for s in below]
        for n, coefficients in ((1, mine), (2, theirs)):
            for c in coefficients:
                c[n] = 0
        across = Across(below, of_columns, theirs) if below else None
        asked = {"scale": torch.ones((), dtype=torch.float64), "class_shift": torch.ones(COLUMNS)}
        if options == "everything":
            asked |= {other: torch.ones(COLUMNS) for other in ("bias", "class_scale", "largest")}
        truths = {key: total.double() for key, total in asked.items()}
        truth = torch.empty(ROWS, COLUMNS, dtype=torch.float64)
        plain.gradient(exact, truth, stats, states, mine, Sums(**truths), across)
        buffer = torch.full((ROWS + 1, COLUMNS + 5), 7.0, dtype=dtype)
        tile = Tile(None, FIRST, first_row=FIRST_ROW, **given)
        visited = [s.identity(ROWS, "cpu") for s in stats] if visits else None
        engine.linear_gradient(x, y, tile, buffer[:ROWS, :COLUMNS], stats, states, mine, Sums(**asked), across, visited)
        size = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(
            buffer[:ROWS, :COLUMNS].double(), truth, rtol=ROUNDING[dtype] + 1e-5, atol=4e-6 * size
        )
        assert (buffer[ROWS:] == 7).all() and (buffer[:, COLUMNS:] == 7).all()
        for key, total in truths.items():
            close(asked[key], total, 2e-5 * max(1.0, total.abs().max().item()), key)
        if visits:
            expected = [s.identity(ROWS, "cpu") for s in stats]
            plain.statistics(exact, stats, expected)
            for s, got, state in zip(stats, visited, expected):
                close(s.value(got), s.value(state), 1e-5, type(s).__name__)
            assert all((state == s.identity(ROWS, "cpu")).all() for s, state in zip(stats, states))

    def test_scores_of_other_tiles():
        """A column (or a row) that is wanted, but beyond those of this tile: 0, though a program has room for it."""
        x, y = torch.randn(5, 16).bfloat16(), torch.randn(70, 16).bfloat16()
        rows, columns = Score(torch.tensor([3, 69, 70, 71, 90])), Score(torch.arange(70) % 9)
        states, truths = ([rows.identity(5, "cpu"), columns.identity(70, "cpu")] for _ in range(2))
        engine.linear_statistics(x, y, Tile(None), [rows], states[:1], None, [columns], states[1:])
        exact = Tile(x.double() @ y.double().t())
        plain.statistics(exact, [rows], truths[:1])
        plain.column_statistics(exact, [columns], truths[1:])
        for got, truth in zip(states, truths):
            close(got, truth, 1e-5)

    def test_what_is_too_much():
        tile, wide = Tile(None), Score(torch.zeros(3, 9).long())
        assert not engine.fuses_gradient([Max()], None, Sums(), tile)
        assert not engine.fuses_gradient([wide], None, Sums(), tile)
        assert not engine.fuses_gradient([], Across([Max()], [], []), Sums(), tile)
        many = [LogSumExp(), Moments()], Across([LogSumExp(), Moments(), Score(torch.zeros(3).long())], [], [])
        assert engine.fuses_gradient(*many, Sums(), tile)
        assert not engine.fuses_gradient([*many[0], SumOf("hinge")], many[1], Sums(), tile)
        x, out = torch.randn(3, 8).bfloat16(), torch.empty(3, 3).bfloat16()
        with pytest.raises(ValueError, match="fuses_gradient"):
            engine.linear_gradient(x, x, tile, out, [Max()], [Max().identity(3, "cpu")], [torch.ones(3, 1)], Sums())

    @pytest.fixture
    def forced(monkeypatch):
        """The gradient comes out of the product or not at all; what came out so, and the types of the walk's blocks."""
        plain_limits, product, plain_workspace = engine.limits, engine.linear_gradient, schedule.workspace
        seen, blocks = [], []

        def limits(device):
            return replace(plain_limits(device), fuses_gradient=True, block_columns=64)

        def linear_gradient(*given):
            seen.append(given[9] is not None)
            product(*given)

        def workspace(device, *wanted):
            blocks.append(wanted[0][1])
            return plain_workspace(device, *wanted)

        monkeypatch.setattr(engine, "limits", limits)
        monkeypatch.setattr(engine, "gradient", None)
        monkeypatch.setattr(engine, "linear_gradient", linear_gradient)
        monkeypatch.setattr(schedule, "workspace", workspace)
        monkeypatch.setattr(triton_launch, "LINEAR_ROWS", 16)
        return seen, blocks

    N, M = 70, 83
    GROUPS = {"row_group": labels(N, 1), "column_group": labels(M, 2)}
    LOSSES = {
        "sigmoid": (fl.sigmoid_loss, N, BF16),
        "sigmoid of groups": (lambda s: fl.sigmoid_loss(s, **GROUPS), M, FP16),
        "clip": (fl.clip_loss, N, BF16),
        "infonce": (fl.info_nce_loss, M, FP16),
        "supcon": (lambda s: fl.supcon_loss(s, labels(N, 1), column_label=labels(M, 2)), M, BF16),
    }

    @pytest.mark.parametrize("name", LOSSES)
    def test_the_whole_way(name, forced):
        """Several blocks each way, against the dense scores in fp64."""
        loss_of, columns, dtype = LOSSES[name]
        visits = name.startswith("sigmoid")
        x, y = (torch.nn.functional.normalize(torch.randn(n, 24)).to(dtype) for n in (N, columns))

        def found(wide, scores_of):
            given = [t.to(wide).requires_grad_() for t in (x, y)]
            given += [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (4.0, -1.0)]
            loss = loss_of(scores_of(*given))
            return loss.detach(), torch.autograd.grad(loss, given)

        def streamed(x, y, scale, bias):
            walk = {"schedule": "auto" if visits else "recompute", "memory_budget": 20 << 11, "backend": "triton"}
            return fl.similarity_scores(x, y, scale=scale, bias=bias, **walk)

        truth, exact = found(torch.float64, lambda x, y, scale, bias: x @ y.t() * scale + bias)
        loss, got = found(dtype, streamed)
        seen, blocks = forced
        assert len(seen) == 8 and all(one == visits for one in seen)  # 4 of rows, 2 of columns
        assert blocks[-1] == dtype
        close(loss, truth, 1e-5 * (1 + truth.abs().item()))
        for g, e in zip(got, exact):
            assert (g.double() - e).norm() <= 8e-3 * e.norm() + 1e-5, name
