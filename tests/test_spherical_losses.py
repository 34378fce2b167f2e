"""The spherical losses: their centred form against autograd on whole rows, and several targets to a row on scores."""

import pickle
import sys

import pytest
import torch
from tolerance import FACTOR, FLOOR, error

import fusedloss as fl

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
ROWS, WIDTH, CLASSES = 18, 7, 31
EXACT = 1e-12
CASES = [
    ("spherical_z_loss", {}),
    ("spherical_z_loss", {"a": 2.5, "b": 1.5}),
    ("taylor_softmax_loss", {}),
    ("spherical_softmax_loss", {"eps": 0.1}),
    ("squared_error_loss", {}),
    ("squared_error_loss", {"value": 3.0, "k": 2.0}),
    ("squared_error_loss", {"value": 2.0, "mean_over_classes": False}),
]
ALL = pytest.mark.parametrize("name, options", CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
FIRST = pytest.mark.parametrize(
    "name, options", [CASES[i] for i in (1, 2, 3, 5)], ids=lambda v: v if type(v) is str else ""
)


def module_of(name):
    return sys.modules[getattr(fl, name).__module__]


def dense(name, options, scores, target, share):
    """(N,) Σ_k share_k L(scores, target_k) by the losses' references; targets of share 0 are not there.

    The squared error is that to a vector with several targets: what all classes have in common, Σ_j s_j², counts once.
    """
    module, each, there = module_of(name), [], share > 0
    for k in range(target.shape[1]):
        loss = module.reference(scores, torch.where(there[:, k], target[:, k], 0), **options)
        each.append(torch.where(there[:, k], loss * share[:, k], 0.0))
    again = 0.0
    if name == "squared_error_loss":
        over = scores.shape[1] if options.get("mean_over_classes", True) else 1
        again = (share.sum(1) - share.sum(1) / there.sum(1).clamp(min=1)) * scores.square().sum(1) / over
    return sum(each) - again


def statistics(scores, target):
    mean = scores.mean(1)
    away = scores - mean[:, None]
    return away.gather(1, target), mean, away.square().sum(1), torch.full_like(mean, scores.shape[1])


def distinct(rows=ROWS, k=3):
    return torch.rand(rows, CLASSES).argsort(1)[:, :k]


def truth_of(name, options, scores, target, ignore=-100, weight=None, row_weight=None, reduction="mean"):
    """The documented meaning of targets (N, K), in plain PyTorch."""
    share = (target != ignore).to(F64)
    safe = torch.where(target == ignore, 0, target)
    if weight is not None:
        share = share * weight[safe]
    losses, there = dense(name, options, scores, safe, share), share > 0
    rows = torch.ones(len(scores), dtype=F64) if row_weight is None else row_weight
    losses = torch.where(there.any(1), losses, 0.0) * rows
    counted = rows * share.sum(1) / there.sum(1).clamp(min=1)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counted.sum()}[reduction]


def compare(got, truth, wanted, bound=EXACT):
    assert got.shape == truth.shape and error(got, truth) <= bound, "loss"
    upstream = torch.rand_like(truth)
    for x, g, t in zip(
        wanted, torch.autograd.grad(got, wanted, upstream), torch.autograd.grad(truth, wanted, upstream)
    ):
        assert error(g, t) <= bound, tuple(x.shape)


