"""Every pair loss in every case against its dense reference: values, gradients, options, layouts, extremes, errors."""

import inspect
import re
from pathlib import Path

import pytest
import tolerance
import torch

import fusedloss as fl
from fusedloss.losses import PAIR_LOSSES, function_of, name_of, pair_arguments

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
EXACT = 1e-10  # relative, in float64, between two orders of the same sums
WIDTH = 8
# z = scale · cos + bias: large for those that divide by a temperature, within (−1, 1) for those that take cosines.
TEMPERED = (
    "sigmoid_loss bixse_loss info_nce_loss clip_loss nt_xent_loss supcon_loss soft_info_nce_loss cwcl_loss".split()
)
SQUARE = ("clip_loss", "cwcl_loss")  # a column has a positive too
CASES = [(m, c, f"{name_of(m)}-{i}") for m in PAIR_LOSSES for i, c in enumerate(m.CASES)]
ALL = [pytest.param(m, c, id=name) for m, c, name in CASES]


def square(module) -> bool:
    return module.SCORES == "self" or name_of(module) in SQUARE


SHAPED = [
    pytest.param(m, c, shape, id=f"{name}-{shape[0]}x{shape[1]}")
    for m, c, name in CASES
    for shape in ((24, 24), (24, 37))
    if shape[0] == shape[1] or not square(m)
]


def unit(t):
    """Rows of length 1; those of zeros stay as they are, and have the slope of the identity."""
    length = torch.where((t == 0).all(-1, keepdim=True), 1.0, t.square().sum(-1, keepdim=True)).sqrt()
    return t / length


class Operands:
    """Embeddings x, y of length 1 (y is x for a loss of x with itself), scale and bias; all want a gradient."""

    def __init__(self, module, shape, dtype=F64, width=WIDTH, trained=True):
        size, shift = (6.0, -0.4) if name_of(module) in TEMPERED else (0.9, 0.05)
        wide = torch.promote_types(dtype, F32)
        self.x = unit(torch.randn(shape[0], width, dtype=F64)).to(dtype).requires_grad_()
        self.y = unit(torch.randn(shape[1], width, dtype=F64)).to(dtype).requires_grad_()
        self.y = self.x if module.SCORES == "self" else self.y
        self.scale, self.bias = (torch.tensor(v, dtype=wide, requires_grad=trained) for v in (size, shift))

    def scores(self, **options):
        return fl.similarity_scores(self.x, self.y, scale=self.scale, bias=self.bias, **options)

    def dense(self, dtype=F64):
        return self.scale.to(dtype) * (self.x.to(dtype) @ self.y.to(dtype).t()) + self.bias.to(dtype)

    def leaves(self):
        embeddings = {"dx": self.x} if self.y is self.x else {"dx": self.x, "dy": self.y}
        return {**embeddings, "dscale": self.scale, "dbias": self.bias}


def close(got, truth, bound=EXACT, what=""):
    error = tolerance.error(got, truth)
    assert error <= bound, f"{what}: relative error {error:.3g}, allowed {bound:g}"


def gradients(loss, leaves, **more):
    """By name; zeros where the loss does not depend on a leaf."""
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, **more)
    return {k: torch.zeros_like(t) if g is None else g for (k, t), g in zip(leaves.items(), found)}


