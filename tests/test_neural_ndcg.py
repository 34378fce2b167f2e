"""NeuralNDCG: long lists, stopping, stochastic orders, what the published code gets wrong, and the op's contract."""

import pytest
import torch
from tolerance import error

from fusedloss import ranking
from fusedloss.ranking.neural_ndcg_loss import neural_ndcg_loss as loss
from fusedloss.ranking.neural_ndcg_loss import reference

F64 = torch.float64


def lists(*shape, dtype=F64):
    return torch.randn(shape, dtype=dtype), torch.randint(0, 5, shape).to(dtype)


def both(function, scores, relevance, **options):
    scores = scores.detach().clone().requires_grad_()
    value = function(scores, relevance, **options)
    return value.detach(), torch.autograd.grad(value.sum(), scores)[0]


def hard_ndcg(scores, relevance):
    gains, place = 2**relevance - 1, torch.arange(2, len(scores) + 2, dtype=F64).log2()
    order = scores.sort(descending=True).indices
    return (gains[order] / place).sum() / (gains.sort(descending=True).values / place).sum()


@pytest.mark.parametrize(
    "options", [{}, {"tau": 0.1, "k": 10}, {"tau": 30.0, "tolerance": 1e-3}, {"max_iterations": 0}]
)
def test_long_lists_follow_the_unrolled_steps(options, backend):
    """Also where Sinkhorn stops early, and where rows of P are cut down to their band."""
    scores, relevance = lists(100)
    scores[50], scores[70] = scores[10], scores[10]
    for dtype, within in ((F64, 1e-11), (torch.float32, 1e-4 if "tolerance" in options else 5e-6)):
        truth = both(reference, scores.to(dtype).double(), relevance, **options)
        for got, right in zip(both(loss, scores.to(dtype), relevance, **options), truth):
            assert error(got, right) <= within


def test_lists_whose_band_is_not_kept(backend, monkeypatch):
    """Of a list of 1060 in float64, of every column, 9 MB of P are computed in each step anew."""
    n = 1060
    if backend == "torch":
        from fusedloss.sorting import sinkhorn_torch

        n = 200
        monkeypatch.setattr(sinkhorn_torch, "KEPT", 1 << 14)
        monkeypatch.setattr(sinkhorn_torch, "AT_ONCE", 1 << 14)
    scores, relevance = lists(n)
    options = dict(tau=2000.0, max_iterations=3, tolerance=0.0)
    for got, right in zip(both(loss, scores, relevance, **options), both(reference, scores, relevance, **options)):
        assert error(got, right) <= 1e-9


def test_little_memory_is_kept():
    scores, relevance = lists(4, 300)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss(scores.requires_grad_(), relevance)
    assert sum(kept) <= 4 * scores.numel()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
def test_the_order_is_found_as_tau_goes_to_zero(scale, backend):
    scores, relevance = lists(40)
    got = loss(scale * scores, relevance, tau=1e-9)
    assert -got.item() == pytest.approx(hard_ndcg(scores, relevance).item(), abs=1e-12)


def test_same_bits_for_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        for shape in ((3, 100), (1, 2100)):
            scores, relevance = lists(*shape, dtype=torch.float32)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(both(loss, scores, relevance, max_iterations=5))
            for value, gradient in found[1:]:
                assert value == found[0][0] and torch.equal(gradient, found[0][1])
    finally:
        torch.set_num_threads(before)


def test_lists_stop_on_their_own(backend):
    """The one list converges at once, its neighbour never does: neither sees the other."""
    scores, relevance = lists(2, 30)
    scores[0] = torch.arange(30) * 100.0
    together = both(loss, scores, relevance, reduction="none")
    for i in range(2):
        alone = both(loss, scores[i], relevance[i])
        torch.testing.assert_close(together[0][i], alone[0], rtol=1e-13, atol=0)
        torch.testing.assert_close(together[1][i], alone[1], rtol=1e-11, atol=1e-15)


def test_mean_is_over_lists_with_something_relevant(backend):
    scores, relevance = lists(3, 8)
    relevance[1] = 0
    losses = loss(scores, relevance, reduction="none")
    value, gradient = both(loss, scores, relevance)
    assert losses[1] == 0 and value == losses.sum() / 2 and (gradient[1] == 0).all()
    assert loss(scores, torch.zeros_like(scores)) == 0


