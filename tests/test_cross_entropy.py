"""cross_entropy and linear_cross_entropy against torch.nn.functional: same values, gradients and errors.

Chosen deviations are listed in docs/numerics.md; the tests of the last part hold one each.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerance import check, check_linear_gradients, check_loss, check_score_gradient

import fusedloss
from fusedloss import cross_entropy, linear_cross_entropy, linear_scores, logits_scores
from fusedloss.losses.cross_entropy import reference

INF = torch.inf
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]

# --- what is compared ------------------------------------------------------------------------------------------------


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@st.composite
def arguments(draw, half=True):
    """Everything that both functions' torch originals take, without the scores."""
    dtype = draw(st.sampled_from(DTYPES if half else DTYPES[:2]))
    layout = draw(st.sampled_from(["1d", "2d", "2d", "kd"]))
    rows = 1 if layout == "1d" else draw(st.integers(0, 6))
    extra = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))) if layout == "kd" else ()
    classes = draw(st.integers(1, 9))
    g = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 10**6)))
    leading = () if layout == "1d" else (rows, *extra)
    probable = draw(st.booleans()) and draw(st.booleans())
    options = {
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
    }
    weight = draw(st.sampled_from([None, None, "random", "zeros"]))
    if weight:
        options["weight"] = torch.rand(classes, generator=g, dtype=torch.float64).to(wide(dtype))
        if weight == "zeros":
            options["weight"][torch.rand(classes, generator=g) < 0.5] = 0
    if probable:
        target = torch.rand(*leading, classes, generator=g, dtype=torch.float64).softmax(-1)
        target = target.movedim(-1, 0 if layout == "1d" else 1).to(wide(dtype))
    else:
        kind = draw(st.sampled_from([torch.int64, torch.int64, torch.int32, torch.int16, torch.uint8]))
        target = torch.randint(0, classes, leading, generator=g)
        ignored = draw(st.sampled_from([None, -100, -1, 0, classes - 1, classes + 5]))
        if ignored is not None:
            options["ignore_index"] = ignored
            share = draw(st.sampled_from([0.0, 0.3, 1.0]))
            if kind != torch.uint8 or ignored >= 0:
                target = torch.where(torch.rand(leading, generator=g) < share, ignored, target)
        target = target.to(kind)
    return SimpleNamespace(
        dtype=dtype, layout=layout, rows=rows, extra=extra, classes=classes, g=g, leading=leading, probable=probable,
        options=options, target=target, weights=weight,
    )  # fmt: skip


def plain_target(target):
    return target if target.is_floating_point() else target.long()


def undefined(a):
    """Whether torch's mean is 0/0: no row counts, or only rows of weight 0. Ours is 0 there."""
    if a.options["reduction"] != "mean":
        return False
    if a.probable:
        return math.prod(a.leading) == 0
    counts = a.target != a.options.get("ignore_index", -100)
    weight = a.options.get("weight")
    safe = torch.where(counts, a.target.long(), 0)
    return not (counts if weight is None else counts * weight[safe]).any()


def laid_out(tensor, how):
    """The same numbers in another memory layout."""
    if how == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if how == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor


layouts = st.sampled_from(["plain", "transposed", "strided"])


def torchs_linear(x, w, target, *, linear_bias=None, **options):
    """torch's linear_cross_entropy, or where torch has none yet (2.11) its meaning: cross_entropy of all the scores."""
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(x, w, target, linear_bias=linear_bias, **options)
    scores = torch.einsum("...d,vd->...v" if w.dim() == 2 else "nd,v...d->nv...", x, w)
    return F.cross_entropy(scores if linear_bias is None else scores + linear_bias, target, **options)


