"""Every loss in every case against its own dense reference: values, gradients, options, extremes, errors, modules."""

import importlib.util
import inspect
import pickle
import re
from pathlib import Path

import pytest
import tolerance
import torch

import fusedloss as fl
from fusedloss.losses import LOSSES, function_of, hyperparameters, linear_log_probs, name_of

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
EXACT = 1e-10  # relative, in float64, between two orders of the same sums
ROWS, WIDTH, CLASSES = 23, 8, 37
ALL = [pytest.param(m, c, id=f"{name_of(m)}-{i}") for m in LOSSES for i, c in enumerate(m.CASES)]
FIRST = [pytest.param(m, m.CASES[0], id=name_of(m)) for m in LOSSES]
# A masked class is absent from the formula of every loss but these.
DIVIDE_BY_CLASSES = ("squentropy", "squared_error_loss")
AT_LEAST_TWO = ("squentropy", "normalized_cross_entropy", "spherical_z_loss")


def operands(dtype=F64, rows=ROWS, width=WIDTH, classes=CLASSES, bias=True):
    """x, W, bias and targets; the targets are among the first classes, which are the digits of number_token_loss."""
    x, w = torch.randn(rows, width, dtype=F64), torch.randn(classes, width, dtype=F64)
    b = torch.randn(classes, dtype=F64) if bias else None
    x, w, b = (None if t is None else t.to(dtype).requires_grad_() for t in (x, w, b))
    return x, w, b, torch.randint(0, min(5, classes), (rows,))


def close(got, truth, bound=EXACT, what=""):
    error = tolerance.error(got, truth)
    assert error <= bound, f"{what}: relative error {error:.3g}, allowed {bound:g}"


def total(module, case, target, **more):
    """The reference's sum over rows, as a function of dense scores of any type."""

    def loss(scores):
        return module.reference(scores, target, **hyperparameters(case, scores.shape[1], scores.dtype)).sum()

    return loss


def keeping(condition):
    """Of ALL, the cases (name, options) that a test is about."""
    return pytest.mark.parametrize("module, case", [p for p in ALL if condition(name_of(p.values[0]), p.values[1])])


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, case", ALL)
@pytest.mark.parametrize("given", ["logits", "eager", "recompute"])
def test_float64(module, case, given):
    x, w, b, target = operands()
    before = [t.detach().clone() for t in (x, w, b, target)]
    options = hyperparameters(case, CLASSES, F64)
    scores = x @ w.t() + b if given == "logits" else fl.linear_scores(x, w, bias=b, schedule=given, memory_budget=2000)
    loss = function_of(module)(scores, target, **options)
    got = torch.autograd.grad(loss, (x, w, b))
    truth = module.reference(x @ w.t() + b, target, **options).mean()
    close(loss, truth, what="loss")
    for name, g, t in zip(("dX", "dW", "db"), got, torch.autograd.grad(truth, (x, w, b))):
        close(g, t, what=name)
    assert all(torch.equal(a, t) for a, t in zip(before, (x, w, b, target))), "an input was written to"


@pytest.mark.parametrize("module, case", ALL)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "given, width",
    [("logits", WIDTH), ("eager", WIDTH), ("eager", 64), ("recompute", WIDTH)],
    ids=["logits", "eager", "eager-64", "recompute"],
)
def test_low_precision(module, case, given, dtype, backend, width):
    x, w, _, target = operands(dtype, width=width, bias=False)
    function, options = function_of(module), hyperparameters(case, CLASSES)
    loss = total(module, case, target)
    if given == "logits":
        scores = (x @ w.t()).detach().requires_grad_()
        got = function(scores, target, **options, reduction="sum")
        tolerance.check_score_gradient(torch.autograd.grad(got, scores)[0], loss, scores.detach(), target)
        tolerance.check_loss(got, loss, scores.detach())
    else:
        got = function(fl.linear_scores(x, w, schedule=given), target, **options, reduction="sum")
        tolerance.check_linear_gradients(*torch.autograd.grad(got, (x, w)), loss, x, w, target)
        tolerance.check_loss(got, loss, x.detach().double() @ w.detach().double().t())
        assert got.dtype == F32


