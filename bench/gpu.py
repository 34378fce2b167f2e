"""The benchmark of `make gpu`: linear_cross_entropy, cross_entropy, the contrastive losses, the factored layer and the
soft sorts on a GPU, beside the bare GEMMs, the hard sort and the peers.

    python bench/gpu.py --rows bench/results/h200.csv          # on a CUDA device
    python bench/gpu.py --device cpu --quick                   # a dry run of the same code, tiny, without a GPU

Every contender of a case passes the correctness gate or says why it does not; then all take turns, and a figure is the
median. Peak memory is the most that PyTorch's allocator held during one call, less what was there before and what the
call returns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import gpu_contrastive
import gpu_sorting
import gpu_spherical
import torch
import torch.nn.functional as F
from cases import chunked, compiled, eager, eager_fp32, floor, has_chunked, ours, shape_name, step
from device_harness import Clock, failures, importable, limited, measure, plot, report, versions
from harness import OURS, Call, check_linear, commit, table
from torch import Tensor

import fusedloss as fl
from fusedloss import backends

SHAPES = (
    (4096, 4096, 128256),
    (8192, 4096, 128256),
    (8192, 2304, 256000),
    (16384, 2048, 248320),
    (32768, 4096, 32000),
)
QUICK = ((64, 32, 300),)
LOGITS = ((8192, 128256), (32768, 32000))
CONFIDENT = 0.005  # nats, mean loss of the trained-like scores


# --- operands --------------------------------------------------------------------------------------------------------


def operands(shape, device, confident: bool) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 x, W and targets; random scores of variance 1, or rows that are nearly sure of their targets."""
    rows, width, columns = shape
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, width, generator=random, device=device)
    w = torch.randn(columns, width, generator=random, device=device) * width**-0.5
    target = torch.randint(0, columns, (rows,), generator=random, device=device)
    if confident:  # s_target = a, the others are N(0, 1): mean loss about V e^{0.5 - a}
        a = torch.tensor(columns / CONFIDENT).log() + 0.5
        x += a * w[target] / w[target].square().sum(1, keepdim=True)
    return x.bfloat16().requires_grad_(), w.bfloat16().requires_grad_(), target


# --- contenders ------------------------------------------------------------------------------------------------------


def liger(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, w, target)


def cut(x: Tensor, w: Tensor, target: Tensor, impl: str = "cce") -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, w, target, impl=impl)


def quack(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, w, target)


PEERS = {
    "liger-kernel": ("liger_kernel", liger),
    "cut-cross-entropy": ("cut_cross_entropy", cut),
    "cut-cross-entropy, exact": ("cut_cross_entropy", partial(cut, impl="cce_exact")),
    "quack": ("quack", quack),
}


