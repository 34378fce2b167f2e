"""cross_entropy of given logits: no GEMM, so what counts is how often memory is read and written."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, QUICK, compiled
from harness import GATE, MIB, OURS, Comparison, tolerance

import fusedloss as fl

ROWS, COLUMNS = 4096, 32000


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(compare, quick, dtype):
    rows, _, columns = QUICK[0] if quick else (ROWS, 0, COLUMNS)
    torch.manual_seed(0)
    logits = torch.randn(rows, columns).to(DTYPES[dtype]).requires_grad_()
    target = torch.randint(0, columns, (rows,))

    def call(loss):
        def step():
            value = loss(logits, target)
            return value.detach(), *torch.autograd.grad(value, logits)

        return step

    def eager_fp32(logits, target):
        return F.cross_entropy(logits.float(), target)

    ways = {"torch, eager": F.cross_entropy, OURS: fl.cross_entropy}
    if dtype != "fp32":
        ways["torch, eager, fp32 logits"] = eager_fp32
    if not quick:
        ways["torch.compile of eager"] = compiled(F.cross_entropy)

    def check():
        picked = torch.randperm(rows)[:GATE]
        _, got = call(fl.cross_entropy)()
        mean = lambda scores: F.cross_entropy(scores, target[picked], reduction="sum") / rows  # noqa: E731
        tolerance.check_score_gradient(got[picked], mean, logits.detach()[picked], target[picked])

    matrix = rows * columns * logits.dtype.itemsize / MIB
    calls = {name: call(way) for name, way in ways.items()}
    note = f"N x V takes {matrix:.0f} MiB; the gradient, one of it, is not in the peak"
    compare(Comparison(f"logits {rows}x{columns}", dtype, calls, check, note=note))