@pytest.mark.parametrize("module, case", ALL)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_weights_ignored_rows_and_leading_shape(module, case, reduction):
    """(B, T) rows, of which some are ignored, with class weights and trained row weights."""
    x, w, _, target = operands(rows=24, bias=False)
    target[::5] = -1
    row_weight = torch.rand(24, dtype=F64).requires_grad_()
    options = hyperparameters(case, CLASSES, F64)
    keep, safe = target != -1, target.clamp(min=0)
    factor = torch.where(keep, row_weight, 0.0)
    more = {}
    if name_of(module) not in ("cross_entropy", "number_token_loss"):  # torch's own meaning; no class weights
        more["weight"] = torch.rand(CLASSES, dtype=F64)
        factor = factor * more["weight"][safe]
    losses = module.reference(x @ w.t(), safe, **options) * factor
    truth = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / factor.sum()}[reduction]
    got = function_of(module)(
        fl.linear_scores(x.view(4, 6, WIDTH), w),
        target.view(4, 6),
        **options,
        **more,
        row_weight=row_weight.view(4, 6),
        ignore_index=-1,
        reduction=reduction,
    )
    assert got.shape == ((4, 6) if reduction == "none" else ())
    close(got.reshape(truth.shape), truth, what="loss")
    upstream = torch.rand_like(truth)
    wanted = (x, w, row_weight)
    found = torch.autograd.grad(got, wanted, upstream.view_as(got))
    for name, g, t in zip(("dX", "dW", "d row_weight"), found, torch.autograd.grad(truth, wanted, upstream)):
        close(g, t, what=name)
    assert found[0][~keep].eq(0).all()


@pytest.mark.parametrize("module, case", FIRST)
def test_no_row_counts(module, case):
    x, w, _, target = operands(bias=False)
    options = hyperparameters(case, CLASSES, F64)
    loss = function_of(module)(fl.linear_scores(x, w), torch.full_like(target, -100), **options)
    assert loss == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (x, w)))


# A detached weight makes the gradient another one than the value's.
@keeping(lambda name, case: not case.get("detach_weight"))
def test_derivatives_by_differences(module, case):
    """First and second derivatives."""
    x, w, b, _ = operands(rows=3, width=2, classes=6)
    target, options = torch.tensor([0, 4, 2]), hyperparameters(case, 6, F64)

    def loss(x, w, b):
        return function_of(module)(fl.linear_scores(x, w, bias=b), target, **options)

    assert torch.autograd.gradcheck(loss, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (x, w, b), fast_mode=True)


TENSORS = [
    ("focal_loss", "gamma", 1.5),
    ("poly_loss", "epsilon", 0.7),
    ("poly_focal_loss", "epsilon", 0.7),
    ("generalized_cross_entropy", "q", 0.6),
    ("mean_absolute_error_loss", "factor", 1.3),
    ("spherical_z_loss", "a", 1.3),
    ("spherical_softmax_loss", "eps", 0.2),
    ("squared_error_loss", "value", 3.0),
]


@pytest.mark.parametrize("name, argument, number", TENSORS, ids=lambda v: str(v))
@pytest.mark.parametrize("learnable", [False, True])
def test_hyperparameter_as_a_tensor(name, argument, number, learnable):
    module = next(m for m in LOSSES if name_of(m) == name)
    x, w, _, target = operands(bias=False)
    value = torch.tensor(number, dtype=F64, requires_grad=learnable)
    wanted = (x, w, value) if learnable else (x, w)
    got = function_of(module)(fl.linear_scores(x, w), target, **{argument: value})
    truth = module.reference(x @ w.t(), target, **{argument: value}).mean()
    close(got, truth)
    for g, t in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(truth, wanted)):
        close(g, t)


def test_learnable_class_vectors():
    module = next(m for m in LOSSES if name_of(m) == "logit_adjusted_cross_entropy")
    x, w, _, target = operands(bias=False)
    vectors = {n: torch.rand(CLASSES, dtype=F64, requires_grad=True) for n in ("class_shift", "class_scale", "margin")}
    got = fl.logit_adjusted_cross_entropy(fl.linear_scores(x, w), target, **vectors)
    truth = module.reference(x @ w.t(), target, **vectors).mean()
    wanted = (x, w, *vectors.values())
    for g, t in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(truth, wanted)):
        close(g, t)


# --- extremes ---------------------------------------------------------------------------------------------------------


