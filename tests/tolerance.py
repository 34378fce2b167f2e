"""The one tolerance policy of the tests.

A gradient is compared with fp64 truth by relative Frobenius error, taken separately on the entries of target classes
and on all others (for dW: on classes that are some row's target and on those that are none), because a max-norm test
on a softmax gradient sees the targets only. Allowed is twice the error of the honest way, "fp32 scores rounded once":
scores, statistics and score gradient in fp32, the score gradient rounded once to the type in which it is stored, exact
products from there on and one rounding of the result. The same holds for losses. Nothing is looser in CI.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FACTOR = 2.0
# The honest way can be exact by luck; two orders of one sum differ by this much. Half precision: of the fp32 inside.
FLOOR = {torch.float64: 1e-13, torch.float32: 5e-7, torch.bfloat16: 5e-7, torch.float16: 5e-7}


def error(got: Tensor, truth: Tensor, where: Tensor | None = None) -> float:
    """‖got − truth‖ / ‖truth‖ over the entries (or rows) `where`; absolute where the truth is 0, NaN where got is."""
    got, truth = got.detach().double(), truth.detach().double()
    if where is not None:
        got, truth = got[where], truth[where]
    same = got == truth  # infinities that agree
    apart = torch.where(same, 0.0, got - truth).norm()
    size = truth[truth.isfinite()].norm()
    return (apart / size if size > 0 else apart).item()


def check(got: Tensor, truth: Tensor, honest: Tensor, what: str, where: Tensor | None = None, dtype=None) -> None:
    """Assert that `got` is at most FACTOR times as wrong as the `honest` way."""
    allowed = FACTOR * error(honest, truth, where) + FLOOR[dtype or got.dtype]
    found = error(got, truth, where)
    assert found <= allowed, f"{what}: relative error {found:.3g}, allowed {allowed:.3g}"


def check_loss(got: Tensor, loss: Callable[[Tensor], Tensor], scores: Tensor) -> None:
    """`got` (float32 or float64) against `loss` of the dense scores, which are exact in their own type."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    check(got, loss(scores.double()), loss(scores.to(wide)), "loss")


def _gradient(loss: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    scores = scores.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(scores), scores)[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def targets_mask(target: Tensor, scores: Tensor) -> Tensor:
    """(N, V): the entries of the rows' targets; no entry for an ignored (negative) target."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, target.clamp(min=0)[:, None], (target >= 0)[:, None])


def check_score_gradient(got: Tensor, loss: Callable[[Tensor], Tensor], scores: Tensor, target: Tensor) -> None:
    """`got` (N, V): the gradient of `loss` (dense scores → number) as somebody computed it for these `scores`."""
    truth = _gradient(loss, scores.double())
    honest = _gradient(loss, scores.to(_wide(scores.dtype))).to(got.dtype)
    hit = targets_mask(target, scores)
    check(got, truth, honest, "score gradient at targets", hit)
    check(got, truth, honest, "score gradient elsewhere", ~hit)


def check_linear_gradients(
    dx: Tensor | None, dw: Tensor | None, loss: Callable[[Tensor], Tensor], x: Tensor, w: Tensor, target: Tensor
) -> None:
    """dx and dw of `loss` of the dense scores x wᵀ, in the types of x and w."""
    x, w = x.detach(), w.detach()
    wide = _wide(x.dtype)
    exact = _gradient(loss, x.double() @ w.double().t())
    rounded = _gradient(loss, x.to(wide) @ w.to(wide).t()).to(w.dtype).double()
    if dx is not None:
        check(dx, exact @ w.double(), (rounded @ w.double()).to(x.dtype), "dX")
    if dw is not None:
        truth, honest = exact.t() @ x.double(), (rounded.t() @ x.double()).to(w.dtype)
        hit = torch.zeros(w.shape[0], dtype=torch.bool).index_fill_(0, target[target >= 0], True)
        check(dw, truth, honest, "dW of hit classes", hit)
        check(dw, truth, honest, "dW of the other classes", ~hit)
