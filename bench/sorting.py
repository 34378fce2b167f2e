"""What is measured of the sort engine, and the dense ways of doing the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import OURS, Call, tolerance
from torch import Tensor

from fusedloss import entmax15_loss, sorting
from fusedloss.ranking import approx_ndcg_loss, lambda_loss, neural_ndcg_loss

SHAPES = ((128, 100), (128, 1000), (32, 10_000), (4, 100_000), (1, 1_000_000))
STRENGTHS = (1.0, 1e-3)
ULPS = 4  # of the largest |output|: what the error of soft ranks and soft sorts may be
NUMBERS = 400_000  # to a turn: small calls are repeated
STEPS = 50  # of Sinkhorn's scaling


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relevances(*shape: int) -> Tensor:
    """0 to 4, as search engines' judges have them."""
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1)).float()


def gradient(function: Callable[..., Tensor], *leaves: Tensor, repeat: int = 1) -> Call:
    """Forward and backward, with random upstream gradients unless the result is one number."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    with torch.no_grad():
        result = function(*leaves)
        upstream = torch.randn(result.shape).to(result)  # of one seed the same in every type

    def call():
        for _ in range(repeat):
            result = function(*leaves)
            slopes = torch.autograd.grad(result, leaves, upstream if result.dim() else None)
        return result.detach(), *slopes

    return call


def alike(ours: Call, exact: Call, ulps: float) -> None:
    """The result of `ours` is within so many fp32 units of its largest entry, its gradients twice fp32's rounding."""
    (got, *slopes), (truth, *true_slopes) = ours(), exact()
    unit = torch.finfo(torch.float32).eps * truth.abs().max()
    assert (got - truth).abs().max() <= ulps * unit, f"off by {(got - truth).abs().max() / unit:.3g} ulps"
    for slope, true in zip(slopes, true_slopes):
        assert tolerance.error(slope, true) < 1e-5, f"gradient off by {tolerance.error(slope, true):.3g}"


# --- the ways of plain PyTorch ---------------------------------------------------------------------------------------


def neural_sort(s: Tensor, tau: float = 1.0) -> Tensor:
    """NeuralSort's matrix (…, n, n); sums of the pairwise differences as a product with ones, as it is published."""
    n = s.shape[-1]
    apart = (s.unsqueeze(-1) - s.unsqueeze(-2)).abs() @ torch.ones(n, n, dtype=s.dtype)
    place = (n + 1 - 2 * torch.arange(1, n + 1)).to(s.dtype)
    return ((place[:, None] * s.unsqueeze(-2) - apart.mT) / tau).softmax(-1)


def discounts(n: int) -> Tensor:
    return 1 / torch.arange(2.0, n + 2).log2()


def ideal(gains: Tensor) -> Tensor:
    best = gains.sort(-1, descending=True).values
    return (best * discounts(gains.shape[-1]).to(gains.dtype)).sum(-1)


def dense_neural_ndcg(s: Tensor, relevance: Tensor) -> Tensor:
    """NeuralSort, and Sinkhorn's steps one by one under autograd, as allRank goes about it."""
    p, gains = neural_sort(s), 2**relevance - 1
    for _ in range(STEPS):
        p = p / p.sum(-2, keepdim=True).clamp(min=1e-10)
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-10)
        if max((p.sum(-1) - 1).abs().max(), (p.sum(-2) - 1).abs().max()) < 1e-6:
            break
    sorted_gains = (p @ gains.unsqueeze(-1).to(p.dtype)).squeeze(-1)
    return -((sorted_gains * discounts(s.shape[-1])).sum(-1) / ideal(gains)).mean()


def dense_approx_ndcg(s: Tensor, relevance: Tensor) -> Tensor:
    gains = 2**relevance - 1
    position = 0.5 + torch.sigmoid(s.unsqueeze(-2) - s.unsqueeze(-1)).sum(-1)
    return -((gains / (1 + position).log2()).sum(-1) / ideal(gains)).mean()


def dense_lambda(s: Tensor, relevance: Tensor, mu: float = 10.0) -> Tensor:
    """LambdaLoss with the weights of NDCG-Loss2++."""
    n = s.shape[-1]
    order = s.detach().argsort(dim=-1, descending=True, stable=True)
    s, relevance = s.gather(-1, order), relevance.gather(-1, order)
    gains = (2**relevance - 1) / ideal(2**relevance - 1)[:, None]
    d = discounts(n).reciprocal()
    far = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    delta = torch.where(far > 0, (1 / d[far - 1] - 1 / d[far]).abs(), 0.0)
    weight = mu * delta + (1 / d[:, None] - 1 / d).abs()
    weight = weight * (gains.unsqueeze(-1) - gains.unsqueeze(-2)).abs()
    loss = weight * F.softplus(s.unsqueeze(-2) - s.unsqueeze(-1)) / torch.tensor(2.0).log()
    return torch.where(relevance.unsqueeze(-1) > relevance.unsqueeze(-2), loss, 0.0).sum((-1, -2)).mean()