# --- the centred form -------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_value_and_derivatives(name, options, k, shift):
    """L = F(a, μ, v); α, t and γ are its partial derivatives; ∂L/∂o = 2γ (o − μ) + Σ α_k (e_k − 1/n) + t/n."""
    scores = (torch.randn(ROWS, CLASSES, dtype=F64) + shift).requires_grad_()
    target, share = distinct(k=k), torch.rand(ROWS, k, dtype=F64)
    share[0, -1] = 0.0
    centred = module_of(name).centred
    given = [x.detach().requires_grad_() for x in statistics(scores, target)]
    loss, alpha, t, gamma = centred(*given, share, **options)
    truth = dense(name, options, scores, target, share)
    assert error(loss, truth) <= EXACT
    for got, partial in zip((alpha, t, gamma), torch.autograd.grad(loss.sum(), given[:3], allow_unused=True)):
        partial = torch.zeros_like(got) if partial is None else partial
        assert (got - partial).norm() <= EXACT * (1 + partial.norm())
    (whole,) = torch.autograd.grad(truth.sum(), scores)
    at = torch.zeros_like(scores).scatter_add(1, target, alpha)
    mean = scores.mean(1, keepdim=True)
    found = 2 * gamma[:, None] * (scores - mean) + at - alpha.sum(1, keepdim=True) / CLASSES + t[:, None] / CLASSES
    assert (found - whole).norm() <= EXACT * (1 + whole.norm()) and error(found, whole) < 1e-10
    assert error(t, whole.sum(1)) < 1e-10 or (t.eq(0).all() and whole.sum(1).abs().max() < EXACT)


def test_the_z_loss_sees_neither_offset_nor_scale():
    scores, target, share = torch.randn(ROWS, CLASSES, dtype=F64), distinct(), torch.ones(ROWS, 3, dtype=F64)
    centred = module_of("spherical_z_loss").centred
    hit, mean, squares, count = statistics(scores, target)
    first = centred(hit, mean, squares, count, share, b=1.0)
    assert first.t.eq(0).all()
    moved = centred(hit, mean + 1e6, squares, count, share, b=1.0)
    assert all(torch.equal(a, b) for a, b in zip(moved, first))
    scaled = centred(3 * hit, mean, 9 * squares, count, share, b=1.0)
    assert error(scaled.loss, first.loss) < EXACT and error(scaled.alpha * 3, first.alpha) < EXACT
    near, target = (scores * 8).round() / 8, target[:, 0]
    loss = fl.spherical_z_loss(near, target, b=1.0, reduction="none")
    for shift in (4096.0, -4096.0):
        assert error(fl.spherical_z_loss(near + shift, target, b=1.0, reduction="none"), loss) < 1e-10
        assert error(fl.spherical_z_loss((near + shift).float(), target, b=1.0, reduction="none"), loss) < 1e-5


def test_rows_without_variance():
    """The Z-loss takes ζ = 0 and pushes nothing; all others have their ordinary gradient."""
    scores, target, share = torch.full((2, CLASSES), 1.5, dtype=F64), distinct(2, 2), torch.ones(2, 2, dtype=F64)
    given = statistics(scores, target)
    loss, *slopes = module_of("spherical_z_loss").centred(*given, share, a=2.0, b=0.5)
    assert error(loss, 2 * torch.nn.functional.softplus(torch.tensor([1.0, 1.0], dtype=F64)) / 2) < EXACT
    assert all(s.eq(0).all() for s in slopes)
    for name in ("taylor_softmax_loss", "spherical_softmax_loss", "squared_error_loss"):
        found = module_of(name).centred(*given, share)
        assert all(x.isfinite().all() for x in found) and found.alpha.ne(0).all()


def test_what_classes_are_ranked_by():
    """A class's rank rises as its loss falls, where it is the target."""
    scores = torch.linspace(-4, 4, CLASSES, dtype=F64).unsqueeze(0)
    for name, options in CASES:
        module = module_of(name)
        if name != "squared_error_loss":  # its loss grows again beyond the wanted value
            losses = module.reference(scores.expand(CLASSES, -1), torch.arange(CLASSES), **options)
            order = module.rank(scores[0]).argsort()
            assert (losses[order].diff() < 1e-12).all(), name
    assert torch.equal(module_of("squared_error_loss").rank(scores), scores)
    assert module_of("taylor_softmax_loss").rank(torch.tensor([-3.0, 0.5])).tolist() == [2.0, 1.5]
    assert module_of("spherical_softmax_loss").rank(torch.tensor([-3.0, 0.5])).tolist() == [3.0, 0.5]


# --- several targets to a row -----------------------------------------------------------------------------------------