def with_gradients(function, leaves, reduction):
    """Value, and gradients of its sum with a different factor for every entry."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in leaves]
    value = function(*leaves)
    factor = (torch.arange(value.numel(), dtype=torch.float64) + 1).cos().reshape(value.shape) * 1.7
    return value, torch.autograd.grad((value * factor.to(value.dtype)).sum(), leaves)


def compare(got, truth, tolerance, what):
    assert torch.equal(got.isinf(), truth.isinf()), f"{what}: {got} for {truth}"
    torch.testing.assert_close(
        got.double(), truth.double(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
    )


def compare_gradients(got, truth, dtype, size, rounding=0.0):
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    tiny = 1e-7 if dtype == torch.float16 else 1e-12 if dtype == torch.float64 else 1e-7
    scale = max(1.0, size) if dtype != torch.float64 else 1.0
    for name, (a, b) in got_and_truth(got, truth).items():
        assert a.dtype == dtype and a.isfinite().all()
        b = torch.where(b.isnan(), a.double(), b)  # torch's ignored rows, when all their classes are masked
        largest = b.abs().max().item() if b.numel() else 0.0
        atol = tiny + largest * tolerance + 2e-7 * scale + rounding
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=atol, msg=lambda m: f"{name}: {m}")


def got_and_truth(got, truth):
    return dict(zip(("first input's gradient", "weight's gradient", "bias' gradient"), zip(got, truth)))


# --- given logits ----------------------------------------------------------------------------------------------------


@given(arguments(), st.sampled_from(["usual", "huge", "masked"]), layouts)
def test_cross_entropy_is_torchs(backend, a, regime, layout):
    z = 2 * torch.randn(*a.leading, a.classes, generator=a.g, dtype=torch.float64)
    if regime == "huge":
        z = z.sign() * 1e4 + z
    if regime == "masked" and not a.probable:
        mask = torch.rand(z.shape, generator=a.g) < 0.3
        hit = torch.where(a.target.long() >= 0, a.target.long(), 0).clamp(max=a.classes - 1)
        z = z.masked_fill(mask.scatter(-1, hit.unsqueeze(-1), False), -INF)
    z = laid_out(z.movedim(-1, 0 if a.layout == "1d" else 1).to(a.dtype), layout)
    got, (grad,) = with_gradients(lambda z: cross_entropy(z, a.target, **a.options), [z], a.options["reduction"])
    assert got.dtype == wide(a.dtype)
    if undefined(a):
        infinite = regime == "masked" and a.options["label_smoothing"]  # 0 · inf is NaN here as there
        assert infinite or (got == 0 and (grad == 0).all())
        return
    options = {k: v.double() if k == "weight" and v is not None else v for k, v in a.options.items()}
    exact = plain_target(a.target).double() if a.probable else plain_target(a.target)
    truth, (expected,) = with_gradients(lambda z: F.cross_entropy(z, exact, **options), [z.double()], None)
    if truth.isnan().any():  # label smoothing onto a class of weight 0 and score -inf
        assert regime == "masked" and a.weights and options["label_smoothing"] and not got.isnan().any()
        return
    # Like torch's in fp32 at 10^4 too; Σ_j y_j s_j, in the sums over all classes, rounds relative to the largest score.
    tolerance = 1e-5 if not a.probable and not options["label_smoothing"] else 1e-3 if regime == "huge" else 1e-5
    compare(got, truth, 1e-10 if a.dtype == torch.float64 else tolerance, "loss")
    compare_gradients([grad], [expected.masked_fill(z == -INF, 0.0)], a.dtype, 0.0)
    assert grad.isfinite().all() and (grad[z == -INF] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_of_score_minus_infinity_has_infinite_loss(backend, reduction, smoothing):
    z = torch.randn(3, 5)
    z[1, 2] = -INF
    target = torch.tensor([0, 2, 4])
    z.requires_grad_()
    loss = cross_entropy(z, target, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(loss, F.cross_entropy(z, target, reduction=reduction, label_smoothing=smoothing))
    loss.sum().backward()
    assert z.grad.isfinite().all() and z.grad[1, 2] == 0  # torch: -1 there, though no score below -inf exists
    theirs = z.detach().requires_grad_()
    F.cross_entropy(theirs, target, reduction=reduction, label_smoothing=smoothing).sum().backward()
    finite = z.detach() != -INF
    torch.testing.assert_close(z.grad[finite], theirs.grad[finite])


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("classes", [200, 300, 40000, 70000])
def test_narrow_targets_do_not_wrap_around(kind, classes):
    """-100 is 156 in uint8, and 300 classes are 44."""
    z, target = torch.randn(4, classes), torch.tensor([0, 100, 156, 199])
    torch.testing.assert_close(cross_entropy(z, target.to(kind)), F.cross_entropy(z, target))


@pytest.mark.parametrize(
    "legacy", [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": False}]
)
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_arguments(legacy):
    z, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
    torch.testing.assert_close(cross_entropy(z, target, **legacy), F.cross_entropy(z, target, **legacy))


def test_positional_arguments_stand_in_torchs_order():
    z, target, weight = torch.randn(4, 5), torch.tensor([0, 1, 3, 4]), torch.rand(5)
    given_ = (z, target, weight, None, 3, None, "sum", 0.2)
    torch.testing.assert_close(cross_entropy(*given_), F.cross_entropy(*given_))


# --- linear scores ---------------------------------------------------------------------------------------------------


@given(
    arguments(),
    st.integers(0, 5),
    st.sampled_from(["usual", "huge", "masked"]),
    st.booleans(),
    layouts,
    st.sampled_from(["eager", "recompute", "auto"]),
)
def test_linear_cross_entropy_is_torchs(backend, a, width, regime, biased, layout, schedule):
    a.options.pop("ignore_index", None) if a.probable else None
    x = torch.randn(*(() if a.layout == "1d" else (a.rows,)), width, generator=a.g, dtype=torch.float64)
    w = torch.randn(a.classes, *a.extra, width, generator=a.g, dtype=torch.float64)
    if regime == "huge" and width:
        w *= 1e3
    bias = torch.randn(a.classes, *a.extra, generator=a.g, dtype=torch.float64)
    if regime == "masked" and not a.probable and not a.options["label_smoothing"]:
        free = torch.ones(a.classes, dtype=torch.bool)
        free[a.target[(a.target >= 0) & (a.target < a.classes)].long().unique()] = False
        bias[free] = -INF  # how classes are masked in a linear layer
    leaves = [laid_out(t.to(a.dtype), layout) for t in ([x, w, bias] if biased else [x, w])]

    def ours(x, w, bias=None):
        return linear_cross_entropy(
            x, w, a.target, linear_bias=bias, schedule=schedule, memory_budget=1 << 14, **a.options
        )

    options = {k: v.double() if k == "weight" and v is not None else v for k, v in a.options.items()}
    exact = plain_target(a.target).double() if a.probable else plain_target(a.target)

    def torchs(x, w, bias=None):
        return torchs_linear(x, w, exact, linear_bias=bias, **options)

    got, grads = with_gradients(ours, leaves, None)
    assert got.dtype == wide(a.dtype)
    if undefined(a):
        assert got == 0 and all((g == 0).all() for g in grads)
        return
    truth, expected = with_gradients(torchs, [t.double() for t in leaves], None)
    size = 1e4 if regime == "huge" else 10.0
    assert not truth.isnan().any()
    compare(got, truth, 1e-10 if a.dtype == torch.float64 else 1e-6 * max(1, size / 100), "loss")
    # Sums of rounded score gradients may cancel; how well they are rounded is the tolerance policy's business, below.
    terms = (a.classes + a.rows) * max(1, math.prod(a.extra))
    largest = max((t.abs().max().item() for t in leaves if t.numel() and t.isfinite().all()), default=1.0)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(a.dtype, 0.0) * terms**0.5 * largest
    compare_gradients(grads, expected, a.dtype, 0.0 if a.dtype == torch.float64 else size, 2 * rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_many_heads_are_rounded_once(backend, dtype):
    x, w = torch.randn(5, 8).to(dtype).requires_grad_(), torch.randn(11, 40, 8).to(dtype)
    target = torch.randint(0, 11, (5, 40))
    linear_cross_entropy(x, w, target).backward()
    exact = x.detach().double().requires_grad_()
    torchs_linear(exact, w.double(), target).backward()
    assert (x.grad.double() - exact.grad).norm() < {torch.bfloat16: 2**-8, torch.float16: 2**-11}[
        dtype
    ] * exact.grad.norm()


def test_options_argument_is_taken(backend):
    x, w, target = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 3, 4])
    options = getattr(torch.nn, "LinearCrossEntropyOptions", object)()
    torch.testing.assert_close(linear_cross_entropy(x, w, target, options=options), torchs_linear(x, w, target))


# --- errors ----------------------------------------------------------------------------------------------------------

Z, T, Y = torch.zeros(4, 5), torch.tensor([0, 1, 2, 4]), torch.full((4, 5), 0.2)
X, W, B = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5)
WK, TK = torch.zeros(5, 2, 3), torch.zeros(4, 2, dtype=torch.int64)
OUT = torch.tensor([0, 5, 2, 4])

BAD = {
    "target too large": ((Z, OUT), {}),
    "target negative": ((Z, -T), {}),
    "target far below": ((Z, -101 - T), {}),
    "target too short": ((Z, T[:3]), {}),
    "target too deep": ((Z, T[:, None]), {}),
    "target of bools": ((Z, T > 1), {}),
    "target of int8": ((Z, T.to(torch.int8)), {}),
    "target of floats": ((Z, T.float()), {}),
    "target of indices in the input's shape": ((Z, torch.ones(4, 5).long()), {}),
    "probabilities too short": ((Z, Y[:3]), {}),
    "target missing": ((Z, None), {}),
    "weight too short": ((Z, T, B[:4]), {}),
    "weight too deep": ((Z, T, B[None]), {}),
    "weight too short for probabilities": ((Z, Y, B[:4]), {}),
    "weight of integers": ((Z, T, B.long()), {}),
    "reduction unknown": ((Z, T), {"reduction": "average"}),
    "reduction None": ((Z, T), {"reduction": None}),
    "label_smoothing too large": ((Z, T), {"label_smoothing": 1.5}),
    "ignore_index with probabilities": ((Z, Y), {"ignore_index": 1}),
    "ignore_index of floats": ((Z, T), {"ignore_index": 1.0}),
    "input a number": ((torch.tensor(1.0), torch.tensor(0)), {}),
    "input of integers": ((Z.long(), T), {}),
    "input complex": ((Z + 0j, T), {}),
    "input of 8 bits": ((Z.to(torch.float8_e4m3fn), T), {}),
    "input a list": (([[1.0, 2.0]], T[:1]), {}),
    "no classes": ((Z[:, :0], T), {}),
}

BAD_LINEAR = {
    "target too large": ((X, W, OUT), {}),
    "target too short": ((X, W, T[:3]), {}),
    "target of bools": ((X, W, T > 1), {}),
    "target of floats": ((X, W, T.float()), {}),
    "probabilities too narrow": ((X, W, Y[:, :4]), {}),
    "target missing": ((X, W, None), {}),
    "input a number": ((torch.tensor(1.0), W, T), {}),
    "input of integers": ((X.long(), W.long(), T), {}),
    "weight a vector": ((X, W[0], T), {}),
    "widths differ": ((X, W[:, :2], T), {}),
    "types differ": ((X, W.double(), T), {}),
    "no classes": ((X, W[:0], T), {}),
    "bias too short": ((X, W, T), {"linear_bias": B[:3]}),
    "bias of integers": ((X, W, T), {"linear_bias": B.long()}),
    "class weight too short": ((X, W, T), {"weight": B[:3]}),
    "ignore_index with probabilities": ((X, W, Y), {"ignore_index": -100}),
    "reduction unknown": ((X, W, T), {"reduction": "average"}),
    "label_smoothing too large": ((X, W, T), {"label_smoothing": 1.5}),
    "argument unknown": ((X, W, T), {"bogus": 1}),
    "many heads, one row": ((X[0], WK, TK[0]), {}),
    "many heads, target of one": ((X, WK, T), {}),
    "many heads, target too large": ((X, WK, TK + 5), {}),
    "many heads, bias of one": ((X, WK, TK), {"linear_bias": B}),
    "many heads, target of floats": ((X, WK, TK.float()), {}),
    "many heads, class weight too short": ((X, WK, TK), {"weight": B[:3]}),
    "many heads, reduction unknown": ((X, WK, TK), {"reduction": "average"}),
    "many heads, label_smoothing too large": ((X, WK, TK), {"label_smoothing": 1.5}),
    "many heads, ignore_index with probabilities": ((X, WK, torch.zeros(4, 5, 2)), {"ignore_index": 2}),
}  # fmt: skip


def fails(function, torchs, positional, options):
    if torchs is not None:  # this torch has such a function
        with pytest.raises(Exception):
            torchs(*positional, **options)
    with pytest.raises((ValueError, TypeError, IndexError)) as caught:
        function(*positional, **options)
    return str(caught.value)


@pytest.mark.host
@pytest.mark.parametrize("name", BAD)
def test_errors_of_cross_entropy_are_torchs(name):
    message = fails(cross_entropy, F.cross_entropy, *BAD[name])
    assert message.startswith("cross_entropy: "), message


@pytest.mark.host
@pytest.mark.parametrize("name", BAD_LINEAR)
def test_errors_of_linear_cross_entropy_are_torchs(name):
    message = fails(linear_cross_entropy, getattr(F, "linear_cross_entropy", None), *BAD_LINEAR[name])
    assert message.startswith("linear_cross_entropy") or "unexpected keyword argument 'bogus'" in message, message


OURS_ALONE = [
    ("row_weight", {"row_weight": torch.ones(3)}),
    ("softcap", {"softcap": 0.0}),
    ("softcap", {"softcap": -3.0}),
    ("temperature", {"temperature": 0.0}),
    ("temperature", {"temperature": math.nan}),
]


@pytest.mark.parametrize(("argument", "options"), OURS_ALONE, ids=[str(o) for _, o in OURS_ALONE])
def test_errors_of_our_own_options_name_the_argument(argument, options):
    for call in (lambda: cross_entropy(Z, T, **options), lambda: linear_cross_entropy(X, W, T, **options)):
        with pytest.raises((ValueError, TypeError), match=f"{argument}: expected"):
            call()


@pytest.mark.parametrize(
    "walk", [{"memory_budget": 0}, {"schedule": "greedy"}, {"gradient_filter": -1.0}, {"backend": "abacus"}]
)
def test_errors_of_the_walk_name_the_argument(walk):
    with pytest.raises(ValueError, match=f"{next(iter(walk))}: expected"):
        linear_cross_entropy(X, W, T, **walk)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    ("shape", "place", "shown"),
    [((7,), (4,), "4"), ((3, 5), (2, 1), "2, 1"), ((2, 3, 2), (1, 0, 1), "1, 0, 1"), ((), (), "")],
)
@pytest.mark.host
def test_a_target_out_of_range_is_named_before_anything_is_computed(monkeypatch, linear, shape, place, shown):
    target = torch.zeros(shape, dtype=torch.int64)
    target[place] = 11
    for name in fusedloss.backends.BACKENDS:
        for primitive in ("gemm", "statistics", "gradient"):
            monkeypatch.setattr(name, primitive, lambda *a, **k: pytest.fail("computed something"))
    message = rf"cross_entropy: target\[{shown}\] = 11 is out of range: expected 0 <= target < 11"
    with pytest.raises(IndexError, match=message):
        if linear:
            linear_cross_entropy(torch.zeros(*shape, 3), torch.zeros(11, 3), target)
        else:
            logits = torch.zeros(*shape, 11).movedim(-1, min(len(shape), 1))
            cross_entropy(logits, target)


@pytest.mark.host
def test_a_bad_target_of_the_last_head_is_found_first(monkeypatch):
    for name in fusedloss.backends.BACKENDS:
        monkeypatch.setattr(name, "gemm", lambda *a, **k: pytest.fail("computed something"))
    target = TK.clone()
    target[3, 1] = 5
    with pytest.raises(IndexError, match=r"linear_cross_entropy: target\[3, 1\] = 5"):
        linear_cross_entropy(X, WK, target)


# --- options that torch does not have --------------------------------------------------------------------------------

EXTRA = [
    {"z_loss": 0.02},
    {"softcap": 3.0},
    {"temperature": 0.5},
    {"z_loss": 0.01, "softcap": 4.0, "temperature": 2.0},
    {"z_loss": 0.01, "label_smoothing": 0.2},
    {"z_loss": 0.03, "weight": [0.5, 0.0, 2.0, 1.0, 0.7, 1.3, 0.2]},
    {"z_loss": 0.03, "weight": [0.5, 0.0, 2.0, 1.0, 0.7, 1.3, 0.2], "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", EXTRA, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", ["all", "weighted", "ignored"])
@pytest.mark.parametrize("probable", [False, True])
def test_extra_options_follow_their_formula(backend, options, reduction, rows, probable):
    options = {k: torch.tensor(v) if k == "weight" else v for k, v in options.items()}
    x, w = torch.randn(6, 4), torch.randn(7, 4)
    target = torch.randn(6, 7).softmax(1) if probable else torch.randint(0, 7, (6,))
    row_weight = torch.rand(6) if rows == "weighted" else None
    if rows == "ignored" and not probable:
        target[2:4] = -100

    def plain(x, w):
        s = x @ w.t()
        counts = torch.ones(6, dtype=s.dtype) if probable else (target != -100).to(s.dtype)
        counts = counts if row_weight is None else counts * row_weight
        y = target.to(s.dtype) if probable else target.clamp(min=0)
        class_weight = options.get("weight")
        class_weight = class_weight if class_weight is None else class_weight.to(s.dtype)
        share = {k: v for k, v in options.items() if k != "weight"}
        regular = {k: v for k, v in share.items() if k != "z_loss"}
        losses = reference(s, y, weight=class_weight, **regular) * counts
        penalties = (reference(s, y, **share) - reference(s, y, **regular)) * counts
        if reduction == "none":
            return losses + penalties
        if reduction == "sum":
            return (losses + penalties).sum()
        divisor = counts.sum() if class_weight is None or probable else (counts * class_weight[y]).sum()
        return losses.sum() / divisor + penalties.sum() / counts.sum()

    more = dict(options, reduction=reduction, row_weight=row_weight)
    truth, expected = with_gradients(plain, [x.double(), w.double()], reduction)
    got, grads = with_gradients(lambda x, w: linear_cross_entropy(x, w, target, **more), [x, w], reduction)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)

    z = x @ w.t()
    got, (grad,) = with_gradients(lambda z: cross_entropy(z, target, **more), [z], reduction)
    truth, (expected,) = with_gradients(lambda z: plain(z, torch.eye(7, dtype=torch.float64)), [z.double()], reduction)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_z_loss_may_be_a_tensor(backend):
    """As when it is scheduled; it means the same with class weights."""
    x, w, target = torch.randn(6, 4, requires_grad=True), torch.randn(7, 4), torch.randint(0, 7, (6,))
    for weight in (None, torch.rand(7)):
        a = linear_cross_entropy(x, w, target, weight=weight, z_loss=0.1)
        b = linear_cross_entropy(x, w, target, weight=weight, z_loss=torch.tensor(0.1))
        torch.testing.assert_close(a, b)


def test_row_weights_can_stand_for_class_weights(backend):
    x, w, target = torch.randn(9, 4), torch.randn(7, 4), torch.randint(0, 7, (9,))
    weight = torch.rand(7)
    for reduction in REDUCTIONS:
        by_class = linear_cross_entropy(x, w, target, weight=weight, reduction=reduction)
        by_row = linear_cross_entropy(x, w, target, row_weight=weight[target], reduction=reduction)
        torch.testing.assert_close(by_class, by_row)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_weights_of_k_dimensional_scores(backend, reduction):
    z, target, row_weight = torch.randn(2, 5, 3), torch.randint(0, 5, (2, 3)), torch.rand(2, 3)
    losses = F.cross_entropy(z, target, reduction="none") * row_weight
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / row_weight.sum()}[reduction]
    torch.testing.assert_close(cross_entropy(z, target, row_weight=row_weight, reduction=reduction), expected)
    x, w = torch.randn(2, 4), torch.randn(5, 3, 4)
    losses = torchs_linear(x, w, target, reduction="none") * row_weight
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / row_weight.sum()}[reduction]
    got = linear_cross_entropy(x, w, target, row_weight=row_weight, reduction=reduction, z_loss=0.0)
    torch.testing.assert_close(got, expected)


def test_scores_are_taken_in_place_of_logits(backend):
    x, w, target = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randint(0, 7, (2, 3))
    expected = F.cross_entropy((x @ w.t()).flatten(0, 1), target.flatten())
    torch.testing.assert_close(cross_entropy(linear_scores(x, w), target), expected)
    torch.testing.assert_close(cross_entropy(logits_scores(x @ w.t()), target), expected)


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("loss", [1e-3, 1e-6, 1e-9, 1e-20, 1e-37])
def test_confident_losses_do_not_round_to_zero(backend, linear, train, loss):
    """p_target = 1 − loss; ``lse − s_target`` is 0 in fp32 from 6e-8 on."""
    classes = 11
    gap = math.log((classes - 1) / math.expm1(loss)) if loss > 1e-15 else math.log((classes - 1) / loss)
    z = torch.zeros(3, classes)
    z[:, 4] = gap
    loss = F.softplus(math.log(classes - 1) - z[0, 4].double(), threshold=40).item()  # gap rounds a little
    target = torch.full((3,), 4)
    leaf = z.clone().requires_grad_(train)
    got = linear_cross_entropy(leaf, torch.eye(classes), target) if linear else cross_entropy(leaf, target)
    assert got.item() == pytest.approx(loss, rel=1e-5)
    if train:
        got.backward()
        assert leaf.grad[0, 0].item() == pytest.approx(-math.expm1(-loss) / (classes - 1) / 3, rel=1e-5)
        assert leaf.grad[0, 4].item() == pytest.approx(math.expm1(-loss) / 3, rel=1e-5)


def stable(s, target):
    """(N,) losses whose fp64 value is good to the last digits also where torch's formula cancels."""
    hit = s.gather(1, target[:, None])
    rest = s.scatter(1, target[:, None], -INF).logsumexp(1, keepdim=True)
    return F.softplus(rest - hit, threshold=40).squeeze(1)