# A smoothed target on an impossible class is an infinite loss.
@keeping(lambda name, case: not case.get("label_smoothing"))
def test_masked_classes(module, case, backend):
    """Scores of -inf off the target: the class is not there, and its gradient is exactly 0."""
    logits = torch.randn(ROWS, CLASSES, dtype=F64)
    target = torch.randint(0, 5, (ROWS,))
    logits[:, 5::3] = -torch.inf
    logits.requires_grad_()
    options = hyperparameters(case, CLASSES, F64)
    got = function_of(module)(logits, target, **options, reduction="none")
    close(got, module.reference(logits, target, **options))
    (grad,) = torch.autograd.grad(got.sum(), logits)
    assert grad[:, 5::3].eq(0).all()
    there = torch.ones(CLASSES, dtype=torch.bool)
    there[5::3] = False
    if name_of(module) not in DIVIDE_BY_CLASSES and "reweigh" not in case:
        rest = logits[:, there].detach().requires_grad_()
        fewer = {k: v[there] if getattr(v, "shape", None) == (CLASSES,) else v for k, v in options.items()}
        truth = module.reference(rest, target, **fewer)
        close(grad[:, there], torch.autograd.grad(truth.sum(), rest)[0])


# No number token but the target's is a row that number_token_loss has no formula for.
@keeping(lambda name, case: not case.get("label_smoothing") and name != "number_token_loss")
@pytest.mark.parametrize("dtype", [F32, F64], ids=["fp32", "fp64"])
def test_only_the_target_is_left(module, case, dtype):
    """All other classes masked, or V = 1: the loss and its gradient are finite, and 0 for functions of p = 1 alone."""
    logits = torch.full((2, 6), -torch.inf, dtype=dtype)
    logits[0, 1] = logits[1, 4] = 1.7
    logits.requires_grad_()
    loss = function_of(module)(logits, torch.tensor([1, 4]), **hyperparameters(case, 6, dtype), reduction="none")
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()
    x, w = torch.ones(2, 3, dtype=dtype, requires_grad=True), torch.ones(1, 3, dtype=dtype, requires_grad=True)
    alone = fl.linear_scores(x, w)
    if name_of(module) in AT_LEAST_TWO:
        with pytest.raises(ValueError, match="at least two classes"):
            function_of(module)(alone, torch.tensor([0, 0]))
        return
    loss = function_of(module)(alone, torch.tensor([0, 0]), **hyperparameters(case, 1, dtype))
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, w)))


OF_P = ("focal_loss", "generalized_cross_entropy", "comp_sum_loss", "poly_loss", "poly_focal_loss", "cross_entropy")
OF_P += ("normalized_cross_entropy", "mean_absolute_error_loss")


@keeping(lambda name, case: name in OF_P)
def test_confident_rows(module, case, backend):
    """Target probabilities 1 − 1e-4 … 1 − 1e-9 keep three digits in float32; `lse − score` would give 0."""
    logits = torch.zeros(6, 5, dtype=F64)
    logits[:, 2] = -(torch.logspace(-4, -9, 6, dtype=F64) / 4).log()
    target = torch.full((6,), 2)
    scores = logits.float().requires_grad_()
    loss = function_of(module)(scores, target, **hyperparameters(case, 5), reduction="none")
    exact = scores.detach().double().requires_grad_()
    truth = module.reference(exact, target, **hyperparameters(case, 5, F64))
    assert ((loss - truth).abs() <= 1e-3 * truth.abs() + 1e-30).all(), (loss, truth)
    grad, true_grad = (torch.autograd.grad(t.sum(), s)[0] for t, s in ((loss, scores), (truth, exact)))
    assert ((grad - true_grad).norm(dim=1) <= 1e-3 * true_grad.norm(dim=1) + 1e-30).all(), (grad, true_grad)


