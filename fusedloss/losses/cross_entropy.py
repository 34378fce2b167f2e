"""Cross-entropy with everything that torch's has, and z-loss, softcap, temperature and row weights; the workhorse."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..checks import check_reduction, expect
from ..numerics import log_partition, nll
from ..relation import Rest
from ..row_loss import checked_target, evaluate, integral, register, row_factors
from ..scores import Scores, check_linear, check_logits, linear_scores, logits_scores
from ..statistics import LogSumExp, Mass, Score, Sum


@register
def indexed(scores, target, *, class_weight=None, label_smoothing=0.0, z_loss=0.0):
    """(1 − ε) w_y (lse − s_y) + (ε / V) Σ_j w_j (lse − s_j) + λ lse²."""
    others = Rest(target)
    if label_smoothing:
        asked = LogSumExp(where=others), Score(target), Sum(class_weight), Mass(_present(class_weight))
        lse, hit, total, seen = scores.reduce(*asked)
    else:
        lse, hit = scores.reduce(LogSumExp(where=others), Score(target))
    loss = nll(lse, hit)
    if class_weight is not None:
        loss = loss * class_weight[target]
    if label_smoothing:
        mass = scores.columns if class_weight is None else class_weight.sum()
        spread = (mass * log_partition(lse, hit) - total) / scores.columns
        spread = spread + _infinite(seen < _count(class_weight, scores.columns))
        # With ε = 1 the first part counts nothing, be it infinite.
        loss = label_smoothing * spread + ((1 - label_smoothing) * loss if label_smoothing < 1 else 0.0)
    return loss + z_loss * log_partition(lse, hit).square() if _given(z_loss) else loss


@register
def probable(scores, target, present, total, count, *, class_weight=None, label_smoothing=0.0, z_loss=0.0):
    """Σ_j w_j y_j (lse − s_j) for target probabilities y, smoothed with ε.

    `target` is w y already, `present` is 1 where that is not 0, and `total` and `count` are the sums of the two.
    """
    asked = [LogSumExp(), Sum(target), Mass(present)]
    if label_smoothing:
        asked += [Sum(class_weight), Mass(_present(class_weight))]
    lse, hit, seen, *smooth = scores.reduce(*asked)
    # Probability on a class of score -inf is an infinite loss; y_j = 0 there is none (torch: 0 · inf = NaN).
    loss = total * lse - hit + _infinite(seen < count)
    if label_smoothing:
        spread = (scores.columns if class_weight is None else class_weight.sum()) * lse - smooth[0]
        spread = spread + _infinite(smooth[1] < _count(class_weight, scores.columns))
        spread = label_smoothing / scores.columns * spread
        loss = spread + ((1 - label_smoothing) * loss if label_smoothing < 1 else 0.0)
    return loss + z_loss * lse.square() if _given(z_loss) else loss


def _infinite(impossible: Tensor) -> Tensor:
    """What a share of the target on a class of score -inf adds; the gradient at the other classes stays."""
    return torch.where(impossible, torch.inf, 0.0)


def _present(class_weight: Tensor | None) -> Tensor | None:
    return None if class_weight is None else (class_weight != 0).to(class_weight.dtype)


def _count(class_weight: Tensor | None, columns: int) -> Tensor | int:
    return columns if class_weight is None else (class_weight != 0).sum()


def _given(z_loss: float | Tensor) -> bool:
    return isinstance(z_loss, Tensor) or z_loss != 0.0


def on_scores(
    name: str,
    scores: Scores,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Cross-entropy of any scores, classes last; shared by both public functions."""
    check_reduction(name, reduction)
    expect(isinstance(target, Tensor), name, "target", "a tensor", target, TypeError)
    whole = ignore_index is None or isinstance(ignore_index, (int, torch.SymInt))
    expect(whole, name, "ignore_index", "an integer", ignore_index, TypeError)
    expect(
        weight is None or weight.is_floating_point(),
        name,
        "weight",
        "floating point",
        getattr(weight, "dtype", None),
        TypeError,
    )
    expect(0.0 <= label_smoothing <= 1.0, name, "label_smoothing", "a number in [0, 1]", label_smoothing)
    expect(weight is None or weight.shape == (scores.columns,), name, "weight", f"({scores.columns},)", weight)
    expect(
        row_weight is None or row_weight.shape == scores.leading,
        name,
        "row_weight",
        f"{tuple(scores.leading)}",
        row_weight,
    )
    weight = None if weight is None else weight.to(scores.dtype)
    options = {"label_smoothing": label_smoothing}
    shared = {} if weight is None else {"class_weight": weight}
    (shared if isinstance(z_loss, Tensor) else options)["z_loss"] = z_loss
    if target.is_floating_point() and target.shape == (*scores.leading, scores.columns):
        expect(
            ignore_index is None or ignore_index < 0,
            name,
            "ignore_index",
            "None with target probabilities",
            ignore_index,
        )
        y = target.reshape(-1, scores.columns)
        y = y if weight is None else y * weight
        factor = row_factors(scores, None, None, row_weight, reduction)
        present = (y != 0).to(torch.bfloat16)  # the smallest type that every backend reads
        rows = [y, present, y.sum(1, dtype=scores.dtype), present.sum(1, dtype=scores.dtype)]
        return evaluate(probable.key, scores, None, factor, rows, shared, options, reduction)
    safe, keep = checked_target(name, scores, target, -100 if ignore_index is None else ignore_index)
    if reduction != "mean" or weight is None:
        factor = row_factors(scores, keep, None, row_weight, reduction)
        return evaluate(indexed.key, scores, keep, factor, [safe], shared, options, reduction)
    # The weighted mean divides by the targets' weights, the z-loss' mean by the row weights alone: fold the quotient in.
    rows = row_factors(scores, keep, None, row_weight, "sum")
    divisor = (rows * weight[safe]).sum()
    factor = torch.where(divisor == 0, 0.0, rows / torch.where(divisor == 0, 1.0, divisor))
    penalised, _ = _given(z_loss), options.pop("z_loss", None)
    if penalised:
        shared["z_loss"] = z_loss * divisor / rows.sum().clamp(min=torch.finfo(rows.dtype).tiny)
    return evaluate(indexed.key, scores, keep, factor, [safe], shared, options, reduction)