REGIMES = {
    "uniform": lambda n, v: 0.01 * torch.randn(n, v),
    "usual": lambda n, v: 3 * torch.randn(n, v),
    "huge": lambda n, v: 200 * torch.randn(n, v),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", [*REGIMES, "confident"])
def test_logits_meet_the_tolerance_policy(backend, dtype, regime):
    n, v = 64, 1500
    target = torch.randint(0, v, (n,))
    z = REGIMES.get(regime, REGIMES["usual"])(n, v)
    if regime == "confident":
        z[torch.arange(n), target] += 25
    z = z.to(dtype).requires_grad_()
    loss = cross_entropy(z, target)
    loss.backward()

    def dense(s):
        return stable(s, target).mean()

    check_loss(loss, dense, z.detach())
    check_loss(cross_entropy(z, target, reduction="none"), lambda s: stable(s, target), z.detach())
    check_score_gradient(z.grad, dense, z.detach(), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["uniform", "usual", "confident", "huge"])
@pytest.mark.parametrize("schedule", ["eager", "recompute"])
def test_linear_scores_meet_the_tolerance_policy(backend, dtype, regime, schedule):
    n, d, v = 192, 24, 1500
    x, w = torch.randn(n, d), torch.randn(v, d) / d**0.5
    target = torch.randint(0, v, (n,))
    w *= {"uniform": 0.01, "usual": 2.0, "confident": 1.0, "huge": 60.0}[regime]
    if regime == "confident":
        x = w[target] * 20
    x, w = (t.to(dtype).requires_grad_() for t in (x, w))
    loss = linear_cross_entropy(x, w, target, schedule=schedule, memory_budget=v * 4 * 64)
    loss.backward()

    def dense(s):
        return stable(s, target).mean()

    exact = dense(x.detach().double() @ w.detach().double().t())
    scores = x.detach().to(wide(dtype)) @ w.detach().to(wide(dtype)).t()
    check(loss, exact, dense(scores), "loss")
    check_linear_gradients(x.grad, w.grad, dense, x, w, target)


# --- chosen deviations from torch, as docs/numerics.md lists them ---------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_give_a_float32_loss(dtype):
    z = torch.randn(4, 5).to(dtype)
    assert cross_entropy(z, T).dtype == cross_entropy(z, T, reduction="none").dtype == torch.float32
    torch.testing.assert_close(cross_entropy(z, T), F.cross_entropy(z.float(), T))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "call",
    [
        lambda x, r: cross_entropy(x[:0], T[:0], reduction=r),
        lambda x, r: cross_entropy(x, torch.full_like(T, -100), reduction=r),
        lambda x, r: cross_entropy(x[:0], Y[:0], reduction=r),
        lambda x, r: cross_entropy(x, T, torch.zeros(5), reduction=r),
        lambda x, r: cross_entropy(x[..., None][..., :0], T[:, None][:, :0], reduction=r),
        lambda x, r: linear_cross_entropy(x[:0], torch.ones(7, 5), T[:0], reduction=r),
        lambda x, r: linear_cross_entropy(x, torch.ones(7, 5), torch.full_like(T, -100), reduction=r),
        lambda x, r: linear_cross_entropy(x[:0], torch.ones(7, 2, 5), TK[:0], reduction=r),
        lambda x, r: linear_cross_entropy(x, torch.ones(7, 2, 5), torch.full_like(TK, -100), reduction=r),
        lambda x, r: linear_cross_entropy(x, torch.ones(7, 0, 5), TK[:, :0], reduction=r),
        lambda x, r: cross_entropy(x, T, row_weight=torch.zeros(4), reduction=r),
    ],
)
def test_a_mean_of_nothing_is_zero(backend, call, reduction):
    x = torch.randn(4, 5, requires_grad=True)
    loss = call(x, reduction)
    assert (loss == 0).all() and (reduction == "none" or loss.shape == ())
    loss.sum().backward()
    assert (x.grad == 0).all()


