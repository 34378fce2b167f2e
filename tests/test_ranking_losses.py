"""Every ranking loss, with each of its CASES: against its reference on single lists, and what all of them share."""

import inspect

import pytest
import torch
from tolerance import check, error

import fusedloss as fl
from fusedloss import nn, ranking
from fusedloss.losses import function_of, name_of
from fusedloss.nn.list_loss import ListLoss

F64 = torch.float64
LOSSES = ranking.losses()
CASES = [pytest.param(m, c, id=f"{name_of(m)}-{i}") for m in LOSSES for i, c in enumerate(m.CASES)]
FIRST = [pytest.param(m, m.CASES[0], id=name_of(m)) for m in LOSSES]
OF_OPERATORS = ("lambda_loss", "approx_ndcg_loss", "list_mle_loss", "neural_ndcg_loss", "spearman_loss", "gro_co_loss")
LENGTHS = [5, 0, 1, 7, 3]
every_case = pytest.mark.parametrize("module, case", CASES)
every_loss = pytest.mark.parametrize("module, case", FIRST)


def random_lists(*shape, dtype=F64):
    """Scores and relevance, of which every list has more than one value, among them 0."""
    relevance = torch.randint(0, 4, shape).to(F64)
    if shape[-1] > 1:
        relevance[..., :2] = torch.tensor([2.0, 0.0], dtype=F64)
    return torch.randn(shape, dtype=F64).to(dtype), relevance


def value_and_gradient(loss, scores, relevance, **options):
    scores = scores.detach().clone().requires_grad_()
    value = loss(scores, relevance, **options)
    if not value.requires_grad:  # a reference of a list that it has nothing to say about
        return value, torch.zeros_like(scores)
    (gradient,) = torch.autograd.grad(value.sum(), scores, allow_unused=True)
    return value.detach(), torch.zeros_like(scores) if gradient is None else gradient


def of_reference(module, scores, relevance, **case):
    """Of lists that lie in rows: values, gradients."""
    relevance = relevance.to(scores.dtype)
    found = [value_and_gradient(module.reference, s, r, **case) for s, r in zip(scores, relevance)]
    return tuple(torch.stack(part) for part in zip(*found))


def defined(found, truth):
    """Both without the lists of which the reference is NaN; there the loss must be a number all the same."""
    known = ~truth[0].isnan()
    assert all(part.isfinite().all() for part in found)
    return [part[known] for part in found], [part[known] for part in truth]


# --- against the reference -------------------------------------------------------------------------------------------


SIZES = [(*each.values, 12) for each in CASES] + [(*each.values, n) for each in FIRST for n in (1, 2)]


@pytest.mark.parametrize("module, case, n", SIZES, ids=lambda x: getattr(x, "__name__", str(x)).rpartition(".")[2])
def test_value_and_gradient(module, case, n, backend):
    scores, relevance = random_lists(2, n)
    truth = of_reference(module, scores.float().double(), relevance, **case)
    exact = value_and_gradient(function_of(module), scores.float().double(), relevance, reduction="none", **case)
    for got, right in zip(*defined(exact, truth)):
        assert got.shape == right.shape and (got - right).norm() <= 1e-10 * right.norm() + 1e-13
    single = value_and_gradient(function_of(module), scores.float(), relevance.float(), reduction="none", **case)
    honest = [part[~truth[0].isnan()] for part in of_reference(module, scores.float(), relevance, **case)]
    for got, right, plain, what in zip(*defined(single, truth), honest, ("loss", "gradient")):
        if right.norm() > 1e-12:
            check(got, right, plain, what)
        else:
            assert (got.abs() < 1e-5).all(), what


@every_case
def test_equal_scores_and_equal_relevance(module, case, backend):
    scores = torch.tensor([[1.0, 0.5, 1.0, -2.0, 0.5, 1.0], [0.3] * 6, [2.0, 1.0, -1.0, 0.0, 0.5, 3.0]], dtype=F64)
    relevance = torch.tensor([[2.0, 0, 1, 2, 0, 0], [3.0, 0, 1, 2, 0, 1], [1.0] * 6], dtype=F64)
    truth = of_reference(module, scores, relevance, **case)
    found = value_and_gradient(function_of(module), scores, relevance, reduction="none", **case)
    for got, right in zip(*defined(found, truth)):
        assert error(got, right) <= 1e-10
    for got in value_and_gradient(function_of(module), scores, torch.zeros_like(scores), **case):
        assert got.isfinite().all()


