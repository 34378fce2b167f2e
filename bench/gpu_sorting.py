"""What `make gpu` measures of the sort engine: soft rank and soft sort, forward and backward, beside torchsort and the
hard sort; NeuralSort's product beside the dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from device_harness import importable
from harness import OURS, Call
from torch import Tensor

SHAPES = ((128, 100), (128, 1000), (32, 10000), (4, 100000), (1, 1000000))
PRODUCTS = ((16, 1000), (4, 10000))  # NeuralSort's rows
QUICK = ((3, 40), (2, 300))
REGULARIZATIONS = ("l2", "kl")
STRENGTHS = (1.0, 1e-3)
ALLOWED = 4 * 2.0**-23  # of the largest output: 4 units in its last place
GRADIENT = 1e-5
TAU = 1.0


def step(operator: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Call:
    def call():
        y = operator(x)
        return y.detach(), *torch.autograd.grad(y, x, g)

    return call


def contenders(name: str, regularization: str, strength: float, x: Tensor, g: Tensor) -> dict[str, Call]:
    from fusedloss import sorting

    given = dict(regularization=regularization, regularization_strength=strength)
    ways = {OURS: partial(getattr(sorting, name), **given)}
    if importable("torchsort"):
        import torchsort

        ways["torchsort"] = partial(getattr(torchsort, name), **given)
    return {"floor: torch.sort": step(lambda x: x.sort(-1).values, x, g)} | {
        n: step(way, x, g) for n, way in ways.items()
    }


def check(name: str, regularization: str, strength: float, x: Tensor, g: Tensor, call: Call) -> None:
    """Values and gradient of the first row against the operator's own fp64 on the CPU, itself held to plain pooling."""
    from fusedloss import sorting

    exact = x[:1].detach().double().cpu().requires_grad_()
    truth = getattr(sorting, name)(exact, regularization, strength)
    (gradient,) = torch.autograd.grad(truth, exact, g[:1].double().cpu())
    for what, got, expected, allowed in zip(("values", "gradient"), call(), (truth, gradient), (ALLOWED, GRADIENT)):
        error = (got[:1].cpu().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
        assert error <= allowed, f"{what}: relative error {error.item():.3g}"


# --- NeuralSort -------------------------------------------------------------------------------------------------------


def dense(s: Tensor, v: Tensor) -> Tensor:
    """softmax(((n + 1 - 2i) s_j - sum_k |s_j - s_k|) / tau) v, the n x n matrix in memory. Grover et al., ICLR 2019."""
    n = s.shape[-1]
    spread = (s[..., :, None] - s[..., None, :]).abs().sum(-1)
    factor = n + 1 - 2 * torch.arange(1, n + 1, device=s.device, dtype=s.dtype)
    return ((factor[:, None] * s[..., None, :] - spread[..., None, :]) / TAU).softmax(-1) @ v


def neural_sort(s: Tensor, v: Tensor) -> Tensor:
    from fusedloss.sorting import NeuralSort

    return NeuralSort(s, TAU) @ v


def check_product(s: Tensor, v: Tensor, g: Tensor, call: Call) -> None:
    exact = s[:1].detach().double().requires_grad_()
    truth = dense(exact, v[:1].double())
    (gradient,) = torch.autograd.grad(truth, exact, g[:1].double())
    for what, got, expected in zip(("values", "gradient"), call(), (truth, gradient)):
        error = (got[:1].double() - expected).norm() / expected.norm()
        assert error <= 1e-4, f"{what}: relative error {error.item():.3g}"


def products(s: Tensor, v: Tensor, g: Tensor) -> dict[str, Call]:
    from fusedloss import sorting

    ways = {"floor: torch.sort": lambda s, v: s.sort(-1).values[..., None] * v, "torch, dense": dense}
    if hasattr(sorting, "NeuralSort"):
        ways[OURS] = neural_sort
    else:
        print("  NeuralSort is left out: fusedloss.sorting has none", flush=True)
    return {name: step(lambda s, way=way: way(s, v), s, g) for name, way in ways.items()}


def cases(
    device: torch.device, quick: bool, only: list[int] | None
) -> Iterator[tuple[str, dict[str, Call], Callable[[Call], None]]]:
    """(case, contenders, check) one after the other."""
    random = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=random, device=device)
    for shape in QUICK if quick else SHAPES if only is None else [SHAPES[i] for i in only]:
        x, g = draw(*shape).requires_grad_(), draw(*shape)
        for name in ("soft_rank", "soft_sort"):
            for regularization in REGULARIZATIONS:
                for strength in STRENGTHS:
                    given = name, regularization, strength, x, g
                    yield (f"{name} {regularization} {strength:g} {shape[0]}x{shape[1]}", contenders(*given),
                           partial(check, *given))  # fmt: skip
    for rows, n in () if only is not None else QUICK if quick else PRODUCTS:
        s, v, g = draw(rows, n).requires_grad_(), draw(rows, n, 1), draw(rows, n, 1)
        yield f"neural_sort product {rows}x{n}", products(s, v, g), partial(check_product, s, v, g)