def test_probability_zero_on_an_impossible_class_costs_nothing(backend):
    z = torch.tensor([[1.0, -INF, 2.0], [0.0, 3.0, -INF]], requires_grad=True)
    y = torch.tensor([[0.4, 0.0, 0.6], [0.5, 0.5, 0.0]])
    loss = cross_entropy(z, y, reduction="sum")
    torch.testing.assert_close(loss, reference(z, y).sum())
    assert F.cross_entropy(z, y).isnan()
    loss.backward()
    assert z.grad.isfinite().all() and z.grad[0, 1] == 0


@pytest.mark.parametrize("share", [1.0, 0.5, 1e-3, 1e-7, 1e-20])
def test_any_probability_on_an_impossible_class_costs_infinitely_much(backend, share):
    z, y = torch.tensor([[1.0, -INF, 2.0]]), torch.tensor([[1.0 - share, share, 0.0]])
    assert cross_entropy(z, y) == INF


def test_target_rows_need_not_be_distributions(backend):
    """torch takes any numbers, advantages for instance; so do we."""
    z = torch.randn(5, 6, requires_grad=True)
    for y in (torch.randn(5, 6), -torch.rand(5, 6), torch.zeros(5, 6), 7 * torch.rand(5, 6)):
        torch.testing.assert_close(cross_entropy(z, y), F.cross_entropy(z, y))


