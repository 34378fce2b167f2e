"""Similarity scores: relations, statistics of columns, half of a symmetric matrix, and walks that visit a block once."""

import pytest
import torch
from tolerance import error

import fusedloss as fl
from fusedloss import (
    Columns,
    Count,
    Expectation,
    LogSumExp,
    LogSumExpOf,
    Max,
    Min,
    Moments,
    Other,
    Rest,
    Same,
    Score,
    Sum,
    SumOf,
    SumOfSquares,
    TopK,
    Where,
    similarity_scores,
    softplus,
    trace,
)
from fusedloss.backends import torch as plain

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
N, M, D = 37, 53, 8


@fl.row_loss
def sigmoid(scores, target):
    soft, hit = scores.reduce(SumOf("softplus"), Score(target))
    return soft - hit


@fl.row_loss
def nce(scores, target):
    rest, hit = scores.reduce(LogSumExp(where=Rest(target)), Score(target))
    return softplus(rest - hit)


def clip(scores):
    rows, columns, hit = scores.reduce(LogSumExp(), Columns(LogSumExp()), Score(scores.diagonal()))
    return (scores.mean(rows - hit) + scores.mean(columns - hit[: len(columns)])) / 2


def leaves(dtype, alone, rows=N, columns=M):
    """x, y (x itself when `alone`), scale and bias."""
    x = torch.randn(rows, D).to(dtype).requires_grad_()
    y = x if alone else torch.randn(columns, D).to(dtype).requires_grad_()
    wide = F64 if dtype == F64 else F32
    return x, y, torch.tensor(2.5, dtype=wide, requires_grad=True), torch.tensor(-1.0, dtype=wide, requires_grad=True)


def statistics(rows, columns):
    """Every kind with a relation of every kind, of rows and of columns."""
    row, column = torch.randint(0, 4, (rows,)), torch.randint(0, 4, (columns,))
    column = row if rows == columns else column
    me, you = torch.arange(rows), torch.arange(columns)
    low, high = torch.full((rows,), -2.0), torch.full((rows,), 1.5)
    across = torch.randn(columns)
    return {
        "lse": LogSumExp(),
        "lse-rest": LogSumExp(where=Rest(me)),
        "lse-same": LogSumExp(factor=-0.7, where=Same(row, column, without=me, above=low)),
        "lse-other": LogSumExp(where=Other(row, column, below=high)),
        "sum-same": Sum(where=Same(row, column, without=me)),
        "count": Count(where=Other(row, column, above=low, below=high)),
        "moments": Moments(where=Other(row, column)),
        "expectation": Expectation(where=Same(row, column)),
        "hinge": SumOf("hinge", row=torch.randn(rows), where=Other(row, column)),
        "squares": SumOfSquares(where=Where(above=low)),
        "max": Max(where=Other(row, column)),
        "min": Min(where=Same(row, column, without=me)),
        "top": TopK(3, where=Rest(me)),
        "score": Score((me * 7) % columns),
        "scores": Score(torch.randint(-1, columns, (rows, 2))),
        "circle": LogSumExpOf("circle", parameter=0.25, weight=3.0, where=Same(row, column, below=high)),
        "tanh": LogSumExpOf("log_tanh", factor=0.1, weight=5.0, row=torch.randn(rows), where=Rest(me)),
        "atan": LogSumExpOf("log_atan", factor=0.1, weight=5.0),
        "relu": LogSumExpOf("log_relu", factor=0.3, weight=2.0),
        "columns-lse": Columns(LogSumExp(factor=1.3, where=Rest(you))),
        "columns-sum": Columns(Sum(where=Same(column, row, without=you))),
        "columns-softplus": Columns(SumOf("softplus", factor=-1.0, row=across, where=Other(column, row))),
        "columns-squares": Columns(SumOfSquares()),
        "columns-count": Columns(Count(where=Same(column, row))),
        "columns-circle": Columns(LogSumExpOf("circle", parameter=0.25, where=Other(column, row, above=across - 2))),
        "columns-max": Columns(Max(where=Other(column, row))),
        "columns-moments": Columns(Moments()),
        "columns-expectation": Columns(Expectation()),
        "columns-score": Columns(Score((you * 5) % rows)),
    }


def weighted(values):
    """A number that depends on every value differently."""
    values = values if isinstance(values, (tuple, list)) else [values]
    terms = [v * torch.linspace(0.1, 1.0, v.numel(), dtype=F64).reshape(v.shape) for v in values if v.is_floating_point()]
    return sum(torch.where(t.isfinite(), t, 0.0).sum() for t in terms)


def gradients(total, inputs):
    found = torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else [None] * len(inputs)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs)]


