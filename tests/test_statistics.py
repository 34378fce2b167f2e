"""Every statistic: value and slope against a dense formula, and that columns may be cut and merged in any way."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import BY_NAME

from fusedloss.backends.tile import Sums, Tile
from fusedloss.relation import Rest, Where
from fusedloss.scores import linear_scores, logits_scores
from fusedloss.statistics import (
    FUNCTIONS,
    Count,
    Expectation,
    Extreme,
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

INF = torch.inf
ROWS, CLASSES = 6, 23


def context(rows=ROWS, classes=CLASSES, seed=0):
    """What the statistics of the table below carry."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return SimpleNamespace(
        target=torch.randint(0, classes, (rows,), generator=g),
        two=torch.rand(rows, classes, generator=g).argsort(1)[:, :2],
        columns=torch.randperm(classes, generator=g)[:3],
        weights=torch.rand(classes, generator=g, dtype=torch.float64) - 0.3,
        sparse=torch.relu(torch.rand(classes, generator=g, dtype=torch.float64) - 0.4),
        matrix=torch.relu(torch.rand(rows, classes, generator=g, dtype=torch.float64) - 0.2),
        values=torch.arange(classes, dtype=torch.float64) / 3,
        near=torch.rand(rows, generator=g, dtype=torch.float64) * classes / 3,
        row=torch.randn(rows, generator=g, dtype=torch.float64),
    )


# --- the meaning, densely: functions of z (N, V) in fp64, -inf where a class does not count ---------------------------


def counted(z):
    return (z != -INF), torch.where(z == -INF, 0.0, z)


def total(terms, z):
    return torch.where(z == -INF, 0.0, terms).sum(1, keepdim=True)


def logsumexp(factor):
    return lambda z, c: torch.where(z == -INF, -INF, factor * counted(z)[1]).logsumexp(1, keepdim=True)


def moments(z, c):
    count, values = counted(z)[0].sum(1, keepdim=True).double(), counted(z)[1]
    mean = values.sum(1, keepdim=True) / count.clamp(min=1)
    return torch.cat([count, mean, total((values - mean) ** 2, z)], 1)


def expectation(values, factor=1.0):
    def mean(z, c):
        p = torch.where(z == -INF, -INF, factor * counted(z)[1]).softmax(1)
        nothing = (z == -INF).all(1, keepdim=True)
        return torch.where(nothing, torch.nan, total(p * values(z, c), z))  # the mean of nothing is 0/0

    return mean


def apart(z, c, power):
    return (c.values - c.near[:, None]).abs() ** power


F_DENSE = {
    "softplus": lambda u: F.softplus(u, threshold=40),
    "sigmoid": torch.sigmoid,
    "hinge": lambda u: u.clamp(min=0),
    "squared_hinge": lambda u: u.clamp(min=0) ** 2,
    "focal": lambda u: torch.sigmoid(u) ** 2 * F.softplus(u, threshold=40),
}


def best(k, sign=1):
    def values(z, c):
        z = sign * torch.where(z == -INF, -INF, sign * z)  # an absent class is last, whichever end is asked for
        padded = F.pad(torch.where(z.abs() == INF, -sign * INF, z), (0, k), value=-sign * INF)
        return padded.sort(dim=1, descending=sign > 0).values[:, :k]

    return values


