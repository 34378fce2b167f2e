"""The factored layer's steps against dense autograd and SGD over the whole score matrix, for hundreds of steps.

Dense are the references of the losses' own files, which know nothing of statistics. Errors are relative, in Frobenius
norm: of ∂L/∂H the worst at some steps on the way, of W at the end. In float64 both have to stay below EXACT; in the
default precision (P and products over examples float32) at most HONEST times as wrong as dense autograd and SGD in
float32.

FUSEDLOSS_LONG=1 adds what takes minutes: all losses at n = 50,000, and 20,000 steps.
"""

import functools
import inspect
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import error

from fusedloss import nn
from fusedloss.spherical import native_products, native_steps, steps
from fusedloss.spherical.factors import Factors, rebalance
from fusedloss.spherical.family import MEMBERS, member

F64, F32 = torch.float64, torch.float32
REFERENCES = {module.__name__.rpartition(".")[2]: module.reference for module in MEMBERS}
MARKS = (1, 10, 50, 100, 200)
EXACT, HONEST = 1e-12, 3.0
LIMIT = 1.5  # of U's condition; at 2 spherical softmax is 1.4e-5 off after 20,000 steps, for the same one pass
LOSSES = {
    "z": nn.SphericalZLoss(b=5.0),
    "taylor": nn.TaylorSoftmaxLoss(),
    "spherical": nn.SphericalSoftmaxLoss(),
    "squared": nn.SquaredErrorLoss(mean_over_classes=False),
}
ENGINES = {"steps": steps, "native": native_steps}

pytestmark = pytest.mark.host
long = pytest.mark.skipif(not os.environ.get("FUSEDLOSS_LONG"), reason="takes minutes: FUSEDLOSS_LONG=1")


@pytest.fixture(params=ENGINES)
def engine(request):
    """Each live engine's module in turn."""
    module = ENGINES[request.param]
    missing = native_products.why_not()
    if module is native_steps and missing is not None:
        pytest.skip(f"engine {request.param!r} is not live here: {missing}")
    return module


@pytest.fixture(autouse=True)
def one_thread():
    """Products are so small that two threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(eq=False)
class Course:
    """A start and what is trained on: batches of features (m, d) and targets (m, K), made again at every reading."""

    n: int
    d: int
    m: int
    k: int = 1
    steps: int = 200
    bias: bool = False
    decay: float = 0.0
    size: float = 1.0  # of the features

    def __post_init__(self):
        self.source = torch.Generator().manual_seed(1)
        # Numbers that float32 holds, so that it does not start with another W and other features.
        self.start = (self.draw(self.n, self.d) * self.d**-0.5).to(F32).to(F64)
        self.classes = self.draw(self.n, self.d)
        self.chance = 1 / torch.arange(1, self.n + 1, dtype=F64)
        self.state = self.source.get_state()

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.source, dtype=F64)

    def __iter__(self):
        self.source.set_state(self.state)
        for _ in range(self.steps):
            chance = self.chance.expand(self.m, -1) if self.k > 1 else self.chance
            target = torch.multinomial(
                chance, self.k if self.k > 1 else self.m, replacement=self.k == 1, generator=self.source
            )
            target = target.reshape(self.m, self.k)
            h = (self.size * (self.classes[target].mean(1) + self.draw(self.m, self.d))).to(F32).to(F64)
            if self.bias:
                h[:, -1] = 1
            yield h, target


def scores_loss(scores, target, loss, share=None):
    """(m,) losses of scores (m, n), densely; several targets' losses are added, the others' squares once."""
    options, share = dict(loss.options), torch.ones_like(target, dtype=scores.dtype) if share is None else share
    if loss.name != "squared_error_loss" or target.shape[1] == 1:
        columns = zip(target.unbind(1), share.unbind(1))
        return sum(weight * REFERENCES[loss.name](scores, column, **options) for column, weight in columns)
    at, value, k = scores.gather(1, target), options["value"], options["k"]
    others = share.sum(1) / (share > 0).sum(1).clamp(min=1)
    total = others * scores.square().sum(1) + (share * (k * (at - value).square() - at.square())).sum(1)
    return total / scores.shape[1] if options["mean_over_classes"] else total


@functools.cache
def dense(course, loss, lr, dtype, marks=MARKS):
    """∂L/∂H at the marks, and W after all steps, by autograd and SGD."""
    w, slopes = course.start.to(dtype).clone().requires_grad_(), {}
    for number, (h, target) in enumerate(course, 1):
        h = h.to(dtype).clone().requires_grad_()
        dh, dw = torch.autograd.grad(scores_loss(h @ w.t(), target, loss).mean(), (h, w))
        with torch.no_grad():
            w.mul_(1 - lr * course.decay).sub_(dw, alpha=lr)
        if number in marks:
            slopes[number] = dh
    return slopes, w.detach()


@functools.cache
def by_hand(course, loss, lr, dtype, marks=MARKS):
    """`dense` with the score gradient written out (it is checked against autograd below): three products a step."""
    w, slopes, n, m = course.start.to(dtype).clone(), {}, course.n, course.m
    scores = torch.zeros(m, n, dtype=dtype)
    for number, (h, target) in enumerate(course, 1):
        h = h.to(dtype)
        torch.mm(h, w.t(), out=scores)
        mean = scores.mean(1, keepdim=True)
        hit = scores.gather(1, target) - mean
        scores.sub_(mean)
        found = loss.centred(hit, mean[:, 0], scores.square().sum(1), n, torch.ones_like(hit))
        alpha, t, gamma = (x / m for x in (found.alpha, found.t, found.gamma))
        scores.mul_(2 * gamma[:, None]).add_(((t - alpha.sum(1)) / n)[:, None]).scatter_add_(1, target, alpha)
        if number in marks:
            slopes[number] = scores @ w
        w.addmm_(scores.t(), h, alpha=-lr, beta=1 - lr * course.decay)
    return slopes, w


def advance(engine, f, batch, lr, decay=0.0):
    """A step of any engine, U's condition looked after."""
    if "limit" in inspect.signature(engine.step).parameters:
        return engine.step(f, batch, lr, decay, LIMIT)
    engine.step(f, batch, lr, decay)
    if f.condition() > LIMIT:
        rebalance(f)


