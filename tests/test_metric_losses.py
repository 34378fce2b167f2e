"""Metric, margin and recommender losses where a formula has an edge: nothing to compare with, ties, cosines of ±1."""

import math
import re

import pytest
import torch

import fusedloss as fl
from fusedloss.losses import PAIR_LOSSES, function_of, name_of
from fusedloss.losses.triplets import distance

F64 = torch.float64
INF = torch.inf
BY_NAME = {name_of(m): m for m in PAIR_LOSSES}
LABELLED = ("multi_similarity_loss", "circle_loss", "triplet_loss")
LABELLED_CASES = [
    pytest.param(BY_NAME[n], {k: v for k, v in case.items() if k != "label"}, id=f"{n}-{i}")
    for n in LABELLED
    for i, case in enumerate(BY_NAME[n].CASES)
]


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=F64), dim=1)


def itself(x, **options):
    return fl.similarity_scores(x, normalize=True, **options)


def close(got, truth):
    torch.testing.assert_close(got, torch.as_tensor(truth, dtype=got.dtype), rtol=1e-10, atol=1e-12)


def gradient(loss, x):
    (found,) = torch.autograd.grad(loss, x)
    assert found.isfinite().all()
    return found


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, case", LABELLED_CASES)
@pytest.mark.parametrize("label", ["equal", "different", "one row"])
def test_nothing_to_compare_with(module, case, label):
    """No positives at all, or no negatives: 0, gradient exactly 0; but what is kept of a pair alone stays."""
    rows = 1 if label == "one row" else 6
    x = torch.randn(rows, 4, dtype=F64, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.int64) if label == "equal" else torch.arange(rows)
    loss = function_of(module)(itself(x), labels, **case)
    got, z = gradient(loss, x), torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(x, dim=1).t()
    if case.get("mining", "official") is None and rows > 1:  # all pairs: each of the two sums counts by itself
        truth = module.reference(z, labels, **case)
        close(loss, truth)
        torch.testing.assert_close(got, torch.autograd.grad(truth, x)[0])
        assert loss > 0
    else:
        assert loss == 0 and (got == 0).all()


@pytest.mark.parametrize("module, case", LABELLED_CASES)
def test_a_row_without_a_positive_has_no_gradient_of_its_own(module, case):
    """Row 0 is alone in its class: as a column it is a negative of the others, as a row it gives nothing."""
    z = (0.4 * torch.randn(7, 7, dtype=F64)).requires_grad_()
    label = torch.tensor([9, 1, 1, 1, 2, 2, 2])
    found = gradient(function_of(module)(z, label, **case), z)
    alone = case.get("mining", "official") is None
    assert (found[0] != 0).any() == alone and (found[1:] != 0).any()


@pytest.mark.parametrize("module, case", LABELLED_CASES)
def test_columns_that_are_not_the_rows(module, case):
    """The first rows of y against all of y: as if the other rows were left out."""
    y, label = torch.randn(9, 4, dtype=F64, requires_grad=True), torch.arange(9) % 3
    scores = fl.similarity_scores(y[:5], y, normalize=True)
    z = torch.nn.functional.normalize(y, dim=1)
    loss = function_of(module)(scores, label[:5], column_label=label, **case)
    truth = module.reference(z[:5] @ z.t(), label[:5], label, **case)
    close(loss, truth)
    torch.testing.assert_close(gradient(loss, y), torch.autograd.grad(truth, y)[0])


@pytest.mark.parametrize("module, case", LABELLED_CASES)
def test_scores_of_minus_infinity_are_no_pairs(module, case):
    z, label = 0.4 * torch.randn(7, 8, dtype=F64), torch.arange(8) % 3
    known = z[:, :7].clone().requires_grad_()
    z[:, 7] = -INF
    z = z.requires_grad_()
    got = function_of(module)(z, label[:7], column_label=label, **case)
    truth = module.reference(known, label[:7], **case)
    close(got, truth)
    found = gradient(got, z)
    torch.testing.assert_close(found[:, :7], torch.autograd.grad(truth, known)[0])
    assert (found[:, 7] == 0).all()