# --- contenders: the first is what ratios are taken to ---------------------------------------------------------------


def peer(module: str, attribute: str) -> Callable[..., Tensor] | None:
    """A function of a package that may not be there."""
    try:
        return getattr(__import__(module), attribute)
    except ImportError:
        return None


def soft(operator: str, kind: str, strength: float, shape: tuple[int, int]) -> dict[str, Call]:
    x, options = random(*shape), dict(regularization=kind, regularization_strength=strength)
    repeat = max(1, NUMBERS // x.numel())
    ways = {"torch.sort": lambda x: x.sort().values}
    if theirs := peer("torchsort", operator):
        ways["torchsort"] = lambda x: theirs(x, **options)
    ways[OURS] = lambda x: getattr(sorting, operator)(x, **options)
    return {name: gradient(way, x, repeat=repeat) for name, way in ways.items()}


def check_soft(operator: str, kind: str, strength: float, shape: tuple[int, int]) -> None:
    """fp32 beside fp64, which the tests hold to the dense formula."""
    x = random(*shape)

    def way(x: Tensor) -> Tensor:
        return getattr(sorting, operator)(x, kind, strength)

    torch.manual_seed(0)
    ours = gradient(way, x)
    torch.manual_seed(0)
    alike(ours, gradient(way, x.double()), ULPS)


def relaxed(shape: tuple[int, int]) -> dict[str, Call]:
    """P̂ v and its gradients."""
    s, v = random(*shape), random(*shape, seed=1)
    ways = {OURS: lambda s, v: sorting.NeuralSort(s) @ v}
    if shape[0] * shape[1] ** 2 < 1e8:
        ways = {"torch, dense": lambda s, v: (neural_sort(s) @ v.unsqueeze(-1)).squeeze(-1), **ways}
    return {name: gradient(way, s, v) for name, way in ways.items()}


def check_relaxed(shape: tuple[int, int]) -> None:
    s, v = random(2, 300), random(2, 300, seed=1)
    torch.manual_seed(0)
    ours = gradient(lambda s, v: sorting.NeuralSort(s) @ v, s, v)
    torch.manual_seed(0)
    exact = gradient(lambda s, v: (neural_sort(s) @ v.unsqueeze(-1)).squeeze(-1), s.double(), v.double())
    alike(ours, exact, 16)


RANKING = {
    "neural_ndcg_loss": (dense_neural_ndcg, neural_ndcg_loss),
    "lambda_loss": (dense_lambda, lambda_loss),
    "approx_ndcg_loss": (dense_approx_ndcg, approx_ndcg_loss),
}


def ranked(name: str, shape: tuple[int, int]) -> dict[str, Call]:
    s, r = random(*shape), relevances(*shape)
    dense, ours = RANKING[name]
    ways = {"torch, dense": dense, OURS: ours}
    if name == "neural_ndcg_loss" and shape[0] * shape[1] ** 2 > 1e6:
        del ways["torch, dense"]  # 200 matrices of each list are kept for backward
    return {way: gradient(lambda s, loss=loss: loss(s, r), s) for way, loss in ways.items()}


def check_ranked(name: str, shape: tuple[int, int]) -> None:
    s, r = random(3, 60), relevances(3, 60)
    dense, ours = RANKING[name]
    alike(gradient(lambda s: ours(s, r), s), gradient(lambda s: dense(s, r.double()), s.double()), 64)


def network(rows: int, n: int) -> dict[str, Call]:
    """Sorted values and the whole relaxed permutation of a bitonic network."""
    x, ways = random(rows, n), {}
    if theirs := peer("diffsort", "DiffSortNet"):
        net = theirs("bitonic", n, steepness=10.0)

        def dense(x: Tensor) -> Tensor:
            in_order, permutation = net(x)
            return torch.cat([in_order[:, None], permutation], 1)

        ways["diffsort"] = dense

    def ours(x: Tensor) -> Tensor:
        net = sorting.SortingNetwork(x, "bitonic", "cauchy", 10.0)
        return torch.cat([net.sorted[:, None], net.dense().mT], 1)

    ways[OURS] = ours
    return {name: gradient(way, x) for name, way in ways.items()}


def entmax(rows: int, columns: int) -> dict[str, Call]:
    z = random(rows, columns)
    target = torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(1))
    ways = {"torch, cross_entropy": lambda z: F.cross_entropy(z, target)}
    if theirs := peer("entmax", "entmax15_loss"):
        ways["entmax"] = lambda z: theirs(z, target).mean()
    ways[OURS] = lambda z: entmax15_loss(z, target)
    return {name: gradient(way, z) for name, way in ways.items()}
