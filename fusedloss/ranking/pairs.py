"""Losses over the pairs of each list, and soft positions: opaque operators that keep O(n) numbers, and their autograd.

``fusedloss::pair_losses``     Σ w_ij f(σ (s_i − s_j)) over pairs of relevance r_i > r_j, its gradient, how many pairs
``fusedloss::soft_positions``  1 + Σ_{j ≠ i} 1 / (1 + e^{σ (s_i − s_j)}), and ``soft_positions_backward``

Weights of pairs are constants: no gradient flows through ranks. Upstream of a list's loss there is one number, so the
gradient comes with the loss and is kept. Second derivatives are right, by plain PyTorch (``…_curvature``); third ones
are an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import ALL_DTYPES, _native, address, contiguous, native_lists
from ..checks import check_constant, expect
from ..lists import Lists
from ..operators import like, operator
from ..sorting.engines import engine
from . import pairs_torch

FUNCTIONS = ("softplus", "logistic")
WEIGHTS = ("one", "difference", "squares", "ndcg1", "ndcg2", "lambdarank", "ndcg2pp")
NORMALIZATIONS = (None, "pairs", "batch")
LISTS = "Tensor? mask, Tensor? offsets"
PAIRS = "str function, str weight, float sigma, float mu, float scale, int k"


def _lists(scores: Tensor, mask: Tensor | None, offsets: Tensor | None) -> Lists:
    return Lists(scores.shape, scores.dim() - 1, mask, offsets)


def _engine(scores: Tensor) -> str:
    found = engine(scores.device, "cpu", "triton")
    return "torch" if found == "triton" and scores.dtype != torch.float32 else found


def _native_pairs(scores: Tensor, mask: Tensor | None, offsets: Tensor | None, *options):
    return _native.Pairs(*native_lists(scores, offsets, mask), ALL_DTYPES[scores.dtype], *options)


# --- losses of pairs -------------------------------------------------------------------------------------------------


def _pair_losses(scores, relevance, mask, offsets, function, weight, sigma, mu, scale, k):
    scores, relevance, mask = contiguous(scores, relevance, mask)
    which, lists = _engine(scores), _lists(scores, mask, offsets)
    if which == "cpu":
        losses, gradient = scores.new_empty(lists.rows), torch.empty_like(scores)
        pairs = scores.new_empty(lists.rows, dtype=torch.int64)
        options = FUNCTIONS.index(function), WEIGHTS.index(weight), mu, scale, k
        given = _native_pairs(scores, mask, offsets, sigma, *options)
        _native.pair_losses(given, *map(address, (scores, relevance, losses, gradient, pairs)))
        return losses, gradient, pairs
    items, sums = pairs_torch.weighted(lists, scores, relevance, weight, mu, k), pairs_torch
    if which == "triton":
        from . import pairs_triton as sums
    losses, gradient, pairs = sums.pair_losses(lists, items, function, sigma, scale)
    disorder = torch.where(relevance.isnan(), torch.nan, 0.0).to(scores.dtype)  # no pair is one of NaN
    losses, at = losses + lists.sum(disorder), lists.spread(lists.sum(disorder))
    return losses, gradient + (at if mask is None else torch.where(mask, at, 0.0)), pairs


def _pair_losses_fake(scores, relevance, mask, offsets, *options):
    rows = _lists(scores, mask, offsets).rows
    return scores.new_empty(rows), like(scores), scores.new_empty(rows, dtype=torch.int64)


def _losses_derivative(ctx, upstream, along, _pairs):
    """`along` comes to the gradient, where that is differentiated."""
    scores, relevance, mask, offsets, gradient = ctx.saved_tensors
    found = None if upstream is None else _lists(scores, mask, offsets).spread(upstream) * gradient
    if along is not None:
        bent = _run_pair_curvature(scores, relevance, along, mask, offsets, *ctx.options)
        found = bent if found is None else found + bent
    return (found,)


_run_pair_losses = operator(
    "pair_losses",
    f"(Tensor scores, Tensor relevance, {LISTS}, {PAIRS}) -> (Tensor, Tensor, Tensor)",
    _pair_losses,
    _pair_losses_fake,
    _losses_derivative,
    keep=lambda inputs, outputs: (*inputs[:4], outputs[1]),
    constant=(2,),
)


def pair_losses(
    name: str,
    lists: Lists,
    scores: Tensor,
    relevance: Tensor,
    *,
    function: str = "softplus",
    weight: str = "one",
    sigma: float = 1.0,
    mu: float = 0.0,
    scale: float = 1.0,
    k: int | None = None,
    normalization: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(rows,): scale Σ w_ij f(σ (s_i − s_j)) of each list, for the loss `name`; "pairs": divided by the number of pairs
    of its list, 0 where there are none; "batch": and the numbers of pairs, by which `list_loss` takes the mean."""
    check_constant(name, "sigma", sigma, 0.0, above=True)
    check_constant(name, "mu", mu)
    expect(normalization in NORMALIZATIONS, name, "normalization", f"one of {NORMALIZATIONS}", normalization)
    expect(k is None or (isinstance(k, int) and k >= 1), name, "k", "None or an integer from 1", k)
    options = function, weight, float(sigma), float(mu), float(scale), k or 0
    losses, _, pairs = _run_pair_losses(scores, relevance.detach(), lists.mask, lists.offsets, *options)
    if normalization == "pairs":
        return losses / pairs.clamp(min=1)
    return losses if normalization is None else (losses, pairs)