@pytest.mark.parametrize("name", LABELLED)
def test_row_weights_and_reductions_of_labelled_rows(name):
    x, label, weight = torch.randn(9, 4, dtype=F64), torch.arange(9) % 3, torch.rand(9, dtype=F64)
    loss, scores = getattr(fl, name), itself(x)
    rows = loss(scores, label, reduction="none")
    assert rows.shape == (9,)
    close(loss(scores, label), rows.mean())
    close(loss(scores, label, reduction="sum", row_weight=weight), (rows * weight).sum())
    close(loss(scores, label, row_weight=weight), (rows * weight).sum() / weight.sum())
    close(loss(scores, label, row_weight=0 * weight), 0.0)


# --- Multi-Similarity: what the mining keeps --------------------------------------------------------------------------


def test_mining_is_strict_and_its_thresholds_have_no_gradient():
    """Powers of two, so that every sum is exact: pairs exactly ε beyond the hardest one are not kept."""
    z = torch.full((3, 3), -0.5, dtype=F64)
    z[0] = torch.tensor([1.0, 0.5, 0.25])  # row 0: positive 1, negative 2
    label = torch.tensor([0, 0, 1])
    for epsilon, kept in ((0.25, False), (0.375, True)):
        got = fl.multi_similarity_loss(z, label, epsilon=epsilon, beta=2.0, base=0.0, reduction="none")
        expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(0.5))) / 2 if kept else 0.0
        close(got[0], expected)
    z = z.requires_grad_()
    got = fl.multi_similarity_loss(z, label, epsilon=0.375, beta=2.0, base=0.0, reduction="none")[0]
    found = gradient(got, z)[0]
    close(found, [0.0, -1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(-0.5))])


def test_duplicates_are_no_positives_officially():
    x = unit(3, 4)
    x[1] = x[0]
    label = torch.tensor([0, 0, 1])
    assert fl.multi_similarity_loss(itself(x), label, epsilon=3.0) == 0
    assert fl.multi_similarity_loss(itself(x), label, epsilon=3.0, mining="pml") > 0


def test_the_rule_of_pytorch_metric_learning_keeps_one_side_of_a_row():
    z = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    label = torch.tensor([0, 0, 1])
    official, pml = (
        fl.multi_similarity_loss(z, label, epsilon=0.1, mining=m, reduction="none") for m in ("official", "pml")
    )
    close(official, [0.0, 0.0, 0.0])
    close(pml, [0.0, 0.0, 0.0])  # positives at 0.5 are not within 0.1 of the negatives at 0
    near = z.clone()
    near[0, 2] = 0.45  # negative kept (> 0.4), positive kept (< 0.55)
    assert (fl.multi_similarity_loss(near, label, mining="pml", reduction="none")[0]) > 0
    near[2, 0] = 0.9  # row 2 has no positive: its negatives are all above +∞ − ε, that is none is kept
    close(fl.multi_similarity_loss(near, label, mining="pml", reduction="none")[2], 0.0)


# --- circle, margins: cosines of ±1, large scales ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_circle_loss_at_its_scale_of_256(dtype):
    x = torch.randn(12, 4, dtype=dtype)
    x[1], x[2] = x[0], -x[0]
    x = x.requires_grad_()
    loss = fl.circle_loss(itself(x), torch.arange(12) % 3)
    assert loss.isfinite() and loss > 100 and gradient(loss, x).abs().sum() > 0


