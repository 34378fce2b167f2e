"""However the scores are walked, the result is the same; and the walk stays within the memory that its plan states."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BY_NAME
from hypothesis import given
from hypothesis import strategies as st
from tolerance import check_linear_gradients

from fusedloss import cross_entropy, linear_cross_entropy, linear_scores, squentropy
from fusedloss.backends import cpu
from fusedloss.losses.squentropy import reference as squentropy_reference
from fusedloss.plan import Walk, plan, spans

N, D, V = 50, 12, 700
MIB = 1 << 20
CPU = torch.device("cpu")
ROW = V * 4  # bytes of one row of an fp32 tile


def problem(dtype=torch.float32, n=N, d=D, v=V):
    return (
        torch.randn(n, d).to(dtype).requires_grad_(),
        torch.randn(v, d).to(dtype).requires_grad_(),
        torch.randint(0, v, (n,)),
    )


def run(call, x, w):
    loss = call(x, w)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), [x, w])]


def agree(a, b, tolerance):
    for got, other in zip(a, b):
        assert (got.double() - other.double()).norm() <= tolerance * other.double().norm() + 1e-12


# --- one result ------------------------------------------------------------------------------------------------------

WALKS = [
    {"schedule": "eager"},
    {"schedule": "eager", "memory_budget": ROW},
    {"schedule": "eager", "memory_budget": 7 * ROW},
    {"schedule": "eager", "memory_budget": 1},
    {"schedule": "recompute"},
    {"schedule": "recompute", "memory_budget": 1 << 16},
    {"schedule": "recompute", "memory_budget": 1},
    {"schedule": "auto", "memory_budget": 1 << 12},
]


@pytest.mark.parametrize("walk", WALKS, ids=lambda w: "-".join(map(str, w.values())))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_walk_gives_the_same_numbers(backend, walk, dtype):
    x, w, target = problem(dtype)
    target[::9] = -100
    bias = torch.randn(V).to(dtype)
    options = dict(linear_bias=bias, label_smoothing=0.1, z_loss=1e-2)
    found = run(lambda x, w: linear_cross_entropy(x, w, target, **options, **walk), x, w)

    def dense(x, w):
        s = F.linear(x, w, bias.to(x.dtype))
        keep = target >= 0
        smooth = F.cross_entropy(s, target, label_smoothing=0.1)
        return smooth + 1e-2 * s.logsumexp(1)[keep].square().mean()

    truth = run(dense, x.detach().double().requires_grad_(), w.detach().double().requires_grad_())
    agree(
        found, truth, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    )


@pytest.mark.parametrize("walk", WALKS, ids=lambda w: "-".join(map(str, w.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_walk_of_a_loss_that_needs_the_scores_themselves(backend, walk, dtype):
    """Squentropy cannot do with kept exponentials."""
    x, w, target = problem(dtype)
    found = run(lambda x, w: squentropy(linear_scores(x, w, **walk), target), x, w)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    agree(
        found,
        run(lambda x, w: squentropy_reference(x @ w.t(), target).mean(), *exact),
        1e-5 if dtype == torch.float32 else 2**-8,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_many_chunks_round_no_more_than_one(backend, dtype, rows):
    """dW is not rounded per chunk."""
    x, w, target = problem(dtype, 100)
    loss = linear_cross_entropy(
        x, w, target, schedule="eager", memory_budget=rows * ROW // (2 if dtype != torch.float32 else 1)
    )
    loss.backward()
    check_linear_gradients(x.grad, w.grad, lambda s: F.cross_entropy(s, target), x, w, target)


@given(
    n=st.integers(0, 40),
    d=st.integers(0, 9),
    v=st.integers(1, 150),
    budget=st.integers(1, 40_000),
    schedule=st.sampled_from(["auto", "eager", "recompute"]),
    ignored=st.floats(0, 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    filtering=st.sampled_from([0.0, 1e-12]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_budget(backend, n, d, v, budget, schedule, ignored, dtype, filtering, seed):
    torch.manual_seed(seed)
    x, w, target = problem(dtype, n, d, v)
    target[torch.rand(n) < ignored] = -100
    walk = dict(memory_budget=budget, schedule=schedule, gradient_filter=filtering)
    loss, dx, dw = run(lambda x, w: linear_cross_entropy(x, w, target, reduction="sum", **walk), x, w)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    truth, ex, ew = run(lambda x, w: F.cross_entropy(x @ w.t(), target, reduction="sum"), *exact)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(
        loss.double(), truth, rtol=min(tolerance, 2e-5), atol=2e-5 if dtype != torch.float64 else 1e-10
    )
    for got, expected in ((dx, ex), (dw, ew)):
        size = expected.abs().max().item() if expected.numel() else 0
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * max(size, 1.0))
    assert (dx[target < 0] == 0).all()


# --- rows that do not count ------------------------------------------------------------------------------------------

IGNORED = {
    "none": lambda: torch.zeros(N, dtype=torch.bool),
    "all": lambda: torch.ones(N, dtype=torch.bool),
    "all but the last": lambda: torch.arange(N) < N - 1,
    "random": lambda: torch.rand(N) < 0.6,
    "the first chunk": lambda: torch.arange(N) < 20,
    "the last chunk": lambda: torch.arange(N) >= 30,
    "every other": lambda: torch.arange(N) % 2 == 0,
}


@pytest.mark.parametrize("which", IGNORED)
@pytest.mark.parametrize("schedule", ["eager", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows(backend, which, schedule, dtype, reduction):
    x, w, target = problem(dtype)
    ignored = IGNORED[which]()
    with torch.no_grad():
        x[ignored] = torch.nan  # padding may hold anything
    target[ignored] = -100
    bias, row_weight = torch.randn(V).to(dtype).requires_grad_(), torch.rand(N).requires_grad_()
    options = dict(
        linear_bias=bias, row_weight=row_weight, reduction=reduction, schedule=schedule, memory_budget=10 * ROW
    )
    loss = linear_cross_entropy(x, w, target, **options)
    found = torch.autograd.grad(loss.sum(), [x, w, bias, row_weight])
    assert all(g.isfinite().all() for g in found) and loss.isfinite().all()
    assert (found[0][ignored] == 0).all() and (reduction == "mean" or (loss[ignored] == 0).all())
    if which == "all":
        assert (loss == 0).all() and all((g == 0).all() for g in found)
        return
    keep = ~ignored
    alone = [t.detach().requires_grad_() for t in (x[keep], w, bias, row_weight[keep])]
    options.update(linear_bias=alone[2], row_weight=alone[3])
    other = linear_cross_entropy(alone[0], alone[1], target[keep], **options)
    expected = torch.autograd.grad(other.sum(), alone)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    agree([loss.sum(), found[0][keep], found[1], found[2], found[3][keep]], [other.sum(), *expected], tolerance)


# --- the plan --------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(0, 10**6),
    width=st.integers(1, 10**4),
    columns=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    budget=st.integers(1, 2**32),
    schedule=st.sampled_from(["auto", "eager", "recompute"]),
)
def test_plans_are_possible_and_keep_to_the_budget(rows, width, columns, dtype, budget, schedule):
    layout = plan(rows, width, columns, dtype, Walk(memory_budget=budget, schedule=schedule), cpu.limits(CPU))
    assert schedule in ("auto", layout.schedule)
    assert layout.block_columns >= 1 and layout.chunk_rows >= (rows > 0)
    assert layout.chunks == -(-rows // max(1, layout.chunk_rows)) if rows else layout.chunks == 0
    chunks = list(spans(rows, layout.chunk_rows)) if rows < 10**4 else []
    if chunks:
        assert len(chunks) == layout.chunks and chunks[0].start == 0 and chunks[-1].stop == rows
    least = (
        64 * 8 * max(1, layout.chunk_rows) if layout.schedule == "recompute" else columns * 8
    )  # one row, one cache line
    instead = columns * width * 4 if dtype == torch.bfloat16 and layout.chunks == 1 else 0  # of an accumulator
    assert layout.tile_bytes <= max(budget + instead, least)
    if schedule == "auto" and layout.schedule == "eager":
        assert layout.tile_bytes <= budget + instead


def test_scores_tell_their_plan():
    x, w, _ = problem()
    scores = linear_scores(x, w, memory_budget=10 * ROW, schedule="eager")
    layout = scores.plan()
    assert (layout.schedule, layout.chunk_rows, layout.chunks) == ("eager", 10, 5)
    assert layout.tile_bytes == 10 * ROW and layout.accumulator_bytes == 0
    half = linear_scores(x.bfloat16(), w.bfloat16(), memory_budget=10 * ROW, schedule="eager").plan()
    assert half.accumulator_bytes == V * D * 4
    assert linear_scores(x, w, memory_budget=10 * ROW).plan().schedule == "recompute"
    assert linear_scores(x, w).plan().schedule == "eager"


def peak_memory(call):
    """Most bytes of tensors alive at once during the call, beyond those alive before it, and its result."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = call()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["eager", "recompute"])
