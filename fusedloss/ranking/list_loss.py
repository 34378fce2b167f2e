"""What every ranking loss shares: lists by mask or offsets, checks, half precision, weights of lists, reductions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_reduction, expect
from ..lists import lists_of

COMMON = """
scores, relevance: (…, n), lists along the last dimension, or (items,) with offsets; a larger relevance is better. fp16
and bf16 scores are computed in fp32, and the loss is fp32; relevance of any type is rounded to the type of the loss (in
fp32, integers above 2^24 may become equal). A NaN that the mask does not leave out makes its list NaN. mask: (…, n)
bool, False: no item (padding). offsets: (lists + 1,) int64, list r is the items from offsets[r] to offsets[r + 1].
list_weight: (…,) weights of the lists. reduction: "mean" over all lists (a list without items has loss 0 and counts;
each list counts once whatever its weight), "sum", or "none".
"""


def spoilt(scores: Tensor, relevance: Tensor) -> Tensor:
    """Scores, NaN where the relevance is: a loss that only sorts by the relevance would not notice."""
    return torch.where(relevance.isnan(), torch.nan, scores)


def list_loss(function: Callable) -> Callable:
    """Make a public loss of ``function(lists, scores, relevance, **options) -> (rows,)``.

    The function sees flat fp32 or fp64 scores and relevance (`Lists` says how they lie), 0 in place of padding. It may
    return a second number for each list, how much the list counts in a mean: the mean is then over their sum.
    """
    name = function.__name__
    parameters = list(inspect.signature(function).parameters.values())
    known = {p.name for p in parameters[3:]}

    @functools.wraps(function)
    def loss(scores, relevance, *, mask=None, offsets=None, list_weight=None, reduction="mean", **options):
        check_reduction(name, reduction)
        unknown = [o for o in options if o not in known]
        if unknown:
            raise TypeError(f"{name}: got an unexpected keyword argument {unknown[0]!r}")
        lists = lists_of(name, scores, -1, mask, offsets, "scores")
        expect(scores.is_floating_point(), name, "scores", "a floating-point tensor", scores.dtype, TypeError)
        expect(isinstance(relevance, Tensor), name, "relevance", "a tensor", type(relevance).__name__, TypeError)
        expect(not relevance.is_complex(), name, "relevance", "real numbers", relevance.dtype, TypeError)
        expect(relevance.shape == scores.shape, name, "relevance", f"shape {tuple(scores.shape)}", relevance)
        expect(relevance.device == scores.device, name, "relevance", f"on {scores.device}", relevance.device)
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        found = function(lists, lists.clean(scores).to(wide), lists.clean(relevance).to(wide), **options)
        losses, counts = found if isinstance(found, tuple) else (found, None)
        if list_weight is not None:
            right = isinstance(list_weight, Tensor)
            expect(right, name, "list_weight", "a tensor", type(list_weight).__name__, TypeError)
            right = list_weight.shape == lists.leading
            expect(right, name, "list_weight", f"shape {tuple(lists.leading)}", list_weight)
            losses = losses * list_weight.reshape(-1).to(wide)
        if reduction == "none":
            return losses.reshape(lists.leading)
        total = losses.sum()
        if reduction == "sum":
            return total
        return total / (max(1, lists.rows) if counts is None else counts.to(wide).sum().clamp(min=1))

    # torch.compile counts compilations by code object: each loss has its own.
    loss.__code__ = loss.__code__.replace(co_name=name)
    keyword = inspect.Parameter.KEYWORD_ONLY
    common = [("mask", None), ("offsets", None), ("list_weight", None), ("reduction", "mean")]
    loss.__signature__ = inspect.Signature(
        [*parameters[1:], *(inspect.Parameter(n, keyword, default=d) for n, d in common)]
    )
    loss.__doc__ = inspect.cleandoc(function.__doc__ or "") + "\n\n" + inspect.cleandoc(COMMON)
    loss.on_lists = function
    return loss