# --- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", statistics(2, 3))
@pytest.mark.parametrize("alone", [False, True], ids=["two sets", "one set"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=["fp64", "fp32"])
def test_every_statistic_equals_the_dense_one(backend, name, alone, dtype):
    x, y, t, b = leaves(dtype, alone)
    statistic = statistics(N, len(y))[name]
    inputs = (x, t, b) if alone else (x, y, t, b)

    def scores():
        return similarity_scores(x, y, scale=t, bias=b, normalize=True, memory_budget=2000)

    assert scores().symmetric == alone
    got, truth = (weighted(s.reduce(statistic)) for s in (scores(), scores().dense()))
    bound = 1e-11 if dtype == F64 else 2e-5
    assert abs(got - truth) <= bound * abs(truth)
    for name, a, b in zip(("dX", "dY", "dscale", "dbias"), gradients(got, inputs), gradients(truth, inputs)):
        assert error(a, b) <= bound or (a - b).norm() <= bound, name


@pytest.mark.parametrize("alone", [False, True], ids=["two sets", "one set"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_half_precision(backend, alone, dtype):
    """Rounded once: gradients are as near to the dense ones in float64 as their type allows."""
    x, y, t, _ = leaves(dtype, alone, N, N)
    label = torch.arange(N) % 5

    def loss(s, dense=False):
        rows, same = (s.dense() if dense else s).reduce(LogSumExp(where=Rest(s.diagonal())), Sum(where=Same(label, label, without=s.diagonal())))
        return (rows - same / 6).mean()

    inputs = (x, t) if alone else (x, y, t)
    wide = [i.detach().double().requires_grad_() for i in inputs]
    truth = loss(similarity_scores(wide[0], wide[0] if alone else wide[1], scale=wide[-1]), dense=True)
    got = loss(similarity_scores(x, y, scale=t, memory_budget=2000))
    assert error(got, truth) < 1e-6
    bound = {F32: 2e-6, BF16: 6e-3, F16: 8e-4}[dtype]
    for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(truth, wide)):
        assert error(g, w) < bound and g.dtype in (dtype, F32)


def test_a_relation_holds_where_all_of_its_conditions_do():
    z = torch.tensor([[0.0, 1.0, 2.0, torch.nan], [3.0, 4.0, 5.0, 6.0]])
    label = torch.tensor([0, 1]), torch.tensor([0, 1, 0, 0])
    hidden = Same(*label, without=torch.tensor([12, -1]), above=torch.tensor([-1.0, 0.0])).hide(z, 10) == -torch.inf
    assert hidden.tolist() == [[False, True, True, False], [True, False, True, True]]
    hidden = Other(*label, below=torch.tensor([1.0, 6.0])).hide(z, 0) == -torch.inf
    assert hidden.tolist() == [[True, True, True, True], [False, True, False, True]]
    assert not Where(above=torch.tensor([9.0, 9.0])).hide(z, 0)[0, 3] == -torch.inf, "NaN is not hidden by a threshold"


def test_scores_at_given_columns():
    x, w, bias = torch.randn(4, 6, D, dtype=F64), torch.randn(M, D, dtype=F64), torch.randn(M, dtype=F64)
    scores = fl.linear_scores(x, w.requires_grad_(), bias=bias, softcap=3.0, scale=0.7).adjusted(bias.exp(), bias)
    for at in (torch.randint(0, M, (24,)), torch.randint(0, M, (24, 3))):
        dense = scores.dense().z.gather(1, at.reshape(24, -1)).reshape(at.shape)
        torch.testing.assert_close(scores.at(at), dense)
        got, truth = (torch.autograd.grad((v * torch.arange(v.numel()).reshape(v.shape)).sum(), w)[0] for v in (scores.at(at), dense))
        torch.testing.assert_close(got, truth)
    logits = torch.randn(24, M)
    torch.testing.assert_close(fl.logits_scores(logits).at(at).float(), logits.gather(1, at))
    assert similarity_scores(torch.zeros(0, D), torch.zeros(3, D)).at(torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("alone", [False, True], ids=["two sets", "one set"])
def test_derivatives_of_the_derivatives(alone):
    x, y, t, b = leaves(F64, alone, N, N)
    inputs = (x, t, b) if alone else (x, y, t, b)

    def twice(s):
        first = torch.autograd.grad(clip(s), inputs, create_graph=True, allow_unused=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), inputs)

    s = similarity_scores(x, y, scale=t, bias=b)
    for got, truth in zip(twice(s), twice(_Dense(s))):
        assert error(got, truth) < 1e-10 or truth.norm() < 1e-10


class _Dense:
    """The dense scores under the same face."""

    def __init__(self, s):
        self.reduce, self.diagonal, self.mean = s.dense().reduce, s.diagonal, s.mean


@pytest.mark.parametrize("rows, columns", [(0, 5), (1, 1), (1, 7), (7, 1), (64, 65), (65, 64)])
def test_odd_shapes(backend, rows, columns):
    x, y, t, b = leaves(F32, False, rows, columns)
    s = similarity_scores(x, y, scale=t, bias=b, memory_budget=4096)
    values = s.reduce(LogSumExp(), Columns(LogSumExp()), Columns(Count()))
    assert [len(v) for v in values] == [rows, columns, columns] and (values[2] == rows).all()
    for got, truth in zip(values, s.dense().reduce(LogSumExp(), Columns(LogSumExp()), Columns(Count()))):
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients(weighted(values), (x, y, t, b)))


# --- walks ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch):
    """Multiplications that the torch backend's GEMMs did, in units of N · M · D."""
    done = [0.0]
    gemm = plain.gemm

    def counted(out, a, b, accumulate):
        done[0] += out.numel() * a.shape[1]
        gemm(out, a, b, accumulate)

    monkeypatch.setattr(plain, "gemm", counted)
    return done


def steps(name, x, y, t):
    if name == "sigmoid":
        s = similarity_scores(x, y, scale=t, backend="torch", memory_budget=1 << 16)
        return sigmoid(s, s.diagonal())
    if name == "nce":
        s = similarity_scores(x, y, scale=t, backend="torch")
        return nce(s, s.diagonal())
    if name == "clip":
        return clip(similarity_scores(x, y, scale=t, backend="torch", memory_budget=1 << 16))
    s = similarity_scores(x, scale=t, backend="torch", memory_budget=1 << 14)  # blocks of 64 rows
    rest = Rest(s.diagonal())
    return (s.reduce(LogSumExp(where=rest)) - s.reduce(Score(s.diagonal().roll(1)))).mean()


@pytest.mark.parametrize("name, gemms", [("sigmoid", 3), ("nce", 3), ("clip", 4), ("one set", 2)])
def test_products_that_a_step_takes(products, name, gemms):
    rows = 1024
    x, y, t, _ = leaves(F32, False, rows, rows)
    steps(name, x, y, t).backward()
    taken = products[0] / (rows * rows * D)
    assert gemms <= taken <= gemms + (0.07 if name == "one set" else 0)  # the blocks on the diagonal are whole


def test_a_loss_that_is_linear_in_its_statistics_is_known():
    @fl.row_loss
    def squared(scores, target):
        return scores.reduce(SumOf("softplus")).square()

    @fl.row_loss
    def scaled(scores, target, factor):
        soft, hit = scores.reduce(SumOf("hinge"), Score(target))
        return factor * soft - hit / 3 + 5

    x, y, t, _ = leaves(F32, False)
    target = torch.arange(N)
    for loss, more, linear in ((sigmoid, (), True), (nce, (), False), (squared, (), False), (scaled, (torch.rand(N),), True)):
        loss(similarity_scores(x, y, scale=t), target, *more)
        traced = [p for k, p in trace.PROGRAMS.items() if repr(loss.on_statistics.key) in k and isinstance(p, trace.Program)]
        assert traced and all(program.linear == linear for program in traced), loss.__name__


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("ignored", [False, True])
def test_one_visit_gives_the_same_numbers(backend, dtype, ignored):
    x, y, t, b = leaves(dtype, False)
    target = torch.arange(N)
    if ignored:
        target[::4] = -100
    found = []
    for schedule in ("auto", "eager", "recompute"):
        s = similarity_scores(x, y, scale=t, bias=b, schedule=schedule, memory_budget=3000)
        loss = sigmoid(s, target)
        found.append([loss, *torch.autograd.grad(loss, (x, y, t, b))])
    bound = {F64: 1e-13, F32: 1e-5, BF16: 1e-2, F16: 2e-3}[dtype]
    for other in found[1:]:
        assert all(error(a, o) <= bound for a, o in zip(found[0], other))


@pytest.mark.parametrize("name", ["sigmoid", "clip"])
def test_fp16_gradients_survive_large_batches(name):
    """∂L/∂s of a mean over 65,536 rows is far below float16's smallest number; a loss scale of 2^16 must bring it back."""
    rows = 1 << 16
    x = torch.nn.functional.normalize(torch.randn(rows, D), dim=1)
    y = torch.nn.functional.normalize(torch.randn(16, D), dim=1)
    found = []
    for dtype in (F64, F16):
        leaf = [i.to(dtype).requires_grad_() for i in (x, y)]
        s = similarity_scores(*leaf, scale=10.0, bias=-10.0)
        loss = sigmoid(s, torch.arange(rows) % 16) if name == "sigmoid" else s.reduce(LogSumExp()).mean()
        factor = 65536.0 if dtype == F16 else 1.0
        found.append([g.double() / factor for g in torch.autograd.grad(loss * factor, leaf)])
    for truth, got in zip(*found):
        assert error(got, truth) < 5e-3 and (got == 0).double().mean() < 0.01


# --- errors --------------------------------------------------------------------------------------------------------------


def test_errors_say_what_is_wrong():
    x, y = torch.randn(N, D), torch.randn(M, D)
    with pytest.raises(ValueError, match=r"similarity_scores: x: expected a tensor \(N, D\), got \(2, 3, 4\)"):
        similarity_scores(torch.randn(2, 3, 4), y)
    with pytest.raises(ValueError, match=r"similarity_scores: y: expected \(M, 8\) to match x, got \(53, 7\)"):
        similarity_scores(x, y[:, :7])
    with pytest.raises(TypeError, match="expected torch.float32 as input, got torch.float64"):
        similarity_scores(x, y.double())
    with pytest.raises(ValueError, match="scale: expected a number or a 0-dimensional tensor, got"):
        similarity_scores(x, y, scale=torch.ones(3))
    with pytest.raises(ValueError, match="schedule: expected auto, eager or recompute, got best"):
        similarity_scores(x, y, schedule="best")
    with pytest.raises(ValueError, match="expected no Columns where rows are left out"):
        similarity_scores(x, y).keeping(torch.arange(N) > 3).reduce(Columns(LogSumExp()))


@pytest.mark.parametrize(
    "statistic, message",
    [
        (lambda: Sum(torch.ones(10)), "Sum.weights: expected 53 entries, got"),
        (lambda: Score(torch.zeros(10, dtype=torch.int64)), "Score.at: expected 37 entries, got"),
        (lambda: Count(where=Same(torch.arange(N), torch.arange(N))), "Count.where.column_label: expected 53 entries"),
        (lambda: Columns(Count(where=Same(torch.arange(N), torch.arange(M)))), "Count.where.row_label: expected 53 entries, got"),
    ],
)
def test_what_statistics_carry_has_the_scores_shape(backend, statistic, message):
    with pytest.raises(ValueError, match=message):
        similarity_scores(torch.randn(N, D), torch.randn(M, D)).reduce(statistic())


def test_labels_are_integers():
    with pytest.raises(TypeError, match="Count.where.row_label: expected integers, got torch.float32"):
        similarity_scores(torch.randn(N, D)).reduce(Count(where=Same(torch.rand(N), torch.arange(N))))


def test_a_column_that_is_not_there_has_no_score(backend):
    x = torch.randn(3, D, requires_grad=True)
    score = similarity_scores(x).reduce(Score(torch.tensor([9, 1, -7])))
    assert score[0] == score[2] == 0
    score.sum().backward()
    torch.testing.assert_close(x.grad, torch.stack([x[0] * 0, 2 * x[1], x[2] * 0]).detach())


def test_infinite_row_parameters():
    row = torch.tensor([0.0, torch.inf, -torch.inf, 1.0], requires_grad=True)
    z = torch.randn(4, 5)
    for one, other in zip(*(fl.logits_scores(z).reduce(SumOf("hinge", row=r)) for r in (row, row.detach()))):
        assert one == other


def test_a_row_loss_may_look_at_columns():
    @fl.row_loss
    def both(scores):
        rows, columns = scores.reduce(LogSumExp(), Columns(LogSumExp()))
        return rows + columns

    x, y = torch.randn(6, D, dtype=F64, requires_grad=True), torch.randn(6, D, dtype=F64)
    got, truth = both(similarity_scores(x, y)), both.on_statistics(similarity_scores(x, y).dense()).mean()
    torch.testing.assert_close(got, truth)
    torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(truth, x))


def test_rows_of_zeros_stay_zeros_when_they_are_normalised():
    x = torch.randn(5, D)
    x[2] = 0
    x.requires_grad_()
    total = similarity_scores(x, normalize=True, scale=100.0).reduce(LogSumExp()).sum()
    total.backward()
    assert total.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("alone", [False, True])
def test_any_layout(backend, view, alone):
    base = torch.randn(D, N) if view == "transposed" else torch.randn(N, 2 * D)
    x = {"transposed": base.t(), "strided": base[:, ::2], "expanded": base[:1, :D].expand(N, D)}[view].requires_grad_()
    y = None if alone else torch.randn(M, D)
    loss = weighted(similarity_scores(x, y).reduce(LogSumExp(), Columns(LogSumExp())))
    truth = weighted(similarity_scores(x, y).dense().reduce(LogSumExp(), Columns(LogSumExp())))
    (got,), (expected,) = torch.autograd.grad(loss, x), torch.autograd.grad(truth, x)
    assert error(got, expected) < 1e-5