def operands(dtype=F64):
    x, w, b = torch.randn(ROWS, WIDTH), torch.randn(CLASSES, WIDTH), torch.randn(CLASSES)
    return *(t.to(dtype).requires_grad_() for t in (x, w, b)), distinct()


def given_as(how, x, w, b):
    return x @ w.t() + b if how == "logits" else fl.linear_scores(x, w, bias=b, schedule=how, memory_budget=3000)


@ALL
@pytest.mark.parametrize("how", ["logits", "eager", "recompute"])
@pytest.mark.parametrize("k", [1, 3])
def test_several_targets(name, options, how, k):
    x, w, b, target = operands()
    got = getattr(fl, name)(given_as(how, x, w, b), target[:, :k], **options)
    compare(got, truth_of(name, options, x @ w.t() + b, target[:, :k]), (x, w, b), 1e-11)


@FIRST
@pytest.mark.parametrize("how", ["logits", "eager", "recompute"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_paddings_weights_and_leading_shape(name, options, how, reduction):
    """Padded rows, a row of paddings, a class of weight 0 (as if it were not there), trained row weights."""
    x, w, b, target = operands()
    target[1, 1:], target[2] = -7, -7
    weight, row_weight = torch.rand(CLASSES, dtype=F64), torch.rand(ROWS, dtype=F64).requires_grad_()
    weight[target[0, 0]] = 0.0
    weight[target[3]] = 0.0
    more = dict(weight=weight, reduction=reduction)
    leading = (3, ROWS // 3)
    scores = given_as(how, x.view(*leading, WIDTH), w, b)
    got = getattr(fl, name)(
        scores, target.view(*leading, 3), **options, **more, row_weight=row_weight.view(leading), ignore_index=-7
    )
    assert got.shape == (leading if reduction == "none" else ())
    truth = truth_of(name, options, x @ w.t() + b, target, -7, row_weight=row_weight, **more)
    (gradient,) = torch.autograd.grad(got.sum(), x, retain_graph=True)
    assert gradient[2].eq(0).all() and gradient[3].eq(0).all()
    compare(got.reshape(truth.shape), truth, (x, w, b, row_weight), 1e-11)


@FIRST
def test_a_target_of_weight_0_is_absent(name, options):
    logits, target = torch.randn(ROWS, CLASSES, dtype=F64), distinct()
    weight = torch.ones(CLASSES, dtype=F64)
    weight[target[:, 1]] = 0.0
    padded = torch.where(weight[target] == 0, -100, target)
    for reduction in ("none", "mean", "sum"):
        both = [getattr(fl, name)(logits, t, **options, weight=weight, reduction=reduction) for t in (target, padded)]
        assert torch.equal(*both)


@FIRST
def test_one_target_in_a_column_of_its_own(name, options):
    """(N, 1) is (N,)."""
    x, w, b, target = operands()
    weight = torch.rand(CLASSES, dtype=F64)
    column, row = (
        getattr(fl, name)(fl.linear_scores(x, w, bias=b), t, **options, weight=weight)
        for t in (target[:, :1], target[:, 0])
    )
    compare(column, row, (x, w, b), 1e-11)


@FIRST
@pytest.mark.parametrize("how", ["logits", "eager", "recompute"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_low_precision(name, options, how, dtype, backend):
    x, w, _, target = operands(dtype)
    target[1, 1:] = -100
    if how == "logits":
        inputs = [(x @ w.t()).detach().requires_grad_()]
        got = getattr(fl, name)(inputs[0], target, **options)
    else:
        inputs = [x, w]
        got = getattr(fl, name)(fl.linear_scores(x, w, schedule=how), target, **options)
    found = {}
    for kind in (F64, F32):
        wide = [t.detach().to(kind).requires_grad_() for t in inputs]
        scores = wide[0] if how == "logits" else wide[0] @ wide[1].t()
        scores.retain_grad()
        loss = truth_of(name, options, scores.double(), target)
        loss.backward()
        found[kind] = loss, scores.grad, wide
    slope = found[F32][1].to(dtype).double()  # rounded once, exact products from there on
    if how == "logits":
        honest = [slope]
    else:
        a, c = (t.detach().double() for t in inputs)
        honest = [(slope @ c).to(dtype), (slope.t() @ a).to(dtype)]
    assert error(got, found[F64][0]) <= FACTOR * error(found[F32][0], found[F64][0]) + FLOOR[F32]
    for g, h, t in zip(torch.autograd.grad(got, inputs), honest, found[F64][2]):
        assert g.dtype == dtype and error(g, t.grad) <= FACTOR * error(h, t.grad) + FLOOR[F32]


@FIRST
@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (5, 0)])
def test_no_target_counts(name, options, shape):
    x, w = torch.randn(shape[0], WIDTH, requires_grad=True), torch.randn(CLASSES, WIDTH, requires_grad=True)
    loss = getattr(fl, name)(fl.linear_scores(x, w), torch.full(shape, -100), **options)
    assert loss == 0 and all(g.eq(0).all() for g in torch.autograd.grad(loss, (x, w)))


@FIRST
def test_derivatives_by_differences(name, options):
    x, w = torch.randn(3, 2, dtype=F64, requires_grad=True), torch.randn(CLASSES, 2, dtype=F64, requires_grad=True)
    target = distinct(3, 2)
    target[1, 1] = -100

    def loss(x, w):
        return getattr(fl, name)(fl.linear_scores(x, w), target, **options)

    assert torch.autograd.gradcheck(loss, (x, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (x, w), fast_mode=True)


@pytest.mark.unpoisoned
@FIRST
def test_compiled(name, options):
    torch._dynamo.reset()
    x, w, b, target = operands(F32)
    target[4, 1:], weight = -100, torch.rand(CLASSES)

    def both(x, w, b, target):
        more = dict(options, weight=weight)
        linear = getattr(fl, name)(fl.linear_scores(x, w, bias=b), target, **more)
        return linear + getattr(fl, name)(x @ w.t(), target, **more, reduction="none").sum()

    got, truth = torch.compile(both, fullgraph=True, backend="aot_eager")(x, w, b, target), both(x, w, b, target)
    assert error(got, truth) < 1e-6
    for g, t in zip(torch.autograd.grad(got, (x, w, b)), torch.autograd.grad(truth, (x, w, b))):
        assert error(g, t) < 1e-5


@FIRST
def test_module(name, options):
    x, w, b, target = operands(F32)
    cls = getattr(fl.nn, "".join(part.capitalize() for part in name.removesuffix("_loss").split("_")) + "Loss")
    loss = pickle.loads(pickle.dumps(cls(**options, weight=torch.rand(CLASSES), ignore_index=3, reduction="sum")))
    truth = getattr(fl, name)(x @ w.t(), target, **options, weight=loss.weight, ignore_index=3, reduction="sum")
    assert torch.equal(loss(x @ w.t(), target), truth)


@FIRST
@pytest.mark.host
def test_errors(name, options):
    x, w, b, target = operands()
    function, scores = getattr(fl, name), fl.linear_scores(x, w, bias=b)
    bad = target.clone()
    bad[3, 1] = CLASSES
    with pytest.raises(IndexError, match=rf"^{name}: target\[3, 1\] = {CLASSES} is out of range"):
        function(scores, bad, **options)
    with pytest.raises(ValueError, match=f"^{name}: target: .*targets of each"):
        function(scores, target[1:], **options)
    with pytest.raises(ValueError, match=f"^{name}: target"):
        function(scores, target[..., None], **options)
    with pytest.raises(TypeError, match=f"^{name}: target: .*integer"):
        function(scores, target.double(), **options)
    with pytest.raises(ValueError, match=f"^{name}: weight: .*class weights"):
        function(scores, target, **options, weight=torch.ones(3))


@pytest.mark.host
def test_losses_of_one_target_take_no_more():
    x, w, _, target = operands()
    with pytest.raises(ValueError, match="^squentropy: target: expected shape"):
        fl.squentropy(fl.linear_scores(x, w), target)