def agree(loss, truth, leaves, bound=EXACT):
    """Value and gradients. A bias may cancel, and leave rounding errors behind: an absolute bound for scalars."""
    close(loss, truth, bound, "loss")
    got, right = gradients(loss, leaves, retain_graph=True), gradients(truth, leaves, retain_graph=True)
    for name, g in got.items():
        if leaves[name].dim():
            close(g, right[name], bound, name)
        else:
            size = bound * max(1.0, *(right[n].norm().item() for n in leaves))
            assert (g - right[name]).abs().item() <= size, f"{name}: {g.item()} for {right[name].item()}"


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, case, shape", SHAPED)
@pytest.mark.parametrize("given", ["matrix", "auto", "eager", "recompute"])
def test_float64(module, case, shape, given):
    made, arguments = Operands(module, shape), pair_arguments(case, *shape, F64)
    before = [t.detach().clone() for t in (*made.leaves().values(), *tensors(arguments))]
    walk = {} if given == "auto" else {"schedule": given, "memory_budget": 2000}
    loss = function_of(module)(made.dense() if given == "matrix" else made.scores(**walk), **arguments)
    assert loss.dtype == F64 and loss.shape == ()
    agree(loss, module.reference(made.dense(), **arguments), made.leaves())
    after = (*made.leaves().values(), *tensors(arguments))
    assert all(torch.equal(a, b) for a, b in zip(before, after)), "an input was written to"


def tensors(arguments):
    return [t for t in arguments.values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("module, case, shape", SHAPED)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("schedule", ["auto", "recompute"])
def test_low_precision(module, case, shape, dtype, schedule, backend):
    """As wrong at most as twice the honest way: scores, loss and ∂L/∂z in fp32, that rounded once, exact products."""
    made = Operands(module, shape, dtype, width=32, trained=False)
    arguments, reference = pair_arguments(case, *shape), module.reference
    loss = function_of(module)(made.scores(schedule=schedule), **arguments)
    assert loss.dtype == F32
    x, y, scale = made.x.detach().double(), made.y.detach().double(), made.scale.double()
    ways = []
    for wide in (F64, F32):
        z = made.dense(wide).detach().requires_grad_()
        value = reference(z, **pair_arguments(case, *shape, wide))
        slope = scale * torch.autograd.grad(value, z)[0].to(F64 if wide == F64 else dtype).double()
        dx, dy = slope @ y, slope.t() @ x
        ways.append((value, dx + dy if made.y is made.x else dx, dy))
    truth, honest = ways
    tolerance.check(loss, truth[0], honest[0], "loss")
    embeddings = {"dx": made.x} if made.y is made.x else {"dx": made.x, "dy": made.y}
    for place, (name, got) in enumerate(gradients(loss, embeddings).items(), 1):
        assert got.dtype == dtype
        tolerance.check(got, truth[place], honest[place].to(dtype), name)


# --- few rows, options of rows ----------------------------------------------------------------------------------------


def takes(module, case, rows, columns) -> bool:
    if rows != columns and square(module):
        return False
    if rows % 2 and name_of(module) == "nt_xent_loss":  # pairs of views
        return False
    return columns > 0 or "teacher" not in case or square(module)  # a matrix has columns


FEW = [
    pytest.param(m, c, shape, id=f"{name}-{shape[0]}x{shape[1]}")
    for m, c, name in CASES
    for shape in ((1, 1), (4, 4), (1, 6), (0, 6), (0, 0))
    if takes(m, c, *shape)
]


@pytest.mark.parametrize("module, case, shape", FEW)
def test_few_rows(module, case, shape):
    made, arguments = Operands(module, shape), pair_arguments(case, *shape, F64)
    loss = function_of(module)(made.scores(), **arguments)
    if shape[0]:
        agree(loss, module.reference(made.dense(), **arguments), made.leaves())
    else:
        assert loss == 0 and all((g == 0).all() for g in gradients(loss, made.leaves()).values())


def of_rows(module, z, arguments):
    """(N,) losses of a loss that separates over rows: the reference of one row at a time."""
    losses, parameters = [], inspect.signature(module.reference).parameters
    for i in range(len(z)):
        mine = {k: v[i : i + 1] if k in ROW_ARGUMENTS else v for k, v in arguments.items()}
        if "target" in parameters and ("row_group" not in mine or name_of(module) == "info_nce_loss"):
            mine.setdefault("target", torch.tensor([i]))  # sigmoid_loss takes one of the two
        losses.append(module.reference(z[i : i + 1], **mine))
    return torch.stack(losses)


ROW_ARGUMENTS = ("target", "row_group", "grade", "norm")
SEPARATE = [
    pytest.param(m, c, id=name)
    for m, c, name in CASES
    if m.SCORES == "pair" and "row_weight" in inspect.signature(function_of(m)).parameters
]


@pytest.mark.parametrize("module, case", SEPARATE)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_row_weights_and_ignored_rows(module, case, reduction):
    made, arguments = Operands(module, (24, 37)), pair_arguments(case, 24, 37, F64)
    weight = torch.rand(24, dtype=F64).requires_grad_()
    losses, factor = of_rows(module, made.dense(), arguments), weight
    takes = inspect.signature(function_of(module)).parameters
    if "ignore_index" in takes and "row_group" not in arguments:
        target = arguments.get("target", torch.arange(24)).clone()
        target[::5] = -7
        arguments |= {"target": target, "ignore_index": -7}
        factor = torch.where(target == -7, 0.0, weight)
    weighted = losses * factor
    truth = {"none": weighted, "sum": weighted.sum(), "mean": weighted.sum() / factor.sum()}[reduction]
    got = function_of(module)(made.scores(), **arguments, row_weight=weight, reduction=reduction)
    assert got.shape == truth.shape
    upstream = torch.rand_like(got)
    agree((got * upstream).sum(), (truth * upstream).sum(), {**made.leaves(), "drow_weight": weight})
    if reduction == "none" and "ignore_index" in arguments:
        assert (got[::5] == 0).all()


# --- layouts, derivatives, the compiler -------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "every other row": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
}


