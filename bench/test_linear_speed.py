"""linear_cross_entropy, forward and backward, against the bare GEMMs and every way that PyTorch has."""

from functools import partial

import pytest
import torch
from cases import (
    CHUNKED_LIMIT,
    DTYPES,
    LARGE,
    QUICK,
    SHAPES,
    ZIPF,
    chunked_default,
    contenders,
    eager,
    floor,
    has_chunked,
    operands,
    ours,
    plan,
    shape_name,
    step,
    trained,
)
from harness import MIB, OURS, Comparison, alone, check_linear

dtypes = pytest.mark.parametrize("dtype", DTYPES)
FLOOR = "floor: three GEMMs"
TIGHT = 32 * MIB
FILTER = 2.0**-12


def comparison(case, shape, dtype, x, w, target, calls, **more):
    walk = more.pop("walk", {})
    layout = plan(x, w, **walk)
    check = partial(check_linear, calls[OURS], x, w, target)
    name = f"{case} {shape_name(shape)}"
    return Comparison(name, dtype, calls, check, layout.chunks, layout.accumulator_bytes, **more)


@pytest.mark.shapes(*SHAPES, *LARGE)
@dtypes
def test_linear_cross_entropy(compare, quick, shape, dtype):
    x, w, target = operands(shape, DTYPES[dtype])
    once = {}
    if shape in SHAPES + QUICK and has_chunked():
        once["torch, chunked, default"] = partial(alone, CHUNKED_LIMIT, chunked_default, shape, DTYPES[dtype])
    calls = contenders(x, w, target, compile=not quick)
    compare(comparison("linear", shape, dtype, x, w, target, calls, once=once))


@pytest.mark.shapes(*SHAPES)
@dtypes
def test_tight_budget(compare, shape, dtype):
    x, w, target = operands(shape, DTYPES[dtype])
    walk = {"memory_budget": TIGHT}
    calls = {FLOOR: floor(x, w), OURS: step(ours, x, w, target, **walk)}
    note = f"32 MiB: {plan(x, w, **walk).schedule} schedule"
    compare(comparison("32 MiB", shape, dtype, x, w, target, calls, walk=walk, note=note))


@pytest.mark.shapes(SHAPES[2])
@dtypes
def test_gradient_filter(compare, shape, dtype):
    """Trained-like scores; classes whose every |∂L/∂s| in a chunk of rows is below FILTER / N are left out."""
    x, w, target, loss = trained(shape, DTYPES[dtype])
    exact, filtered = step(ours, x, w, target), step(ours, x, w, target, gradient_filter=FILTER)
    check_linear(exact, x, w, target)
    note = f"mean loss {loss:.2f} nats, Zipf exponent {ZIPF}, class ids permuted, filter {FILTER:.3g}"
    calls = {FLOOR: floor(x, w), f"{OURS}, unfiltered": exact, OURS: filtered}

    def check():
        """Every entry of ∂L/∂s is off by at most FILTER / N."""
        (_, dx, dw), (_, truth_x, truth_w) = filtered(), exact()
        bound = FILTER / shape[0]
        rounding = 2 * torch.finfo(dx.dtype).eps
        off = bound * w.detach().double().abs().sum(0) + rounding * truth_x.double().abs()
        assert ((dx.double() - truth_x.double()).abs() <= off).all()
        off = bound * x.detach().double().abs().sum(0) + rounding * truth_w.double().abs()
        assert ((dw.double() - truth_w.double()).abs() <= off).all()

    layout = plan(x, w)
    name = f"filter {shape_name(shape)}"
    compare(Comparison(name, dtype, calls, check, layout.chunks, layout.accumulator_bytes, note=note))


@pytest.mark.shapes(SHAPES[0])
@dtypes
def test_ignored_rows(compare, shape, dtype):
    """90% of the rows ignored, beside none."""
    x, w, target = operands(shape, DTYPES[dtype])
    _, _, sparse = operands(shape, DTYPES[dtype], ignored=0.9)
    calls = {
        f"{OURS}, none ignored": step(ours, x, w, target),
        OURS: step(ours, x, w, sparse),
        "torch, eager": step(eager, x, w, sparse),
    }
    compare(comparison("90% ignored", shape, dtype, x, w, sparse, calls))


@pytest.mark.shapes(SHAPES[0])
@dtypes
def test_frozen_weight(compare, shape, dtype):
    x, w, target = operands(shape, DTYPES[dtype])
    w.requires_grad_(False)
    calls = {
        "floor: two GEMMs": floor(x, w, gemms=2),
        OURS: step(ours, x, w, target),
        "torch, eager": step(eager, x, w, target),
    }
    compare(comparison("frozen weight", shape, dtype, x, w, target, calls))


@pytest.mark.shapes(SHAPES[0])
@dtypes
def test_forward_only(compare, shape, dtype):
    x, w, target = operands(shape, DTYPES[dtype])

    def value(loss):
        def call():
            with torch.no_grad():
                return (loss(x, w, target),)

        return call

    calls = {"floor: one GEMM": floor(x, w, gemms=1), OURS: value(ours), "torch, eager": value(eager)}
    check = partial(check_linear, step(ours, x, w, target), x, w, target)
    compare(Comparison(f"forward only {shape_name(shape)}", dtype, calls, check))


@pytest.mark.shapes(SHAPES[0])
@dtypes
def test_reduction_none(compare, shape, dtype):
    """A loss per row, whose gradient needs a second computation of the scores (four GEMMs)."""
    x, w, target = operands(shape, DTYPES[dtype])
    per_row = partial(ours, reduction="none")

    def eager_rows(x, w, target):
        return torch.nn.functional.cross_entropy(x @ w.t(), target, reduction="none")

    calls = {FLOOR: floor(x, w), OURS: step(per_row, x, w, target), "torch, eager": step(eager_rows, x, w, target)}
    mean = step(lambda *operands: per_row(*operands).mean(), x, w, target)
    check = partial(check_linear, mean, x, w, target)
    compare(Comparison(f"reduction=none {shape_name(shape)}", dtype, calls, check))