@pytest.mark.parametrize("budget", [1, 4, 16])
@pytest.mark.host
def test_memory_stays_within_the_plan(backend, dtype, schedule, budget):
    n, d, v = 1024, 32, 6000
    x, w, target = problem(dtype, n, d, v)
    walk = dict(memory_budget=budget * MIB, schedule=schedule)
    linear_cross_entropy(x[:9], w, target[:9], **walk)  # traced and loaded before it is measured
    layout = linear_scores(x, w, **walk).plan()
    stated = layout.tile_bytes + layout.block_bytes + layout.accumulator_bytes
    gradients = x.nbytes + w.nbytes

    def step():
        loss = linear_cross_entropy(x, w, target, **walk)
        return torch.autograd.grad(loss, [x, w])

    peak, _ = peak_memory(step)
    block = layout.chunk_rows * layout.block_columns * 4
    room = (
        MIB if backend == "cpu" else MIB + 12 * block + 2 * gradients
    )  # plain PyTorch writes every step of a block out
    per_row, wide_input, part = 200 * n, n * d * 4, layout.block_columns * d * 4
    assert peak <= stated + gradients + per_row + wide_input + part + room
    if budget * MIB < n * v * 4 // 2 and backend == "cpu":
        assert peak < n * v * 4  # the scores themselves