def test_smoothing_onto_an_impossible_class_of_weight_zero(backend):
    z, weight = torch.tensor([[1.0, -INF, 2.0]]), torch.tensor([1.0, 0.0, 1.0])
    target = torch.tensor([2])
    assert F.cross_entropy(z, target, weight, label_smoothing=0.1).isnan()
    assert cross_entropy(z, target, label_smoothing=0.1) == INF
    expected = reference(z, target, weight, label_smoothing=0.1)[0]
    torch.testing.assert_close(cross_entropy(z, target, weight, label_smoothing=0.1), expected)


def test_full_smoothing_onto_an_impossible_target(backend):
    z = torch.tensor([[1.0, -INF, 2.0]])
    assert F.cross_entropy(z, torch.tensor([1]), label_smoothing=1.0).isnan()
    assert cross_entropy(z, torch.tensor([1]), label_smoothing=1.0) == INF


@pytest.mark.parametrize("smoothing", [-0.1, math.nan])
def test_label_smoothing_below_zero_is_an_error(smoothing):
    with pytest.raises(ValueError, match="cross_entropy: label_smoothing"):
        cross_entropy(Z, T, label_smoothing=smoothing)


def test_any_leading_shape_of_a_linear_layer(backend):
    x, w, target = torch.randn(2, 3, 4, 5), torch.randn(7, 5), torch.randint(0, 7, (2, 3, 4))
    losses = linear_cross_entropy(x, w, target, reduction="none")
    expected = F.cross_entropy((x @ w.t()).movedim(-1, 1), target, reduction="none")
    torch.testing.assert_close(losses, expected)
    y = torch.rand(2, 3, 4, 7)
    got = linear_cross_entropy(x, w, y)
    torch.testing.assert_close(got, F.cross_entropy((x @ w.t()).flatten(0, 2), y.flatten(0, 2)))


