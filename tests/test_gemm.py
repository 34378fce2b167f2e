"""Every product with fp32 sums that the cpu backend may choose, also those that this processor's table does not."""

import pytest
import torch

from fusedloss.backends import cpu

pytestmark = pytest.mark.host

KINDS = {
    "native": lambda dtype: cpu._native is not None and cpu._native.gemm_available(cpu.DTYPES[dtype]),
    "blas": lambda dtype: dtype == torch.bfloat16 and cpu._blas("cblas_gemm_bf16bf16f32") is not None,
    "torch": lambda dtype: True,
}
LAYOUTS = ("scores", "dx", "dw")


def operands(layout: str, dtype: torch.dtype, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """a (m, k) and b (k, n) with the strides of x wᵀ, G W and Gᵀ x, G's rows in the first half of longer ones."""
    if layout == "scores":
        return torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).t()
    if layout == "dx":
        return torch.randn(m, 2 * k).to(dtype)[:, :k], torch.randn(k, n).to(dtype)
    return torch.randn(k, 2 * m).to(dtype)[:, :m].t(), torch.randn(k, n).to(dtype)


# Of one feature, one class or none of them the strides say nothing: a matrix of one row may claim any.
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 1), (4, 1, 3), (1, 5, 2), (3, 5, 0), (5, 33, 7), (70, 64, 130)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_product_with_fp32_sums(kind, dtype, layout, shape, monkeypatch):
    if not KINDS[kind](dtype):
        pytest.skip(f"no {kind} product of {dtype} here")
    monkeypatch.setattr(cpu, "gemm_kind", lambda _: kind)
    m, n, k = shape
    a, b = operands(layout, dtype, m, n, k)
    exact = a.double() @ b.double()
    out = torch.full((m, n + 3), float("nan"))[:, :n]
    cpu.gemm(out, a, b, accumulate=False)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6 * k**0.5 * 4)
    cpu.gemm(out, a, b, accumulate=True)
    torch.testing.assert_close(out.double(), 2 * exact, rtol=1e-6, atol=1e-6 * k**0.5 * 8)