@pytest.mark.host
def test_backward_makes_no_second_weight_gradient(backend):
    """The gradients wait in forward's buffers; backward hands them over."""
    x, w, target = problem(torch.float32, 64, 64, 8000)
    for upstream in (1.0, 3.0):
        loss = upstream * linear_cross_entropy(x, w, target)
        peak, grads = peak_memory(lambda loss=loss: torch.autograd.grad(loss, [x, w]))
        assert peak < w.nbytes // 4
        del grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.host
def test_given_logits_cost_one_gradient(backend, dtype):
    if backend != "cpu":
        pytest.skip("the torch backend writes every step of a chunk out")
    z, target = torch.randn(1024, 4000).to(dtype).requires_grad_(), torch.randint(0, 4000, (1024,))
    cross_entropy(z[:9], target[:9])
    peak, _ = peak_memory(lambda: torch.autograd.grad(cross_entropy(z, target), z))
    assert peak <= 1.1 * z.nbytes + MIB


# --- gradient filter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bound", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("rows", [5, 40])
def test_filtered_gradients_keep_their_bound(backend, bound, reduction, rows):
    """|error of ∂L/∂s| <= bound × largest row factor; with W = 1 the gradient of x is that of s."""
    n, v = 40, 600
    s = (4 * torch.randn(n, v)).requires_grad_()
    target = torch.randint(0, v // 3, (n,))
    row_weight = torch.rand(n) + 0.1
    factors = row_weight / (row_weight.sum() if reduction == "mean" else 1)
    walk = dict(schedule="eager", memory_budget=rows * v * 4)
    options = dict(row_weight=row_weight, reduction=reduction)
    w = torch.eye(v)
    grads = []
    for given_bound in (0.0, bound):
        loss = linear_cross_entropy(s, w, target, gradient_filter=given_bound, **options, **walk)
        grads.append(torch.autograd.grad(loss, s)[0])
    apart = (grads[1] - grads[0]).abs().max().item()
    assert apart <= bound * factors.max().item() * (1 + 1e-5)
    if bound == 1e-2:
        assert apart > 0  # something was left out
    hit = grads[0].gather(1, target[:, None])
    kept = grads[1].gather(1, target[:, None])
    large = hit.abs() > bound * factors.max()
    torch.testing.assert_close(hit[large], kept[large], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_filtered_gradients_of_the_weight(backend, dtype):
    n, d, v = 200, 16, 3000
    x, w, _ = problem(dtype, n, d, v)
    target = torch.randint(0, 50, (n,))
    bias = torch.full((v,), -12.0).to(dtype)
    bias[:50] = 0
    walk = dict(schedule="eager", memory_budget=v * 4 * 30, linear_bias=bias)
    with_all = run(lambda x, w: linear_cross_entropy(0.1 * x, w, target, **walk), x, w)
    filtered = run(lambda x, w: linear_cross_entropy(0.1 * x, w, target, gradient_filter=1e-4, **walk), x, w)
    assert torch.equal(with_all[0], filtered[0])
    assert (filtered[2][50:] == 0).any() and not (with_all[2][50:] == 0).all()
    agree(filtered[1:], with_all[1:], 2e-3 if dtype == torch.float32 else 2**-6)


def test_filtering_saves_gemms(backend):
    n, d, v = 64, 16, 4096
    x, w, _ = problem(torch.float32, n, d, v)
    bias = torch.full((v,), -30.0)
    bias[:40] = 0
    target = torch.randint(0, 40, (n,))
    work, engine = [], BY_NAME[backend]
    plain = engine.gemm
    try:
        engine.gemm = lambda out, a, b, accumulate: (
            work.append(out.numel() * a.shape[1]) or plain(out, a, b, accumulate)
        )
        linear_cross_entropy(0.1 * x, w, target, linear_bias=bias, gradient_filter=1e-6, schedule="eager")
    finally:
        engine.gemm = plain
    assert sum(work) / (n * d * v) < 1.1  # the scores, and hardly anything else


# --- kept exponentials: the gradient is a factor per row times them ---------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rise", [0.0, 10.0, 30.0, 200.0])
def test_scores_that_rise_from_block_to_block(backend, dtype, rise):
    """The blocks of a row share a shift until a later one's scores are far above it."""
    n, d, v = 12, 64, 5000
    x, w, target = problem(dtype, n, d, v)
    with torch.no_grad():
        w[:, 0] = torch.linspace(0, rise, v).to(dtype)
        x[:, 0] = 1
        x[: n // 2, 0] = 0  # these rows do not rise
    _, dx, dw = run(lambda x, w: linear_cross_entropy(x, w, target, schedule="eager"), x, w)
    check_linear_gradients(dx, dw, lambda s: F.cross_entropy(s, target), x, w, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_weight_zero_leave_no_trace(backend, dtype):
    n, d, v = 12, 64, 3000
    x, w, target = problem(dtype, n, d, v)
    row_weight = torch.ones(n)
    row_weight[3] = 0
    with torch.no_grad():
        x[3] = 1e30 if dtype == torch.float32 else 1e20  # scores beyond all bounds
    options = dict(row_weight=row_weight, schedule="eager", reduction="sum")
    _, dx, dw = run(lambda x, w: linear_cross_entropy(x, w, target, **options), x, w)
    rest = torch.arange(n) != 3
    less = [t.detach().requires_grad_() for t in (x[rest], w)]
    _, ex, ew = run(lambda x, w: linear_cross_entropy(x, w, target[rest], schedule="eager", reduction="sum"), *less)
    assert (dx[3] == 0).all()
    agree([dx[rest], dw], [ex, ew], 1e-6 if dtype == torch.float32 else 2**-8)


def test_a_target_of_score_minus_infinity_gets_no_gradient(backend):
    x, w, target = problem(torch.float32, 6, 64, 500)
    bias = torch.zeros(500)
    bias[target[2]] = -torch.inf
    w.requires_grad_(False)
    loss = linear_cross_entropy(x, w, target, linear_bias=bias, schedule="eager", reduction="sum")
    other = linear_cross_entropy(x, w, target, linear_bias=bias, schedule="recompute", reduction="sum")
    assert loss == other == torch.inf
    found, expected = (torch.autograd.grad(value, x)[0] for value in (loss, other))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
