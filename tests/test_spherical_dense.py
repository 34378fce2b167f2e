"""Spherical losses of a layer with a dense weight: against the same losses on dense scores, in every combination."""

import copy
import pickle
import re

import pytest
import torch
from tolerance import FACTOR, error

import fusedloss as fl
from fusedloss.spherical import Linear, linear_loss
from fusedloss.spherical.exact import exact
from fusedloss.spherical.gram import Gram

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ROWS, WIDTH, CLASSES = 24, 9, 41
LOSSES = {
    "z": (fl.nn.SphericalZLoss, {"a": 2.0, "b": 1.5}),
    "taylor": (fl.nn.TaylorSoftmaxLoss, {}),
    "spherical": (fl.nn.SphericalSoftmaxLoss, {"eps": 0.1}),
    "mse": (fl.nn.SquaredErrorLoss, {"value": 3.0, "k": 2.0}),
}
EVERY = pytest.mark.parametrize("name", LOSSES)


def make(name, **more):
    cls, options = LOSSES[name]
    return cls(**options, **more)


def operands(dtype=F64, rows=ROWS, width=WIDTH, classes=CLASSES, several=None):
    h, w, b = torch.randn(rows, width), torch.randn(classes, width), torch.randn(classes)
    shape = (rows,) if several is None else (rows, several)
    target = torch.rand(rows, classes).argsort(1)[:, : several or 1].reshape(shape)
    return *(x.to(dtype).requires_grad_() for x in (h, w, b)), target


def on_scores(h, w, target, loss, bias=None, row_weight=None):
    """The same loss of dense scores in plain autograd."""
    scores = h @ w.t() if bias is None else h @ w.t() + bias
    return loss(scores, target, row_weight=row_weight)


def compare(got, truth, wanted, bound=1e-12):
    assert got.shape == truth.shape and error(got, truth) <= bound, "loss"
    upstream = torch.rand_like(truth)
    for x, g, t in zip(wanted, *(torch.autograd.grad(v, wanted, upstream) for v in (got, truth))):
        assert g.dtype == x.dtype and error(g, t) <= bound, tuple(x.shape)