@every_case
def test_huge_scores(module, case, backend):
    scores, relevance = random_lists(2, 9)
    truth = of_reference(module, 1e4 * scores, relevance, **case)
    found = value_and_gradient(function_of(module), 1e4 * scores, relevance, reduction="none", **case)
    for got, right in zip(found, truth):
        assert right.isfinite().all() and (got - right).abs().max() <= 1e-9 * right.abs().max() + 1e-12


# --- lists by mask and by offsets ------------------------------------------------------------------------------------


@every_case
def test_mask_and_offsets_are_single_lists(module, case, backend):
    loss, dtype = function_of(module), torch.float32 if case is module.CASES[0] else F64
    lists = [random_lists(n, dtype=dtype) for n in LENGTHS]
    singles = [value_and_gradient(loss, s, r, reduction="sum", **case) for s, r in lists]
    losses, gradients = torch.stack([v for v, _ in singles]), [g for _, g in singles]
    close = dict(rtol=1e-11, atol=1e-13) if dtype == F64 else dict(rtol=1e-4, atol=1e-6)

    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    flat = [torch.cat(part) for part in zip(*lists)]
    got, gradient = value_and_gradient(loss, *flat, offsets=offsets, reduction="none", **case)
    torch.testing.assert_close(got, losses, **close)
    torch.testing.assert_close(gradient, torch.cat(gradients), **close)

    # Padding holds NaN, and stands before, between and behind the items.
    mask = torch.zeros(len(LENGTHS), 9, dtype=torch.bool)
    for row, n in zip(mask, LENGTHS):
        row[torch.randperm(9)[:n]] = True
    wide = [torch.full(mask.shape, torch.nan, dtype=t.dtype).masked_scatter(mask, t) for t in flat]
    got, gradient = value_and_gradient(loss, *wide, mask=mask, reduction="none", **case)
    torch.testing.assert_close(got, losses, **close)
    torch.testing.assert_close(gradient[mask], torch.cat(gradients), **close)
    assert (gradient[~mask] == 0).all()

    # Both: every list with two items more, which are masked out.
    more = [torch.cat([t, t.new_full((2,), torch.nan)]) for s_r in lists for t in s_r]
    keep = torch.cat([torch.tensor([True] * n + [False] * 2) for n in LENGTHS])
    offsets = torch.tensor([0, *(n + 2 for n in LENGTHS)]).cumsum(0)
    flat = torch.cat(more[::2]), torch.cat(more[1::2])
    got, gradient = value_and_gradient(loss, *flat, offsets=offsets, mask=keep, reduction="none", **case)
    torch.testing.assert_close(got, losses, **close)
    torch.testing.assert_close(gradient[keep], torch.cat(gradients), **close)
    assert (gradient[~keep] == 0).all()


@every_loss
def test_nothing(module, case, backend):
    loss = function_of(module)
    nothing = [
        (torch.zeros(0, 5), {}, (0,)),
        (torch.zeros(3, 0), {}, (3,)),
        (torch.zeros(0), {}, ()),
        (torch.zeros(0), {"offsets": torch.tensor([0])}, (0,)),
        (torch.zeros(0), {"offsets": torch.tensor([0, 0, 0])}, (2,)),
        (torch.full((2, 3), torch.nan), {"mask": torch.zeros(2, 3, dtype=torch.bool)}, (2,)),
    ]
    for scores, lists, shape in nothing:
        got, gradient = value_and_gradient(loss, scores, scores, reduction="none", **lists, **case)
        assert got.shape == shape and (got == 0).all() and (gradient == 0).all()
        assert loss(scores, scores, **lists, **case) == 0


@every_loss
def test_no_number_leaks_to_other_lists(module, case, backend):
    """A list with a NaN spoils no other."""
    scores, relevance = random_lists(3, 6)
    right = value_and_gradient(function_of(module), scores, relevance, reduction="none", **case)
    scores[1, 2] = torch.nan
    spoilt = value_and_gradient(function_of(module), scores, relevance, reduction="none", **case)
    assert spoilt[0][1].isnan()
    for got, truth in zip(spoilt, right):
        torch.testing.assert_close(got[::2], truth[::2], rtol=1e-12, atol=1e-14)


# --- what list_loss adds ---------------------------------------------------------------------------------------------


