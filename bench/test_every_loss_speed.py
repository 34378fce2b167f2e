"""Every loss on linear scores, forward and backward, beside cross-entropy's own time."""

import pytest
import tolerance
import torch
from cases import SHAPES, operands, plan, shape_name
from harness import GATE, OURS, Comparison

import fusedloss as fl
from fusedloss.losses import LOSSES, function_of, hyperparameters, name_of

DIGITS = 5  # the number tokens of number_token_loss' cases


@pytest.mark.shapes(SHAPES[0])
@pytest.mark.parametrize("module", LOSSES, ids=name_of)
def test_loss(compare, shape, module):
    x, w, target = operands(shape, torch.float32)
    if name_of(module) == "number_token_loss":
        target = target % DIGITS  # rows whose target is no number cost nothing
    options = hyperparameters(module.CASES[0], shape[2])

    def call(function, **options):
        def step():
            value = function(fl.linear_scores(x, w), target, reduction="sum", **options)
            return value.detach(), *torch.autograd.grad(value, (x, w))

        return step

    def check():
        """dX of some rows against the dense reference."""
        _, dx, _ = ours()
        picked = torch.randperm(shape[0])[:GATE]
        part, y = x.detach()[picked], target[picked]

        def loss(scores):
            return module.reference(scores, y, **hyperparameters(module.CASES[0], shape[2], scores.dtype)).sum()

        tolerance.check_linear_gradients(dx[picked], None, loss, part, w, y)

    ours = call(function_of(module), **options)
    calls = {"cross_entropy": call(fl.cross_entropy), OURS: ours}
    compare(Comparison(f"{name_of(module)} {shape_name(shape)}", "fp32", calls, check, plan(x, w).chunks, seconds=5))