TABLE = {
    "score": (lambda c: Score(at=c.target), lambda z, c: z.gather(1, c.target[:, None])),
    "score-two": (lambda c: Score(at=c.two), lambda z, c: z.gather(1, c.two)),
    "score-columns": (lambda c: Score(columns=c.columns), lambda z, c: z[:, c.columns]),
    "logsumexp": (lambda c: LogSumExp(), logsumexp(1.0)),
    "logsumexp-2.5": (lambda c: LogSumExp(factor=2.5), logsumexp(2.5)),
    "logsumexp-minus": (lambda c: LogSumExp(factor=-1.5), logsumexp(-1.5)),
    "sum": (lambda c: Sum(), lambda z, c: total(z, z)),
    "sum-classes": (lambda c: Sum(c.weights), lambda z, c: total(counted(z)[1] * c.weights, z)),
    "sum-matrix": (lambda c: Sum(c.matrix), lambda z, c: total(counted(z)[1] * c.matrix, z)),
    "count": (lambda c: Count(), lambda z, c: total(torch.ones_like(z), z)),
    "count-classes": (lambda c: Count(c.sparse), lambda z, c: total((c.sparse != 0).double().expand_as(z), z)),
    "count-matrix": (lambda c: Count(c.matrix), lambda z, c: total((c.matrix != 0).double(), z)),
    "squares": (lambda c: SumOfSquares(), lambda z, c: total(counted(z)[1] ** 2, z)),
    "moments": (lambda c: Moments(), moments),
    "expectation-values": (lambda c: Expectation(c.values), expectation(lambda z, c: c.values.expand_as(z))),
    "expectation-0.7": (
        lambda c: Expectation(c.values, factor=0.7),
        expectation(lambda z, c: c.values.expand_as(z), 0.7),
    ),
    "expectation-scores": (lambda c: Expectation(), expectation(lambda z, c: counted(z)[1])),
    "expectation-scores-2": (lambda c: Expectation(factor=2.0), expectation(lambda z, c: counted(z)[1], 2.0)),
    "distance": (lambda c: Expectation(c.values, c.near), expectation(lambda z, c: apart(z, c, 1))),
    "distance-squared": (lambda c: Expectation(c.values, c.near, power=2), expectation(lambda z, c: apart(z, c, 2))),
    "max": (lambda c: Max(), best(1)),
    "min": (lambda c: Min(), best(1, -1)),
    "top-4": (lambda c: TopK(4), best(4)),
}
for f, dense in F_DENSE.items():
    TABLE[f"sum-of-{f}"] = (
        lambda c, f=f: SumOf(f, parameter=2.0),
        lambda z, c, d=dense: total(d(counted(z)[1]), z),
    )
    TABLE[f"sum-of-{f}-row"] = (
        lambda c, f=f: SumOf(f, factor=-1.3, parameter=2.0, row=c.row),
        lambda z, c, d=dense: total(d(-1.3 * (counted(z)[1] - c.row[:, None])), z),
    )

assert set(F_DENSE) == set(FUNCTIONS)


def case(name, where=False, seed=0, rows=ROWS, classes=CLASSES):
    """(statistic, dense value as a function of z), over all columns or over those that are not the target."""
    c = context(rows, classes, seed)
    statistic, dense = TABLE[name][0](c), TABLE[name][1]
    if not where:
        return statistic, lambda z: dense(z, c)
    hidden = F.one_hot(c.target, classes).bool()
    return replace(statistic, where=Rest(c.target)), lambda z: dense(z.masked_fill(hidden, -INF), c)


every_case = pytest.mark.parametrize(
    ("name", "where"), [(n, w) for n in TABLE for w in (False, True) if not (w and n.startswith("score"))]
)


def some_scores(masked, rows=ROWS, classes=CLASSES, seed=0):
    z = 2 * torch.randn(rows, classes, dtype=torch.float64, generator=torch.Generator(torch.get_default_device()).manual_seed(seed))
    if masked:
        z[torch.rand(rows, classes) < 0.3] = -INF
        z[1] = -INF
        z[2, 1:] = -INF
    return z


def close(a, b, tolerance=1e-12, **options):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, **options)


def parts_of(statistic, z, rng):
    """States of the columns cut at random places, empty parts included, each with its own first column."""
    cuts = sorted(rng.randint(0, z.shape[1]) for _ in range(rng.randint(1, 6)))
    edges = [0, *cuts, z.shape[1]]
    spans = [slice(a, b) for a, b in zip(edges, edges[1:])]
    states = [statistic.taking(columns=s).of(z[:, s], s.start) for s in spans]
    return [*states, statistic.identity(z.shape[0], z.device)]