@pytest.mark.parametrize("module, case", ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_that_are_not_contiguous(module, case, layout):
    made, arguments = Operands(module, (24, 24)), pair_arguments(case, 24, 24, F64)
    x = LAYOUTS[layout](made.x)
    y = x if made.y is made.x else LAYOUTS[layout](made.y)
    assert not x.is_contiguous()
    z = made.scale * (x @ y.t()) + made.bias
    loss = function_of(module)(fl.similarity_scores(x, y, scale=made.scale, bias=made.bias), **arguments)
    agree(loss, module.reference(z, **arguments), made.leaves())


@pytest.mark.parametrize("module, case", ALL)
def test_a_second_backward(module, case):
    made, arguments = Operands(module, (24, 24)), pair_arguments(case, 24, 24, F64)
    loss = function_of(module)(made.scores(), **arguments)
    first = {k: g.clone() for k, g in gradients(3 * loss, made.leaves(), retain_graph=True).items()}
    second = gradients(3 * loss, made.leaves())
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("module, case", ALL)
def test_second_derivatives(module, case):
    made, arguments = Operands(module, (12, 12)), pair_arguments(case, 12, 12, F64)
    direction = torch.randn(12, WIDTH, dtype=F64)
    found = []
    for loss in (
        function_of(module)(made.scores(), **arguments),
        module.reference(made.dense(), **arguments),
    ):
        slope = torch.autograd.grad(loss, made.x, create_graph=True)[0]
        found.append(gradients((slope * direction).sum(), made.leaves()))
    size = max(g.norm().item() for g in found[1].values())
    for name, got in found[0].items():
        assert (got - found[1][name]).norm() <= EXACT * size, name


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["sigmoid_loss", "clip_loss", "supcon_loss", "soft_info_nce_loss"])
def test_compiled(name):
    torch._dynamo.reset()
    module = next(m for m in PAIR_LOSSES if name_of(m) == name)
    made, arguments = Operands(module, (12, 12), F32), pair_arguments(module.CASES[0], 12, 12)

    def loss(x, y, scale, bias):
        y = x if module.SCORES == "self" else y
        scores = fl.similarity_scores(x, y, scale=scale.exp(), bias=bias, normalize=True)
        return function_of(module)(scores, **arguments)

    operands = [t.detach().requires_grad_() for t in (made.x, made.y, torch.tensor(1.5), made.bias)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = [f(*operands) for f in (loss, compiled)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    eager, ours = (torch.autograd.grad(v, operands, allow_unused=True) for v in values)
    for a, b in zip(eager, ours):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("module, case", ALL)
def test_autocast(module, case, device):
    """Products in bf16 of fp32 embeddings: those of the embeddings rounded to bf16."""
    made, arguments = Operands(module, (24, 24), F32, trained=False), pair_arguments(case, 24, 24)
    with torch.autocast(device.type, torch.bfloat16):
        loss = function_of(module)(made.scores(), **arguments)
    found = gradients(loss, {"dx": made.x, "dy": made.y})
    made.x, made.y = (t.detach().bfloat16().requires_grad_() for t in (made.x, made.y))
    made.y = made.x if module.SCORES == "self" else made.y
    rounded = function_of(module)(made.scores(), **arguments)
    close(loss, rounded, 1e-6)
    for name, g in gradients(rounded, {"dx": made.x, "dy": made.y}).items():
        assert found[name].dtype == F32
        close(found[name], g, 1e-2, name)


# --- extremes ---------------------------------------------------------------------------------------------------------


def near_duplicates(rows):
    return unit(torch.ones(rows, WIDTH, dtype=F64) + 1e-4 * torch.randn(rows, WIDTH, dtype=F64))


def both_signs(rows):
    """Cosines are 1 and −1."""
    return unit(torch.ones(rows, WIDTH, dtype=F64)) * (1 - 2 * (torch.arange(rows) % 2)).unsqueeze(1)


def with_zeros(rows):
    return torch.randn(rows, WIDTH, dtype=F64) * (torch.arange(rows) % 3 != 0).unsqueeze(1)


EXTREMES = {
    "near duplicates": (near_duplicates, near_duplicates),
    "equal and opposite": (both_signs, both_signs),
    "rows of zeros": (with_zeros, with_zeros),
    "temperature 0.01": (lambda rows: torch.randn(rows, WIDTH, dtype=F64), None),
    "pairs are equal": (lambda rows: torch.randn(rows, WIDTH, dtype=F64), "x"),
}
# Where scores are compared, or roots taken, rounding decides at these; such losses have tests of their own.
SMOOTH = [
    pytest.param(m, c, id=name) for m, c, name in CASES if name_of(m) in (*TEMPERED, "orthogonal_projection_loss")
]
LABELS = {
    "all equal": lambda rows: torch.zeros(rows, dtype=torch.int64),
    "all different": torch.arange,
    "one alone": lambda rows: torch.arange(rows).clamp(max=1),
    "negative and large": lambda rows: (torch.arange(rows) % 3 - 1) * 2**40,
}


def extreme(module, case, name, dtype):
    make_x, make_y = EXTREMES[name]
    scale = 100.0 if name_of(module) in TEMPERED else 1.0
    torch.manual_seed(1)
    x = make_x(24)
    y = x.clone() if make_y == "x" else (make_y or make_x)(24)
    x, y = (t.to(dtype).requires_grad_() for t in (x, y))
    y = x if module.SCORES == "self" else y
    scores = fl.similarity_scores(x, y, scale=scale, normalize=True)
    return x, y, scores, scale, pair_arguments(case, 24, 24, dtype)


@pytest.mark.parametrize("module, case", SMOOTH)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(module, case, name):
    """Exact in float64; in float32 finite, and the loss as far from the truth as the scores' rounding makes it."""
    x, y, scores, scale, arguments = extreme(module, case, name, F64)
    loss = function_of(module)(scores, **arguments)
    truth = module.reference(scale * (unit(x) @ unit(y).t()), **arguments)
    found = gradients(loss, {"dx": x, "dy": y})
    right = gradients(truth, {"dx": x, "dy": y})
    assert (loss - truth).abs() <= 1e-9 * max(1.0, truth.abs().item())
    for g, t in zip(found.values(), right.values()):
        assert g.isfinite().all()
        assert (g - t).norm() <= 1e-9 * max(scale, t.norm().item())
    x, y, scores, _, arguments = extreme(module, case, name, F32)
    narrow = function_of(module)(scores, **arguments)
    assert all(g.isfinite().all() for g in gradients(narrow, {"dx": x, "dy": y}).values())
    terms = 24 if name_of(module) in ("sigmoid_loss", "bixse_loss") else 1
    assert (narrow - truth).abs() <= 1e-6 * max(truth.abs().item(), 2 * scale * terms)


LABELLED = [pytest.param(m, c, id=name) for m, c, name in CASES if "label" in c]


@pytest.mark.parametrize("module, case", LABELLED)
@pytest.mark.parametrize("name", LABELS)
def test_labels(module, case, name):
    made, arguments = Operands(module, (24, 24)), pair_arguments(case, 24, 24, F64)
    arguments["label"] = LABELS[name](24)
    for scores in (made.scores(), made.dense()):
        loss = function_of(module)(scores, **arguments)
        agree(loss, module.reference(made.dense(), **arguments), made.leaves())


# --- single losses ----------------------------------------------------------------------------------------------------


def test_a_certain_positive_keeps_its_digits():
    """lse − s would be 0 in float32."""
    x = torch.eye(4)
    for loss in (fl.info_nce_loss, fl.clip_loss):
        got = loss(fl.similarity_scores(x, x.clone(), scale=30.0))
        close(got, torch.log1p(3 * torch.exp(torch.tensor(-30.0, dtype=F64))), 1e-6)
    got = fl.nt_xent_loss(fl.similarity_scores(torch.cat([x, x]), scale=30.0))
    close(got, torch.log1p(6 * torch.exp(torch.tensor(-30.0, dtype=F64))), 1e-6)


def test_soft_info_nce_takes_scores_of_a_teacher_and_gives_it_no_gradient():
    made, teacher = Operands(fl.losses.soft_info_nce_loss, (24, 24)), torch.randn(24, 5, dtype=F64).requires_grad_()
    guide = fl.similarity_scores(teacher, scale=2.0, normalize=True)
    u = unit(teacher)
    got = fl.soft_info_nce_loss(made.scores(memory_budget=2000), guide)
    agree(got, fl.losses.soft_info_nce_loss.reference(made.dense(), 2 * (u @ u.t()).detach()), made.leaves())
    assert torch.autograd.grad(got, teacher, allow_unused=True)[0] is None


def test_soft_info_nce_memory_does_not_grow_with_the_rows():
    """What autograd keeps between the passes: embeddings, and a number or two per row."""
    kept = []

    def keep(t):
        kept.append(t.numel())
        return t

    x, y, guide = (torch.randn(400, 4).requires_grad_(i < 2) for i in range(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        scores = fl.similarity_scores(x, y, memory_budget=40 * 400 * 4)
        fl.soft_info_nce_loss(scores, fl.similarity_scores(guide))
    assert max(kept) < 400 * 40


def test_supcon_with_one_view_against_all():
    """The official contrast_mode "one": x the first view, y all of them."""
    x, more = (torch.randn(6, WIDTH, dtype=F64).requires_grad_() for _ in range(2))
    label = torch.tensor([0, 1, 0, 2, 1, 3])
    y, columns = torch.cat([x, more]), torch.cat([label, label])
    for form in ("out", "in"):
        loss = fl.supcon_loss(fl.similarity_scores(x, y), label, column_label=columns, form=form)
        truth = fl.losses.supcon_loss.reference(x @ y.t(), label, columns, form)
        agree(loss, truth, {"dx": x, "dmore": more})


def test_a_trained_temperature_of_supcon():
    log_scale, x = torch.tensor(1.0, dtype=F64, requires_grad=True), torch.randn(8, WIDTH, dtype=F64)
    label, scale = torch.arange(8) % 3, log_scale.exp()
    loss = fl.supcon_loss(fl.similarity_scores(x, scale=scale), label, temperature_ratio=1 / (0.07 * scale))
    truth = fl.losses.supcon_loss.reference(scale * x @ x.t(), label, temperature_ratio=1 / (0.07 * scale))
    agree(loss, truth, {"dlog_scale": log_scale})


def test_orthogonal_projection_reads_no_score_for_its_plain_form(monkeypatch):
    def refuse(*_):
        raise AssertionError("a pass over the scores")

    x = torch.randn(9, 4, dtype=F64)
    label = torch.tensor([5, -1, 5, 7, -1, 5, 0, 0, 3])
    truth = fl.losses.orthogonal_projection_loss.reference(unit(x) @ unit(x).t(), label)
    monkeypatch.setattr(fl.Scores, "reduce", refuse)
    close(fl.orthogonal_projection_loss(fl.similarity_scores(x, normalize=True), label), truth)


def test_a_trained_grade():
    made, grade = Operands(fl.losses.bixse_loss, (24, 37)), torch.rand(24, dtype=F64).requires_grad_()
    loss = fl.bixse_loss(made.scores(), grade)
    agree(loss, fl.losses.bixse_loss.reference(made.dense(), grade), {**made.leaves(), "dgrade": grade})


# --- errors -----------------------------------------------------------------------------------------------------------

X, Y, LABEL = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)


def pairs(n=6, m=9):
    return fl.similarity_scores(torch.randn(n, 4), torch.randn(m, 4))


def itself(n=6):
    return fl.similarity_scores(torch.randn(n, 4))


ERRORS = {
    "sigmoid_loss: scores": lambda: fl.sigmoid_loss(torch.randn(5)),
    "sigmoid_loss: target: expected given where N > M": lambda: fl.sigmoid_loss(pairs(9, 6)),
    "sigmoid_loss: target: expected None with row_group": lambda: fl.sigmoid_loss(pairs(), LABEL, row_group=LABEL),
    "sigmoid_loss: row_group: expected given with column_group": lambda: fl.sigmoid_loss(pairs(), column_group=LABEL),
    "sigmoid_loss: reduction": lambda: fl.sigmoid_loss(pairs(), reduction="avg"),
    "sigmoid_loss: row_weight": lambda: fl.sigmoid_loss(pairs(), row_weight=torch.ones(5)),
    r"sigmoid_loss: target\[0\] = 9 is out of range": lambda: fl.sigmoid_loss(pairs(), LABEL + 9),
    "info_nce_loss: target: expected an integer": lambda: fl.info_nce_loss(pairs(), torch.rand(6)),
    "info_nce_loss: target: expected shape": lambda: fl.info_nce_loss(pairs(), LABEL[1:]),
    "info_nce_loss: column_group: expected given where N ≠ M": lambda: fl.info_nce_loss(pairs(), row_group=LABEL),
    "info_nce_loss: column_group: expected shape": lambda: fl.info_nce_loss(
        pairs(), row_group=LABEL, column_group=LABEL
    ),
    "info_nce_loss: row_group: expected integers": lambda: fl.info_nce_loss(pairs(6, 6), row_group=LABEL.float()),
    "info_nce_loss: row_group: expected an integer tensor": lambda: fl.info_nce_loss(pairs(6, 6), row_group=[0] * 6),
    r"info_nce_loss: target\[0\] = 9 is out": lambda: fl.info_nce_loss(pairs(6, 6), LABEL + 9, row_group=LABEL),
    "clip_loss: scores: expected as many rows": lambda: fl.clip_loss(pairs()),
    "clip_loss: scores: expected similarity_scores": lambda: fl.clip_loss(None),
    "nt_xent_loss: scores: expected an even number": lambda: fl.nt_xent_loss(itself(5)),
    "nt_xent_loss: target: expected shape": lambda: fl.nt_xent_loss(itself(6), LABEL[1:]),
    r"nt_xent_loss: target\[5\] = 6 is out of range": lambda: fl.nt_xent_loss(itself(6), LABEL + 1),
    "supcon_loss: form": lambda: fl.supcon_loss(itself(), LABEL, form="both"),
    "supcon_loss: label: expected shape": lambda: fl.supcon_loss(itself(), LABEL[1:]),
    "supcon_loss: label: expected integers": lambda: fl.supcon_loss(itself(), LABEL.float()),
    "supcon_loss: column_label": lambda: fl.supcon_loss(pairs(), LABEL),
    "supcon_loss: temperature_ratio": lambda: fl.supcon_loss(itself(), LABEL, temperature_ratio=0.0),
    "bixse_loss: grade: expected a floating": lambda: fl.bixse_loss(pairs(), LABEL),
    "bixse_loss: grade: expected shape": lambda: fl.bixse_loss(pairs(), torch.rand(5)),
    "bixse_loss: target: expected columns": lambda: fl.bixse_loss(pairs(), torch.rand(5), LABEL[1:]),
    r"bixse_loss: target\[0, 1\] = 9": lambda: fl.bixse_loss(
        pairs(), torch.rand(6, 2), torch.stack([LABEL, LABEL + 9], 1)
    ),
    "bixse_loss: divisor": lambda: fl.bixse_loss(pairs(), torch.rand(6), divisor="N"),
    "bixse_loss: reduction": lambda: fl.bixse_loss(pairs(), torch.rand(6), reduction="avg"),
    "soft_info_nce_loss: teacher: expected (6, 9) scores": lambda: fl.soft_info_nce_loss(pairs(), itself()),
    "soft_info_nce_loss: teacher: expected similarity_scores": lambda: fl.soft_info_nce_loss(pairs(), None),
    "soft_info_nce_loss: alpha: expected a number": lambda: fl.soft_info_nce_loss(
        pairs(6, 6), itself(), alpha=torch.ones(())
    ),
    "soft_info_nce_loss: beta": lambda: fl.soft_info_nce_loss(pairs(3, 3), itself(3), beta=0.4),
    "soft_info_nce_loss: scores: expected each row": lambda: fl.soft_info_nce_loss(pairs(9, 6), torch.rand(9, 6)),
    "cwcl_loss: scores: expected as many rows": lambda: fl.cwcl_loss(pairs(), torch.rand(6, 3)),
    "cwcl_loss: teacher: expected (6, D_u)": lambda: fl.cwcl_loss(pairs(6, 6), torch.rand(5, 3)),
    "cwcl_loss: teacher: expected embeddings": lambda: fl.cwcl_loss(pairs(6, 6), LABEL),
    "cwcl_loss: scores: expected similarity_scores": lambda: fl.cwcl_loss(
        fl.linear_scores(X, X, softcap=3.0), torch.rand(6, 3)
    ),
    "orthogonal_projection_loss: form": lambda: fl.orthogonal_projection_loss(itself(), LABEL, form="square"),
    "orthogonal_projection_loss: gamma": lambda: fl.orthogonal_projection_loss(itself(), LABEL, gamma=-1.0),
    "orthogonal_projection_loss: label": lambda: fl.orthogonal_projection_loss(itself(), LABEL[1:]),
}


@pytest.mark.host
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_function_and_argument(message):
    pattern = message if "\\" in message else re.escape(message)
    with pytest.raises((ValueError, TypeError, IndexError), match="^" + pattern):
        ERRORS[message]()


@pytest.mark.parametrize("module", PAIR_LOSSES, ids=name_of)
def test_every_pair_loss_is_public_and_cites_its_source(module):
    name, function = name_of(module), function_of(module)
    assert getattr(fl, name) is function
    assert module.SCORES in ("pair", "self", "classes")
    assert re.search(r"\d{4},\s+arXiv\s+\d{4}\.\d{4,5}", function.__doc__), "authors, title, year, arXiv id"
    assert len(Path(module.__file__).read_text().splitlines()) <= 100