def test_the_mean_over_rows_that_still_lose():
    z = torch.eye(4, dtype=F64)
    z[0, 1] = z[1, 0] = 1.0
    label = torch.tensor([0, 0, 1, 2])
    rows = fl.circle_loss(z, label, scale=4.0, reduction="none")
    assert (rows > 0).tolist() == [True, True, False, False]
    close(fl.circle_loss(z, label, scale=4.0, reduction="nonzero_mean"), rows[:2].mean())
    assert fl.circle_loss(z, torch.arange(4), reduction="nonzero_mean") == 0


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("margin", ["none", "cosface", "arcface", "adaface", "circle"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_parallel_to_its_class(dtype, margin, sign):
    """Where acos has an infinite slope (pytorch-metric-learning's ArcFace: NaN), in x and in the class vectors."""
    w = torch.eye(3, 4, dtype=dtype).requires_grad_()
    x = (sign * 2.0 * torch.eye(3, 4, dtype=dtype)).requires_grad_()
    norm = {"norm": 2 * torch.ones(3)} if margin == "adaface" else {}
    loss = fl.margin_softmax_loss(fl.similarity_scores(x, w, normalize=True), torch.arange(3), margin=margin, **norm)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("cosine", [1.0, 1 + 1e-6, -1.0, 0.999999999])
def test_arcface_near_the_ends(cosine):
    z = torch.tensor([[cosine, 0.0]], dtype=F64, requires_grad=True)
    loss = fl.margin_softmax_loss(z, torch.tensor([0]), m=0.5, scale=1.0)
    cut = min(max(cosine, 1e-7 - 1), 1 - 1e-7)
    psi = math.cos(math.acos(cut) + 0.5) if cosine > -math.cos(0.5) else cosine - 0.5 * math.sin(0.5)
    torch.testing.assert_close(loss, torch.tensor(math.log1p(math.exp(-psi)), dtype=F64), rtol=1e-12, atol=0)
    assert gradient(loss, z)[0, 0].abs() <= (0 if cosine > 1 - 1e-7 else 1)


@pytest.mark.parametrize("easy", [False, True])
def test_arcface_is_decreasing_in_nothing_but_its_step(easy):
    """ψ against the angle's formula on a grid, on both sides of where it changes."""
    cosine, m = torch.linspace(-0.999, 0.999, 4001, dtype=F64), 0.7
    z = torch.stack([cosine, torch.zeros_like(cosine)], 1)
    got = fl.margin_softmax_loss(
        z, torch.zeros(4001, dtype=torch.int64), m=m, scale=1.0, easy_margin=easy, reduction="none"
    )
    psi = -torch.log(torch.expm1(got))
    turned = torch.cos(torch.acos(cosine) + m)
    if easy:
        truth = torch.where(cosine > 0, turned, cosine)
    else:
        truth = torch.where(torch.acos(cosine) < math.pi - m, turned, cosine - m * math.sin(m))
    torch.testing.assert_close(psi, truth, rtol=1e-9, atol=1e-9)


def test_margin_softmax_ignores_weighs_and_reduces():
    z, target = 0.5 * torch.randn(6, 5, dtype=F64), torch.tensor([0, 4, -100, 2, 2, 1])
    weight, row_weight = torch.rand(5, dtype=F64), torch.rand(6, dtype=F64)
    kept = target != -100
    rows = fl.margin_softmax_loss(z, target, reduction="none")
    assert rows[2] == 0
    factor = torch.where(kept, row_weight * weight[target.clamp(min=0)], 0.0)
    got = fl.margin_softmax_loss(z, target, weight=weight, row_weight=row_weight)
    close(got, (rows * factor).sum() / factor.sum())
    z[2] = torch.nan
    z = z.requires_grad_()
    found = gradient(fl.margin_softmax_loss(z, target), z)
    assert (found[2] == 0).all() and (found[kept] != 0).any(1).all()


def test_no_margin_is_cross_entropy_and_zero_margins_are_none():
    z, target = torch.rand(6, 5, dtype=F64) - 0.5, torch.arange(6) % 5
    truth = fl.cross_entropy(7.0 * z, target)
    for margin in ("none", "cosface", "arcface"):
        close(fl.margin_softmax_loss(z, target, margin=margin, m=0.0, scale=7.0), truth)


# --- triplets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mining", ["hard", "all", "semihard"])
def test_duplicates_have_no_slope_between_them(mining):
    """D = 0, whose derivative in x does not exist; the slope is 0, and nothing is NaN."""
    z = torch.tensor([[1.0, 1.0, 0.9], [1.0, 1.0, 0.9], [0.9, 0.9, 1.0]], dtype=F64, requires_grad=True)
    loss = fl.triplet_loss(z, torch.tensor([0, 0, 1]), mining=mining, margin=1.0)
    found, d = gradient(loss, z), math.sqrt(0.2)
    close(loss, 1 - d)
    assert found[0, 1] == found[1, 0] == 0 and (found[2] == 0).all()
    close(found[:2, 2], [0.5 / d] * 2)


def test_a_rounded_cosine_above_one_is_no_distance():
    s = torch.tensor([1.0, 1 + 1e-7, 0.5, -1.0], dtype=F64, requires_grad=True)
    d = distance(s, squared=False)
    close(d, [0.0, 0.0, 1.0, 2.0])
    close(gradient(d.sum(), s), [0.0, 0.0, -1.0, -0.5])


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margin", [-0.3, 0.0, 0.2, 5.0])
@pytest.mark.parametrize("mining", ["all", "semihard"])
def test_triplets_against_loops(mining, margin, squared):
    x, label = unit(11, 3), torch.tensor([0, 0, 1, 1, 1, 2, 0, 2, 3, 1, 0])
    z = x @ x.t()
    d = (2 - 2 * z).clamp(min=0) if squared else (2 - 2 * z).clamp(min=0).sqrt()
    losses = []
    for a in range(11):
        negatives = [n for n in range(11) if label[n] != label[a]]
        for p in (p for p in range(11) if p != a and label[p] == label[a]):
            if mining == "all":
                losses += [v for n in negatives if (v := d[a, p].item() - d[a, n].item() + margin) > 0]
            else:
                beyond = [d[a, n].item() for n in negatives if d[a, n] > d[a, p]]
                near = min(beyond) if beyond else max(d[a, n].item() for n in negatives)
                losses.append(max(0.0, d[a, p].item() - near + margin))
    got = fl.triplet_loss(z, label, mining=mining, margin=margin, squared=squared)
    close(got, sum(losses) / max(1, len(losses)))


def test_ties_of_all_triplets_are_counted_once():
    """Distances that coincide: D_p + m = D_n is no active triplet, on either side of the count."""
    z = 1 - torch.tensor([[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]], dtype=F64) / 8
    z, label = z.requires_grad_(), torch.tensor([0, 0, 1, 1])
    loss = fl.triplet_loss(z, label, mining="all", margin=0.25, squared=True)  # D²: 0.25 and 0.5
    assert loss == 0 and (gradient(loss, z) == 0).all()
    loss = fl.triplet_loss(z, label, mining="all", margin=0.5, squared=True)
    close(loss, 0.25)
    close(
        gradient(loss, z), [[0, -0.5, 0.25, 0.25], [-0.5, 0, 0.25, 0.25], [0.25, 0.25, 0, -0.5], [0.25, 0.25, -0.5, 0]]
    )


def test_rows_without_both_kinds_are_left_out_of_the_mean():
    x, label = unit(7, 3), torch.tensor([0, 0, 1, 1, 1, 5, 6])
    rows = fl.triplet_loss(itself(x), label, margin=3.0, reduction="none")
    assert (rows > 0).tolist() == [True] * 5 + [False] * 2
    close(fl.triplet_loss(itself(x), label, margin=3.0), rows.sum() / 5)


# --- recommenders, the whole batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["sl", "tanh", "atan", "relu"])
def test_pairwise_softmax_without_a_column_that_counts(form):
    z = torch.tensor([[0.3]], dtype=F64, requires_grad=True)
    for include in (False, True):
        loss = fl.pairwise_softmax_loss(z, form=form, include_positive=include)
        assert loss == 0 and gradient(loss, z) == 0
    z = torch.tensor([[3.0, 0.5, 0.1]], dtype=F64, requires_grad=True)  # differences below −2: σ is 0 but for e^d, tanh
    loss = fl.pairwise_softmax_loss(z, form=form)
    assert (loss == 0) == (form in ("atan", "relu"))
    assert ((gradient(loss, z) != 0).all()) == (form in ("sl", "tanh"))


@pytest.mark.parametrize("form", ["sl", "tanh", "atan", "relu"])
def test_the_positives_own_term_is_one(form):
    z = 0.4 * torch.randn(5, 8, dtype=F64)
    without = fl.pairwise_softmax_loss(z, form=form, reduction="none")
    close(fl.pairwise_softmax_loss(z, form=form, include_positive=True, reduction="none"), torch.log1p(without.exp()))


@pytest.mark.parametrize("temperature", [0.01, 0.001])
@pytest.mark.parametrize("form", ["sl", "tanh", "atan", "relu"])
def test_a_low_temperature_does_not_overflow(form, temperature):
    """e^{1 / 0.01} is infinite in float32."""
    x, y = (torch.randn(n, 4, requires_grad=True) for n in (6, 9))
    scores = fl.similarity_scores(x, y, scale=0.5, normalize=True)
    loss = fl.pairwise_softmax_loss(scores, form=form, temperature=temperature)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, y)))