def our_ways(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Ours by default, and every backend and walk by name."""
    ways = {OURS: ours}
    for backend in backends.BACKENDS:
        if backend.why_not() is not None or not backend.supports(device, torch.bfloat16):
            continue
        if device.type != "cpu" and backend.name == "torch":
            continue

        def way(x, w, target, backend=backend, fused=False, **walk):
            with limited(backend, fuses_eager=fused):  # GEMM, then a pass; or statistics out of the product itself
                return ours(x, w, target, backend=backend.name, **walk)

        ways[f"{OURS}, {backend.name}, chunked"] = partial(way, schedule="eager")
        if backend.limits(device).fused_columns:
            ways[f"{OURS}, {backend.name}, chunked, one kernel"] = partial(way, schedule="eager", fused=True)
        ways[f"{OURS}, {backend.name}, streamed"] = partial(way, schedule="recompute")
    return ways


def linear_contenders(x, w, target, quick: bool) -> dict[str, Call]:
    floors = {"4096 rows": 4096, "unchunked": x.shape[0]}
    calls = {f"floor: GEMMs, {name}": floor(x, w, rows=rows) for name, rows in floors.items()}
    ways = our_ways(x.device) | {"torch, eager": eager, "torch, eager, fp32 logits": eager_fp32}
    if not quick:
        ways["torch.compile of eager"] = compiled(eager)
    if has_chunked():
        ways["torch, chunked"] = chunked
    ways |= {name: way for name, (module, way) in PEERS.items() if x.device.type == "cuda" and importable(module)}
    return calls | {name: step(way, x, w, target) for name, way in ways.items()}


def logits_contenders(logits: Tensor, target: Tensor, quick: bool) -> dict[str, Call]:
    """The device's copy bandwidth is the floor: one read and one write of the logits."""
    other = torch.empty_like(logits)

    def copy():
        other.copy_(logits.detach())
        return ()

    def call(loss):
        def run():
            value = loss(logits, target)
            return value.detach(), *torch.autograd.grad(value, logits)

        return run

    ways = {OURS: fl.cross_entropy, "torch, eager": F.cross_entropy}
    if not quick:
        ways["torch.compile of eager"] = torch.compile(F.cross_entropy, dynamic=False)
    return {"floor: copy": copy} | {name: call(way) for name, way in ways.items()}


def check_logits(logits: Tensor, target: Tensor, call: Call) -> None:
    value, gradient = call()
    picked = torch.arange(0, len(target), max(1, len(target) // 64), device=logits.device)
    z = logits.detach()[picked].double()
    p = torch.softmax(z, 1)
    p[torch.arange(len(picked), device=p.device), target[picked]] -= 1
    error = (gradient[picked].double() * len(target) - p).norm() / p.norm()
    assert error <= 2**-7, f"gradient of the logits: relative error {error:.3g}"
    assert value.isfinite(), "the loss is not finite"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds, no torch.compile")
    parser.add_argument("--rows", type=Path, help="append the rows to this CSV file; a PNG of the same name beside it")
    parser.add_argument("--shapes", type=int, nargs="*", help="only these of the linear shapes, by number")
    parser.add_argument("--contrastive", type=int, nargs="*", help="only these of the contrastive shapes, by number")
    parser.add_argument("--factored", type=int, nargs="*", help="only these of the factored shapes, by number")
    parser.add_argument("--sorting", type=int, nargs="*", help="only these of the sorted shapes, by number")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cpu" and backends.triton.interpreted():
        from interpreted import round_as_a_device  # of the tests

        round_as_a_device()
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"dry run on {device}"
    clock, rows = Clock(device), []
    shapes = QUICK if given.quick else SHAPES if given.shapes is None else [SHAPES[n] for n in given.shapes]
    for shape in shapes:
        for confident in (False, True):
            x, w, target = operands(shape, device, confident)
            calls = linear_contenders(x, w, target, given.quick)
            case = f"linear {shape_name(shape)}{', confident' if confident else ''}"
            about = machine, commit(), versions()
            check = partial(check_linear, x=x, w=w, target=target)
            rows += measure(case, calls, check, clock, about, given.quick)
            report(rows, given.rows)
            del x, w, target, calls, check
            if clock.cuda:
                torch.cuda.empty_cache()
    for shape in ((64, 300),) if given.quick else LOGITS:
        logits = torch.randn(*shape, device=device).bfloat16().requires_grad_()
        target = torch.randint(0, shape[1], shape[:1], device=device)
        calls = logits_contenders(logits, target, given.quick)
        about = machine, commit(), versions()
        rows += measure(
            f"logits {shape_name(shape)}", calls, partial(check_logits, logits, target), clock, about, given.quick
        )
        report(rows, given.rows)
    for case, calls, check in gpu_contrastive.cases(device, given.quick, given.contrastive):
        about = machine, commit(), versions()
        rows += measure(case, calls, check, clock, about, given.quick)
        report(rows, given.rows)
        del calls, check
        if clock.cuda:
            torch.cuda.empty_cache()
    fp32 = ((gpu_spherical, given.factored), (gpu_sorting, given.sorting))
    for case, calls, check in (each for module, only in fp32 for each in module.cases(device, given.quick, only)):
        about = machine, commit(), versions()
        rows += measure(case, calls, check, clock, about, given.quick, dtype="fp32")
        report(rows, given.rows)
        del calls, check
        if clock.cuda:
            torch.cuda.empty_cache()
    print(f"\n{machine}\n{versions()}\n\n{table(rows)}")
    if given.rows:
        plot(rows, given.rows.with_suffix(".png"))
    if failures:
        sys.exit("\n".join(["fusedloss failed:", *failures]))


if __name__ == "__main__":
    main()