# Below τ = 1 comp_sum_loss grows like a power of 1 / p, beyond float32.
@keeping(lambda name, case: name != "comp_sum_loss" or case.get("tau", 1) >= 1)
@pytest.mark.parametrize("size", [80.0, 1e4])
def test_huge_scores(module, case, size, backend):
    """Both signs of confidence, far beyond what exp can hold: finite gradients, and float32 follows float64."""
    logits = size * torch.tensor([[1, -1, 0, 0.5, 0.25], [-1, 1, 0, 0.5, 0.25], [0, 0, 0, 0, 1.0]])
    target = torch.zeros(3, dtype=torch.int64)
    found = {}
    for dtype in (F32, F64):
        scores = logits.to(dtype).requires_grad_()
        loss = function_of(module)(scores, target, **hyperparameters(case, 5, dtype), reduction="none")
        found[dtype] = loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]
    # The gradient of number_token_loss is a difference that is 0 here, up to rounding.
    size = 1.0 if name_of(module) == "number_token_loss" else 0.0
    for got, truth in zip(found[F32], found[F64]):
        assert got.isfinite().all()
        assert (got - truth).norm() <= 1e-5 * (truth.norm() + size)


def test_constant_rows_of_the_spherical_z_loss():
    """σ = 0: ζ counts as 0 and nothing is pushed, also where rounding leaves a σ of 1e-8."""
    for noise in (0.0, 1e-8):
        logits = (3 + noise * torch.randn(4, 9, dtype=F64)).requires_grad_()
        loss = fl.spherical_z_loss(logits, torch.tensor([0, 1, 2, 3]), a=2.0, b=0.5)
        close(loss, torch.nn.functional.softplus(torch.tensor(1.0, dtype=F64)) / 2)
        assert torch.autograd.grad(loss, logits)[0].eq(0).all()


def test_spherical_z_loss_far_from_zero():
    """|mean| ≫ deviation: centred statistics do not cancel. The scores differ by multiples of 1/8, exact in float32."""
    logits = 4096 + torch.randint(-16, 16, (8, 50)) / 8
    target = torch.randint(0, 50, (8,))
    module = next(m for m in LOSSES if name_of(m) == "spherical_z_loss")
    close(fl.spherical_z_loss(logits, target, reduction="none"), module.reference(logits.double(), target), 1e-3)


# --- what is particular to one loss -----------------------------------------------------------------------------------


def test_rows_without_a_number_are_left_out():
    x, w, _, _ = operands(bias=False)
    digits = dict(number_ids=torch.tensor([7, 3, 30]), number_values=torch.tensor([1.0, 2.5, 9.0]))
    target = torch.randint(0, CLASSES, (ROWS,))
    target[:6], target[6] = torch.tensor([7, 3, 30, 3, 7, 30]), -100
    losses = fl.number_token_loss(fl.linear_scores(x, w), target, **digits, reduction="none")
    mean = fl.number_token_loss(fl.linear_scores(x, w), target, **digits)
    named = torch.isin(target, digits["number_ids"])
    assert losses[~named].eq(0).all() and losses[named].gt(0).all()
    close(mean, losses[named].mean())
    gradient = torch.autograd.grad(mean, (x, w))
    assert gradient[0][~named].eq(0).all()
    elsewhere = torch.ones(CLASSES, dtype=torch.bool).index_fill_(0, digits["number_ids"], False)
    assert gradient[1][elsewhere].eq(0).all()


def test_class_balanced_weight_of_an_empty_class():
    weight = fl.class_counts.class_balanced_weight(torch.tensor([0, 10, 1000]), beta=0.99)["weight"]
    assert weight[0] == 0 and weight.sum() == pytest.approx(3) and weight[1] > weight[2]
    assert fl.class_counts.balanced_softmax(torch.tensor([0, 10]))["class_shift"][0] == -torch.inf


# --- errors -----------------------------------------------------------------------------------------------------------

