"""Second derivatives of the operators: backward as a differentiable function, from the plain formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def plain_gradients(
    formula: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], upstream: Sequence[Tensor | None], needs
) -> list[Tensor | None]:
    """Σ upstream_i ∂formula_i/∂input for the inputs that `needs` names, differentiable in inputs and upstream.

    For a backward that runs under create_graph=True. `formula(*inputs)` must be a differentiable PyTorch function.
    """
    with torch.enable_grad():
        # Views: one input may be made from another, and a derivative in the one must not run through the other.
        inputs = [t.view_as(t) for t in inputs]
        pairs = [(y, g) for y, g in zip(formula(*inputs), upstream) if g is not None and y.requires_grad]
        wanted = [t for t, need in zip(inputs, needs) if need]
        if not pairs or not wanted:
            return [None] * len(inputs)
        outputs, grads = zip(*pairs)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
        return [next(found) if need else None for need in needs]