# --- against dense scores ---------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [4, 24], ids=["few rows", "many rows"])
@pytest.mark.parametrize("several", [None, 1, 3])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_everything_at_once(name, reduction, rows, several, with_bias):
    """Leading shape, ignored rows and paddings, class weights (one of them 0), row weights; both forms of dW."""
    h, w, b, target = operands(rows=rows, several=several)
    target.reshape(rows, -1)[1, 0] = -7
    target[2] = -7
    class_weight = torch.rand(CLASSES, dtype=F64)
    class_weight[target.reshape(rows, -1)[0, 0]] = 0.0
    loss = make(name, weight=class_weight, ignore_index=-7, reduction=reduction)
    row_weight = torch.rand(rows, dtype=F64).requires_grad_()
    leading = (2, rows // 2)
    given = target.reshape(*leading, *target.shape[1:])
    bias = b if with_bias else None
    more = dict(bias=bias, row_weight=row_weight.view(leading))
    wanted = (h, w, row_weight, *[b][: int(with_bias)])
    got = linear_loss(h.view(*leading, WIDTH), w, given, loss, **more)
    truth = on_scores(h.view(*leading, WIDTH), w, given, loss, **more)
    compare(got, truth, wanted)
    assert torch.autograd.grad(linear_loss(h, w, target, loss, bias=bias).sum(), h)[0][2].eq(0).all()


@EVERY
@pytest.mark.parametrize("trained", ["h", "w", "b", "hw", "wb"])
def test_only_what_is_trained(name, trained):
    h, w, b, target = operands()
    for key, x in (("h", h), ("w", w), ("b", b)):
        x.requires_grad_(key in trained)
    wanted = [x for x in (h, w, b) if x.requires_grad]
    compare(linear_loss(h, w, target, make(name), bias=b), on_scores(h, w, target, make(name), b), wanted)


@EVERY
def test_one_row_of_no_leading_dimension(name):
    h, w, _, target = operands(rows=1)
    for y in (target[0], torch.tensor([3, 0])):
        compare(linear_loss(h[0], w, y, make(name)), on_scores(h[0], w, y, make(name)), (h, w))


def test_many_blocks_of_every_kind(monkeypatch):
    """Rows of W and of h in blocks that do not divide them, a Gram matrix in panels, a pivot far from the mean."""
    from fusedloss.spherical import gram, weight_gradient

    for module in (gram, weight_gradient):
        monkeypatch.setattr(module, "block_rows", lambda *_: 7)
    monkeypatch.setattr(gram, "PANELS_FROM", 5)
    monkeypatch.setattr(gram, "SAMPLE", 2)
    for rows in (3, ROWS):
        for b in (None, torch.randn(CLASSES, dtype=F64, requires_grad=True)):
            h, w, _, target = operands(rows=rows, several=2)
            wanted = [x for x in (h, w, b) if x is not None]
            compare(
                linear_loss(h, w, target, make("taylor"), bias=b), on_scores(h, w, target, make("taylor"), b), wanted
            )


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_layout(layout):
    _, _, b, target = operands()
    h = torch.randn(WIDTH, ROWS, dtype=F64).t().requires_grad_()
    w = {
        "transposed": torch.randn(WIDTH, CLASSES, dtype=F64).t(),
        "strided": torch.randn(CLASSES, 2 * WIDTH, dtype=F64)[:, ::2],
        "expanded": torch.randn(CLASSES, 1, dtype=F64).expand(-1, WIDTH),
    }[layout].requires_grad_()
    compare(linear_loss(h, w, target, make("z"), bias=b), on_scores(h, w, target, make("z"), b), (h, w, b))


@EVERY
@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_counts(name, rows):
    h, w, b, _ = operands(rows=rows)
    for shape in ((rows,), (rows, 3)):
        target = torch.full(shape, -100)
        for bad in (False, True):
            with torch.no_grad():
                h.fill_(torch.nan if bad else 1.0)
            loss = linear_loss(h, w, target, make(name), bias=b)
            assert loss == 0
            assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (h, w, b)))
            assert linear_loss(h, w, target, make(name, reduction="none"), bias=b).eq(torch.zeros(rows)).all()
        assert linear_loss(h, w * torch.nan, target, make(name), bias=b) == 0


def test_an_ignored_row_may_hold_anything():
    h, w, b, target = operands()
    target[4] = -100
    with torch.no_grad():
        h[4] = torch.tensor([torch.nan, torch.inf] * 4 + [1e308])
    loss = make("taylor")
    got = torch.autograd.grad(linear_loss(h, w, target, loss, bias=b), (h, w, b))
    rest = torch.arange(ROWS) != 4
    truth = torch.autograd.grad(on_scores(h[rest], w, target[rest], loss, b), (h, w, b))
    assert got[0][4].eq(0).all()
    for g, t in zip((got[0][rest], *got[1:]), (truth[0][rest], *truth[1:])):
        assert error(g, t) < 1e-12


def test_examples_without_variance():
    """h = 0, and a weight whose rows are all the same: nothing is pushed by the Z-loss."""
    h, w, _, target = operands()
    same = torch.ones(CLASSES, WIDTH, dtype=F64, requires_grad=True)
    for x, y in ((torch.zeros_like(h).requires_grad_(), w), (h, same)):
        loss = linear_loss(x, y, target, make("z"))
        assert error(loss, torch.nn.functional.softplus(torch.tensor(3.0, dtype=F64)) / 2) < 1e-12
        assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (x, y)))


