"""What is measured: shapes, operands, and the ways to compute a loss and its gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import OURS, Call
from torch import Tensor

import fusedloss as fl
from fusedloss.plan import Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Shape = tuple[int, int, int]  # N, D, V
SHAPES: tuple[Shape, ...] = ((2048, 512, 32000), (1024, 1024, 128256), (4096, 256, 50257), (8192, 64, 8000))
LARGE: tuple[Shape, ...] = ((16384, 512, 32000), (4096, 1024, 128256))  # several chunks at the default budget
QUICK: tuple[Shape, ...] = ((192, 32, 1000),)
FLOOR_ROWS = 512
ZIPF = 1.0
TRAINED_LOSS = 3.0  # nats
CHUNKED_LIMIT = 40.0  # seconds that torch's chunked op gets at its default

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def shape_name(shape: Shape) -> str:
    return "x".join(map(str, shape))


def operands(shape: Shape, dtype: torch.dtype, ignored: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and targets; scores of mean 0 and variance 1."""
    rows, width, columns = shape
    torch.manual_seed(0)
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    w = (torch.randn(columns, width) * width**-0.5).to(dtype).requires_grad_()
    target = torch.randint(0, columns, (rows,))
    return x, w, torch.where(torch.rand(rows) < ignored, -100, target)


def trained(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float]:
    """x, W and targets like a trained model's, and the mean loss (about TRAINED_LOSS).

    Targets have Zipf(ZIPF) frequencies, class ids in random order. The first coordinate of W holds the classes'
    log-frequencies and that of x is 1; the rest of W is random and of x is a · W[target] + noise, so that the
    probability which misses the target is spread by frequency and by chance. a is found by bisection.
    """
    rows, width, columns = shape
    torch.manual_seed(0)
    frequency = torch.arange(1, columns + 1, dtype=torch.float64) ** -ZIPF
    frequency = (frequency / frequency.sum())[torch.randperm(columns)]
    target = torch.multinomial(frequency, rows, replacement=True)
    w, noise = torch.randn(columns, width) * width**-0.5, torch.randn(rows, width)
    w[:, 0], noise[:, 0] = frequency.log(), 1.0
    pull = w[target]
    pull[:, 0] = 0.0
    low, high = 0.0, 100.0
    for _ in range(12):
        a = (low + high) / 2
        loss = F.cross_entropy((noise + a * pull)[:1024] @ w.t(), target[:1024]).item()
        low, high = (a, high) if loss > TRAINED_LOSS else (low, a)
    x = (noise + a * pull).to(dtype).requires_grad_()
    w = w.to(dtype).requires_grad_()
    with torch.no_grad():
        return x, w, target, fl.linear_cross_entropy(x, w, target).item()


def plan(x: Tensor, w: Tensor, **walk: object) -> Plan:
    return fl.linear_scores(x, w, **walk).plan()


# --- the ways -------------------------------------------------------------------------------------------------------


def ours(x: Tensor, w: Tensor, target: Tensor, **options: object) -> Tensor:
    return fl.linear_cross_entropy(x, w, target, **options)


def eager(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.t(), target)


def eager_fp32(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((x @ w.t()).float(), target)


def has_chunked() -> bool:
    """Whether this torch has a chunked op to compare with; tells so where not."""
    found = hasattr(F, "linear_cross_entropy")
    if not found:
        warnings.warn(f"torch, chunked is left out: torch {torch.__version__} has no linear_cross_entropy", stacklevel=2)
    return found


def chunked(x: Tensor, w: Tensor, target: Tensor, **options: object) -> Tensor:
    return F.linear_cross_entropy(x, w, target, options=torch.nn.LinearCrossEntropyOptions(**options))


def compiled(loss: Loss) -> Loss:
    torch._dynamo.reset()  # a fresh one for every shape
    return torch.compile(loss, dynamic=False)


def step(loss: Loss, x: Tensor, w: Tensor, target: Tensor, **options: object) -> Call:
    """Forward and backward to those of x and w that want a gradient."""
    wanted = [t for t in (x, w) if t.requires_grad]

    def call():
        value = loss(x, w, target, **options)
        gradients = torch.autograd.grad(value, wanted, torch.ones_like(value))
        return value.detach(), *gradients

    return call


def floor(x: Tensor, w: Tensor, gemms: int = 3, rows: int = FLOOR_ROWS) -> Call:
    """The bare GEMMs of scores, dX and dW (the first `gemms` of them) over chunks of `rows` into reused buffers."""
    x, w = x.detach(), w.detach()
    scores = x.new_ones(min(rows, x.shape[0]), w.shape[0])  # ones: touched, so that no page is missing later
    dx, dw = torch.ones_like(x), torch.ones_like(w)

    def call():
        for start in range(0, x.shape[0], rows):
            part = x[start : start + rows]
            tile = scores[: part.shape[0]]
            torch.mm(part, w.t(), out=tile)
            if gemms > 1:
                torch.mm(tile, w, out=dx[start : start + rows])
            if gemms > 2:
                torch.mm(tile.t(), part, out=dw)
        return ()

    return call


def contenders(x: Tensor, w: Tensor, target: Tensor, compile: bool) -> dict[str, Call]:
    """The floor, ours, and the ways of PyTorch that can take turns with them."""
    ways: dict[str, Loss] = {OURS: ours, "torch, eager": eager}
    if x.dtype != torch.float32:
        ways["torch, eager, fp32 logits"] = eager_fp32
    if compile:
        ways["torch.compile of eager"] = compiled(eager)
    calls = {name: step(way, x, w, target) for name, way in ways.items()}
    if has_chunked():
        calls["torch, chunked, 512 rows"] = step(chunked, x, w, target, batch_chunk_size=FLOOR_ROWS)
    return {"floor: three GEMMs": floor(x, w), **calls}


def chunked_default(shape: Shape, dtype: torch.dtype) -> Call:
    """torch's chunked op as it chooses its chunks itself, warmed up."""
    step(chunked, *operands((64, 8, 64), dtype))()
    return step(chunked, *operands(shape, dtype))