def test_cosine_contrastive_hinges_have_no_slope_at_their_kink():
    z = torch.tensor([[1.0, 0.4, 0.5], [0.2, 1.5, 0.1]], dtype=F64, requires_grad=True)
    loss = fl.cosine_contrastive_loss(z, margin=0.4, reduction="sum")
    close(loss, 0.1)
    close(gradient(loss, z), [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("name", ["bpr_loss", "cosine_contrastive_loss", "pairwise_softmax_loss"])
def test_an_ignored_row_may_hold_anything(name):
    x, y, target = torch.randn(4, 3, dtype=F64), torch.randn(6, 3, dtype=F64), torch.tensor([0, 1, -100, 3])
    kept, x[2] = target >= 0, torch.nan
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = getattr(fl, name)(fl.similarity_scores(x, y), target)
    truth = getattr(fl, name)(fl.similarity_scores(x[kept], y), target[kept])
    close(loss, truth)
    (dx, dy), (_, right) = (torch.autograd.grad(v, (x, y)) for v in (loss, truth))
    assert (dx[2] == 0).all()
    torch.testing.assert_close(dy, right)


@pytest.mark.parametrize("name", ["bpr_loss", "auc_loss", "cosine_contrastive_loss", "pairwise_softmax_loss"])
def test_one_pair_alone(name):
    """No negative: what is left is CCL's own positive."""
    z = torch.tensor([[0.25]], dtype=F64, requires_grad=True)
    loss = getattr(fl, name)(z)
    close(loss, 0.75 if name == "cosine_contrastive_loss" else 0.0)
    gradient(loss, z)


def test_auc_counts_pairs_of_the_whole_batch():
    """τ → 0 leaves the number of negatives above each positive, times their distance over τ."""
    z = torch.tensor([[0.9, 0.1], [0.8, 0.3]], dtype=F64)
    close(fl.auc_loss(z, temperature=0.001), (0 + 500) / 2)  # 0.8 is above the positive 0.3, 0.1 above none
    close(fl.auc_loss(z, temperature=0.001, negatives="mean"), 500 / 2 / 2)


def test_auc_of_rows_without_a_positive():
    """All of their scores are negatives of the others' positives."""
    z, target = torch.randn(4, 5, dtype=F64, requires_grad=True), torch.tensor([2, -100, 0, -100])
    rest = torch.ones(4, 5, dtype=torch.bool)
    rest[0, 2] = rest[2, 0] = False
    pairs = torch.nn.functional.softplus((z[rest][:, None] - z[[0, 2], [2, 0]]) / 0.3, threshold=50)
    got = fl.auc_loss(z, target, temperature=0.3)
    close(got, pairs.sum() / 2)
    torch.testing.assert_close(gradient(got, z), torch.autograd.grad(pairs.sum() / 2, z)[0])
    nothing = fl.auc_loss(z, torch.full((4,), -100))
    assert nothing == 0 and (gradient(nothing, z) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auc_at_its_temperature(dtype):
    x, y = (torch.randn(n, 4, dtype=dtype, requires_grad=True) for n in (6, 9))
    loss = fl.auc_loss(fl.similarity_scores(x, y, normalize=True))
    assert loss.isfinite() and loss.dtype == torch.float32
    assert all(g.isfinite().all() and g.dtype == dtype for g in torch.autograd.grad(loss, (x, y)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, **o: fl.triplet_loss(itself(x, **o), torch.arange(len(x)) % 7, mining="all"),
        lambda x, **o: fl.triplet_loss(itself(x, **o), torch.arange(len(x)) % 7, mining="semihard"),
        lambda x, **o: fl.auc_loss(fl.similarity_scores(x, x.flip(0), normalize=True, **o), temperature=0.1),
    ],
    ids=["all", "semihard", "auc"],
)
def test_what_autograd_keeps_does_not_grow_with_the_square_of_the_batch(loss):
    x, kept = torch.randn(200, 4, requires_grad=True), []

    def keep(t):
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        value = loss(x, memory_budget=200 * 400)
    assert max(kept) <= 200 * 8
    torch.testing.assert_close(value, loss(x))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["hard", "all", "semihard", "auc_loss", "bpr_loss", "multi_similarity_loss"])
def test_compiled(name):
    """Mining in two passes, rows sorted chunk by chunk, a row parameter from the scores: all in one graph."""
    torch._dynamo.reset()
    x, y, label = *(torch.randn(n, 4, requires_grad=True) for n in (12, 15)), torch.arange(12) % 4

    def loss(x, y):
        if name in ("hard", "all", "semihard"):
            return fl.triplet_loss(itself(x), label, mining=name)
        if name in LABELLED:
            return getattr(fl, name)(itself(x), label)
        return getattr(fl, name)(fl.similarity_scores(x, y, normalize=True))

    values = [f(x, y) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*[torch.autograd.grad(v, (x, y), allow_unused=True) for v in values])
    torch._dynamo.reset()


# --- errors -----------------------------------------------------------------------------------------------------------

X, LABEL = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
Z, WIDE = torch.rand(4, 4), torch.rand(4, 6)
ERRORS = {
    "multi_similarity_loss: label: expected an integer tensor": lambda: fl.multi_similarity_loss(Z, [0, 0, 1, 1]),
    "multi_similarity_loss: label: expected integers": lambda: fl.multi_similarity_loss(Z, LABEL.float()),
    "multi_similarity_loss: label: expected shape (4,)": lambda: fl.multi_similarity_loss(Z, LABEL[:3]),
    "multi_similarity_loss: column_label: expected given": lambda: fl.multi_similarity_loss(WIDE, LABEL),
    "multi_similarity_loss: alpha: ": lambda: fl.multi_similarity_loss(Z, LABEL, alpha=0.0),
    "multi_similarity_loss: beta: expected a number": lambda: fl.multi_similarity_loss(
        Z, LABEL, beta=torch.tensor(9.0)
    ),
    "multi_similarity_loss: epsilon: ": lambda: fl.multi_similarity_loss(Z, LABEL, epsilon=-0.1),
    "multi_similarity_loss: mining: ": lambda: fl.multi_similarity_loss(Z, LABEL, mining="hard"),
    "multi_similarity_loss: reduction: ": lambda: fl.multi_similarity_loss(Z, LABEL, reduction="all"),
    "circle_loss: scores: expected each row": lambda: fl.circle_loss(WIDE.t(), LABEL, column_label=LABEL),
    "circle_loss: scale: ": lambda: fl.circle_loss(Z, LABEL, scale=0.0),
    "circle_loss: margin: ": lambda: fl.circle_loss(Z, LABEL, margin=math.nan),
    "circle_loss: reduction: ": lambda: fl.circle_loss(Z, LABEL, reduction="nonzero"),
    "circle_loss: row_weight: ": lambda: fl.circle_loss(Z, LABEL, row_weight=torch.ones(3)),
    "triplet_loss: mining: ": lambda: fl.triplet_loss(Z, LABEL, mining="easy"),
    "triplet_loss: margin: expected a number with": lambda: fl.triplet_loss(Z, LABEL, mining="all", margin=None),
    "triplet_loss: row_weight: expected None": lambda: fl.triplet_loss(
        Z, LABEL, mining="all", row_weight=torch.ones(4)
    ),
    "triplet_loss: reduction: expected mean": lambda: fl.triplet_loss(Z, LABEL, mining="semihard", reduction="sum"),
    "triplet_loss: reduction: none of": lambda: fl.triplet_loss(Z, LABEL, reduction="none of"),
    "triplet_loss: column_label: expected shape (6,)": lambda: fl.triplet_loss(WIDE, LABEL, column_label=LABEL),
    "margin_softmax_loss: margin: ": lambda: fl.margin_softmax_loss(Z, LABEL, margin="sphereface"),
    "margin_softmax_loss: m: ": lambda: fl.margin_softmax_loss(Z, LABEL, m=torch.tensor(0.5)),
    "margin_softmax_loss: scale: ": lambda: fl.margin_softmax_loss(Z, LABEL, scale=-1.0),
    "margin_softmax_loss: norm: expected (N,) for adaface only, got None": lambda: fl.margin_softmax_loss(
        Z, LABEL, margin="adaface"
    ),
    "margin_softmax_loss: norm: expected (N,) for adaface only, got (4,)": lambda: fl.margin_softmax_loss(
        Z, LABEL, norm=torch.ones(4)
    ),
    "margin_softmax_loss: target[0] = 4 is out of range": lambda: fl.margin_softmax_loss(Z, LABEL + 4),
    "margin_softmax_loss: weight: ": lambda: fl.margin_softmax_loss(Z, LABEL, weight=torch.ones(3)),
    "cosine_contrastive_loss: target: expected given": lambda: fl.cosine_contrastive_loss(WIDE.t()),
    "cosine_contrastive_loss: negative_weight: ": lambda: fl.cosine_contrastive_loss(Z, negative_weight=-1.0),
    "pairwise_softmax_loss: form: ": lambda: fl.pairwise_softmax_loss(Z, form="sigmoid"),
    "pairwise_softmax_loss: temperature: ": lambda: fl.pairwise_softmax_loss(Z, temperature=0.0),
    "pairwise_softmax_loss: target[1] = -1 is out of range": lambda: fl.pairwise_softmax_loss(
        Z, torch.tensor([0, -1, 2, 3])
    ),
    "bpr_loss: scores: ": lambda: fl.bpr_loss(X[0]),
    "bpr_loss: target[2] = 7 is out of range": lambda: fl.bpr_loss(Z, torch.tensor([0, 1, 7, 3])),
    "auc_loss: target[0] = 6 is out of range": lambda: fl.auc_loss(Z, LABEL + 6),
    "auc_loss: target: expected shape (4,)": lambda: fl.auc_loss(Z, LABEL[:3]),
    "auc_loss: temperature: ": lambda: fl.auc_loss(Z, temperature=-0.1),
    "auc_loss: negatives: ": lambda: fl.auc_loss(Z, negatives="all"),
}


@pytest.mark.host
@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_function_and_argument(message):
    with pytest.raises((ValueError, TypeError, IndexError), match="^" + re.escape(message)):
        ERRORS[message]()


def test_views_of_nt_xent_are_one_set():
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"nt_xent_loss: scores: expected of x with itself"):
        fl.nt_xent_loss(fl.similarity_scores(x, y))
    with pytest.raises(ValueError, match="nt_xent_loss: target: expected another view of each row, got the row itself"):
        fl.nt_xent_loss(fl.similarity_scores(x), torch.arange(6))


@pytest.mark.parametrize("name", ["bpr_loss", "pairwise_softmax_loss"])
def test_targets_of_a_wrong_shape(name):
    scores = fl.similarity_scores(torch.randn(6, 4), torch.randn(6, 4))
    with pytest.raises(ValueError, match=rf"{name}: target: expected shape \(6,\), got \(5,\)"):
        getattr(fl, name)(scores, torch.arange(5))


def test_a_single_negative_needs_no_beta():
    assert fl.soft_info_nce_loss(torch.randn(2, 2), torch.randn(2, 2)).isfinite()
    assert fl.soft_info_nce_loss(torch.zeros(0, 0), torch.zeros(0, 0)) == 0