@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_far_from_zero(with_bias):
    """Shift of all classes' rows by 4096: the Z-loss sees none of it, and keeps its digits in float32."""
    h = torch.randint(-8, 8, (ROWS, WIDTH)) / 8.0
    w, b = torch.randint(-16, 16, (CLASSES, WIDTH)) / 8.0, torch.randint(-16, 16, (CLASSES,)) / 8.0
    target = torch.randint(0, CLASSES, (ROWS,))
    near = [x.double().requires_grad_() for x in (h, w, b)]
    far = [h.requires_grad_(), (w + 4096).requires_grad_(), (b - 4096).requires_grad_()]
    losses = []
    for x, weight, bias in (near, far):
        loss = linear_loss(x, weight, target, make("z"), bias=bias if with_bias else None)
        losses.append((loss, *torch.autograd.grad(loss, (x, weight))))
    for got, truth in zip(losses[1], losses[0]):
        assert error(got, truth) < 2e-6


# --- precision --------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rows", [8, 200], ids=["few rows", "many rows"])
@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["", "shifted"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_no_worse_than_float32_scores_rounded_once(name, dtype, rows, shift, with_bias):
    h = torch.randn(rows, 32).to(dtype).requires_grad_()
    w = ((torch.randn(2000, 32) + shift) / 4).to(dtype).requires_grad_()
    b = torch.randn(2000).to(dtype).requires_grad_() if with_bias else None
    target = torch.randint(0, 2000, (rows,))
    inputs = [x for x in (h, w, b) if x is not None]

    def run(kind):
        loss = make(name, reduction="sum")
        if kind == "ours":
            return (value := linear_loss(h, w, target, loss, bias=b)), torch.autograd.grad(value, inputs)
        wide = [x.detach().to(kind).requires_grad_() for x in inputs]
        value = on_scores(*wide[:2], target, loss, *wide[2:])
        found = torch.autograd.grad(value, wide)
        return value, [g if kind == F64 else g.to(dtype) for g in found]

    (got, grads), (honest, rough), (truth, exact) = run("ours"), run(F32), run(F64)
    assert got.dtype == F32 and error(got, truth) <= FACTOR * error(honest, truth) + 1e-6
    for x, g, r, t in zip(inputs, grads, rough, exact):
        assert g.dtype == dtype and error(g, t) <= FACTOR * error(r, t) + 1e-6, tuple(x.shape)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [30, 300], ids=["few rows", "many rows"])
def test_wide_layers_on_every_backend(backend, dtype, rows):
    """Gram matrices in panels, several blocks, sums that only the last columns show."""
    h, w, _, target = operands(dtype, rows=rows, width=261, classes=3000)
    wide = [x.detach().double().requires_grad_() for x in (h, w)]
    loss, truth = linear_loss(h, w, target, make("taylor")), on_scores(*wide, target, make("taylor"))
    assert error(loss, truth) < 1e-6
    bound = 2e-6 if dtype == F32 else 3e-3
    for g, t in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(truth, wide)):
        assert error(g, t) < bound and error(g[..., -5:], t[..., -5:]) < bound


@pytest.mark.parametrize("kinds", [(BF16, F32), (F32, BF16), (F64, F32), (F16, F64)], ids=str)
def test_features_of_another_type_than_the_weight(kinds):
    h, w, b = torch.randn(ROWS, WIDTH), torch.randn(CLASSES, WIDTH), torch.randn(CLASSES)
    inputs = [x.to(kind).requires_grad_() for x, kind in zip((h, w, b), (*kinds, F32))]
    target = torch.randint(0, CLASSES, (ROWS,))
    loss = linear_loss(*inputs[:2], target, make("taylor"), bias=inputs[2])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = on_scores(*wide[:2], target, make("taylor"), wide[2])
    assert loss.dtype == (F64 if kinds[1] == F64 else F32) and error(loss, truth) < 1e-6
    for x, g, t in zip(inputs, torch.autograd.grad(loss, inputs), torch.autograd.grad(truth, wide)):
        assert g.dtype == x.dtype and error(g, t) < {BF16: 5e-3, F16: 1e-3}.get(x.dtype, 1e-6)