def factored(engine, course, loss, lr, dtype, marks=MARKS, advance=advance):
    f, slopes = Factors.of(course.start.to(dtype).clone()), {}
    share, upstream = torch.ones(course.m, course.k, dtype=F64), torch.full((course.m,), 1 / course.m, dtype=F64)
    for number, (h, target) in enumerate(course, 1):
        dh, batch = engine.backward(f, engine.visit(f, h.to(dtype), target, share, loss), upstream)
        advance(engine, f, batch, lr, course.decay)
        if number in marks:
            slopes[number] = dh
    return slopes, f.rows(torch.arange(course.n))


def errors(found, truth):
    """Of ∂L/∂H, the worst of all marks, and of W."""
    slopes, w = found
    return max(error(slopes[mark], truth[0][mark]) for mark in truth[0]), error(w, truth[1])


@functools.cache
def course_of(size=1.0, **sizes):
    """The same one for every engine, whose dense part is then computed once."""
    return Course(size=size, **sizes)


def compare(engine, course, loss, lr, dense=dense):
    """Assert both bounds; every figure is in the message of what fails, and printed."""
    truth = dense(course, loss, lr, F64)
    moved = error(course.start, truth[1])
    exact = errors(factored(engine, course, loss, lr, F64), truth)
    ours = errors(factored(engine, course, loss, lr, F32), truth)
    honest = errors(dense(course, loss, lr, F32), truth)
    told = " ".join(
        f"{what} ({e[0]:.1e}, {e[1]:.1e})" for what, e in (("f64", exact), ("f32", ours), ("dense f32", honest))
    )
    print(f"\n{loss.name} {course}: W moved by {moved:.2f}; dH, W: {told}")
    assert moved > 0.02 and max(exact) <= EXACT, told
    assert all(our <= HONEST * their for our, their in zip(ours, honest)), told


# Learning rates and sizes of features at which W moves by a good part of itself (under squared error to a tenth), but
# the training is not chaotic: there dense float32 and float64 part as well. Spherical softmax decides: the slope of its
# α = −2 o / (o² + ε) goes from −2 / ε to 1 / (4 ε), so that a class oscillates where lr ‖h‖² / (4 ε m) > 2, and each
# time that its score passes 0, errors grow a hundredfold. (With features of size 1 and lr 0.3, targets in threes,
# float64 errs by 1e-7 after 200 steps, and float32, dense or not, by as much as there is.)
RATES = {"z": 10.0, "taylor": 1.0, "spherical": 0.1, "squared": 0.005}
SIZES = {"z": 1.0, "taylor": 1.0, "spherical": 0.25, "squared": 1.0}
COURSES = {
    "few": {"n": 5000, "d": 64, "m": 32},
    "many": {"n": 3000, "d": 32, "m": 48, "bias": True, "decay": 1e-3},
    "several": {"n": 1000, "d": 32, "m": 24, "k": 3, "bias": True, "decay": 1e-3},
    "many of several": {"n": 1000, "d": 16, "m": 24, "k": 2},
}


@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("name", LOSSES)
def test_hundreds_of_steps(engine, name, course):
    compare(engine, course_of(SIZES[name], **COURSES[course]), member("test", LOSSES[name]), RATES[name])