@every_loss
def test_reductions_and_weights(module, case):
    loss, (scores, relevance) = function_of(module), random_lists(4, 3, 6)
    losses = loss(scores, relevance, reduction="none", **case)
    weight = torch.rand(4, 3)
    assert losses.shape == (4, 3)
    for factor, options in ((1.0, {}), (weight, {"list_weight": weight})):
        torch.testing.assert_close(loss(scores, relevance, reduction="none", **options, **case), losses * factor)
        torch.testing.assert_close(loss(scores, relevance, reduction="sum", **options, **case), (losses * factor).sum())
        torch.testing.assert_close(loss(scores, relevance, **options, **case), (losses * factor).mean())
    weighted = value_and_gradient(loss, scores, relevance, list_weight=weight, reduction="sum", **case)[1]
    plain = value_and_gradient(loss, scores, relevance, reduction="sum", **case)[1]
    torch.testing.assert_close(weighted, plain * weight.unsqueeze(-1))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(module, case, dtype, backend):
    """Computed in fp32: the numbers of the rounded scores."""
    scores, relevance = random_lists(3, 8, dtype=dtype)
    relevance = relevance.to(dtype)
    got, gradient = value_and_gradient(function_of(module), scores, relevance, **case)
    value, wide = value_and_gradient(function_of(module), scores.float(), relevance.float(), **case)
    assert got.dtype == torch.float32 and gradient.dtype == dtype
    assert got == value and torch.equal(gradient, wide.to(dtype))


@every_loss
def test_layouts(module, case, backend):
    scores, relevance = random_lists(4, 7)
    wide = torch.stack([scores, scores], -1)[..., 0], relevance.t().contiguous().t()
    for got, right in zip(
        value_and_gradient(lambda s, r, **o: function_of(module)(s.t().contiguous().t(), r, **o), *wide, **case),
        value_and_gradient(function_of(module), scores, relevance, **case),
    ):
        assert torch.equal(got, right)
    frozen = scores.clone()
    assert not function_of(module)(scores, relevance, **case).requires_grad
    assert torch.equal(scores, frozen)


@pytest.mark.parametrize("arguments, wrong", [
    (dict(relevance=torch.zeros(2, 3)), "relevance"),
    (dict(scores=torch.zeros(2, 4, dtype=torch.int64)), "scores"),
    (dict(mask=torch.ones(2, 4)), "mask"),
    (dict(mask=torch.ones(4, dtype=torch.bool)), "mask"),
    (dict(offsets=torch.tensor([0, 4])), "scores"),
    (dict(list_weight=torch.ones(4)), "list_weight"),
    (dict(reduction="average"), "reduction"),
    (dict(temprature=1.0), "temprature"),
])
def test_errors_name_the_argument(arguments, wrong):
    given = {"scores": torch.zeros(2, 4), "relevance": torch.zeros(2, 4), **arguments}
    with pytest.raises((ValueError, TypeError), match=f"listnet_loss: .*{wrong}"):
        ranking.listnet_loss(**given)


@every_loss
def test_signature(module, case):
    parameters = inspect.signature(function_of(module)).parameters
    assert list(parameters)[:2] == ["scores", "relevance"]
    assert {"mask", "offsets", "list_weight", "reduction"} < set(parameters)
    assert getattr(ranking, name_of(module)) is function_of(module)
    assert "list_weight" in function_of(module).__doc__ and "20" in function_of(module).__doc__  # the year of a paper


# --- derivatives -----------------------------------------------------------------------------------------------------


@every_case
def test_gradcheck(module, case, backend):
    scores, relevance = random_lists(2, 4)
    mask = torch.tensor([[True] * 4, [True, True, False, True]])

    def loss(scores):
        return function_of(module)(scores, relevance, mask=mask, reduction="none", **case)

    assert torch.autograd.gradcheck(loss, scores.requires_grad_(), fast_mode=True)
    try:
        assert torch.autograd.gradgradcheck(loss, scores, fast_mode=True)
    except RuntimeError as refused:
        assert name_of(module) in str(refused) and "create_graph" in str(refused)


@every_loss
@pytest.mark.unpoisoned
def test_compiles_whole(module, case):
    torch._dynamo.reset()
    how = "aot_eager" if name_of(module) in OF_OPERATORS else "eager"  # plain PyTorch has only graphs to break
    compiled = torch.compile(function_of(module), fullgraph=True, backend=how)
    scores, relevance = random_lists(9)
    lists = dict(mask=torch.arange(9) != 6, offsets=torch.tensor([0, 3, 3, 9]))
    found = value_and_gradient(compiled, scores, relevance, **lists, **case)
    for got, right in zip(found, value_and_gradient(function_of(module), scores, relevance, **lists, **case)):
        torch.testing.assert_close(got, right)


# --- modules ---------------------------------------------------------------------------------------------------------