def test_scores_without_an_order(backend):
    scores, relevance = lists(5, 12)
    scores[1:4, 3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    value, gradient = both(loss, scores, relevance, reduction="none")
    assert value[1:4].isnan().all() and value[::4].isfinite().all() and gradient[::4].isfinite().all()


# --- stochastic ------------------------------------------------------------------------------------------------------


def ragged():
    lengths = [6, 1, 9]
    parts = [lists(n) for n in lengths]
    flat = [torch.cat(p) for p in zip(*parts)]
    mask = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    padded = [torch.full(mask.shape, torch.nan, dtype=F64).masked_scatter(mask, t) for t in flat]
    return parts, flat, dict(offsets=torch.tensor([0, *lengths]).cumsum(0)), padded, dict(mask=mask)


@pytest.mark.parametrize("log_scores", [False, True])
def test_stochastic_orders_of_ragged_lists(log_scores, backend):
    """Without noise all samples are the plain loss, of each list with its own items: the published code mixes up which
    lists are padded (−0.678 for −0.861 in the mean over two)."""
    parts, flat, offsets, padded, mask = ragged()
    options = dict(stochastic=True, n_samples=3, beta=0.0, log_scores=log_scores, reduction="none")

    def own(scores):
        return (scores + scores.min().abs() + 1e-10).log() if log_scores else scores

    truth = [both(lambda s, r: reference(own(s), r), s, r) for s, r in parts]
    for given, layout in ((flat, offsets), (padded, mask)):
        value, gradient = both(loss, *given, **layout, **options)
        assert error(value, torch.stack([v for v, _ in truth])) <= 1e-10
        gradient = gradient if "offsets" in layout else gradient[layout["mask"]]
        assert gradient.isfinite().all()
        if not log_scores:  # where the smallest score is made 0, autograd's way through its logarithm is rounding only
            assert error(gradient, torch.cat([g for _, g in truth])) <= 1e-10


def test_stochastic_gradient_where_the_smallest_score_is_a_constant():
    """log(s + |min s| + 1e-10) at the smallest is log 1e-10 whatever it is; the others move against it."""
    scores, relevance = lists(7)
    options = dict(stochastic=True, n_samples=4, beta=0.1, tau=0.5)

    def made(scores):
        return loss(scores, relevance, generator=torch.Generator().manual_seed(3), **options)

    assert torch.autograd.gradcheck(made, scores.requires_grad_(), eps=1e-8, atol=1e-5)
    assert torch.autograd.gradcheck(made, (scores.detach() + 9).requires_grad_())


def test_stochastic_samples_come_from_the_generator():
    scores, relevance = lists(2, 9)

    def made(seed, **options):
        return loss(scores, relevance, stochastic=True, generator=torch.Generator().manual_seed(seed), **options)

    assert made(1) == made(1) != made(2)
    plain, noisy = loss(scores, relevance), made(3, n_samples=400, beta=0.01, log_scores=False)
    assert noisy.item() == pytest.approx(plain.item(), abs=0.01)


# --- what the published code gets wrong ------------------------------------------------------------------------------


def test_transposed_is_the_same_number_for_any_gains(backend):
    scores, relevance = lists(3, 12)
    for powered in (True, False):
        plain, turned = (
            both(loss, scores, relevance, transposed=t, powered_relevancies=powered) for t in (False, True)
        )
        assert torch.equal(plain[0], turned[0]) and torch.equal(plain[1], turned[1])
        options = dict(transposed=True, powered_relevancies=powered)
        truth = sum(reference(s, r, **options) for s, r in zip(scores, relevance)) / 3
        assert error(plain[0], truth) <= 1e-11
    perfect = loss(relevance * 100.0, relevance, transposed=True, powered_relevancies=False, tau=1e-3)
    assert perfect.item() == pytest.approx(-1, abs=1e-6)


def test_list_mle_far_below_its_largest_score():
    scores = torch.tensor([0.0, -200.0, -201.0], requires_grad=True)
    value = ranking.list_mle_loss(scores, torch.tensor([2.0, 0.0, 1.0]))
    value.backward()
    assert value.item() == pytest.approx(1.3132617, abs=1e-5)  # at 201, fp32 is 1.5e-5 coarse
    sure = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(scores.grad, torch.stack([torch.tensor(0.0), sure, -sure]), rtol=1e-4, atol=1e-4)


def test_listnet_does_not_saturate():
    scores = torch.tensor([60.0, 0.0], requires_grad=True)
    value = ranking.listnet_loss(scores, torch.tensor([0.0, 3.0]))
    value.backward()
    assert value.item() == pytest.approx(60 * torch.tensor(3.0).sigmoid().item(), rel=1e-6) and scores.grad[0] > 0.9


def test_list_mle_shuffles_ties():
    scores = torch.randn(6, dtype=F64).expand(400, 6)
    relevance = torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=F64).expand(400, 6)
    for function in (ranking.list_mle_loss, ranking.p_list_mle_loss):
        made = [
            function(scores, relevance, shuffle_ties=True, generator=torch.Generator().manual_seed(s), reduction="none")
            for s in (1, 1, 2)
        ]
        assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2]) and len(made[0].unique()) == 36
        assert len(function(scores, relevance, reduction="none").unique()) == 1


def test_p_list_mle_of_a_long_list():
    scores = torch.randn(2000, dtype=torch.float32, requires_grad=True)
    value = ranking.p_list_mle_loss(scores, torch.arange(2000.0))
    value.backward()
    assert value.isfinite() and scores.grad.isfinite().all() and scores.grad.abs().sum() > 0.1


# --- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
def test_op_contract():
    op = torch.ops.fusedloss
    scores, gains = lists(3, 6)
    mask = torch.rand(3, 6) < 0.8
    flat, offsets = scores.reshape(-1).requires_grad_(), torch.tensor([0, 5, 5, 18])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.neural_ndcg, (scores, gains, mask, None, 1.0, 0, 50, 1e-6, True), test_utils=checks)
    given = flat, gains.reshape(-1), None, offsets, 0.5, 3, 9, 0.0, True
    torch.library.opcheck(op.neural_ndcg, given, test_utils=checks)
    torch.library.opcheck(op.neural_ndcg_backward, (gains, torch.rand(3), scores, None), test_utils=checks)


def test_second_derivatives_are_refused(backend):
    scores, relevance = lists(5)
    scores.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(scores, relevance), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="neural_ndcg_loss.*create_graph"):
        gradient.sum().backward()


@pytest.mark.parametrize("wrong", [
    dict(tau=0.0), dict(tau=-1.0), dict(k=0), dict(tolerance=-1e-6), dict(max_iterations=-1),
    dict(stochastic=True, n_samples=0),
])
def test_options_are_checked(wrong):
    scores, relevance = lists(2, 4)
    name = [n for n in wrong if n != "stochastic"][0]
    with pytest.raises(ValueError, match=f"neural_ndcg_loss: {name}"):
        loss(scores, relevance, **wrong)
