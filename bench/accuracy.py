"""How far each way is from float64 truth: writes the table of docs/numerics.md.

python bench/accuracy.py            # writes it
python bench/accuracy.py --print    # shows it
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from cases import has_chunked  # noqa: E402
from report import replace_section  # noqa: E402
from tolerance import error, targets_mask  # noqa: E402
from torch import Tensor  # noqa: E402

import fusedloss as fl  # noqa: E402

PAGE = ROOT / "docs" / "numerics.md"
ROWS, WIDTH, COLUMNS = 512, 64, 4096
CHUNKED_ROWS = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIDENT_LOSS = 0.02


def operands(regime: str) -> tuple[Tensor, Tensor, Tensor]:
    """float64 x, W and targets; loss about log V, about CONFIDENT_LOSS, or with scores of 1e3 to 1e4."""
    torch.manual_seed(0)
    x, w = torch.randn(ROWS, WIDTH).double(), torch.randn(COLUMNS, WIDTH).double() * WIDTH**-0.5
    target = torch.randint(0, COLUMNS, (ROWS,))
    if regime == "uniform":
        return 0.1 * x, w, target
    if regime == "huge":
        return 3e3 * x, w, target
    low, high = 0.0, 100.0
    for _ in range(30):
        a = (low + high) / 2
        loss = F.cross_entropy((a * w[target]) @ w.t(), target)
        low, high = (a, high) if loss > CONFIDENT_LOSS else (low, a)
    return a * w[target], w, target


def linear(logits_of, x: Tensor, w: Tensor, target: Tensor):
    """Summed loss, dX and dW of a way to get from x, W and targets to a loss."""
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    loss = logits_of(x, w, target)
    return (loss, *torch.autograd.grad(loss, (x, w)))


def dense(x, w, target):
    return F.cross_entropy(x @ w.t(), target, reduction="sum")


def dense_fp32(x, w, target):
    return F.cross_entropy((x @ w.t()).float(), target, reduction="sum")


def torch_chunked(x, w, target):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNKED_ROWS)
    return F.linear_cross_entropy(x, w, target, reduction="sum", options=options)


def ours(x, w, target):
    walk = {"memory_budget": CHUNKED_ROWS * COLUMNS * w.dtype.itemsize, "schedule": "eager"}
    return fl.linear_cross_entropy(x, w, target, reduction="sum", **walk)


def on_logits(loss):
    """The gradient with respect to given logits."""

    def gradient(logits, target):
        logits = logits.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(logits, target), logits)[0]

    return gradient


WAYS = {
    "fusedloss": (ours, lambda s, y: fl.cross_entropy(s, y, reduction="sum")),
    "eager": (dense, lambda s, y: F.cross_entropy(s, y, reduction="sum")),
    "eager, fp32 logits": (dense_fp32, lambda s, y: F.cross_entropy(s.float(), y, reduction="sum")),
}
if has_chunked():
    WAYS["torch, chunked"] = torch_chunked, None


def measured():
    """(regime, mean loss, type, way, errors) of every line."""
    for regime in ("uniform", "confident", "huge"):
        for name, dtype in DTYPES.items():
            *matrices, target = operands(regime)
            x, w = (t.to(dtype) for t in matrices)
            exact = linear(dense, x.double(), w.double(), target)
            scores = (x.double() @ w.double().t()).to(dtype)
            exact_scores = on_logits(WAYS["eager"][1])(scores.double(), target)
            hit = torch.zeros(COLUMNS, dtype=torch.bool).index_fill_(0, target, True)
            at = targets_mask(target, scores)
            mean = exact[0].item() / ROWS
            for way, (loss, logits_loss) in WAYS.items():
                if way == "eager, fp32 logits" and dtype == torch.float32:
                    continue  # the same as eager
                got = linear(loss, x, w, target)
                errors = [error(got[0], exact[0]), error(got[1], exact[1])]
                errors += [error(got[2], exact[2], where) for where in (hit, ~hit)]
                if logits_loss is None:
                    errors += [None, None]
                else:
                    found = on_logits(logits_loss)(scores, target)
                    errors += [error(found, exact_scores, where) for where in (at, ~at)]
                yield regime, mean, name, way, errors


def table() -> str:
    head = "| scores | type | way | loss | dX | dW, hit | dW, other | ∂s, target | ∂s, other |"
    lines = [head, "|---|---|---|" + "---:|" * 6]
    for regime, mean, dtype, way, errors in measured():
        shown = " | ".join("" if e is None else f"{e:.1e}" for e in errors)
        lines.append(f"| {regime}, loss {mean:.3g} | {dtype} | {way} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(2)
    text = table()
    if "--print" in sys.argv[1:]:
        print(text)
        return
    replace_section(PAGE, "accuracy", text)


if __name__ == "__main__":
    main()