def test_neither_autocast_nor_low_precision_products():
    h, w, b, target = operands(F32, width=40)
    truth = linear_loss(h, w, target, make("z"), bias=b)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(h.device.type, torch.bfloat16):
            got = linear_loss(h, w, target, make("z"), bias=b)
            grads = torch.autograd.grad(got, (h, w, b))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, truth)
    for g, t in zip(grads, torch.autograd.grad(truth, (h, w, b))):
        assert torch.equal(g, t)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_products_are_exact_and_the_settings_come_back(kind):
    owner = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}[kind]
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("medium", "highest"):
            torch.set_float32_matmul_precision(setting)
            outside = owner.fp32_precision
            with pytest.raises(KeyError), exact(torch.device(kind)):
                assert owner.fp32_precision == "ieee"
                raise KeyError
            assert owner.fp32_precision == outside and torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


# --- derivatives again ------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("several", [None, 2])
def test_derivatives_by_differences(name, several):
    h, w, b, target = operands(rows=4, width=2, classes=6, several=several)
    target.view(4, -1)[1, -1] = -100
    row_weight = torch.rand(4, dtype=F64, requires_grad=True)

    def loss(h, w, b, row_weight):
        return linear_loss(h, w, target, make(name), bias=b, row_weight=row_weight)

    assert torch.autograd.gradcheck(loss, (h, w, b, row_weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (h, w, b, row_weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda h: loss(h, w.detach(), b, row_weight), h, fast_mode=True)


def test_one_input_made_from_the_other():
    """Second derivatives where h depends on the weight."""
    _, w, _, target = operands()

    def twice(loss_of):
        h = torch.tanh(w[:ROWS])
        (first,) = torch.autograd.grad(loss_of(h, w, target, make("taylor")), w, create_graph=True)
        return torch.autograd.grad(first.square().sum(), w)[0]

    assert error(twice(linear_loss), twice(on_scores)) < 1e-11


def test_several_backwards():
    h, w, b, target = operands(F32)
    loss = linear_loss(h, w, target, make("z"), bias=b)
    first = [g.clone() for g in torch.autograd.grad(loss, (h, w, b), torch.tensor(3.0), retain_graph=True)]
    again = torch.autograd.grad(loss, (h, w, b), torch.tensor(3.0), retain_graph=True)
    assert all(torch.equal(a, g) for a, g in zip(again, first))
    plain = torch.autograd.grad(loss, (h, w, b), torch.tensor(3.0), create_graph=True)
    assert all(error(p, g) < 1e-5 for p, g in zip(plain, first))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.detach().mul_(2)
        torch.autograd.grad(loss, (h, w, b))


@pytest.mark.unpoisoned
def test_compiled_with_a_break():
    h, w, b, target = operands(F32)
    step = torch.compile(lambda h: linear_loss(torch.tanh(h), w, target, make("z"), bias=b) * 2, backend="aot_eager")
    for g, t in zip(
        torch.autograd.grad(step(h), (h, w)), torch.autograd.grad(step._torchdynamo_orig_callable(h), (h, w))
    ):
        assert error(g, t) < 1e-6


# --- the layer --------------------------------------------------------------------------------------------------------


def layers(name="z", dtype=F64, **more):
    head = Linear(WIDTH, CLASSES, make(name), dtype=dtype, **more)
    dense = torch.nn.Linear(WIDTH, CLASSES, dtype=dtype, bias=head.bias is not None)
    dense.load_state_dict({k: v.clone() for k, v in head.state_dict().items() if not k.startswith("loss")})
    return head, dense


@EVERY
@pytest.mark.parametrize("optimizer", ["adam", "fused adam", "data", "sgd"])
def test_training_as_of_dense_scores(name, optimizer):
    """Twenty steps, also by updates that no version counter tells of."""
    head, dense = layers(name)
    loss = make(name)

    def made(parameters):
        if "adam" in optimizer:
            return torch.optim.Adam(parameters, 0.05, fused=optimizer == "fused adam")
        return torch.optim.SGD(parameters, 0.05)

    steps = made(head.parameters()), made(dense.parameters())
    before = head.weight.detach().clone()
    for _ in range(20):
        h, target = torch.randn(ROWS, WIDTH, dtype=F64), torch.randint(0, CLASSES, (ROWS,))
        values = head(h, target), loss(dense(h), target)
        assert error(*values) < 1e-9
        for layer, step, value in zip((head, dense), steps, values):
            step.zero_grad()
            value.backward()
            if optimizer == "data":
                for p in layer.parameters():
                    p.data.sub_(p.grad, alpha=0.05)
            else:
                step.step()
    assert error(head.weight, dense.weight) < 1e-9 and error(head.bias, dense.bias) < 1e-9
    assert error(head.weight, before) > 1e-3


@pytest.fixture
def passes(monkeypatch):
    """How many Gram matrices were made."""
    made, plain = [], Gram.of.__func__

    def counted(cls, *arguments):
        made.append(1)
        return plain(cls, *arguments)

    monkeypatch.setattr(Gram, "of", classmethod(counted))
    return made


def test_frozen_weight(passes):
    head, dense = layers()
    loss = make("z")
    h, target = torch.randn(3, ROWS, WIDTH, dtype=F64, requires_grad=True), torch.randint(0, CLASSES, (3, ROWS))
    with head.frozen_weight():
        assert not passes
        for part, at in zip(h, target):
            head(part, at).backward()
        with head.frozen_weight():
            head(h[0].detach(), target[0])
        head(h[0].detach(), target[0])
        assert len(passes) == 1, "nested blocks share a matrix"
    got, h.grad = h.grad, None
    for part, at in zip(h, target):
        loss(dense(part), at).backward()
    for g, t in ((got, h.grad), (head.weight.grad, dense.weight.grad), (head.bias.grad, dense.bias.grad)):
        assert error(g, t) < 1e-12
    with torch.no_grad():
        head.weight.mul_(1.5)
    assert error(head(h[0], target[0]), loss(h[0] @ head.weight.t() + head.bias, target[0])) < 1e-12
    assert len(passes) == 2


def test_frozen_weight_that_changes():
    head, _ = layers()
    h, target = torch.randn(ROWS, WIDTH, dtype=F64), torch.randint(0, CLASSES, (ROWS,))
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="^Linear: weight: .*frozen_weight"), head.frozen_weight():
        head(h, target).backward()
        optimizer.step()
        head(h, target)
    assert error(head(h, target), make("z")(h @ head.weight.t() + head.bias, target)) < 1e-12, "an error thaws it"


def test_copies_are_not_frozen(passes):
    head, _ = layers()
    h, target = torch.randn(ROWS, WIDTH, dtype=F64), torch.randint(0, CLASSES, (ROWS,))
    with head.frozen_weight():
        head(h, target)
        copies = copy.deepcopy(head), pickle.loads(pickle.dumps(head))
    for other in copies:
        with torch.no_grad():
            other.weight.add_(1.0)
        assert error(other(h, target), make("z")(h @ other.weight.t() + other.bias, target)) < 1e-12
    assert len(passes) == 3


def test_module():
    head = Linear(WIDTH, CLASSES)
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {"weight": (CLASSES, WIDTH), "bias": (CLASSES,)}
    assert isinstance(head.loss, fl.nn.SphericalZLoss) and "in_features=9, out_features=41, bias=True" in repr(head)
    assert Linear(WIDTH, CLASSES, bias=False, dtype=BF16).weight.dtype == BF16
    assert head(torch.randn(0, WIDTH), torch.zeros(0, dtype=torch.int64)) == 0
    weighted = Linear(WIDTH, CLASSES, fl.nn.TaylorSoftmaxLoss(weight=torch.rand(CLASSES), reduction="sum"))
    h, target = torch.randn(2, 3, WIDTH), torch.randint(0, CLASSES, (2, 3))
    truth = on_scores(h, weighted.weight, target, weighted.loss, weighted.bias, torch.full((2, 3), 2.0))
    assert error(weighted(h, target, row_weight=torch.full((2, 3), 2.0)), truth) < 1e-6


def test_a_trained_class_weight():
    h, w, b, target = operands()
    weight = torch.nn.Parameter(torch.rand(CLASSES, dtype=F64))
    loss = make("taylor", weight=weight)
    compare(linear_loss(h, w, target, loss, bias=b), on_scores(h, w, target, loss, b), (h, w, b, weight))
    with pytest.raises(TypeError, match="^linear_loss: loss.weight"):
        linear_loss(h, w, target[:, None], loss)


def test_no_copy_of_the_weight_and_no_scores(monkeypatch):
    """Nothing of the weight's size is made but its gradient, in the forward nothing at all."""
    from fusedloss.spherical import gram, weight_gradient

    for module in (gram, weight_gradient):
        monkeypatch.setattr(module, "block_rows", lambda *_: 64)
    h, w = torch.randn(100, 16, requires_grad=True), torch.randn(4000, 16, requires_grad=True)
    target = torch.randint(0, 4000, (100,))
    large = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= w.nbytes // 4:
                    large[x.untyped_storage().data_ptr()] = x
            return out

    with Watch():
        loss = linear_loss(h, w, target, make("z"))
        assert set(large) <= {w.data_ptr()}
        _, gradient = torch.autograd.grad(loss, (h, w))
    assert set(large) <= {w.data_ptr(), gradient.data_ptr()}


ERRORS = [
    (lambda h, w, b, y: (h[:, 1:], w, y, make("z")), {}, ValueError, "h: expected (*leading, 9)"),
    (lambda h, w, b, y: (h.long(), w, y, make("z")), {}, TypeError, "h: expected float64"),
    (lambda h, w, b, y: (h, w[0], y, make("z")), {}, ValueError, "weight: expected a tensor (n, d)"),
    (lambda h, w, b, y: (h, w[:1], y * 0, make("z")), {}, ValueError, "weight: expected at least two classes"),
    (lambda h, w, b, y: (h, w, y, make("z")), {"bias": torch.ones(3)}, ValueError, "bias: expected (41,)"),
    (lambda h, w, b, y: (h, w, y, fl.nn.FocalLoss()), {}, TypeError, "loss: expected one of"),
    (lambda h, w, b, y: (h, w, y, make("z", weight=torch.ones(3))), {}, ValueError, "loss.weight: expected (41,)"),
    (lambda h, w, b, y: (h, w, y, make("z", reduction="max")), {}, ValueError, "reduction: max is not"),
    (lambda h, w, b, y: (h, w, y[1:], make("z")), {}, ValueError, "target: expected shape (24,)"),
    (lambda h, w, b, y: (h, w, y.float(), make("z")), {}, TypeError, "target: expected an integer tensor"),
    (
        lambda h, w, b, y: (h, w, y, make("z")),
        {"row_weight": torch.ones(2)},
        ValueError,
        "row_weight: expected shape (24,)",
    ),
    (lambda h, w, b, y: (h, w, y, fl.nn.SphericalZLoss(a=0.0)), {}, ValueError, "a: expected"),
    (lambda h, w, b, y: (h, w, y, make("z")), {"gram": 3}, ValueError, "gram: expected Gram.of"),
]


@pytest.mark.parametrize("arguments, more, kind, text", ERRORS, ids=[e[3][:16] for e in ERRORS])
def test_errors(arguments, more, kind, text):
    with pytest.raises(kind, match=rf"\w+: {re.escape(text)}"):
        linear_loss(*arguments(*operands()), **more)


@pytest.mark.host
def test_errors_of_targets_and_of_the_layer():
    h, w, _, target = operands()
    target[3] = CLASSES
    with pytest.raises(IndexError, match=rf"^Linear: target\[3\] = {CLASSES} is out of range"):
        Linear(WIDTH, CLASSES, dtype=F64)(h, target)
    with pytest.raises(ValueError, match="^Linear: out_features: expected at least two classes"):
        Linear(WIDTH, 1)
    with pytest.raises(TypeError, match="^Linear: loss: expected one of"):
        Linear(WIDTH, CLASSES, torch.nn.CrossEntropyLoss())
