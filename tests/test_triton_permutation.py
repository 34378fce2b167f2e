"""The Triton kernels of NeuralSort and SoftSort in Triton's interpreter, against plain PyTorch in float64.

As in test_triton_interpreter.py, the ordinary run starts this file again with TRITON_INTERPRET=1.
"""


import pytest
import tolerance
import torch
from in_interpreter import passes_in_the_interpreter

from fusedloss import backends
from fusedloss.sorting import NeuralSort, SoftSort, permutation_ops

pytest.importorskip("triton", reason="triton is not installed")
from fusedloss.sorting import permutation_triton  # noqa: E402

F64 = torch.float64

if not backends.triton.interpreted():

    def test_kernels_in_the_interpreter():
        passes_in_the_interpreter(__file__)

else:

    @pytest.fixture(autouse=True)
    def live(monkeypatch):
        monkeypatch.setattr(backends, "BACKENDS", (backends.triton, backends.torch))
        monkeypatch.setattr(permutation_triton, "SCANNED", 16)  # lists are walked
        assert permutation_ops._engine(torch.zeros(1)) == "triton" != permutation_ops._engine(torch.zeros(1, dtype=F64))

    @pytest.fixture(params=range(3), ids=["neural_sort", "soft_sort", "soft_sort_squared"])
    def relaxation(request):
        return request.param

    def results(t, tau, v, u, *layout):
        """Of every operator; the gradients also of sums of `rest`."""
        y, rest, deviation = permutation_ops.product(t, tau, v, *layout)
        x, again = permutation_ops.transposed(t, tau, u, *layout)
        assert torch.equal(rest.nan_to_num(9), again.nan_to_num(9))
        gradient = permutation_ops.gradient(t, tau, rest, u, v, deviation, *layout)
        of_rest = permutation_ops.gradient(t, tau, rest, u[..., :1], None, None, *layout)
        assert of_rest[2].numel() == 0
        return y, rest, deviation, x, *gradient, *of_rest[:2]

    def check(found, truth, allowed=1e-6):
        for i, (a, b) in enumerate(zip(found, truth, strict=True)):
            assert a.shape == b.shape and tolerance.error(a, b) < allowed, (i, tolerance.error(a, b))

    def falling(*shape):
        return torch.randn(shape).sort(-1, descending=True).values

    def wide(*tensors):
        return (x.double() for x in tensors)

    @pytest.mark.parametrize("columns, tau, ties", [(1, 0.3, True), (5, 1.0, False)])
    def test_operators(relaxation, columns, tau, ties):
        t, v, u = falling(2, 34) * 2, *torch.randn(2, 2, 34, columns)
        t, tau = t.round() if ties else t, torch.tensor([tau, 2 * tau], dtype=F64)
        layout = torch.tensor([34, 20]), None, relaxation
        found, truth = results(t, tau, v, u, *layout), results(*wide(t, tau, v, u), *layout)
        check(found, truth, 4e-6)
        for x in (found[0], found[1], found[3], found[4], found[6]):
            assert (x[1, 20:] == 0).all()

    def test_a_narrow_band_of_a_long_list(relaxation):
        """Both ends are looked for in steps, and most of the matrix is left out."""
        n, layout = 160, (None, None, relaxation)

        def run(t, tau, v, u):
            y, rest, deviation = permutation_ops.product(t, tau, v, *layout)
            return y, rest, deviation, *permutation_ops.gradient(t, tau, rest, u, v, deviation, *layout)

        given = falling(1, n) * 10, torch.tensor([0.1], dtype=F64), *torch.randn(2, 1, n, 1)
        check(run(*given), run(*wide(*given)), 4e-6)

    def test_lists_by_offsets_have_the_bits_of_lists_alone(relaxation):
        lengths = [4, 0, 1, 18]
        parts = [(falling(n), *torch.randn(2, n, 2)) for n in lengths]
        t, v, u = (torch.cat(x) for x in zip(*parts))
        tau, offsets = torch.rand(4, dtype=F64) + 0.2, torch.tensor([0, *lengths]).cumsum(0)
        found = results(t, tau, v, u, None, offsets, relaxation)
        check(found, results(*wide(t, tau, v, u), None, offsets, relaxation), 4e-6)
        for r in (0, 2, 3):
            t, v, u = (x[None] for x in parts[r])
            alone = results(t, tau[r : r + 1], v, u, None, None, relaxation)
            for i, (a, b) in enumerate(zip(found, alone)):
                if a.shape == (4,):  # of tau: sums over lists are torch's
                    torch.testing.assert_close(a[r], b[0], rtol=1e-12, atol=1e-12)
                else:
                    assert torch.equal(a[offsets[r] : offsets[r + 1]], b[0]), i

    def test_what_is_not_finite_or_not_there(relaxation):
        t = torch.tensor([[1.0, 0.5, 0, 0], [torch.inf, 1, 0, 0], [torch.nan, 1, 0, 0], [2, 1, -torch.inf, 0], [1] * 4])
        t = torch.cat([t, torch.tensor([[1.0, torch.nan, torch.nan, torch.nan]] * 2)])
        tau, counts = torch.tensor([1.0, 1, 1, 1, 0, 1, 1], dtype=F64), torch.tensor([3, 3, 3, 3, 3, 1, 0])
        v = torch.randn(7, 4, 1)
        v[:, 3:] = torch.nan  # behind what counts
        for x in results(t, tau, v, v, counts, None, relaxation):
            assert x[[0, 5, 6]].isfinite().all()
            if x.dim() == 1:
                assert x[1:5].isnan().all()
            else:
                assert x[1:5, :3].isnan().all() and (x[:, 3] == 0).all() and (x[6] == 0).all()
        for shape in ((0, 3), (3, 0)):
            t, v = torch.randn(shape), torch.randn(*shape, 2)
            results(t, torch.ones(shape[0], dtype=F64), v, v, None, None, relaxation)

    def test_extreme_scores_and_large_values(relaxation):
        tau = torch.tensor([1e-3], dtype=F64)
        t, v = torch.tensor([[1e30, 1e-30, 0.0, -1e30]]), torch.tensor([[1.0, 2.0, 3.0, 0.0]])[..., None]
        found = results(t, tau, v, v, None, None, relaxation)
        assert torch.equal(found[0].flatten(), torch.tensor([1.0, 2.5, 2.5, 0.0])) and found[4].isfinite().all()
        t, v = torch.randint(-400, 400, (1, 40)).sort(1, descending=True).values / 128, torch.arange(40.0) + 100_000
        given = t + 4096, torch.tensor([0.5], dtype=F64), v[None, :, None], torch.randn(1, 40, 1)
        truth = results(*wide(*given), None, None, relaxation)
        assert tolerance.error(results(*given, None, None, relaxation)[4], truth[4]) < 2e-5

    @pytest.mark.parametrize("make", [NeuralSort, SoftSort], ids=str)
    def test_from_scores_to_gradients(make):
        s, mask, v = torch.randn(2, 12), torch.rand(2, 12) > 0.2, torch.randn(2, 12)

        def loss(s, v, tau):
            p = make(s, tau, mask=mask)
            return (p @ v).square().sum() + (p.T @ v).sin().sum() + p.cross_entropy(p._order.remainder(12)).sum() / 9

        given = [x.requires_grad_() for x in (s, v, torch.tensor([0.5, 1.5]))]
        exact = [x.detach().double().requires_grad_() for x in given]
        a, b = loss(*given), loss(*exact)
        check([a, *torch.autograd.grad(a, given)], [b, *torch.autograd.grad(b, exact)], 2e-6)
