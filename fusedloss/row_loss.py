"""`row_loss`: from a loss on statistics of one row to a public loss function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from . import autograd, trace
from .checks import check_reduction, expect
from .scores import Scores, as_scores
from .targets import checked_target, spoilt

# Row losses work on statistics as they are kept: rounded to float32, a lse of 10 would put an error of 5e-7 on every p.
STATISTICS = "float64"

COMMON = """
    Common arguments:
        scores: logits (*leading, V), or `linear_scores(x, weight, …)`, whose score matrix is never stored.
        target: (*leading) class indices; of the spherical losses also (*leading, K), several to a row, with losses that
            are added.
        weight: (V,) class weights; row i counts weight[target_i] times.
        row_weight: (*leading) weights of the rows, differentiable.
        ignore_index: rows with this target count nothing, have loss 0 and gradient exactly 0, and cost no GEMM.
        reduction: "mean" divides the weighted sum by the sum of the weights of the rows that count (0 when there are
            none), "sum", or "none" (weighted losses of shape *leading).
    Returns a float32 loss (float64 for float64 scores), also for half-precision scores.
    Raises ValueError or TypeError for bad arguments, IndexError for a target out of range, before anything is computed.
"""


def row_factors(
    scores: Scores,
    keep: Tensor | None,
    valid: Tensor | None,
    class_weight: Tensor | None,
    row_weight: Tensor | None,
    reduction: str,
    counted: Tensor | None = None,
) -> Tensor:
    """(N,) factors by which the row losses enter the result; for a mean they are divided by their own sum.

    ``counted`` (N,): what rows count in that sum, where their losses are weighted already.
    """
    rows = scores.leading.numel()
    factor = torch.ones(rows, dtype=scores.dtype, device=scores.input.device) if keep is None else keep.to(scores.dtype)
    if class_weight is not None:
        factor = factor * class_weight.to(scores.dtype)
    if row_weight is not None:
        factor = factor * row_weight.reshape(-1).to(scores.dtype)
    if reduction == "mean":
        total = scores.total(factor if counted is None else factor * counted)
        # No row counts: the loss is 0, not 0/0 (torch returns NaN there), and a masked batch does no harm.
        factor = torch.where(total == 0, 0.0, factor / torch.where(total == 0, 1.0, total))
    return spoilt(factor, valid)


def shares(keep: Tensor, class_weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of K targets to a row, (N, K), what each counts; which rows have one; and what a row counts in a mean.

    A row's loss is the sum over its targets, each times its class weight; in a mean it counts their mean weight.
    """
    share = keep.to(dtype)
    if class_weight is not None:
        share = share * class_weight.to(dtype)
    there = share > 0
    return share, there.any(1), share.sum(1) / there.sum(1).clamp(min=1)


def evaluate(
    name: str,
    scores: Scores,
    keep: Tensor | None,
    factor: Tensor,
    rows: list[Tensor],
    shared: dict[str, Tensor],
    options: dict[str, object],
    reduction: str,
) -> Tensor:
    """Reduce the row loss registered as `name`: eagerly where it separates over row chunks, else by recomputation."""
    scores = scores.keeping(keep)
    tensors = list(shared.values())
    streams = scores.streams()
    trained = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in streams])
    constant = not any([t.requires_grad for t in [*rows, *tensors]])
    if reduction != "none" and trained and constant and scores.separable:
        key = trace.find(name, scores, rows, shared, options, STATISTICS)
        if key:
            return autograd.weighted_total(scores.spec((), key), streams, keep, factor, rows, tensors)
    losses = trace.FUNCTIONS[name](scores, *rows, **shared, **options)
    if keep is not None:  # before the factor: an ignored row's loss may be inf or NaN, and would reach ∂/∂factor
        losses = torch.where(keep, losses, 0.0)
    losses = losses.to(scores.dtype) * factor
    return losses.reshape(scores.leading) if reduction == "none" else scores.total(losses)


def register(function: Callable) -> Callable:
    """Give a loss on statistics a unique key, by which `evaluate` and the ops find it."""
    name = function.__name__
    function.key = name if name not in trace.FUNCTIONS else f"{name}#{len(trace.FUNCTIONS)}"
    trace.FUNCTIONS[function.key] = function
    return function