DIGITS = dict(number_ids=torch.tensor([0, 1]), number_values=torch.tensor([0.0, 1.0]))
ERRORS = [
    ("focal_loss", {"gamma": -1.0}, ValueError, "gamma"),
    ("focal_loss", {"gamma": "2"}, TypeError, "gamma"),
    ("focal_loss", {"gamma": float("nan")}, TypeError, "gamma"),
    ("focal_loss", {"gamma": torch.ones(2)}, ValueError, "gamma"),
    ("focal_loss", {"alpha": torch.ones(3)}, ValueError, "alpha"),
    ("focal_loss", {"beta": 1.0}, TypeError, "beta"),
    ("sigmoid_focal_loss", {"gamma": torch.tensor(2.0)}, TypeError, "gamma"),
    ("sigmoid_focal_loss", {"alpha": 1.5}, ValueError, "alpha"),
    ("poly_loss", {"epsilon": (1.0, "a")}, TypeError, "epsilon"),
    ("poly_loss", {"label_smoothing": 1.5}, ValueError, "label_smoothing"),
    ("poly_focal_loss", {"gamma": -0.1}, ValueError, "gamma"),
    ("generalized_cross_entropy", {"q": 0.0}, ValueError, "q"),
    ("generalized_cross_entropy", {"q": 1.1}, ValueError, "q"),
    ("generalized_cross_entropy", {"k": 1.0}, ValueError, "k"),
    ("comp_sum_loss", {"tau": -0.5}, ValueError, "tau"),
    ("mean_absolute_error_loss", {"factor": None}, TypeError, "factor"),
    ("logit_adjusted_cross_entropy", {"class_shift": torch.ones(2)}, ValueError, "class_shift"),
    ("logit_adjusted_cross_entropy", {"weight": torch.ones(2)}, ValueError, "weight"),
    ("number_token_loss", {**DIGITS, "form": "l1"}, ValueError, "form"),
    ("number_token_loss", {**DIGITS, "number_values": torch.ones(3)}, ValueError, "number_values"),
    ("number_token_loss", {**DIGITS, "number_ids": torch.ones(2)}, TypeError, "number_ids"),
    ("number_token_loss", {**DIGITS, "squash_factor": 1.0}, ValueError, "squash_factor"),
    ("number_token_loss", {**DIGITS, "squash_factor": 2.0, "form": "mse"}, ValueError, "squash_factor"),
    ("spherical_z_loss", {"a": 0.0}, ValueError, "a"),
    ("spherical_z_loss", {"eps": -1.0}, ValueError, "eps"),
    ("spherical_softmax_loss", {"eps": 0.0}, ValueError, "eps"),
    ("squared_error_loss", {"k": -1.0}, ValueError, "k"),
]


@pytest.mark.parametrize("name, options, error, argument", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("given", ["logits", "linear"])
def test_errors_name_function_and_argument(name, options, error, argument, given):
    x, w, _, target = operands(bias=False)
    scores = fl.linear_scores(x, w) if given == "linear" else x @ w.t()
    with pytest.raises(error, match=rf"^{name}: .*{argument}"):
        getattr(fl, name)(scores, target, **options)


@pytest.mark.parametrize("module, case", FIRST)
@pytest.mark.host
def test_errors_of_every_loss(module, case):
    x, w, _, target = operands(bias=False)
    name, function, options = name_of(module), function_of(module), hyperparameters(case, CLASSES, F64)
    scores = fl.linear_scores(x, w)
    bad = target.clone()
    bad[3] = CLASSES
    with pytest.raises(IndexError, match=rf"^{name}: target\[3\] = {CLASSES} is out of range"):
        function(scores, bad, **options)
    with pytest.raises(ValueError, match=f"^{name}: .*target"):
        function(scores, target[:-1], **options)
    with pytest.raises(ValueError, match=f"^{name}: .*row_weight"):
        function(scores, target, **options, row_weight=torch.ones(2, dtype=F64))
    with pytest.raises(ValueError, match=f"^{name}: .*reduction"):
        function(scores, target, **options, reduction="average")


@fl.row_loss
def _with_a_vector(scores, z, *, c: torch.Tensor):
    return scores.reduce(fl.LogSumExp()) + (z * c).sum(1)


@pytest.mark.parametrize("classes", [1, 10, 11, 40])
def test_a_length_that_is_the_number_of_classes_by_chance(classes):
    """A program serves any number of columns; of two lengths of 10 only one may be that number."""
    x, w, _, _ = operands(bias=False, classes=classes)
    for length in (1, 10):
        z, c = torch.randn(ROWS, length, dtype=F64), torch.randn(length, dtype=F64)
        got = _with_a_vector(fl.linear_scores(x, w), z, c=c)
        truth = ((x @ w.t()).logsumexp(1) + (z * c).sum(1)).mean()
        close(got, truth)
        for g, t in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(truth, (x, w))):
            close(g, t)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
@pytest.mark.parametrize("module, case", FIRST)
def test_compiled(module, case):
    compare_compiled(module, case, "aot_eager")


@pytest.mark.unpoisoned
@pytest.mark.parametrize("module, case", [p for p in FIRST if p.id in ("focal_loss", "number_token_loss")])
def test_compiled_by_inductor(module, case):
    compare_compiled(module, case, "inductor")