def merged_at_random(statistic, states, rng):
    """One state, by merging two at a time in a random tree."""
    states = list(states)
    while len(states) > 1:
        a, b = (states.pop(rng.randrange(len(states))) for _ in range(2))
        states.append(statistic.merge(a, b))
    return states[0]


@every_case
@pytest.mark.parametrize("masked", [False, True])
def test_columns_may_be_cut_and_merged_in_any_way(name, where, masked):
    for seed in range(4):
        rng = random.Random(seed)
        statistic, dense = case(name, where, seed)
        z = some_scores(masked, seed=seed)
        whole = statistic.of(z, 0)
        state = merged_at_random(statistic, parts_of(statistic, z, rng), rng)
        assert state.shape == whole.shape == (ROWS, statistic.width)
        close(statistic.value(state), dense(z))
        close(statistic.value(state), statistic.value(whole))


@every_case
def test_slope_is_the_derivative_of_the_value(name, where):
    statistic, dense = case(name, where)
    z = some_scores(masked=False).requires_grad_()
    value = dense(z) + 0 * z.sum()
    coefficient = torch.randn_like(value)
    truth = torch.autograd.grad(value, z, coefficient)[0]
    state = statistic.of(z.detach(), 0)
    close(statistic.slope(z.detach(), 0, state, coefficient), truth)
    for columns in (slice(0, 5), slice(5, CLASSES)):
        part = statistic.taking(columns=columns)
        close(part.slope(z.detach()[:, columns], columns.start, state, coefficient), truth[:, columns])
    by_autograd = statistic.value(statistic.of(z, 0))
    if by_autograd.requires_grad:  # the way to second derivatives
        close(torch.autograd.grad(by_autograd, z, coefficient)[0], truth)


# --- the tile primitives of each backend -----------------------------------------------------------------------------

TILE_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@every_case
@pytest.mark.parametrize("dtype", TILE_TYPES, ids=str)
def test_tile_primitives(backend, device, name, where, dtype):
    engine = BY_NAME[backend]
    if not engine.supports(device, dtype):
        pytest.skip(f"backend {backend!r} has no tiles of {dtype}")
    rows, classes = 5, 203  # no multiple of any vector length
    statistic, dense = case(name, where, rows=rows, classes=classes)
    z = some_scores(True, rows, classes).to(dtype)
    z[4] = 0.5  # ties
    cuts = [slice(128, 203), slice(0, 64), slice(64, 128)]
    state = statistic.identity(rows, z.device)
    for columns in cuts:
        engine.statistics(Tile(z[:, columns], columns.start), [statistic.taking(columns=columns)], [state])
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    wide = z.double().requires_grad_()
    truth = dense(wide) + 0 * wide.nan_to_num(0, 0, 0).sum()
    close(statistic.value(state), truth.detach(), tolerance)

    coefficient = torch.randn(truth.shape, dtype=torch.float64)
    coefficient[3] = 0
    if hasattr(statistic, "k"):  # ties: the columns found say where the slope is
        columns = statistic.columns(state)
        at = torch.where(columns < 0, 0, columns)
        slope = torch.zeros(rows, classes, dtype=torch.float64).scatter_add(1, at, coefficient * (columns >= 0))
    else:
        slope = torch.autograd.grad(truth, wide, coefficient)[0]
    slope = slope.nan_to_num(0.0).masked_fill(z == -INF, 0.0)
    out = torch.full((rows, classes), torch.nan, dtype=dtype)
    for columns in cuts:
        part = [statistic.taking(columns=columns)]
        given = coefficient.to(torch.float64 if dtype == torch.float64 else torch.float32)
        engine.gradient(Tile(z[:, columns], columns.start), out[:, columns], part, [state], [given], Sums())
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, tolerance)
    torch.testing.assert_close(out.double(), slope, rtol=rounding, atol=tolerance * 10)
    assert (out[3] == 0).all()