def test_every_loss_has_a_module():
    modules = {c.function.__name__: c for c in ListLoss.__subclasses__()}
    assert set(modules) == {name_of(m) for m in LOSSES}
    for name, module in modules.items():
        assert getattr(nn, module.__name__) is module and module.__name__.lower() == name.replace("_", "")
        assert inspect.getdoc(getattr(fl.ranking, name)) in module.__doc__


@every_case
def test_module_is_the_function(module, case):
    made = {c.function.__name__: c for c in ListLoss.__subclasses__()}[name_of(module)](**case)
    scores, relevance = random_lists(3, 6)
    mask, weight = torch.rand(3, 6) < 0.7, torch.rand(3)
    of_batch = dict(mask=mask, list_weight=weight)
    assert torch.equal(made(scores, relevance, **of_batch), function_of(module)(scores, relevance, **of_batch, **case))
    for name, value in case.items():
        assert getattr(made, name) == value


def test_losses_share_no_limit_of_compilations():
    """torch.compile counts by code object: with one for all, fullgraph=True ends at the ninth loss of a process."""
    assert len({id(function_of(m).__code__) for m in LOSSES}) == len(LOSSES)
    assert all(function_of(m).__code__.co_name == name_of(m) for m in LOSSES)


# --- what padding and odd relevances must not do ----------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("shift, lift", [(-300.0, 0.0), (0.0, -300.0), (0.0, 300.0)])
def test_padding_far_from_the_items(module, case, shift, lift):
    """Padding is cleaned to 0, which may lie far above all items of a list: no overflow comes back from there."""
    loss, keep = function_of(module), torch.tensor([True, False, True, True, False])
    scores, relevance = random_lists(5, dtype=torch.float32)
    scores, relevance = scores + shift, relevance.float() + lift

    def found(s, r, **options):
        s, r = s.clone().requires_grad_(), r.clone().requires_grad_()
        value = loss(s, r, **options, **case)
        parts = torch.autograd.grad(value, (s, r), allow_unused=True) if value.requires_grad else (None, None)
        return value, *(torch.zeros_like(s) if part is None else part for part in parts)

    value, *gradients = found(scores, relevance, mask=keep)
    right, *truth = found(scores[keep], relevance[keep])
    assert torch.allclose(value, right, rtol=1e-4, atol=1e-6)
    for got, want in zip(gradients, truth):
        assert torch.allclose(got[keep], want, rtol=1e-3, atol=1e-5) and (got[~keep] == 0).all()


@every_loss
def test_nan_relevance_is_seen(module, case):
    scores, relevance = random_lists(2, 5)
    relevance[1, 3] = torch.nan
    value = function_of(module)(scores, relevance, reduction="none", **case)
    assert value[0].isfinite() and value[1].isnan()


@pytest.mark.parametrize("powered", [True, False])
def test_approx_ndcg_without_gains(powered):
    scores, relevance = torch.randn(2, 3), torch.tensor([[-1.0, -2.0, -3.0], [-200.0, -201.0, -300.0]])
    value, gradient = value_and_gradient(ranking.approx_ndcg_loss, scores, relevance, powered_relevancies=powered)
    assert value == 0 and (gradient == 0).all()


def test_irrelevant_items_of_no_score():
    scores, relevance = torch.tensor([0.5, -torch.inf]), torch.tensor([1.0, 0.0])
    value, gradient = value_and_gradient(ranking.listwise_point_loss, scores, relevance)
    assert torch.allclose(value, scores[:1].neg().exp().log1p().sum()) and gradient.isfinite().all()


@pytest.mark.parametrize(
    "options", [{"relevance": [1, 0]}, {"relevance": torch.zeros(2) + 1j}, {"mask": [True, True]}, {"offsets": [0, 2]},
                {"list_weight": [1.0]}],
)  # fmt: skip
def test_arguments_that_are_no_tensors(options):
    given = {"relevance": torch.tensor([1.0, 0.0]), **options}
    with pytest.raises(TypeError, match=f"ranknet_loss: {next(iter(options))}: expected"):
        ranking.ranknet_loss(torch.zeros(2), **given)


@pytest.mark.parametrize("name, option", [
    ("neural_ndcg_loss", "k"), ("neural_ndcg_loss", "max_iterations"),
    ("neural_ndcg_loss", "n_samples"), ("gro_co_loss", "k"),
])  # fmt: skip
def test_whole_numbers(name, option):
    for value, error_type in ((-1, ValueError), (2.5, TypeError), ("a", TypeError)):
        options = {option: value, **({"stochastic": True} if option == "n_samples" else {})}
        with pytest.raises(error_type, match=f"{name}: {option}: expected an integer from"):
            getattr(ranking, name)(*random_lists(2, 3), **options)
