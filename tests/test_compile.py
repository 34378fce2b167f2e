"""torch.compile: same numbers, no graph break, no warning, few compilations; and the contracts of the operators."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import fusedloss
from fusedloss import cross_entropy, linear_cross_entropy, linear_scores, logits_scores, similarity_scores, trace
from fusedloss.losses.squentropy import reference as squentropy_reference
from fusedloss.statistics import Columns, Expectation, LogSumExp, Max, Score, SumOf
from fusedloss.targets import checked_target

pytestmark = pytest.mark.unpoisoned
N, D, V = 12, 8, 37


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles anew, and a warning is an error."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What the compiler's own modules say as they are imported or run is not ours.
        for module in (r"torch\..*", r"sympy\..*", r"triton\..*"):
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=module)
        yield
    torch._dynamo.reset()


def problem(n=N, dtype=torch.float32):
    x, w = torch.randn(n, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_()
    return x, w, torch.randint(0, V, (n,))


def same(function, *arguments, compiled=None, tolerance=1e-5):
    """The compiled function gives the value and the gradients of the eager one, twice over."""
    compiled = compiled or torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled, compiled):
        copies = [
            a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments
        ]
        value = run(*copies)
        leaves = [c for c in copies if isinstance(c, torch.Tensor) and c.requires_grad]
        results.append([value.detach(), *(torch.autograd.grad(value.sum(), leaves) if leaves else [])])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return results[0]


CALLS = {
    "mean": lambda x, w, t: linear_cross_entropy(x, w, t),
    "sum": lambda x, w, t: linear_cross_entropy(x, w, t, reduction="sum"),
    "none": lambda x, w, t: linear_cross_entropy(x, w, t, reduction="none"),
    "recompute": lambda x, w, t: linear_cross_entropy(x, w, t, schedule="recompute"),
    "options": lambda x, w, t: linear_cross_entropy(
        x, w, t, label_smoothing=0.1, z_loss=1e-2, softcap=5.0, temperature=0.7, ignore_index=3, memory_budget=V * 4 * 5
    ),
    "class weights": lambda x, w, t: linear_cross_entropy(x, w, t, weight=w.detach()[:, 0].abs(), z_loss=0.1),
    "row weights": lambda x, w, t: linear_cross_entropy(x, w, t, row_weight=x.detach()[:, 0].abs()),
    "bias": lambda x, w, t: linear_cross_entropy(x, w, t, linear_bias=w[:, 0]),
    "probabilities": lambda x, w, t: linear_cross_entropy(x, w, F.one_hot(t, V).float(), label_smoothing=0.1),
    "int32 targets": lambda x, w, t: linear_cross_entropy(x, w, t.int()),
    "logits": lambda x, w, t: cross_entropy(x @ w.t(), t, label_smoothing=0.1),
    "logits of three dimensions": lambda x, w, t: cross_entropy((x @ w.t()).T[None], t[None], reduction="none"),
    "batch and time": lambda x, w, t: linear_cross_entropy(x.view(3, -1, D), w, t.view(3, -1)),
    "squentropy": lambda x, w, t: fusedloss.squentropy(linear_scores(x, w), t),
    "scale tensor": lambda x, w, t: cross_entropy(linear_scores(x, w, scale=x[0, 0].exp()), t),
    "many heads": lambda x, w, t: linear_cross_entropy(x, torch.stack([w, -w], 1), torch.stack([t, t], 1)),
    "many statistics": lambda x, w, t: sum(
        linear_scores(x, w).reduce(LogSumExp(), Score(t), Expectation(), SumOf("softplus", row=x[:, 0]), Max())[:4]
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled_calls_are_the_eager_ones(backend, name):
    same(CALLS[name], *problem())


@pytest.mark.parametrize("name", ["mean", "none", "options", "logits"])
def test_inductor(name):
    function = CALLS[name]
    same(function, *problem(), compiled=torch.compile(function, fullgraph=True))


@pytest.mark.parametrize("name", ["mean", "none", "options", "logits", "row weights", "probabilities", "squentropy"])
def test_dynamic_shapes(name):
    function = CALLS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (12, 6, 15):
        same(function, *problem(n), compiled=compiled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["mean", "none"])
def test_other_types(backend, name, dtype):
    tolerance = {torch.float64: 1e-12}.get(dtype, 1e-2)
    loss, dx, dw = same(CALLS[name], *problem(dtype=dtype), tolerance=tolerance)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and dx.dtype == dw.dtype == dtype


@pytest.mark.parametrize("name", ["mean", "none", "options", "logits", "squentropy"])
def test_twelve_batch_sizes_compile_at_most_twice(name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], fullgraph=True, backend=counter)
    for n in [12, 9, 30, 6, 15, 21, 3, 18, 27, 24, 33, 36]:
        x, w, target = problem(n)
        loss = compiled(x, w, target)
        loss.sum().backward()
        torch.testing.assert_close(loss, CALLS[name](x, w, target))
        assert x.grad.shape == x.shape
    assert counter.frame_count <= 2


def grouped(x, y):
    row, column = torch.arange(len(x)) // 2, torch.arange(len(y)) // 2
    return fusedloss.info_nce_loss(fusedloss.similarity_scores(x, y), row_group=row, column_group=column)


PAIRS = {
    "sigmoid": lambda x, y: fusedloss.sigmoid_loss(fusedloss.similarity_scores(x, y, scale=10.0)),
    "info_nce": lambda x, y: fusedloss.info_nce_loss(fusedloss.similarity_scores(x, y)),
    "info_nce of groups": grouped,
    "clip": lambda x, y: fusedloss.clip_loss(fusedloss.similarity_scores(x, y)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_twelve_sizes_of_a_batch_of_pairs_compile_at_most_twice(name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(PAIRS[name], fullgraph=True, backend=counter)
    traced = len(trace.PROGRAMS)
    for n in [12, 9, 30, 6, 15, 21, 3, 18, 27, 24, 33, 36]:
        x, y = (torch.randn(n, 4, requires_grad=True) for _ in range(2))
        found, wanted = compiled(x, y), PAIRS[name](x, y)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found, (x, y)), torch.autograd.grad(wanted, (x, y)))
    assert counter.frame_count <= 2 and len(trace.PROGRAMS) <= traced + 1


@pytest.mark.parametrize("option", ["z_loss", "label_smoothing", "temperature", "softcap"])
@pytest.mark.parametrize("linear", [True, False])
def test_a_changed_number_changes_the_result(option, linear):
    """The compiler may make a float an input of the graph once it has changed."""

    def loss(x, w, t, value):
        options = {option: value}
        return linear_cross_entropy(x, w, t, **options) if linear else cross_entropy(x @ w.t(), t, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    seen = set()
    for value in (0.5, 0.25, 0.125, 0.75, 0.5):
        seen.add(same(loss, *problem_once(), value, compiled=compiled)[0].item())
    assert len(seen) == 4


def problem_once():
    torch.manual_seed(1)
    return problem()


def test_small_steps_of_z_loss():
    def loss(x, w, t, z_loss):
        return linear_cross_entropy(x, w, t, z_loss=z_loss)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for z_loss in (0.0, 1e-4, 2e-4, 3e-4):
        x, w, target = problem_once()
        truth = F.cross_entropy(x @ w.t(), target) + z_loss * (x @ w.t()).logsumexp(1).square().mean()
        torch.testing.assert_close(compiled(x, w, target, z_loss), truth)


def test_a_changed_string_or_integer_changes_the_result():
    def loss(x, w, t, reduction, ignored):
        return linear_cross_entropy(x, w, t, reduction=reduction, ignore_index=ignored)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, w, target = problem_once()
    target[0] = 5
    for reduction in ("mean", "sum", "none"):
        for ignored in (-100, 5, 6, int(target[1])):
            expected = F.cross_entropy(x @ w.t(), target, reduction=reduction, ignore_index=ignored)
            torch.testing.assert_close(compiled(x, w, target, reduction, ignored), expected)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("name", ["mean", "none"])
def test_frozen_inputs(backend, name, frozen):
    arguments = problem()
    for number in frozen:
        arguments[number].requires_grad_(False)
    same(CALLS[name], *arguments)


def test_compiled_without_gradients(backend):
    x, w, target = problem()
    compiled = torch.compile(CALLS["mean"], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, w, target), F.cross_entropy(x @ w.t(), target))
    compiled(x, w, target).backward()
    assert x.grad is not None


def test_compiled_autocast(backend, device):
    def loss(x, w, t):
        with torch.autocast(device.type, torch.bfloat16):
            return linear_cross_entropy(x, w, t)

    same(loss, *problem(), tolerance=1e-3)


def test_compiled_backward_twice():
    x, w, target = problem()
    loss = torch.compile(CALLS["mean"], fullgraph=True, backend="aot_eager")(x, w, target)
    first = torch.autograd.grad(2 * loss, [x, w], retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, [x, w])
    for a, b, k in zip(first, second, kept):
        assert torch.equal(a, k) and torch.equal(b, k)


def test_compiled_row_weight_gradient():
    def loss(x, w, t, r):
        return linear_cross_entropy(x, w, t, row_weight=r)

    same(loss, *problem(), torch.rand(N, requires_grad=True))


def test_a_whole_model_compiled():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = torch.nn.Embedding(V, D), torch.nn.Linear(D, D)

        def forward(self, tokens):
            h = torch.tanh(self.layer(self.table(tokens)))
            return linear_cross_entropy(h, self.table.weight, tokens.roll(-1), z_loss=1e-4)

    model, tokens = Model(), torch.randint(0, V, (3, 5))
    model(tokens).backward()
    eager = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True)(tokens).backward()
    for p, expected in zip(model.parameters(), eager):
        torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.host
@pytest.mark.parametrize("name", ["mean", "none", "logits", "many heads"])
def test_a_target_out_of_range_is_an_error_when_compiled(name):
    x, w, target = problem()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    compiled(x, w, target)
    target[7] = V
    with pytest.raises(IndexError, match=rf"cross_entropy: target\[7(, 0)?\] = {V} is out of range"):
        compiled(x, w, target)


# --- losses of the user ----------------------------------------------------------------------------------------------


@fusedloss.row_loss
def info_margin(scores, target, margin=None, *, power=2.0, pull=0.5):
    """A loss of our own: its name holds an "inf", it has a row tensor, a number and a shared tensor."""
    lse, hit, mean = scores.reduce(LogSumExp(), Score(target), Expectation())
    return (lse - hit + margin).relu() ** power + pull * mean


def dense_margin(x, w, t, margin, power, pull):
    s = x @ w.t()
    lse, hit = s.logsumexp(1), s.gather(1, t[:, None])[:, 0]
    return ((lse - hit + margin).relu() ** power + pull * (s.softmax(1) * s).sum(1)).mean()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_of_the_user(backend, compiled):
    x, w, target = problem_once()
    margin, pull = torch.rand(N), torch.tensor(0.3)

    def ours(x, w, t, margin, power, pull):
        return info_margin(linear_scores(x, w), t, margin, power=power, pull=pull)

    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    for power in (2.0, 3.0, 1.5, 2.5):
        arguments = (x, w, target, margin, power, pull)
        loss, truth = run(*arguments), dense_margin(*arguments)
        torch.testing.assert_close(loss, truth)
        for a, b in zip(torch.autograd.grad(loss, [x, w]), torch.autograd.grad(truth, [x, w])):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@fusedloss.row_loss
def two_passes(scores, target):
    """Its second pass needs a value of the first, so it cannot walk once."""
    hit = scores.reduce(Score(target))
    return scores.reduce(SumOf("hinge", row=hit - 1))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_of_two_passes(backend, compiled):
    def ours(x, w, t):
        return two_passes(linear_scores(x, w), t)

    x, w, target = problem()
    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    s = x @ w.t()
    truth = (s - s.gather(1, target[:, None]) + 1).relu().sum(1).mean()
    loss = run(x, w, target)
    torch.testing.assert_close(loss, truth)
    for a, b in zip(torch.autograd.grad(loss, [x, w]), torch.autograd.grad(truth, [x, w])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_two_losses_of_one_name():
    """A notebook cell that is run again defines its loss anew."""
    first = fusedloss.row_loss(_named(1.0))
    second = fusedloss.row_loss(_named(2.0))
    x, w, target = problem()
    scores = linear_scores(x, w)
    torch.testing.assert_close(2 * first(scores, target), second(scores, target))
    torch.testing.assert_close(first(scores, target), F.cross_entropy(x @ w.t(), target))


def _named(factor):
    def again(scores, target):
        lse, hit = scores.reduce(LogSumExp(), Score(target))
        return factor * (lse - hit)

    return again


def test_squentropy_agrees_with_its_reference_when_compiled():
    x, w, target = problem()
    loss, _, _ = same(CALLS["squentropy"], x, w, target)
    torch.testing.assert_close(loss, squentropy_reference(x.detach() @ w.detach().t(), target).mean())


# --- similarity scores -----------------------------------------------------------------------------------------------


def clip(x, y, t):
    rows, columns, hit = (s := similarity_scores(x, y, scale=t.exp(), bias=t)).reduce(
        LogSumExp(), Columns(LogSumExp()), Score(s.diagonal())
    )
    return (rows - hit).mean() + (columns - hit).mean()


@pytest.mark.parametrize("alone", [False, True])
def test_similarity_scores(alone):
    x, y, t = torch.randn(N, D), torch.randn(N, D), torch.tensor(0.3)
    for leaf in (x, y, t):
        leaf.requires_grad_()
    compiled = torch.compile(clip, fullgraph=True, backend="aot_eager")
    inputs = (x, t) if alone else (x, y, t)
    got, truth = (f(x, None if alone else y, t) for f in (compiled, clip))
    torch.testing.assert_close(got, truth)
    for g, expected in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(truth, inputs)):
        torch.testing.assert_close(g, expected)


# --- the operators' contracts ----------------------------------------------------------------------------------------

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OPTIONAL = {
    "plain": {},
    "half": {"dtype": torch.bfloat16},
    "double": {"dtype": torch.float64},
    "some rows": {"keep": "some"},
    "no rows": {"keep": "none"},
    "empty": {"rows": 0},
    "bias": {"bias": True},
    "everything": {"bias": True, "vectors": True, "scale": True, "keep": "some"},
    "frozen input": {"frozen": (0,)},
    "frozen weight": {"frozen": (1,)},
    "logits": {"logits": True},
    "recompute": {"schedule": "recompute"},
    "columns": {"across": True},
    "columns of logits": {"across": True, "logits": True},
    "symmetric": {"across": True, "symmetric": True, "scale": True},
}


def op_scores(
    dtype=torch.float32, rows=N, keep=None, bias=False, vectors=False, scale=False, frozen=(), logits=False,
    symmetric=False, across=False, **walk,
):  # fmt: skip
    def parameter(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    target = torch.randint(0, V, (rows,))
    if logits:
        scores = logits_scores(parameter(rows, V))
    elif symmetric:
        scores, target = similarity_scores(parameter(rows, D), scale=parameter()), target % rows
    else:
        x, w = (t.requires_grad_(n not in frozen) for n, t in enumerate((parameter(rows, D), parameter(V, D))))
        scores = linear_scores(x, w, bias=parameter(V) if bias else None, scale=parameter() if scale else 1.0, **walk)
    if vectors:
        scores = scores.adjusted(parameter(V), parameter(V))
    kept = {None: None, "some": torch.arange(rows) % 3 != 0, "none": torch.zeros(rows, dtype=torch.bool)}[keep]
    return scores.keeping(kept), target


def leaves_of(scores):
    return [None if s is None else s.detach().requires_grad_(s.requires_grad) for s in scores.streams()]


@pytest.mark.parametrize("name", OPTIONAL)
def test_opcheck_statistics(name):
    scores, target = op_scores(**OPTIONAL[name])
    stats = (LogSumExp(), Score(target), Expectation(), Max())
    if "across" in OPTIONAL[name]:
        stats += (Columns(LogSumExp(factor=0.5)), Columns(Max()))
    text, carried = scores.spec(tuple(s.static() for s in stats)), [target]
    op = torch.ops.fusedloss.statistics.default
    torch.library.opcheck(op, (text, *leaves_of(scores), scores.keep, carried), test_utils=CHECKS)
    plain = [None if s is None else s.detach() for s in scores.streams()]
    values, _, states, below, _, states_below = op(text, *plain, scores.keep, carried)
    needs = [s is not None and s.requires_grad for s in scores.streams()]
    given = states, torch.randn_like(values), states_below, torch.randn_like(below)
    arguments = (text, *plain, scores.keep, carried, *given, needs)
    torch.library.opcheck(torch.ops.fusedloss.statistics_backward.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("name", [n for n in OPTIONAL if "logits" not in OPTIONAL[n] and "across" not in OPTIONAL[n]])
def test_opcheck_eager_gradient(name, monkeypatch):
    """With the arguments that a loss really passes."""
    scores, target = op_scores(**OPTIONAL[name])
    if scores.keep is not None:
        target = torch.where(scores.keep, target, -100)
    caught = []
    op = torch.ops.fusedloss.eager_gradient.default
    plain = fusedloss.autograd.weighted_total

    def spy(text, streams, keep, row_factor, rows, shared):
        needs = [s is not None and s.requires_grad for s in streams]
        caught.append((text, *leaves_of(scores), keep, row_factor.detach().requires_grad_(), rows, shared, needs))
        return plain(text, streams, keep, row_factor, rows, shared)

    monkeypatch.setattr(fusedloss.autograd, "weighted_total", spy)
    cross_entropy(scores, target, torch.rand(V), label_smoothing=0.1)
    torch.library.opcheck(op, caught[0], test_utils=CHECKS)


@pytest.mark.parametrize("target", [torch.randint(0, V, (5,)), torch.randint(0, V, (2, 3)).int(), torch.tensor(3)])
def test_opcheck_checked_target(target, device):
    target = target.to(device)
    torch.library.opcheck(torch.ops.fusedloss.checked_target.default, (target, V, -100, "a_loss"), test_utils=CHECKS)
    safe, keep, _ = checked_target("a_loss", logits_scores(torch.zeros(*target.shape, V)), target, 3)
    assert safe.dtype == torch.int64 and keep.dtype == torch.bool and safe.shape == keep.shape == (target.numel(),)
