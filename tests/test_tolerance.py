"""The tolerance policy must let the honest way pass and catch the mutants that a max-norm test lets through."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import check_linear_gradients, check_score_gradient

ROWS, WIDTH, CLASSES, CHUNK = 128, 16, 3000, 8
HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]


def problem(dtype):
    x, w = torch.randn(ROWS, WIDTH).to(dtype), (0.02 * torch.randn(CLASSES, WIDTH)).to(dtype)
    target = torch.randint(0, CLASSES - 1, (ROWS,))
    return x, w, target, lambda s: F.cross_entropy(s, target)


def score_gradient(x, w, target):
    scores = (x.float() @ w.float().t()).requires_grad_()
    F.cross_entropy(scores, target).backward()
    return scores.detach(), scores.grad


def without_softmax(g, target):
    return torch.zeros_like(g).scatter_(1, target[:, None], g.gather(1, target[:, None]))


def without_a_chunk(g, target):
    return g.clone().index_fill_(0, torch.arange(CHUNK, 2 * CHUNK), 0.0)


def without_the_last_column(g, target):
    return g.clone().index_fill_(1, torch.tensor([CLASSES - 1]), 0.0)


MUTANTS = [without_softmax, without_a_chunk, without_the_last_column]


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_honest_gradients_pass(dtype):
    x, w, target, loss = problem(dtype)
    scores, g = score_gradient(x, w, target)
    check_score_gradient(g.to(dtype), loss, scores.to(dtype) if dtype == torch.float32 else scores, target)
    check_linear_gradients((g @ w.float()).to(dtype), (g.t() @ x.float()).to(dtype), loss, x, w, target)


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_mutants_fail_in_the_scores(dtype, mutant):
    x, w, target, loss = problem(dtype)
    scores, g = score_gradient(x, w, target)
    wrong = mutant(g, target)
    if mutant is not without_a_chunk:  # the usual test sees nothing
        torch.testing.assert_close(wrong, g, atol=1e-5, rtol=1.3e-6)
    with pytest.raises(AssertionError, match="relative error"):
        check_score_gradient(wrong.to(dtype), loss, scores, target)


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("which", ["dx", "dw"])
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_mutants_fail_in_the_operands(dtype, which, mutant):
    x, w, target, loss = problem(dtype)
    if which == "dx" and mutant is without_the_last_column:
        w[-1] *= 50  # one class of thousands shows in dX only when it weighs something
    _, g = score_gradient(x, w, target)
    wrong = mutant(g, target)
    dx = (wrong @ w.float()).to(dtype) if which == "dx" else None
    dw = (wrong.t() @ x.float()).to(dtype) if which == "dw" else None
    with pytest.raises(AssertionError, match="relative error"):
        check_linear_gradients(dx, dw, loss, x, w, target)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_entry_fails(bad):
    x, w, target, loss = problem(torch.float32)
    scores, g = score_gradient(x, w, target)
    g[3, 7] = bad
    with pytest.raises(AssertionError, match="relative error"):
        check_score_gradient(g, loss, scores, target)
