"""Running log-sum-exps: against the definition, at any range, of ragged lists, with derivatives of any order."""

import pytest
import torch
from tolerance import error

from fusedloss.sorting.running import plain, running_logsumexp

F64 = torch.float64
OFFSETS = torch.tensor([0, 3, 3, 4, 11])


def reference(x, offsets):
    lists = [x] if offsets is None else [x[a:b] for a, b in zip(offsets, offsets[1:])]
    return torch.cat([x[:0], *(row[i:].logsumexp(0, keepdim=True) for row in lists for i in range(len(row)))])


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("offsets", [None, OFFSETS], ids=["rows", "offsets"])
def test_values_and_gradients(scale, offsets, backend):
    x, upstream = (scale * torch.randn(11, dtype=F64)).requires_grad_(), torch.randn(11, dtype=F64)
    truth = reference(x, offsets)
    (right,) = torch.autograd.grad(truth @ upstream, x)
    for dtype, within in ((F64, 1e-13), (torch.float32, 1e-6 if scale == 1 else 1e-4)):
        given = x.detach().to(dtype).requires_grad_()
        shape = given if offsets is not None else given.unsqueeze(0)
        got = running_logsumexp(shape, offsets).flatten()
        (gradient,) = torch.autograd.grad(got @ upstream.to(dtype), given)
        assert got.dtype == dtype and error(got, truth) <= within and error(gradient, right) <= within


def test_derivatives_of_any_order(backend):
    x = torch.randn(11, dtype=F64, requires_grad=True)
    for layout, offsets in ((lambda x: x, OFFSETS), (lambda x: x[:10].reshape(2, 5), None)):
        assert torch.autograd.gradcheck(lambda x: running_logsumexp(layout(x), offsets), x)
        assert torch.autograd.gradgradcheck(lambda x: running_logsumexp(layout(x), offsets), x)


def test_infinite_and_absent_numbers(backend):
    x = torch.tensor([[1.0, -torch.inf, 2.0, -torch.inf], [0.0, 1.0, -1e30, -1e30], [0.0, torch.nan, 1.0, 2.0]])
    got = running_logsumexp(x, None)
    torch.testing.assert_close(got[:, :2], plain(x, None)[:, :2], equal_nan=True)
    assert got[0, 3] == -torch.inf and (got[1, 2:] < -1e29).all() and got[2, 2:].isfinite().all()


def test_long_lists(backend):
    """All of the weight at the end, and then at the start: nothing is lost on the way."""
    for x in (torch.linspace(-500, 500, 50_000), torch.linspace(500, -500, 50_000)):
        wide = running_logsumexp(x.double().unsqueeze(0), None)
        assert error(running_logsumexp(x.unsqueeze(0), None), wide) <= 1e-6
        assert error(wide, plain(x.double().unsqueeze(0), None)) <= 1e-12


@pytest.mark.unpoisoned
def test_op_contract():
    x, op = torch.randn(11, dtype=F64, requires_grad=True), torch.ops.fusedloss
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for given in ((x, OFFSETS), (torch.randn(3, 4, requires_grad=True), None), (torch.zeros(0, 4), None)):
        torch.library.opcheck(op.running_logsumexp, given, test_utils=checks)
    flat = x.detach()
    given = flat, flat, plain(flat, OFFSETS), OFFSETS
    torch.library.opcheck(op.running_logsumexp_backward, given, test_utils=checks[:2])
