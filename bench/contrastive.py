"""What is measured of sigmoid_loss, clip_loss and supcon_loss: operands, the ways, the floor, and the check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import GATE, LOSS_ERROR, OURS, Call, tolerance
from torch import Tensor

import fusedloss as fl

Shape = tuple[int, int]  # B, D
SHAPES: tuple[Shape, ...] = ((4096, 512), (16384, 512))
FLOOR_ROWS = 512
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, y, log-scale, bias


@dataclass(frozen=True)
class Start:
    """Where training starts: log-scale and bias (None: there is none), and the bare GEMMs of a step."""

    log_scale: float
    bias: float | None
    gemms: int


STARTS = {"sigmoid": Start(2.302585, -10.0, 3), "clip": Start(2.659260, None, 4), "supcon": Start(2.659260, None, 2)}


def operands(shape: Shape, dtype: torch.dtype, name: str, device: object = "cpu") -> list[Tensor]:
    """Unit rows x and y whose pairs are alike (cosine about 0.5), log-scale and bias; all want gradients."""
    torch.manual_seed(0)
    x, noise = torch.randn(*shape, device=device), torch.randn(*shape, device=device)
    x, y = F.normalize(x, dim=1), F.normalize(x + 1.7 * noise, dim=1)
    start = STARTS[name]
    scalars = [torch.tensor(v, device=device) for v in (start.log_scale, start.bias) if v is not None]
    return [t.requires_grad_() for t in (x.to(dtype), y.to(dtype), *scalars)]


def labels(rows: int) -> Tensor:
    """Eight rows to a label."""
    return torch.arange(rows) // 8


# --- the ways --------------------------------------------------------------------------------------------------------


def ours(name: str, **walk: object) -> Loss:
    if name == "sigmoid":
        return lambda x, y, t, b: fl.sigmoid_loss(fl.similarity_scores(x, y, scale=t.exp(), bias=b, **walk))
    if name == "clip":
        return lambda x, y, t: fl.clip_loss(fl.similarity_scores(x, y, scale=t.exp(), **walk))
    return lambda x, y, t: fl.supcon_loss(fl.similarity_scores(x, scale=t.exp(), **walk), labels(len(x)))


def dense_sigmoid(x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> Tensor:
    """As open_clip writes it: one matrix of logits, one of labels."""
    logits = t.exp().to(x.dtype) * x @ y.t() + b.to(x.dtype)
    labels = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def dense_clip(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """As open_clip writes it: logits in both directions."""
    scale, target = t.exp().to(x.dtype), torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scale * x @ y.t(), target) + F.cross_entropy(scale * y @ x.t(), target)) / 2


def dense_supcon(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """As SupContrast writes it: masks of all pairs."""
    label = labels(len(x))
    logits = x @ x.t() * t.exp().to(x.dtype)
    logits = logits - logits.amax(1, keepdim=True).detach()
    other = ~torch.eye(len(x), dtype=torch.bool)
    same = ((label[:, None] == label) & other).to(x.dtype)
    log_p = logits - (logits.exp() * other).sum(1, keepdim=True).log()
    return -((same * log_p).sum(1) / same.sum(1)).mean()


class TiledSigmoid(torch.autograd.Function):
    """A good loop over row tiles in plain PyTorch, gradients made on the way."""

    @staticmethod
    def forward(ctx, x, y, t, b, rows=FLOOR_ROWS):
        n, scale = len(x), t.exp()
        dx, dy = torch.empty_like(x), torch.zeros(y.shape, dtype=torch.float32, device=y.device)
        total, dt, db = (torch.zeros((), device=x.device) for _ in range(3))
        for start in range(0, n, rows):
            part = x[start : start + rows]
            s = (part @ y.t()).float()
            z = s * scale + b
            mine = torch.arange(len(part), device=x.device)
            total += F.softplus(z).sum() - z[mine, start + mine].sum()
            g = torch.sigmoid_(z)
            g[mine, start + mine] -= 1
            dt += (g * s).sum()
            db += g.sum()
            g = (g * (scale / n)).to(x.dtype)
            dx[start : start + rows] = g @ y
            dy += g.t() @ part
        ctx.save_for_backward(dx, dy.to(y.dtype), dt * scale / n, db / n)
        return total / n

    @staticmethod
    def backward(ctx, grad):
        return *(g * grad for g in ctx.saved_tensors), None


class TiledClip(torch.autograd.Function):
    """The same for CLIP: row and column log-sum-exps of one sweep, then the gradient."""

    @staticmethod
    def forward(ctx, x, y, t, rows=FLOOR_ROWS):
        scale = t.exp()
        below, across = [], torch.full((len(y),), -torch.inf, device=x.device)
        for part in x.split(rows):
            z = (part @ y.t()).float() * scale
            below.append(z.logsumexp(1))
            across = torch.logaddexp(across, z.logsumexp(0))
        ctx.save_for_backward(x, y, scale, torch.cat(below), across)
        hit = (x.float() * y.float()).sum(1) * scale
        return (torch.cat(below) - hit).mean() / 2 + (across - hit).mean() / 2

    @staticmethod
    def backward(ctx, grad, rows=FLOOR_ROWS):
        x, y, scale, below, across = ctx.saved_tensors
        dx, dy = torch.empty_like(x), torch.zeros(y.shape, dtype=torch.float32, device=y.device)
        n, dt = len(x), torch.zeros((), device=x.device)
        for start in range(0, n, rows):
            part = x[start : start + rows]
            s = (part @ y.t()).float()
            z = s * scale
            g = torch.exp(z - below[start : start + rows, None]) + torch.exp(z - across)
            mine = torch.arange(len(part), device=x.device)
            g[mine, start + mine] -= 2
            dt += (g * s).sum()
            g = (g * (scale / (2 * n))).to(x.dtype)
            dx[start : start + rows] = g @ y
            dy += g.t() @ part
        return dx * grad, dy.to(y.dtype) * grad, dt * scale / (2 * n) * grad, None


def step(loss: Loss, inputs: list[Tensor]) -> Call:
    """Forward and backward to every input that the loss uses."""

    def call():
        value = loss(*inputs)
        gradients = torch.autograd.grad(value, inputs, torch.ones_like(value), allow_unused=True)
        return value.detach(), *[g for g in gradients if g is not None]

    return call


def floor(x: Tensor, y: Tensor, gemms: int, rows: int = FLOOR_ROWS) -> Call:
    """The bare GEMMs over chunks of rows into reused buffers: scores, dX and dY, and the scores once more for 4. For 2:
    x with itself, where half of the scores are enough, twice, and one product makes dX."""
    x, y = x.detach(), y.detach()
    scores, dx, dy = x.new_ones(min(rows, len(x)), len(y)), torch.ones_like(x), torch.ones_like(y)

    def call():
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            tile = scores[: len(part)]
            torch.mm(part, y.t(), out=tile)
            if gemms == 4:
                torch.mm(part, y.t(), out=tile)
            torch.mm(tile, y, out=dx[start : start + rows])
            if gemms > 2:
                torch.mm(tile.t(), part, out=dy)
        return ()

    return call


def contenders(name: str, inputs: list[Tensor], dense: bool) -> dict[str, Call]:
    ways: dict[str, Loss] = {OURS: ours(name)}
    if dense:
        ways["torch, dense"] = {"sigmoid": dense_sigmoid, "clip": dense_clip, "supcon": dense_supcon}[name]
    if name != "supcon":
        ways["torch, loop over tiles"] = {"sigmoid": TiledSigmoid, "clip": TiledClip}[name].apply
    gemms = STARTS[name].gemms
    calls = {f"floor: {gemms} GEMMs": floor(*inputs[:2], gemms)}
    return calls | {way: step(loss, inputs) for way, loss in ways.items()}


# --- the gate --------------------------------------------------------------------------------------------------------


def check(name: str, call: Call, inputs: list[Tensor]) -> None:
    """Loss, dX and dY of some rows, and the gradients of log-scale and bias, against fp64, by the tests' tolerance policy:
    twice the error of scores in fp32 whose gradient is rounded once."""
    loss, dx, *rest = call()
    x, y, t, *b = (i.detach().double() for i in inputs)
    if name == "supcon":
        y = x
    bias = b[0] if b else 0.0
    n, scale, label = len(x), t.exp(), labels(len(x)).to(x.device)
    rows, columns = (torch.randperm(n, device=x.device)[:GATE] for _ in range(2))
    below, across, total, slope_t, slope_b = [], torch.full((n,), -torch.inf, device=x.device).double(), 0.0, 0.0, 0.0

    def blocks():
        for start in range(0, n, 512):
            yield slice(start, start + 512), scale * (x[start : start + 512] @ y.t()) + bias

    def visible(z, some):
        if name != "supcon":
            return z
        return z.masked_fill(torch.arange(n, device=x.device)[some, None] == torch.arange(n, device=x.device), -torch.inf)

    for some, z in blocks():
        if name == "sigmoid":
            total += F.softplus(z, threshold=40).sum()
        else:
            z = visible(z, some)
            below.append(z.logsumexp(1))
            across = torch.logaddexp(across, z.logsumexp(0))
    below = torch.cat(below) if below else None

    def gradient(z, i, j, dtype):
        """n · ∂L/∂z for rows i and columns j."""
        z, diagonal = z.to(dtype), (i[:, None] == j).to(dtype)
        if name == "sigmoid":
            return torch.sigmoid(z) - diagonal
        p = torch.exp(z - below[i, None].to(dtype))
        if name == "clip":
            return (p + torch.exp(z - across[j].to(dtype))) / 2 - diagonal
        same = ((label[i, None] == label[j]).to(dtype) - diagonal) / 7
        return (p + torch.exp(z - across[j].to(dtype))) * (1 - diagonal) - 2 * same

    everything = torch.arange(n, device=x.device)
    for some, z in blocks():
        g = gradient(z, everything[some], everything, torch.float64)
        slope_t, slope_b = slope_t + (g * (z - bias)).sum() / n, slope_b + g.sum() / n
        if name == "supcon":  # both orders of a pair are in g
            slope_t = slope_t - (g * (z - bias)).sum() / n / 2
    pairs = scale * (x * y).sum(1) + bias
    if name == "sigmoid":
        truth = (total - pairs.sum()) / n
    elif name == "clip":
        truth = ((below - pairs).mean() + (across - pairs).mean()) / 2
    else:
        sums = torch.zeros(n // 8 + 1, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, label, x)
        truth = (below - scale * ((x * sums[label]).sum(1) - (x * x).sum(1)) / 7).mean()
    allowed = LOSS_ERROR if x.device.type == "cpu" else 10 * LOSS_ERROR  # matrix units round toward 0
    assert tolerance.error(loss, truth) <= allowed, f"loss {loss.item()}, expected {truth.item()}"

    def compare(got, i, j, what):
        exact, honest = [gradient(scale * (x[i] @ y[j].t()) + bias, i, j, d) for d in (torch.float64, torch.float32)]
        side = 0 if what == "dX" else 1
        others = (y, x)[side]
        product = (lambda g: g @ others) if side == 0 else (lambda g: g.t() @ others)
        factor = scale / n
        tolerance.check(got, product(exact * factor), product((honest * factor).to(dx.dtype).double()).to(dx.dtype), what)

    compare(dx[rows], rows, everything, "dX")
    if name != "supcon":
        dy, *rest = rest
        compare(dy[columns], everything, columns, "dY")
    for got, slope, what in zip(rest, (slope_t, slope_b), ("d log-scale", "d bias")):
        assert tolerance.error(got, slope) <= 2e-4, f"{what}: {got.item()}, expected {slope.item()}"