def compare_compiled(module, case, compiler):
    torch._dynamo.reset()
    x, w, b, target = operands(F32)
    target[4] = -100
    options = hyperparameters(case, CLASSES)

    def both(x, w, b, target):
        linear = function_of(module)(fl.linear_scores(x, w, bias=b), target, **options)
        return linear + function_of(module)(x @ w.t(), target, **options, reduction="none").sum()

    got, truth = torch.compile(both, fullgraph=True, backend=compiler)(x, w, b, target), both(x, w, b, target)
    close(got, truth, 1e-6)
    for g, t in zip(torch.autograd.grad(got, (x, w, b)), torch.autograd.grad(truth, (x, w, b))):
        close(g, t, 1e-5)


# --- modules ----------------------------------------------------------------------------------------------------------


def module_class(module):
    name = "".join(part.capitalize() for part in name_of(module).split("_"))
    return getattr(fl.nn, name if name.endswith("Loss") else name + "Loss")


@pytest.mark.parametrize("module, case", ALL)
def test_module(module, case):
    x, w, _, target = operands(F32, bias=False)
    options, row_weight = hyperparameters(case, CLASSES), torch.rand(ROWS)
    loss = module_class(module)(**options, reduction="sum")
    loss = pickle.loads(pickle.dumps(loss))
    got = loss(fl.linear_scores(x, w), target, row_weight=row_weight)
    plain = function_of(module)(fl.linear_scores(x, w), target, **options, reduction="sum", row_weight=row_weight)
    assert torch.equal(got, plain)
    parameters = inspect.signature(type(loss)).parameters
    shown = repr(loss)
    assert shown.startswith(type(loss).__name__ + "(") and "reduction='sum'" in shown
    assert all(name in shown for name, value in case.items() if value != parameters[name].default)
    expected = [p for p in list(inspect.signature(function_of(module)).parameters)[2:] if p != "row_weight"]
    assert list(parameters) == expected
    tensors = {name for name, value in options.items() if isinstance(value, torch.Tensor)}
    assert set(loss.state_dict()) == tensors


def test_module_parameters():
    gamma = torch.nn.Parameter(torch.tensor(2.0))
    loss = fl.nn.FocalLoss(gamma=gamma, weight=torch.ones(5))
    assert list(loss.parameters()) == [gamma] and "weight" in dict(loss.named_buffers())
    loss(torch.randn(4, 5), torch.tensor([0, 1, 2, 3])).backward()
    assert gamma.grad.isfinite()
    with pytest.raises(TypeError, match="FocalLoss: .*beta"):
        fl.nn.FocalLoss(beta=1)