# --- soft positions --------------------------------------------------------------------------------------------------


def _soft_positions(scores, mask, offsets, sigma):
    (scores, mask), which = contiguous(scores, mask), _engine(scores)
    if which == "cpu":
        positions = torch.empty_like(scores)
        _native.soft_positions(_native_pairs(scores, mask, offsets, sigma), address(scores), address(positions))
        return positions
    lists = _lists(scores, mask, offsets)
    if which == "triton":
        from . import pairs_triton

        return pairs_triton.soft_positions(lists, scores, None, sigma)
    return pairs_torch.soft_positions(lists, scores, sigma)


def _soft_positions_backward(scores, upstream, mask, offsets, sigma):
    (scores, upstream, mask), which = contiguous(scores, upstream, mask), _engine(scores)
    if which == "cpu":
        found = torch.empty_like(scores)
        given = _native_pairs(scores, mask, offsets, sigma)
        _native.soft_positions_backward(given, *map(address, (scores, upstream, found)))
        return found
    lists = _lists(scores, mask, offsets)
    if which == "triton":
        from . import pairs_triton

        return pairs_triton.soft_positions(lists, scores, upstream, sigma)
    return pairs_torch.soft_positions_backward(lists, scores, upstream, sigma)


def _positions_derivative(ctx, upstream):
    scores, mask, offsets = ctx.saved_tensors
    return (_run_positions_backward(scores, upstream, mask, offsets, *ctx.options),)


def _positions_backward_derivative(ctx, along):
    scores, upstream, mask, offsets = ctx.saved_tensors
    bent = _run_positions_curvature(scores, upstream, along, mask, offsets, *ctx.options)
    # Symmetric in what comes from above and what it is asked along.
    return bent, _run_positions_backward(scores, along, mask, offsets, *ctx.options)


_run_positions = operator(
    "soft_positions",
    f"(Tensor scores, {LISTS}, float sigma) -> Tensor",
    _soft_positions,
    like,
    _positions_derivative,
)
_run_positions_backward = operator(
    "soft_positions_backward",
    f"(Tensor scores, Tensor upstream, {LISTS}, float sigma) -> Tensor",
    _soft_positions_backward,
    like,
    _positions_backward_derivative,
)


# --- second derivatives ----------------------------------------------------------------------------------------------


def _pair_curvature(scores, relevance, along, mask, offsets, function, weight, sigma, mu, scale, k):
    lists, scores = _lists(scores, mask, offsets), scores.contiguous()
    items = pairs_torch.weighted(lists, scores, relevance, weight, mu, k)
    return pairs_torch.pair_curvature(lists, items, function, sigma, scale, along.contiguous())


def _soft_positions_curvature(scores, upstream, along, mask, offsets, sigma):
    given = contiguous(scores, upstream, along)
    return pairs_torch.soft_positions_curvature(_lists(scores, mask, offsets), *given, sigma)


def _no_third_derivative(ctx, _):
    raise NotImplementedError("fusedloss.ranking: third derivatives of losses over pairs are not implemented")


_run_pair_curvature = operator(
    "pair_curvature",
    f"(Tensor scores, Tensor relevance, Tensor along, {LISTS}, {PAIRS}) -> Tensor",
    _pair_curvature,
    like,
    _no_third_derivative,
)
_run_positions_curvature = operator(
    "soft_positions_curvature",
    f"(Tensor scores, Tensor upstream, Tensor along, {LISTS}, float sigma) -> Tensor",
    _soft_positions_curvature,
    like,
    _no_third_derivative,
)


def soft_positions(lists: Lists, scores: Tensor, sigma: float) -> Tensor:
    """p_i = 1 + Σ_{j ≠ i} 1 / (1 + e^{σ (s_i − s_j)}) of each item, 0 of padding; O(n) memory."""
    return _run_positions(scores, lists.mask, lists.offsets, float(sigma))
