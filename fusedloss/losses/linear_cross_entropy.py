"""Cross-entropy of a linear output layer, the scores never stored: what a language model's last step is."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..checks import check_reduction, expect
from ..scores import check_linear, linear_scores
from ..targets import integral
from .cross_entropy_on_scores import Options, on_scores, probabilities
from .cross_entropy_on_statistics import penalised


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
    walk |= {"softcap": softcap, "temperature": temperature}
    given = Options(weight, row_weight, ignore_index, reduction, label_smoothing, z_loss)
    if linear_weight.dim() > 2:
        return _many_heads(name, input, linear_weight, linear_bias, target, given, walk)
    scores = linear_scores(input, linear_weight, bias=linear_bias, **walk)
    if probabilities(target, (*scores.leading, scores.columns)):
        expect(ignore_index is None, name, "ignore_index", "None with target probabilities", ignore_index)
    return on_scores(name, scores, target, given)


def _many_heads(
    name: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    given: Options,
    walk: dict[str, object],
) -> Tensor:
    """K-dimensional weights: one linear layer per position of (d_1, …), all reading the same input (N, D)."""
    classes, *extra, width = linear_weight.shape
    expect(input.dim() == 2, name, "input", "(N, D) with a K-dimensional linear_weight", input)
    rows, heads, shape = input.shape[0], math.prod(extra), (input.shape[0], *extra)
    weight, row_weight, index = given.weight, given.row_weight, given.ignore_index
    expect(row_weight is None or row_weight.shape == shape, name, "row_weight", f"shape {shape}", row_weight)
    expect(weight is None or weight.shape == (classes,), name, "weight", f"({classes},)", weight)
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    safe = None
    if probabilities(target, (rows, classes, *extra)):
        expect(index is None, name, "ignore_index", "None with target probabilities", index)
        by_head = target.reshape(rows, classes, heads)
        counting = torch.ones(rows, heads, dtype=wide, device=input.device)
    else:  # all of it, before anything is computed
        expect(target.shape == shape, name, "target", f"shape {shape}", target)
        expect(integral(target), name, "target", "an integer tensor of class indices", target.dtype, TypeError)
        safe, keep, _ = torch.ops.fusedloss.checked_target(target, classes, -100 if index is None else index, name)
        by_head, counting = target.reshape(rows, heads), keep.reshape(rows, heads).to(wide)
    if row_weight is not None:
        counting = counting * row_weight.reshape(rows, heads)
    z_loss = given.z_loss
    if given.reduction == "mean":  # one divisor for all heads: fold it into the row weights and sum
        divisor = total = counting.sum()
        if weight is not None and safe is not None:
            divisor = (counting * weight[safe.reshape(rows, heads)]).sum()
        z_loss = z_loss * divisor / torch.where(total == 0, 1.0, total) if penalised(z_loss) else z_loss
        counting = counting / torch.where(divisor == 0, 1.0, divisor)
    single = "none" if given.reduction == "none" else "sum"
    by_class = linear_weight.reshape(classes, heads, width)
    losses, shared = [], input.to(wide)  # the heads' gradients add up in the wide type and are rounded once
    for head in range(heads):
        bias = None if linear_bias is None else linear_bias.reshape(classes, heads)[:, head]
        scores = replace(linear_scores(input, by_class[:, head], bias=bias, **walk), input=shared)
        options = replace(given, row_weight=counting[:, head], reduction=single, z_loss=z_loss)
        losses.append(on_scores(name, scores, by_head[..., head], options))
    if not heads:
        losses.append((input[:0].sum() + linear_weight.sum()).to(wide))  # 0, and differentiable
        return losses[0].expand(shape) if given.reduction == "none" else losses[0]
    return torch.stack(losses, 1).reshape(shape) if given.reduction == "none" else torch.stack(losses).sum()