def test_class_vectors_of_another_floating_type_are_taken(backend):
    x, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.rand(4, 5)
    other = torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(
        linear_cross_entropy(x, w, T, linear_bias=other), torchs_linear(x, w, T, linear_bias=other.float())
    )
    torch.testing.assert_close(cross_entropy(x @ w.t(), T, other), F.cross_entropy(x @ w.t(), T, other.float()))
    loss = cross_entropy(x @ w.t(), y.double())
    assert loss.dtype == torch.float32  # torch: float64
    torch.testing.assert_close(loss, F.cross_entropy(x @ w.t(), y))


def test_class_weights_are_differentiable(backend):
    """torch: an error."""
    z, weight = torch.randn(4, 5), torch.rand(5, requires_grad=True)
    cross_entropy(z, T, weight).backward()
    exact = weight.detach().double().requires_grad_()
    losses = F.cross_entropy(z.double(), T, reduction="none")
    ((losses * exact[T]).sum() / exact[T].sum()).backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_a_row_target_has_no_dimension():
    """torch takes a target of shape (1,) with logits of shape (V,), except where it reduces or smooths."""
    with pytest.raises(ValueError, match="cross_entropy: target"):
        cross_entropy(torch.zeros(5), T[:1])


def test_nan_logits_give_nan(backend):
    z = torch.randn(3, 40)
    z[1, 30] = math.nan
    assert cross_entropy(z, T[:3]).isnan()
    assert cross_entropy(z, T[:3], reduction="none").isnan().tolist() == [False, True, False]
    z[1, 2] = math.nan
    assert cross_entropy(z, torch.tensor([0, 2, 0]), reduction="none").isnan().tolist() == [False, True, False]
    ignored = torch.tensor([0, -100, 0])
    z.requires_grad_()
    loss = cross_entropy(z, ignored)  # a row that does not count may hold anything
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and (z.grad[1] == 0).all()
