"""What `make gpu` measures of sigmoid_loss and clip_loss: large batches of bf16 embeddings, all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from contrastive import (
    STARTS,
    check,
    dense_clip,
    dense_sigmoid,
    floor,
    operands,
    ours,
    step,
)
from device_harness import importable, limited
from harness import OURS, Call
from torch import Tensor

from fusedloss import backends

SHAPES = ((32768, 768), (65536, 768), (131072, 768))
QUICK = ((96, 32),)
FLOORS = {"4096 rows": 4096, "unchunked": 1 << 30}
TILE_BYTES = 40 << 30  # a floor that needs a larger tile is left out


def siglip_kernel(x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(x, y, t, b)


def inf_cl(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    return (cal_flash_loss(x, y, scale=t.exp()) + cal_flash_loss(y, x, scale=t.exp())).mean() / 2


def cut(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """The keys as classes, once in each direction."""
    from cut_cross_entropy import linear_cross_entropy

    target, scaled = torch.arange(len(x), device=x.device), t.exp().to(x.dtype)
    return (linear_cross_entropy(x * scaled, y, target) + linear_cross_entropy(y * scaled, x, target)) / 2


PEERS = {
    "sigmoid": {"siglip-kernel": ("siglip_kernel", siglip_kernel)},
    "clip": {"inf-cl": ("inf_cl", inf_cl), "cut-cross-entropy": ("cut_cross_entropy", cut)},
}
DENSE = {"sigmoid": dense_sigmoid, "clip": dense_clip}


def contenders(name: str, inputs: list[Tensor]) -> dict[str, Call]:
    x, y = inputs[:2]
    calls = {
        f"floor: GEMMs, {text}": floor(x, y, STARTS[name].gemms, rows)
        for text, rows in FLOORS.items()
        if min(rows, len(x)) * len(y) * 2 <= TILE_BYTES
    }
    ways = {OURS: ours(name), "torch, dense": DENSE[name]}
    for backend in backends.BACKENDS:
        if backend.why_not() is None and backend.supports(x.device, x.dtype) and backend.name != "torch":
            ways[f"{OURS}, {backend.name}"] = ours(name, backend=backend.name)
    for peer, (module, way) in PEERS[name].items():
        if x.device.type == "cuda" and importable(module):
            ways[peer] = way
    calls |= {way: step(loss, inputs) for way, loss in ways.items()}
    product = calls.get(f"{OURS}, triton")
    return calls if product is None else calls | {f"{OURS}, triton, one kernel": one_kernel(product)}


def one_kernel(call: Call) -> Call:
    """The gradient of the scores out of the product itself; it may be formed in the backward pass."""

    def run():
        with limited(backends.triton, fuses_gradient=True):
            return call()

    return run


def cases(
    device: torch.device, quick: bool, only: list[int] | None
) -> Iterator[tuple[str, dict[str, Call], Callable[[Call], None]]]:
    """(case, contenders, check) one after the other."""
    shapes = QUICK if quick else SHAPES if only is None else [SHAPES[n] for n in only]
    for shape in shapes:
        for name in PEERS:
            inputs = operands(shape, torch.bfloat16, name, device)
            # By keyword: `measure` hands over the call under test.
            yield f"{name} {shape[0]}x{shape[1]}", contenders(name, inputs), partial(checked, name, inputs)


def checked(name: str, inputs: list[Tensor], call: Call) -> None:
    check(name, call, inputs)
