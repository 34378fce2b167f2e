"""The factored layer's steps on a device, in Triton's interpreter, against the plain PyTorch ones.

As in test_triton_interpreter.py, the ordinary run starts this file again with TRITON_INTERPRET=1.
"""

from copy import deepcopy

import pytest
import torch
from in_interpreter import passes_in_the_interpreter

from fusedloss import backends, nn
from fusedloss.spherical import engines, steps
from fusedloss.spherical.exact import exact
from fusedloss.spherical.factors import Factors
from fusedloss.spherical.family import member

pytest.importorskip("triton", reason="triton is not installed")
from fusedloss.spherical import device_launches, device_steps  # noqa: E402

F32, F64 = torch.float32, torch.float64
LOSSES = {
    "z": nn.SphericalZLoss(a=2.0, b=0.3),
    "taylor": nn.TaylorSoftmaxLoss(),
    "spherical": nn.SphericalSoftmaxLoss(eps=0.1),
    "squared": nn.SquaredErrorLoss(value=3.0, k=2.0),
    "squared, summed": nn.SquaredErrorLoss(mean_over_classes=False),
}
SMALL = dict(ELEMENTS=16, WIDEST=8, SLOTS=2, SQUARE=4, SEGMENT=(2, 4), SUMMED=(2, 4), FOLD=(4, 4, 4), FOLDING=3)

if not backends.triton.interpreted():

    def test_factored_steps_in_the_interpreter():
        passes_in_the_interpreter(__file__)

    @pytest.mark.host
    @pytest.mark.parametrize("asked", ["highest", "high", "medium", "allow", "new"])
    def test_products_are_never_in_tf32(asked):
        """However it was asked for; and it is asked for again afterwards. PyTorch raises where both ways are mixed."""
        matmul = torch.backends.cuda.matmul

        def told():
            try:
                return torch.get_float32_matmul_precision(), matmul.allow_tf32, matmul.fp32_precision
            except RuntimeError:
                return "mixed", None, matmul.fp32_precision

        try:
            if asked == "allow":
                matmul.allow_tf32 = True
            elif asked == "new":
                matmul.fp32_precision = "tf32"
            else:
                torch.set_float32_matmul_precision(asked)
            before = told()
            x = torch.randn(3, 3)
            with torch.autocast("cpu", torch.bfloat16), exact(x.device):
                assert matmul.allow_tf32 is False and matmul.fp32_precision != "tf32"
                assert (x @ x).dtype == F32
            assert told() == before
        finally:
            torch.set_float32_matmul_precision("highest")


