"""The Triton kernels of sparsemax and entmax in Triton's interpreter, against plain PyTorch in float64.

As in test_triton_interpreter.py, the ordinary run starts this file again with TRITON_INTERPRET=1.
"""

import math

import pytest
import tolerance
import torch
from in_interpreter import passes_in_the_interpreter

import fusedloss as fl
from fusedloss import backends
from fusedloss.lists import Lists
from fusedloss.losses import entmax15_loss as entmax15_module
from fusedloss.losses import sparsemax_loss as sparsemax_module
from fusedloss.sorting import entmax15, sparsemax, threshold

pytest.importorskip("triton", reason="triton is not installed")
from fusedloss.sorting import threshold_launches  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
INF, NAN = math.inf, math.nan

if not backends.triton.interpreted():

    def test_kernels_in_the_interpreter():
        passes_in_the_interpreter(__file__)

else:

    @pytest.fixture(autouse=True, params=[16, 4096], ids=["walked", "at once"])
    def live(request, monkeypatch):
        monkeypatch.setattr(backends, "BACKENDS", (backends.triton, backends.torch))
        monkeypatch.setattr(threshold_launches, "WIDEST", request.param)
        assert threshold.who(torch.zeros(1, 1), Lists(torch.Size((1, 1)), 1)) == "triton"

    @pytest.mark.parametrize("f", [sparsemax, entmax15])
    @pytest.mark.parametrize("n, size", [(1, 1.0), (16, 1.0), (50, 1e-3), (50, 1.0), (50, 20.0)])
    def test_operators(f, n, size):
        z = (size * torch.randn(4, n)).requires_grad_()
        exact, g = z.detach().double().requires_grad_(), torch.randn(4, n)
        p, truth = f(z), f(exact)
        assert (p - truth).abs().max() <= 4 * 2**-23 * truth.max()
        assert ((p == 0) == (truth == 0)).all()
        (got,), (wanted,) = torch.autograd.grad(p, z, g), torch.autograd.grad(truth, exact, g.double())
        assert tolerance.error(got, wanted) < 1e-6

    @pytest.mark.parametrize("f", [sparsemax, entmax15])
    def test_steps_that_halve_the_interval(f):
        """Rows on which Newton's method alone drops few entries at a time."""
        z = -(0.93 ** torch.arange(60.0)) * torch.tensor([[0.9], [2.0], [40.0]])
        truth = f(z.double())
        assert ((f(z) - truth).abs().amax(1) <= 4 * 2**-23 * truth.amax(1)).all()

    @pytest.mark.parametrize("f", [sparsemax, entmax15])
    def test_infinities_and_nan(f):
        rows = [[-INF] * 4, [0.0, -INF, 0.0, -INF], [NAN, 1.0, 2.0, -INF], [INF, 3.0, INF, -INF], [1e30, -5, 1e30, -8]]
        wanted = [[0.0] * 4, [0.5, 0, 0.5, 0], [NAN] * 4, [0.5, 0, 0.5, 0], [0.5, 0, 0.5, 0]]
        z = torch.tensor(rows, requires_grad=True)
        p = f(z)
        torch.testing.assert_close(p, torch.tensor(wanted), equal_nan=True)
        (gradient,) = torch.autograd.grad(p, z, torch.randn(5, 4))
        assert gradient[2].isnan().all() and gradient[[0, 1, 3, 4]].isfinite().all()

    @pytest.mark.parametrize("module", [sparsemax_module, entmax15_module], ids=["sparsemax", "entmax15"])
    @pytest.mark.parametrize("linear, dtype", [(False, F32), (True, BF16)], ids=str)
    def test_losses(module, linear, dtype):
        """Gradients in place of the scores, in half precision in half of their memory; ignored rows, options."""
        f = getattr(fl, module.__name__.rpartition(".")[2])
        x, w = torch.randn(7, 40).to(dtype).requires_grad_(), (torch.randn(70, 40) / 4).to(dtype).requires_grad_()
        y = torch.randint(0, 70, (7,))
        y[2], keep = -100, torch.arange(7) != 2
        z = (x @ w.t()).detach().requires_grad_()
        leaves = (x, w) if linear else (z,)
        loss = f(fl.linear_scores(x, w) if linear else z, y)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        truth = module.reference((exact[0] @ exact[1].t() if linear else exact[0])[keep], y[keep]).mean()
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
        for got, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact)):
            assert tolerance.error(got, wanted) < (1e-5 if dtype == F32 else 1e-2)

    @pytest.mark.parametrize("module, margin", [(sparsemax_module, 1.0), (entmax15_module, 2.0)])
    def test_extreme_losses(module, margin):
        f = getattr(fl, module.__name__.rpartition(".")[2])
        rows = [[margin, 0, -3, -INF], [0.0, -INF, 0, 1], [NAN, 1, 2, 0], [INF, 3, 1, 0], [-INF] * 4]
        rows.append([0.9999 * margin, 0, -9, -9])
        z, y = torch.tensor(rows, requires_grad=True), torch.tensor([0, 1, 0, 0, 0, 0])
        loss = f(z, y, reduction="none")
        assert loss[0] == 0 and loss[1] == INF and loss[2].isnan() and loss[3] == 0 and loss[4] == INF
        (gradient,) = torch.autograd.grad(f(z, y, reduction="sum"), z)
        assert (gradient[[0, 3, 4]] == 0).all() and gradient[2].isnan().all() and gradient[1, 1] == 0
        exact = z.detach()[5:].double().requires_grad_()
        wanted = fl.sparsemax_loss(exact, y[5:]) if module is sparsemax_module else fl.entmax15_loss(exact, y[5:])
        torch.testing.assert_close(loss[5].double(), wanted, rtol=1e-3, atol=0)
        (gradient,) = torch.autograd.grad(f(z, y, row_weight=torch.zeros(6), reduction="sum"), z)
        assert (gradient == 0).all()