def test_cross_entropy_module_is_a_drop_in():
    logits, target = torch.randn(7, 4, 3), torch.randint(0, 4, (7, 3))
    arguments = (torch.rand(4), None, 2, None, "sum", 0.1)
    ours, theirs = fl.nn.CrossEntropyLoss(*arguments), torch.nn.CrossEntropyLoss(*arguments)
    close(ours(logits, target), theirs(logits, target), 1e-6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("out_features, bias", [((), False), ((), True), ((2, 3), True)])
def test_linear_cross_entropy_module_is_a_drop_in(out_features, bias):
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        pytest.skip(f"torch {torch.__version__} has no LinearCrossEntropyLoss to compare with")
    options = dict(out_features=out_features, bias=bias, weight=torch.rand(9), label_smoothing=0.1, reduction="sum")
    ours, theirs = fl.nn.LinearCrossEntropyLoss(5, 9, **options), torch.nn.LinearCrossEntropyLoss(5, 9, **options)
    ours.load_state_dict(theirs.state_dict())
    x, target = torch.randn(7, 5), torch.randint(0, 9, (7, *out_features))
    got, truth = ours(x, target), theirs(x, target)
    close(got, truth, 1e-6)
    for g, t in zip(torch.autograd.grad(got, ours.linear.weight), torch.autograd.grad(truth, theirs.linear.weight)):
        close(g, t, 1e-5)
    assert "label_smoothing=0.1" in repr(ours)


# --- linear_log_probs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, 2.0)])
def test_log_probs(temperature, softcap):
    x, w, b, target = operands(rows=24)
    target[5] = -100
    keep = target != -100
    got = fl.linear_log_probs(
        x.view(4, 6, WIDTH),
        w,
        target.view(4, 6),
        linear_bias=b,
        softcap=softcap,
        temperature=temperature,
        return_lse=True,
        return_entropy=True,
    )
    s = x @ w.t() + b
    s = (s if softcap is None else softcap * torch.tanh(s / softcap)) / temperature
    truth = [torch.where(keep, t, 0.0) for t in linear_log_probs.reference(s, target.clamp(min=0))]
    upstream = torch.randn(3, 24, dtype=F64)
    for g, t in zip(got, truth):
        assert g.shape == (4, 6)
        close(g.flatten(), t)
    together = sum((g.flatten() * u).sum() for g, u in zip(got, upstream))
    expected = sum((t * u).sum() for t, u in zip(truth, upstream))
    for g, t in zip(torch.autograd.grad(together, (x, w, b)), torch.autograd.grad(expected, (x, w, b))):
        close(g, t)
    options = dict(linear_bias=b, softcap=softcap, temperature=temperature)
    alone = fl.linear_log_probs(x.view(4, 6, WIDTH), w, target.view(4, 6), **options)
    assert torch.equal(alone, got.log_probs)
    partly = fl.linear_log_probs(x, w, target, **options, return_lse=True)
    assert partly.entropy is None and torch.equal(partly.lse, got.lse.flatten())


def test_log_probs_in_half_precision(backend):
    x, w, _, target = operands(BF16, bias=False)
    got = fl.linear_log_probs(x, w, target)
    assert got.dtype == F32
    s = x.detach().double() @ w.detach().double().t()
    close(got, linear_log_probs.reference(s, target)[0], 1e-5)
    dx, dw = torch.autograd.grad(got.sum(), (x, w))
    tolerance.check_linear_gradients(dx, dw, lambda s: linear_log_probs.reference(s, target)[0].sum(), x, w, target)


def test_log_probs_near_certainty():
    w = torch.eye(4)
    x = torch.tensor([[20.0, 0, 0, 0]])
    log_p = fl.linear_log_probs(x, w, torch.tensor([0]))
    close(log_p, torch.log_softmax(x.double(), 1)[:, 0], 1e-5)
    assert log_p.item() < 0


@pytest.mark.unpoisoned
def test_log_probs_compiled():
    x, w, b, target = operands(F32)

    def together(x, w, b):
        found = fl.linear_log_probs(x, w, target, linear_bias=b, return_lse=True, return_entropy=True)
        return (found.log_probs + 2 * found.lse - found.entropy).sum()

    got, truth = torch.compile(together, fullgraph=True, backend="aot_eager")(x, w, b), together(x, w, b)
    close(got, truth, 1e-6)
    for g, t in zip(torch.autograd.grad(got, (x, w, b)), torch.autograd.grad(truth, (x, w, b))):
        close(g, t, 1e-5)


@pytest.mark.host
def test_log_probs_errors():
    x, w, _, target = operands(bias=False)
    with pytest.raises(IndexError, match=r"linear_log_probs: target\[0\] = 99"):
        fl.linear_log_probs(x, w, torch.full_like(target, 99))
    with pytest.raises(ValueError, match="linear_log_probs: target"):
        fl.linear_log_probs(x, w, target[1:])


# --- documentation ----------------------------------------------------------------------------------------------------


def test_table_of_losses_is_up_to_date():
    folder = Path(__file__).parents[1] / "docs"
    code = importlib.util.spec_from_file_location("generate", folder / "generate.py")
    generate = importlib.util.module_from_spec(code)
    code.loader.exec_module(generate)
    assert (folder / "losses.md").read_text() == generate.table(), "run python docs/generate.py"
    assert generate.README.read_text() == generate.readme(), "run python docs/generate.py"


@pytest.mark.parametrize("module", LOSSES, ids=name_of)
def test_every_loss_is_public_and_cites_its_source(module):
    name, function = name_of(module), function_of(module)
    assert getattr(fl, name) is function
    assert re.search(r"\d{4}, arXiv \d{4}\.\d{4,5}", function.__doc__), "authors, title, year, arXiv id"
    assert len(Path(module.__file__).read_text().splitlines()) <= 100 or name == "cross_entropy"