def problem(m, d, targets, n, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = Factors.of(torch.randn(n, d, generator=g).to(dtype))
    h, target = torch.randn(m, d, generator=g).to(dtype), torch.randint(0, n // 4, (m, targets), generator=g)
    share = torch.rand(m, targets, generator=g, dtype=F64)
    upstream = torch.rand(m, generator=g, dtype=F64) + 0.5
    if targets > 1:
        share[:, -1] *= torch.arange(m) % 2  # targets that are not there
        share[-1:] = 0
    return f, h, target, share, upstream


def agree(got, truth, tolerance, what):
    for name, wanted in vars(truth).items():
        found, size = getattr(got, name), wanted.abs().max().clamp(min=1e-3)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape, f"{what} {name}"
        assert (found - wanted).abs().max() <= tolerance * size, f"{what} {name}"


def weight(f):
    return f.rows(torch.arange(f.p.shape[0]))


if backends.triton.interpreted():
    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on infinities and NaN

    @pytest.fixture
    def pieces(monkeypatch):
        for name, value in SMALL.items():
            monkeypatch.setattr(device_launches, name, value)

    def check(name, shape, dtype, lr=0.05):
        m, d, targets, n = shape
        loss, tolerance = member("tests", LOSSES[name]), 1e-13 if dtype == F64 else 5e-6
        f, h, target, share, upstream = problem(m, d, targets, n, dtype)
        f.u.add_(0.05 * torch.randn(d, d, dtype=F64))  # as it is after some steps: no multiple of the identity
        f.inverse.copy_(torch.linalg.inv(f.u))
        g = deepcopy(f)
        visits = steps.visit(f, h, target, share, loss), device_steps.visit(g, h, target, share, loss)
        agree(visits[1], visits[0], tolerance, "visit")
        (dh, b), (found, c) = steps.backward(f, visits[0], upstream), device_steps.backward(g, visits[1], upstream)
        assert (found - dh).abs().max() <= tolerance * dh.abs().max().clamp(min=0.01)  # of one feature it is 0
        agree(c, b, tolerance, "backward")
        steps.step(f, b, lr, 0.3)
        device_steps.step(g, c, lr, 0.3)
        agree(g, f, tolerance, "step")
        return f, g

    @pytest.mark.parametrize("dtype", [F64, F32], ids=str)
    @pytest.mark.parametrize("shape", [(6, 13, 1, 40), (17, 9, 3, 44)], ids=["small batch", "large batch"])
    @pytest.mark.parametrize("name", LOSSES)
    def test_a_step(name, shape, dtype):
        check(name, shape, dtype, 0.05 if "squared" not in name else 0.002)

    @pytest.mark.parametrize("shape", [(5, 13, 5, 22), (11, 9, 3, 30)], ids=["small batch", "large batch"])
    def test_a_step_in_pieces(shape, pieces):
        """As above where nothing is done in one block: rows, targets of a row, examples of a class, columns."""
        check("taylor", shape, F64)

    @pytest.mark.parametrize("shape", [(1, 7, 1, 30), (1, 1, 1, 30), (3, 1, 2, 30)], ids=str)
    def test_the_smallest(shape):
        check("z", shape, F64)

    def test_nothing_to_do():
        f, h, target, share, upstream = problem(0, 5, 2, 20, F32)
        before, loss = deepcopy(f), member("tests", LOSSES["z"])
        visited = device_steps.visit(f, h, target, share, loss)
        dh, b = device_steps.backward(f, visited, upstream)
        device_steps.step(f, b, 0.1)
        assert visited.losses.shape == (0,) and dh.shape == (0, 5)
        agree(f, before, 0, "step")

    def test_losses_near_zero_keep_their_digits():
        f, h, _, _, _ = problem(4, 6, 1, 30, F64)
        f.p[1] = 40 * h[2]  # a row nearly sure of its target
        f = Factors.of(f.p)
        target, share = torch.tensor([[0], [3], [1], [5]]), torch.ones(4, 1, dtype=F64)
        for options in (dict(a=30.0), dict(a=1e-3, b=4.0), dict(eps=1e3)):  # the last: constant rows
            loss = member("tests", nn.SphericalZLoss(**options))
            truth, found = (engine.visit(f, h, target, share, loss) for engine in (steps, device_steps))
            torch.testing.assert_close(found.losses, truth.losses, rtol=1e-11, atol=0)
            agree(found, truth, 1e-11, str(options))
        assert truth.alpha.abs().max() == 0

    @pytest.mark.parametrize("rows", [1, 9], ids=["small batch", "large batch"])
    @pytest.mark.parametrize("lack", [0.0, 1e-9, 0.01], ids=["singular", "nearly", "ill"])
    def test_folding(lack, rows, pieces):
        """E has no inverse, or one that U would suffer from: P takes U over, and W is what it should be."""
        f, h, target, share, upstream = problem(rows, 5, 1, 21, F64)
        h[1:] *= 1e-3
        loss = member("tests", LOSSES["squared, summed"])
        upstream.fill_(1.0)
        v = steps.visit(f, h, target, share, loss)
        dh, b = steps.backward(f, v, upstream)
        if rows == 1:
            b.gamma[:] = 2.0 / h.square().sum()  # E = 1 − lr · 4, exactly 0
        largest = torch.linalg.eigvalsh((h * 2 * b.gamma[:, None]).t() @ h).max()
        lr = (1 - lack) / largest.item()
        g, before = deepcopy(f), f.p.clone()
        steps.step(f, b, lr, 0.0)
        device_steps.step(g, b, lr, 0.0)
        assert torch.equal(g.u, torch.eye(5, dtype=F64)) and torch.equal(g.inverse, g.u)
        assert not torch.equal(g.p, before)
        for got, truth in ((weight(g), weight(f)), (g.gram, f.gram), (g.mean, f.mean), (g.offset, f.offset)):
            assert (got - truth).abs().max() <= 1e-12 * truth.abs().max()

    def test_a_limit_of_the_condition():
        f, h, target, share, upstream = problem(3, 6, 1, 21, F64)
        loss = member("tests", LOSSES["squared, summed"])
        _, b = steps.backward(f, steps.visit(f, h, target, share, loss), upstream)
        kept, folded = deepcopy(f), deepcopy(f)
        steps.step(f, b, 0.01)
        condition = f.condition().item()
        device_steps.step(kept, b, 0.01, limit=condition * 1.0001)
        device_steps.step(folded, b, 0.01, limit=condition * 0.9999)
        agree(kept, f, 1e-13, "step")
        assert torch.equal(folded.u, torch.eye(6, dtype=F64)) and (weight(folded) - weight(f)).abs().max() < 1e-13

    def test_no_gradient_reaches_a_class_that_nobody_asked_for():
        """Not a row of P beyond the targets' is written, and not one is read of targets that count nothing."""
        f, h, target, share, upstream = problem(4, 6, 2, 30, F32)
        share[:, 1], target[:, 1] = 0, 29
        f.p[29] = torch.nan
        loss, before = member("tests", LOSSES["z"]), f.p.clone()
        dh, b = device_steps.backward(f, device_steps.visit(f, h, target, share, loss), upstream)
        device_steps.step(f, b, 0.1)
        assert dh.isfinite().all()
        others = torch.ones(30, dtype=torch.bool).index_fill_(0, target[:, 0], False)
        assert torch.equal(f.p[others].nan_to_num(), before[others].nan_to_num())
        assert (f.p[~others] != before[~others]).any(1).all()

    @pytest.mark.unpoisoned
    def test_more_elements_than_32_bits_count(pieces, tmp_path):
        """Rows of P that lie up to 2³¹ elements apart, in a file that is nearly all a hole."""
        n, d, stride = 9, 5, (1 << 28) + 3
        size = (n - 1) * stride + d
        far = torch.from_file(str(tmp_path / "p"), shared=True, size=size, dtype=F32).as_strided((n, d), (stride, 1))
        f, h, target, share, upstream = problem(3, d, 1, n, F32)
        target += n - 3
        far.copy_(f.p)
        g, loss = deepcopy(f), member("tests", LOSSES["taylor"])
        g.p = far
        for limit in (8.0, 0.5):  # the second: P is folded
            batches = []
            for each in (f, g):
                visited = device_steps.visit(each, h, target, share, loss)
                batches.append(device_steps.backward(each, visited, upstream)[1])
                device_steps.step(each, batches[-1], 0.05, limit=limit)
            agree(batches[1], batches[0], 0, "backward")
            agree(g, f, 0, "step")
        assert torch.equal(f.u, torch.eye(d, dtype=F64))

    def test_the_engine_of_a_device(monkeypatch):
        f = Factors.of(torch.randn(7, 3, dtype=F64))
        assert engines.engine(f) is not device_steps  # the interpreter is for those who ask for it
        monkeypatch.setattr(backends, "BACKENDS", (backends.triton, backends.torch))
        assert engines.engine(f) is device_steps
        monkeypatch.setattr(backends, "BACKENDS", (backends.torch,))
        assert engines.engine(f) is steps