def row_loss(function: Callable, evaluate: Callable = evaluate) -> Callable:
    """Make a loss function of a loss on statistics.

    The decorated function takes `scores`, then per-row tensors (the first one the target, when it is called
    ``target``), then keyword-only hyperparameters: numbers, or tensors that all rows share. It calls
    ``scores.reduce(…)`` and returns (N,) losses in plain PyTorch::

        @fusedloss.row_loss
        def squentropy(scores, target):
            lse, hit, squares = scores.reduce(LogSumExp(where=Rest(target)), Score(target), SumOfSquares(where=Rest(target)))
            return softplus(lse - hit) + squares / (scores.columns - 1)

    What comes out takes logits or linear scores of any leading shape, with class and row weights, ignore_index and
    reduction, and runs forward and backward on every backend without storing the scores, in three GEMMs when it
    reduces once. A second `reduce` is one more pass, and the walk then recomputes the scores.

    A function of ``(scores, target, share=None, …)`` takes several targets to a row too: target (N, K), and in ``share``
    (N, K) what each of them counts, its class weight, or 0 where there is none.
    """
    parameters = list(inspect.signature(function).parameters.values())
    several_allowed = any(p.name == "share" for p in parameters)
    parameters = [p for p in parameters if p.name != "share"]
    per_row = [p.name for p in parameters[1:] if p.kind is not p.KEYWORD_ONLY]
    # An underscore marks the inner half of a loss that prepares its arguments first; its errors name the public half.
    # Of several inner halves, what follows two more underscores tells which.
    name, key = function.__name__.lstrip("_").partition("__")[0], register(function).key
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}

    @functools.wraps(function)
    def loss(scores, *arguments, weight=None, row_weight=None, ignore_index=-100, reduction="mean", **options):
        check_reduction(name, reduction)
        scores = as_scores(scores)
        if len(arguments) != len(per_row):
            raise TypeError(
                f"{name}: expected {', '.join(per_row) or 'nothing'} after scores, got {len(arguments)} arguments"
            )
        unknown = [o for o in options if o not in known]
        if unknown:
            raise TypeError(f"{name}: got an unexpected keyword argument {unknown[0]!r}")
        rows, keep, valid, class_weight, counted = list(arguments), None, None, None, None
        if per_row and per_row[0] == "target":
            several = several_allowed and rows[0].dim() == len(scores.leading) + 1
            rows[0], keep, valid = checked_target(name, scores, rows[0], ignore_index, several)
            if weight is not None:
                expect(weight.shape == (scores.columns,), name, "weight", f"({scores.columns},) class weights", weight)
                class_weight = weight[rows[0]]
            if several:
                share, keep, counted = shares(keep, class_weight, scores.dtype)
                rows[0], class_weight = torch.where(share > 0, rows[0], -1), None
        for number in range(0 if keep is None else 1, len(rows)):
            extra, given = len(scores.leading), rows[number]
            expect(
                given.shape[:extra] == scores.leading,
                name,
                per_row[number],
                f"leading shape {tuple(scores.leading)}",
                given,
            )
            rows[number] = given.reshape(scores.leading.numel(), *given.shape[extra:])
        if counted is not None:
            rows.insert(1, share)
        if row_weight is not None:
            expect(row_weight.shape == scores.leading, name, "row_weight", f"shape {tuple(scores.leading)}", row_weight)
        options = {**defaults, **options}
        shared = {k: v for k, v in options.items() if isinstance(v, Tensor)}
        plain = {k: v for k, v in options.items() if not isinstance(v, Tensor)}
        factor = row_factors(scores, keep, valid, class_weight, row_weight, reduction, counted)
        return evaluate(key, scores, keep, factor, rows, shared, plain, reduction)

    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    keyword = inspect.Parameter.KEYWORD_ONLY
    common = [("weight", None), ("row_weight", None), ("ignore_index", -100), ("reduction", "mean")]
    signature = parameters + [inspect.Parameter(n, keyword, default=d) for n, d in common]
    loss.__signature__ = inspect.Signature(signature)
    loss.__doc__ = inspect.cleandoc(function.__doc__ or "") + "\n\n" + inspect.cleandoc(COMMON)
    loss.on_statistics = function
    return loss