def test_written_out_is_autograd():
    for name, loss in LOSSES.items():
        course = Course(n=300, d=16, m=8, k=2, steps=10, decay=1e-2, size=SIZES[name])
        by_autograd, written = (way(course, member("test", loss), RATES[name], F64, (10,)) for way in (dense, by_hand))
        assert max(errors(written, by_autograd)) < 1e-13, name


@pytest.mark.parametrize("name, count", [("taylor", 20), *(pytest.param(name, 200, marks=long) for name in LOSSES)])
def test_many_classes(engine, name, count):
    course = course_of(SIZES[name], n=50_000, d=128, m=64, steps=count)
    compare(engine, course, member("test", LOSSES[name]), RATES[name], by_hand)


def test_squared_error_at_a_hot_learning_rate(engine):
    """U's condition reaches 10⁹ within 50 steps: who looks after it every 50 comes too late."""
    course, loss = course_of(0.5, n=1000, d=32, m=16, bias=True), member("test", LOSSES["squared"])
    truth = dense(course, loss, 0.1, F64)
    counted = iter(range(1, course.steps + 1))

    def at_fixed_times(engine, f, batch, lr, decay):
        engine.step(f, batch, lr, decay)
        if next(counted) % 50 == 0 and f.u.isfinite().all():
            rebalance(f)

    assert not max(errors(factored(engine, course, loss, 0.1, F32, advance=at_fixed_times), truth)) < 0.1
    assert max(errors(factored(engine, course, loss, 0.1, F32), truth)) < 3e-5
    assert max(errors(factored(engine, course, loss, 0.1, F64), truth)) < 1e-10


@long
@pytest.mark.parametrize("name", ["z", "taylor", "spherical"])
def test_twenty_thousand_steps(engine, name):
    course, marks = course_of(SIZES[name], n=3000, d=64, m=32, steps=20_000), (1000, 10_000, 20_000)
    loss = member("test", LOSSES[name])
    truth = by_hand(course, loss, RATES[name], F64, marks)
    found = {dtype: errors(factored(engine, course, loss, RATES[name], dtype, marks), truth) for dtype in (F32, F64)}
    print(f"\n{name}: {found}, dense float32 {errors(by_hand(course, loss, RATES[name], F32, marks), truth)}")
    assert found[F32][0] <= 1e-5


@st.composite
def histories(draw):
    """A loss, and steps: (seed, rows of each of its batches, lr, decay, whether to rebalance before, and after)."""
    name = draw(st.sampled_from(sorted(LOSSES)))
    rate = st.floats(1e-3, 0.1)
    batches = st.lists(st.integers(1, 12), min_size=1, max_size=3)
    step = st.tuples(st.integers(0, 999), batches, rate, st.sampled_from((0.0, 0.1)), st.booleans(), st.booleans())
    return name, draw(st.integers(2, 9)), draw(st.integers(1, 3)), draw(st.lists(step, min_size=1, max_size=6))


@given(history=histories())
def test_any_history_is_that_of_dense_sgd(engine, history):
    """Accumulation over batches at one W, missing targets, weights of targets and rows, rebalancing at any time."""
    name, d, k, taken = history
    n, loss = 40, member("test", LOSSES[name])
    w = torch.randn(n, d, generator=torch.Generator().manual_seed(d), dtype=F64)
    f, w = Factors.of(w.clone()), w.requires_grad_()
    for seed, batches, lr, decay, before, after in taken:
        source, queue, total = torch.Generator().manual_seed(seed), [], 0.0
        if before:
            rebalance(f)
        for m in batches:
            h = torch.randn(m, d, generator=source, dtype=F64) / d**0.5
            target = torch.rand(m, n, generator=source).topk(k).indices
            share = torch.rand(m, k, generator=source, dtype=F64) + 0.5
            share *= torch.rand(m, k, generator=source) > 0.2
            upstream = torch.rand(m, generator=source, dtype=F64)
            visit = engine.visit(f, h, target, share, loss)
            dh, batch = engine.backward(f, visit, upstream)
            queue.append(batch)
            h = h.clone().requires_grad_()
            losses = scores_loss(h @ w.t(), target, loss, share)
            total = total + (losses * upstream).sum()
            assert error(visit.losses, losses) < 1e-12
            assert error(dh, torch.autograd.grad(losses, h, upstream, retain_graph=True)[0]) < 1e-9
        slope = torch.autograd.grad(total, w)[0]
        batch = steps.Batch.join(queue)
        assert error(steps.squared_norm(f, batch), slope.square().sum()) < 1e-9
        advance(engine, f, batch, lr, decay)
        if after:
            rebalance(f)
        with torch.no_grad():
            w.mul_(1 - lr * decay).sub_(slope, alpha=lr)
        assert error(f.rows(torch.arange(n)), w) < 1e-9