# --- ends of the range -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, -1.0])
@pytest.mark.parametrize("k", [1, 3])
def test_ties_go_to_the_lowest_column_however_the_columns_are_cut(factor, k):
    z = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0]], dtype=torch.float64)
    expected = [[1, 2, 4], [0, 3, 5]][factor < 0][:k]
    statistic = Extreme(k=k, factor=factor)
    for seed in range(20):
        rng = random.Random(seed)
        state = merged_at_random(statistic, parts_of(statistic, z, rng), rng)
        assert statistic.columns(state).tolist() == [expected]


def test_topk_of_fewer_classes_than_k(backend):
    z = torch.tensor([[3.0, -INF, 5.0], [-INF] * 3], requires_grad=True)
    values, columns = logits_scores(z).reduce(TopK(5))
    assert values.tolist() == [[5, 3, -INF, -INF, -INF], [-INF] * 5]
    assert columns.tolist() == [[2, 0, -1, -1, -1], [-1] * 5]
    values.backward(torch.ones_like(values))
    assert z.grad.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_max_and_min_leave_out_the_target(backend):
    z = torch.tensor([[9.0, 1.0, 4.0], [2.0, 8.0, 3.0]], requires_grad=True)
    rest = Rest(torch.tensor([0, 1]))
    (top, at), (low, below) = logits_scores(z).reduce(Max(where=rest), Min(where=rest))
    assert (top.tolist(), at.tolist(), low.tolist(), below.tolist()) == ([4, 3], [2, 2], [1, 2], [1, 0])
    (top.sum() - low.sum()).backward()
    assert z.grad.tolist() == [[0, -1, 1], [-1, 0, 1]]


def test_moments_do_not_cancel(backend):
    z = 1e4 + torch.linspace(-1, 1, 1001)[None]  # variance 1/3, mean 10^4: Σs²/n − mean² has no digit left in fp32
    count, mean, m2 = logits_scores(z).reduce(Moments())
    exact = z.double()
    assert count.item() == 1001
    close(mean.double(), exact.mean(1), 1e-7)
    close(m2.double(), ((exact - exact.mean()) ** 2).sum(1), 1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e30])
def test_huge_and_tiny_scores(backend, scale):
    z = scale * torch.randn(4, 50)
    lse, (top, at) = logits_scores(z).reduce(LogSumExp(), Max())
    close(lse.double(), z.double().logsumexp(1), 1e-6)
    assert torch.equal(top, z.amax(1)) and torch.equal(at, z.argmax(1))


def test_nan_scores_are_not_hidden(backend):
    z = torch.zeros(2, 40)
    z[0, 17] = torch.nan
    lse, total_, squares = logits_scores(z).reduce(LogSumExp(), Sum(), SumOfSquares())
    for value in (lse, total_, squares):
        assert value.isnan().tolist() == [True, False]


# --- Scores.reduce ---------------------------------------------------------------------------------------------------

# Count has no gradient.
SMOOTH = [n for n in TABLE if not n.startswith("count")]


def flat(values):
    """A number that depends on every value of a reduce, each with another weight."""
    out, number = 0.0, 0
    stack = [values] if isinstance(values, torch.Tensor) else list(values)
    while stack:
        v = stack.pop(0)
        if isinstance(v, (list, tuple)):
            stack = list(v) + stack
        elif v.is_floating_point():
            number += 1
            shape = torch.arange(1, v.numel() + 1, dtype=v.dtype).reshape(v.shape).sin()
            out = out + (v * shape * (0.5 + 1 / number)).sum()
    return out


@pytest.mark.parametrize("name", SMOOTH)
def test_reduce_of_logits_passes_gradcheck(name):
    statistic, _ = case(name, rows=3, classes=7)
    z = some_scores(False, 3, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: flat(logits_scores(z).reduce(statistic)), z)


