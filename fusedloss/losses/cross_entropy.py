"""Cross-entropy with everything that torch's has, and z-loss, softcap, temperature and row weights; the workhorse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect
from ..scores import Scores, check_logits, logits_scores
from .cross_entropy_on_scores import Options, on_scores


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
        plain = softcap is None and temperature == 1.0
        expect(plain, "cross_entropy", "softcap, temperature", "given to the scores", "both")
    options = Options(weight, row_weight, ignore_index, reduction, label_smoothing, z_loss)
    return on_scores("cross_entropy", input, target, options)


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