def cross_entropy(
    input: Tensor | Scores,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    row_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Drop-in for `torch.nn.functional.cross_entropy`, with more options, in one read of the logits and one write.

    L_i = (1 − ε) w_y (lse(s) − s_y) + (ε / V) Σ_j w_j (lse(s) − s_j) + λ lse(s)²,   s = softcap · tanh(a / softcap) / temperature

    Args:
        input: (V,), (N, V) or (N, V, d_1, …) logits a, as torch takes them; or `Scores`, classes last.
        target: class indices (int64, or int32, int16, uint8) of the shape of input without its class dimension, or
            probabilities of input's shape.
        weight: (V,) class weights w.
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows with this target count nothing; their gradient is exactly 0.
        reduction: "none", "mean" or "sum"; the mean divides by Σ w_y over the rows that count (the number of rows for
            probabilities), and is 0 where torch returns NaN because no row counts.
        label_smoothing: ε in [0, 1] (Szegedy et al., 2015, arXiv 1512.00567).
        row_weight: weights of the rows, of target's shape; a mean is then a weighted mean.
        z_loss: λ of the squared log-partition regulariser (PaLM, Chowdhery et al., 2022, arXiv 2204.02311; 1e-4 there);
            not multiplied by class weights, averaged over rows. Not the spherical Z-loss (`spherical_z_loss`).
        softcap: cap of the logits (Gemma 2, 2024, arXiv 2408.00118). temperature: divides after the cap.

    Returns a float32 loss (float64 for float64 logits): half-precision logits do not give a half-precision loss.
    Raises ValueError, TypeError, or IndexError that names the position and value of a target out of range.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if not isinstance(input, Scores):
        shapes = "a tensor (V,), (N, V) or (N, V, d_1, …)"
        expect(isinstance(input, Tensor) and input.dim() >= 1, "cross_entropy", "input", shapes, input)
        expect(isinstance(target, Tensor), "cross_entropy", "target", "a tensor", target, TypeError)
        classes = 0 if input.dim() == 1 else 1
        check_logits("cross_entropy", "input", input, input.shape[classes])
        if target.is_floating_point() and target.shape == input.shape:
            target = target.movedim(classes, -1)
        input = logits_scores(input.movedim(classes, -1), softcap=softcap, temperature=temperature)
    else:
        expect(
            softcap is None and temperature == 1.0,
            "cross_entropy",
            "softcap, temperature",
            "given to the scores",
            "both",
        )
    return on_scores(
        "cross_entropy", input, target, weight, row_weight, ignore_index, reduction, label_smoothing, z_loss
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
    row_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    **walk: object,
) -> Tensor:
    """Cross-entropy of a linear layer's scores input · linear_weightᵀ + linear_bias, which are never stored.

    Drop-in for `torch.nn.functional.linear_cross_entropy`; formula and options as in `cross_entropy`.

    Args:
        input: (*leading, D) hidden states; any leading shape.
        linear_weight: (V, D); or (V, d_1, …, D) with input (N, D), K-dimensional as in torch.
        target: class indices of shape *leading (with d_1, … after it), or probabilities (*leading, V) ((N, V, d_1, …)).
        linear_bias: (V,), or (V, d_1, …).
        ignore_index: None means -100; not allowed with probabilities.
        options: accepted for the signature's sake: how the scores are cut follows from `memory_budget`.
        walk: memory_budget, schedule, gradient_filter, backend, scale: see `fusedloss.linear_scores`.

    Returns and raises as `cross_entropy`.
    """
    name = "linear_cross_entropy"
    check_reduction(name, reduction)
    check_linear(name, input, linear_weight, linear_bias, "linear_")
    expect(isinstance(target, Tensor), name, "target", "a tensor", target, TypeError)
    more = dict(softcap=softcap, temperature=temperature, **walk)
    if linear_weight.dim() == 2:
        scores = linear_scores(input, linear_weight, bias=linear_bias, **more)
        probable = target.is_floating_point() and target.shape == (*scores.leading, scores.columns)
        expect(
            not probable or ignore_index is None, name, "ignore_index", "None with target probabilities", ignore_index
        )
        return on_scores(name, scores, target, weight, row_weight, ignore_index, reduction, label_smoothing, z_loss)
    return _many_heads(
        input,
        linear_weight,
        target,
        linear_bias,
        reduction,
        row_weight,
        more,
        name,
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
    )


def _many_heads(
    input,
    linear_weight,
    target,
    linear_bias,
    reduction,
    row_weight,
    more,
    name,
    weight,
    ignore_index,
    label_smoothing,
    z_loss,
) -> Tensor:
    """K-dimensional weights: one linear layer per position of (d_1, …), all reading the same input (N, D)."""
    classes, *extra, width = linear_weight.shape
    expect(input.dim() == 2, name, "input", "(N, D) with a K-dimensional linear_weight", input)
    rows = input.shape[0]
    probable = target.is_floating_point() and target.shape == (rows, classes, *extra)
    expect(not probable or ignore_index is None, name, "ignore_index", "None with target probabilities", ignore_index)
    if not probable:
        expect(target.shape == (rows, *extra), name, "target", f"shape {(rows, *extra)}", target)
    expect(
        row_weight is None or row_weight.shape == (rows, *extra),
        name,
        "row_weight",
        f"shape {(rows, *extra)}",
        row_weight,
    )
    expect(weight is None or weight.shape == (classes,), name, "weight", f"({classes},)", weight)
    heads = math.prod(extra)
    ignored = -100 if ignore_index is None else ignore_index
    if not probable:  # all of it, before anything is computed
        expect(integral(target), name, "target", "an integer tensor of class indices", target.dtype, TypeError)
        torch.ops.fusedloss.checked_target(target, classes, ignored, name)
    by_head = target.reshape(rows, classes, heads) if probable else target.reshape(rows, heads)
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    counting = torch.ones(rows, heads, dtype=wide, device=input.device) if probable else (by_head != ignored).to(wide)
    if row_weight is not None:
        counting = counting * row_weight.reshape(rows, heads)
    if reduction == "mean":  # one divisor for all heads: fold it into the row weights and sum
        divisor = total = counting.sum()
        if weight is not None and not probable:
            safe, _ = torch.ops.fusedloss.checked_target(by_head, classes, ignored, name)
            divisor = (counting * weight[safe]).sum()
        z_loss = z_loss * divisor / torch.where(total == 0, 1.0, total) if _given(z_loss) else z_loss
        counting = counting / torch.where(divisor == 0, 1.0, divisor)
    flat = linear_weight.reshape(classes, heads, width)
    losses, shared = [], input.to(wide)  # the heads' gradients add up in the wide type and are rounded once
    for head in range(heads):
        bias = None if linear_bias is None else linear_bias.reshape(classes, heads)[:, head]
        scores = replace(linear_scores(input, flat[:, head], bias=bias, **more), input=shared)
        single = "none" if reduction == "none" else "sum"
        y = by_head[..., head]
        losses.append(
            on_scores(name, scores, y, weight, counting[:, head], ignore_index, single, label_smoothing, z_loss)
        )
    if not heads:
        nothing = (input[:0].sum() + linear_weight.sum()).to(wide)  # 0, and differentiable
        return nothing.expand(rows, *extra) if reduction == "none" else nothing
    return torch.stack(losses, 1).reshape(rows, *extra) if reduction == "none" else torch.stack(losses).sum()


def reference(
    logits: Tensor, target: Tensor, weight=None, label_smoothing=0.0, z_loss=0.0, softcap=None, temperature=1.0
) -> Tensor:
    """(N,) losses from dense logits (N, V) and class indices or probabilities."""
    s = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(s / temperature, 1)
    y = target if target.is_floating_point() else torch.nn.functional.one_hot(target, s.shape[1]).to(s.dtype)
    y = (1 - label_smoothing) * y + label_smoothing / s.shape[1]
    w = torch.ones_like(s[0]) if weight is None else weight
    terms = torch.where((y == 0) | (w == 0), 0.0, -w * y * log_p)
    return terms.sum(1) + z_loss * torch.logsumexp(s / temperature, 1).square()


CASES = (
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"label_smoothing": 0.1, "z_loss": 1e-3},
)