@pytest.mark.parametrize("where", [False, True])
def test_reduce_of_many_statistics_at_once(backend, where):
    """One pass over linear scores with every option on, in fp32, against autograd of the dense formula in fp64."""
    names = [n for n in TABLE if not (where and n.startswith("score"))]
    x, w = torch.randn(ROWS, 4), torch.randn(CLASSES, 4)
    bias, stretch, shift = torch.randn(CLASSES), torch.rand(CLASSES) + 0.5, torch.randn(CLASSES)
    scale = torch.tensor(1.7)
    leaves = [t.requires_grad_() for t in (x, w, bias, stretch, shift, scale)]
    scores = linear_scores(x, w, bias=bias, softcap=3.0, scale=scale).adjusted(stretch, shift)
    got = flat(scores.reduce(*[case(n, where)[0] for n in names]))
    found = torch.autograd.grad(got, leaves)

    exact = [t.detach().double().requires_grad_() for t in leaves]
    x, w, bias, stretch, shift, scale = exact
    z = stretch * scale * 3 * torch.tanh((x @ w.t() + bias) / 3) + shift
    values = [case(n, where)[1](z) for n in names]
    values = [v.unbind(1) if n == "moments" else v for n, v in zip(names, values)]
    truth = flat([v[:, 0] if isinstance(v, torch.Tensor) and v.shape[1] == 1 else v for v in values])
    close(got.double(), truth, 1e-5)
    for a, b in zip(found, torch.autograd.grad(truth, exact)):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("f", sorted(FUNCTIONS))
def test_row_parameter_of_sum_of_has_a_gradient(backend, f):
    z = torch.randn(4, 9, requires_grad=True)
    row = torch.randn(4, requires_grad=True)
    rest = Rest(torch.tensor([0, 3, 8, 2]))
    value = logits_scores(z).reduce(SumOf(f, factor=1.5, parameter=2.0, row=row, where=rest))
    found = torch.autograd.grad((value * torch.arange(4)).sum(), [z, row])
    a, b = (t.detach().double().requires_grad_() for t in (z, row))
    keep = ~F.one_hot(rest.without, 9).bool()
    dense = (F_DENSE[f](1.5 * (a - b[:, None])) * keep).sum(1)
    close(value.double(), dense, 1e-5)
    for got, truth in zip(found, torch.autograd.grad((dense * torch.arange(4)).sum(), [a, b])):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


def test_row_parameter_may_itself_come_from_the_scores(backend):
    """A threshold that depends on the scores: hinge around the positive's score, its gradient flowing back too."""
    z, at = torch.randn(5, 9, requires_grad=True), torch.tensor([0, 1, 5, 8, 3])
    hit = logits_scores(z).reduce(Score(at))
    value = logits_scores(z).reduce(SumOf("squared_hinge", row=hit - 1, where=Rest(at)))
    found = torch.autograd.grad(value.sum(), z)[0]
    a = z.detach().double().requires_grad_()
    margin = (a - a.gather(1, at[:, None]) + 1).clamp(min=0) ** 2
    dense = margin.sum() - 5  # the target's own margin is 1
    truth = torch.autograd.grad(dense, a)[0]
    close(value.sum().double(), dense, 1e-5)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_carried_tensors_that_want_gradients_get_them(backend):
    """Learnable class weights or target probabilities: the dense formula steps in."""
    z, y = torch.randn(3, 5, requires_grad=True), torch.rand(3, 5, requires_grad=True)
    value = logits_scores(z).reduce(Sum(y))
    dz, dy = torch.autograd.grad(value.sum(), [z, y])
    close(dz, y.detach(), 1e-6)
    close(dy, z.detach(), 1e-6)


