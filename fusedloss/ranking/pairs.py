"""Losses over the pairs of each list, and soft positions: opaque operators that keep O(n) numbers, and their autograd.

``fusedloss::pair_losses``     Σ w_ij f(σ (s_i − s_j)) over pairs of relevance r_i > r_j, its gradient, how many pairs
``fusedloss::soft_positions``  1 + Σ_{j ≠ i} 1 / (1 + e^{σ (s_i − s_j)}), and ``soft_positions_backward``

Weights of pairs are constants: no gradient flows through ranks. Upstream of a list's loss there is one number, so the
gradient comes with the loss and is kept. Second derivatives are right, by plain PyTorch (``…_curvature``); third ones
are an error. Outside of torch.compile the same functions run in `torch.autograd.Function`s, whose calls cost less.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..backends.native import _native
from ..checks import check_constant, expect
from ..lists import Lists
from ..sorting.engines import engine
from . import pairs_torch

FUNCTIONS = ("softplus", "logistic")
WEIGHTS = ("one", "difference", "squares", "ndcg1", "ndcg2", "lambdarank", "ndcg2pp")
DTYPES = {torch.float32: 0, torch.float64: 3}
NORMALIZATIONS = (None, "pairs", "batch")

torch.library.define(
    "fusedloss::pair_losses",
    "(Tensor scores, Tensor relevance, Tensor? mask, Tensor? offsets, str function, str weight, float sigma, float mu, "
    "float scale, int k) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fusedloss::soft_positions", "(Tensor scores, Tensor? mask, Tensor? offsets, float sigma) -> Tensor"
)
torch.library.define(
    "fusedloss::soft_positions_backward",
    "(Tensor scores, Tensor upstream, Tensor? mask, Tensor? offsets, float sigma) -> Tensor",
)
torch.library.define(
    "fusedloss::pair_curvature",
    "(Tensor scores, Tensor relevance, Tensor along, Tensor? mask, Tensor? offsets, str function, str weight, "
    "float sigma, float mu, float scale, int k) -> Tensor",
)
torch.library.define(
    "fusedloss::soft_positions_curvature",
    "(Tensor scores, Tensor upstream, Tensor along, Tensor? mask, Tensor? offsets, float sigma) -> Tensor",
)


def _operator(name: str, forward: Callable, setup: Callable, backward: Callable) -> Callable:
    """Registers an operator; what is returned calls it where somebody traces, and its functions otherwise."""
    torch.library.impl(f"fusedloss::{name}", "CompositeExplicitAutograd", forward)
    torch.library.register_autograd(f"fusedloss::{name}", backward, setup_context=setup)
    static = dict(forward=forward, setup_context=setup, backward=backward)
    eager = type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in static.items()})
    op = getattr(torch.ops.fusedloss, name)

    def call(*inputs):
        if torch.compiler.is_compiling() or type(inputs[0]) is not Tensor or _get_current_dispatch_mode() is not None:
            return op(*inputs)
        return eager.apply(*inputs)

    return call



def _lists(scores: Tensor, mask: Tensor | None, offsets: Tensor | None) -> Lists:
    return Lists(scores.shape, scores.dim() - 1, mask, offsets)


def _engine(scores: Tensor) -> str:
    found = engine(scores.device, "cpu", "triton")
    return "torch" if found == "triton" and scores.dtype != torch.float32 else found


def _native_pairs(scores: Tensor, mask: Tensor | None, offsets: Tensor | None, sigma: float, *options):
    rows, width = (offsets.shape[0] - 1, 0) if offsets is not None else scores.shape
    at = (0 if t is None else t.data_ptr() for t in (offsets, mask))
    return _native.Pairs(rows, width, *at, DTYPES[scores.dtype], sigma, *options)


# --- losses of pairs -------------------------------------------------------------------------------------------------


def _pair_losses(scores, relevance, mask, offsets, function, weight, sigma, mu, scale, k):
    with torch.no_grad():
        scores, relevance = scores.contiguous(), relevance.contiguous()
        which, lists = _engine(scores), _lists(scores, mask, offsets)
        if which == "cpu":
            losses, gradient = scores.new_empty(lists.rows), torch.empty_like(scores)
            pairs = scores.new_empty(lists.rows, dtype=torch.int64)
            options = FUNCTIONS.index(function), WEIGHTS.index(weight), mu, scale, k
            given = _native_pairs(scores, mask, offsets, sigma, *options)
            tensors = (scores, relevance, losses, gradient, pairs)
            _native.pair_losses(given, *(t.data_ptr() for t in tensors))
            return losses, gradient, pairs
        items, sums = pairs_torch.weighted(lists, scores, relevance, weight, mu, k), pairs_torch
        if which == "triton":
            from . import pairs_triton as sums
        losses, gradient, pairs = sums.pair_losses(lists, items, function, sigma, scale)
        disorder = torch.where(relevance.isnan(), torch.nan, 0.0).to(scores.dtype)  # no pair is one of NaN
        losses, at = losses + lists.sum(disorder), lists.spread(lists.sum(disorder))
        return losses, gradient + (at if mask is None else torch.where(mask, at, 0.0)), pairs


@torch.library.register_fake("fusedloss::pair_losses")
def _(scores, relevance, mask, offsets, function, weight, sigma, mu, scale, k):
    rows = _lists(scores, mask, offsets).rows
    gradient = torch.empty_like(scores, memory_format=torch.contiguous_format)
    return scores.new_empty(rows), gradient, scores.new_empty(rows, dtype=torch.int64)


def _setup_losses(ctx, inputs, output):
    scores, relevance, mask, offsets, *ctx.options = inputs
    ctx.save_for_backward(scores, relevance, mask, offsets, output[1])
    ctx.set_materialize_grads(False)


def _losses_formula(ctx, upstream, along, _pairs):
    """`along` comes to the gradient, where that is differentiated."""
    scores, relevance, mask, offsets, gradient = ctx.saved_tensors
    found = None if upstream is None else _lists(scores, mask, offsets).spread(upstream) * gradient
    if along is not None:
        bent = _run_pair_curvature(scores, relevance, along, mask, offsets, *ctx.options)
        found = bent if found is None else found + bent
    return found, *[None] * 9


_run_pair_losses = _operator("pair_losses", _pair_losses, _setup_losses, _losses_formula)


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
) -> Tensor:
    """(rows,): scale Σ w_ij f(σ (s_i − s_j)) of each list, for the loss `name`; by None, or divided by the number of
    pairs of its list ("pairs") or of the batch ("batch"), 0 where there are none."""
    check_constant(name, "sigma", sigma, 0.0, above=True)
    check_constant(name, "mu", mu)
    expect(normalization in NORMALIZATIONS, name, "normalization", f"one of {NORMALIZATIONS}", normalization)
    expect(k is None or (isinstance(k, int) and k >= 1), name, "k", "None or an integer from 1", k)
    options = function, weight, float(sigma), float(mu), float(scale), k or 0
    losses, _, pairs = _run_pair_losses(scores, relevance.detach(), lists.mask, lists.offsets, *options)
    if normalization is None:
        return losses
    pairs = pairs if normalization == "pairs" else pairs.sum()
    return losses / pairs.clamp(min=1).to(losses.dtype)


# --- soft positions --------------------------------------------------------------------------------------------------


def _soft_positions(scores, mask, offsets, sigma):
    with torch.no_grad():
        scores, which = scores.contiguous(), _engine(scores)
        if which == "cpu":
            positions = torch.empty_like(scores)
            given = _native_pairs(scores, mask, offsets, sigma)
            _native.soft_positions(given, scores.data_ptr(), positions.data_ptr())
            return positions
        lists = _lists(scores, mask, offsets)
        if which == "triton":
            from . import pairs_triton

            return pairs_triton.soft_positions(lists, scores, None, sigma)
        return pairs_torch.soft_positions(lists, scores, sigma)


def _soft_positions_backward(scores, upstream, mask, offsets, sigma):
    with torch.no_grad():
        scores, upstream, which = scores.contiguous(), upstream.contiguous(), _engine(scores)
        if which == "cpu":
            found = torch.empty_like(scores)
            given = _native_pairs(scores, mask, offsets, sigma)
            _native.soft_positions_backward(given, scores.data_ptr(), upstream.data_ptr(), found.data_ptr())
            return found
        lists = _lists(scores, mask, offsets)
        if which == "triton":
            from . import pairs_triton

            return pairs_triton.soft_positions(lists, scores, upstream, sigma)
        return pairs_torch.soft_positions_backward(lists, scores, upstream, sigma)


def _setup_positions(ctx, inputs, output):
    *tensors, ctx.sigma = inputs
    ctx.save_for_backward(*tensors)


def _positions_formula(ctx, upstream):
    scores, mask, offsets = ctx.saved_tensors
    return _run_positions_backward(scores, upstream, mask, offsets, ctx.sigma), None, None, None


def _positions_backward_formula(ctx, along):
    scores, upstream, mask, offsets = ctx.saved_tensors
    bent = _run_positions_curvature(scores, upstream, along, mask, offsets, ctx.sigma)
    # Symmetric in what comes from above and what it is asked along.
    return bent, _run_positions_backward(scores, along, mask, offsets, ctx.sigma), None, None, None


_run_positions_backward = _operator(
    "soft_positions_backward", _soft_positions_backward, _setup_positions, _positions_backward_formula
)
_run_positions = _operator("soft_positions", _soft_positions, _setup_positions, _positions_formula)


# --- second derivatives ----------------------------------------------------------------------------------------------


def _pair_curvature(scores, relevance, along, mask, offsets, function, weight, sigma, mu, scale, k):
    with torch.no_grad():
        lists, scores = _lists(scores, mask, offsets), scores.contiguous()
        items = pairs_torch.weighted(lists, scores, relevance, weight, mu, k)
        return pairs_torch.pair_curvature(lists, items, function, sigma, scale, along.contiguous())


def _soft_positions_curvature(scores, upstream, along, mask, offsets, sigma):
    with torch.no_grad():
        given = (t.contiguous() for t in (scores, upstream, along))
        return pairs_torch.soft_positions_curvature(_lists(scores, mask, offsets), *given, sigma)


def _like_scores(scores, *_):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _setup_nothing(ctx, inputs, output):
    pass


def _no_third_derivative(ctx, _):
    raise NotImplementedError("fusedloss.ranking: third derivatives of losses over pairs are not implemented")


for _name in ("soft_positions", "soft_positions_backward", "soft_positions_curvature", "pair_curvature"):
    torch.library.register_fake(f"fusedloss::{_name}", _like_scores)
_run_pair_curvature = _operator("pair_curvature", _pair_curvature, _setup_nothing, _no_third_derivative)
_run_positions_curvature = _operator(
    "soft_positions_curvature", _soft_positions_curvature, _setup_nothing, _no_third_derivative
)


def soft_positions(lists: Lists, scores: Tensor, sigma: float) -> Tensor:
    """p_i = 1 + Σ_{j ≠ i} 1 / (1 + e^{σ (s_i − s_j)}) of each item, 0 of padding; O(n) memory."""
    return _run_positions(scores, lists.mask, lists.offsets, float(sigma))