def test_rows_that_do_not_count_get_zero(backend):
    z, keep = torch.randn(6, 11, requires_grad=True), torch.tensor([True, False, True, False, False, True])
    names = list(TABLE)
    values = logits_scores(z).keeping(keep).reduce(*[case(n, classes=11)[0] for n in names])
    whole = logits_scores(z).reduce(*[case(n, classes=11)[0] for n in names])
    for name, value, other in zip(names, values, whole):
        for v, o in zip(value, other) if isinstance(value, tuple) else [(value, other)]:
            if name not in ("max", "min", "top-4") or v.is_floating_point():
                assert (v[~keep] == 0).all(), name
            close(v[keep], o[keep], 1e-6)
    flat(values).backward()
    assert (z.grad[~keep] == 0).all() and (z.grad[keep] != 0).any(1).all()


@pytest.mark.parametrize("shape", [(0, 7), (4, 1), (0, 1)])
@pytest.mark.parametrize("name", [n for n in TABLE if not n.startswith("score-")])
def test_no_rows_and_one_class(backend, name, shape):
    statistic, dense = case(name, rows=shape[0], classes=shape[1])
    z = torch.randn(shape, requires_grad=True)
    value = logits_scores(z).reduce(statistic)
    first = value[0] if isinstance(value, tuple) else value
    assert first.shape[0] == shape[0]
    if name != "moments":
        truth = dense(z.double())
        close(first.reshape(truth.shape).double(), truth, 1e-5)
    if first.requires_grad:
        flat(value).backward()
        assert z.grad.shape == z.shape and z.grad.isfinite().all()


def test_derivatives_of_the_derivatives(backend):
    """create_graph=True differentiates the dense formula: right at every order."""
    names = [n for n in SMOOTH if n not in ("max", "min", "top-4")]
    z = some_scores(False, 3, 7)
    assert torch.autograd.gradgradcheck(
        lambda z: flat(logits_scores(z).reduce(*[case(n, rows=3, classes=7)[0] for n in names])), z.requires_grad_()
    )


@pytest.mark.parametrize("name", ["logsumexp", "expectation-scores", "moments", "sum-of-focal", "squares"])
def test_second_derivatives_survive_masked_classes(name):
    statistic, dense = case(name, where=True, rows=3, classes=4)
    z = torch.randn(3, 4, dtype=torch.float64)
    z[0] = -INF
    z[0, context(3, 4).target[0]] = 1.0  # nothing but the target, which is left out
    z[1, (context(3, 4).target[1] + 1) % 4] = -INF
    z.requires_grad_()
    value = logits_scores(z).reduce(statistic)
    value = value[2] if name == "moments" else value
    (first,) = torch.autograd.grad(value[1:].sin().sum(), z, create_graph=True)
    (second,) = torch.autograd.grad((first * first.detach().cos()).sum(), z)
    assert first.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize("factor", [1.0, -2.0, 40.0])
def test_thresholds_are_for_the_score_itself(backend, factor):
    """Not for factor · score."""
    x, w = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (ROWS, CLASSES))
    low, high = torch.full((ROWS,), -0.4), torch.full((ROWS,), 0.6)
    got = linear_scores(x, w, memory_budget=500).reduce(LogSumExp(factor, Where(above=low, below=high)))
    z = x @ w.t()
    truth = torch.where((z > low[:, None]) & (z < high[:, None]), factor * z, -INF).logsumexp(1)
    torch.testing.assert_close(got, truth)
    ours, theirs = (torch.autograd.grad(v.sum(), (x, w)) for v in (got, truth))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("of", [SumOf("focal", parameter=2.0), LogSumExpOf("log_tanh", factor=0.7, weight=3.0)])
def test_second_derivatives_through_a_row_parameter(of):
    z, shift = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    at = torch.tensor([1, 0, 5])

    def loss(z, shift):
        hit = logits_scores(z).at(at) + shift
        return logits_scores(z).reduce(replace(of, row=hit, where=Rest(at))) * hit.sin()

    assert torch.autograd.gradgradcheck(loss, (z.requires_grad_(), shift.requires_grad_()))
