"""The operators: whole walks as opaque `torch.library` ops on plain tensors, and their autograd.

* ``fusedloss::statistics``       statistics of scores, of rows and of columns (forward of the recompute schedule)
* ``fusedloss::statistics_backward``
* ``fusedloss::eager_gradient``   the weighted sum of per-row losses, the losses, and the sum's gradients, in one walk

An op's first argument ``spec`` is a string that names everything static (`Spec`); the tensors follow. In eager mode
the ops run inside `torch.autograd.Function`s, which can hand stored gradients over without a copy and, for
``create_graph=True``, differentiate the plain PyTorch formula; under `torch.compile` their registered autograd is used.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import backends, symmetric
from .backends.tile import Across, Sums
from .memory import empty
from .plan import Plan, Walk, accumulation_dtype, waiting_dtype
from .schedule import Gradients, eager_sweep, gradient_sweep, keeps_exponentials, statistics_sweep
from .statistics import Count, Statistic, build, split
from .stream import Stream
from .trace import PROGRAMS
from .whole_rows import WholeRows, whole_row_sweep

DTYPES = {str(d): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Spec:
    """Everything about a call that is not a tensor."""

    statistics: tuple  # Statistic.static() of each
    softcap: float
    scale: float
    multiply: str  # the type in which x and W are multiplied (autocast), as str(dtype)
    walk: Walk
    program: str = ""  # key of a traced loss (eager_gradient only)
    symmetric: bool = False  # weight is x


@torch.compiler.assume_constant_result
def encode(
    statistics: tuple, softcap: float, scale: float, multiply: str, walk: tuple, program: str, symmetric: bool
) -> str:
    """The string that `decode` reads; a constant under torch.compile."""
    return repr((statistics, softcap, scale, multiply, walk, program, symmetric))


@lru_cache(maxsize=4096)
def decode(text: str) -> Spec:
    # Infinity has no literal in Python; a loss may well be called "info".
    statistics, softcap, scale, multiply, walk, program, same = ast.literal_eval(re.sub(r"\binf\b", "2e308", text))
    return Spec(statistics, softcap, scale, multiply, Walk(*walk), program, same)


STREAMS = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? class_scale, Tensor? class_shift, Tensor? scale, Tensor? keep"
)
GRADIENTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"  # of the first six, empty where not needed

# values, columns found, states: of rows, then of columns
torch.library.define(
    "fusedloss::statistics",
    f"(str spec, {STREAMS}, Tensor[] carried) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fusedloss::statistics_backward",
    f"(str spec, {STREAMS}, Tensor[] carried, Tensor states, Tensor grad, Tensor states_across, Tensor grad_across, "
    f"bool[] needs) -> ({GRADIENTS})",
)
torch.library.define(
    "fusedloss::eager_gradient",
    f"(str spec, {STREAMS}, Tensor row_factor, Tensor[] rows, Tensor[] shared, bool[] needs) -> (Tensor, Tensor, {GRADIENTS})",
)


# --- from op arguments to a stream -----------------------------------------------------------------------------------


def _operand(tensor: Tensor) -> Tensor:
    """A matrix that a GEMM can read: no stride of zero, one stride of one."""
    expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))
    return tensor.contiguous() if expanded or 1 not in tensor.stride() else tensor


def stream_of(spec: Spec, x, weight, bias, class_scale, class_shift, scale, keep) -> Stream:
    """The scores that a call is about, as the walks see them."""
    multiply = DTYPES[spec.multiply]
    kept = None
    if keep is not None and x.device.type == "cpu" and not keep.all():  # elsewhere it would wait for the device
        kept = keep.nonzero().squeeze(1)
    if weight is None and x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous()
    backend = backends.choose(x.device, multiply, spec.walk.backend)
    vectors = [
        None if v is None else v.detach().to(accumulation_dtype(multiply)).contiguous()
        for v in (bias, class_scale, class_shift)
    ]
    if scale is not None:
        in_memory = getattr(backend, "reads_scale", False)
        scale = scale.detach().to(x.device, accumulation_dtype(multiply)) if in_memory else scale.item()
    return Stream(
        _operand(x) if weight is not None else x,
        None if weight is None else _operand(weight.to(multiply)),
        *vectors,
        spec.softcap,
        spec.scale if scale is None else scale,
        kept,
        backend,
        spec.symmetric and kept is None,
    )


def _statistics(spec: Spec, carried: list[Tensor], kept: Tensor | None) -> list[Statistic]:
    tensors = list(carried)
    stats = [build(static, tensors) for static in spec.statistics]
    return stats if kept is None else [s.taking(kept) for s in stats]


def recompute_layout(stream: Stream, walk: Walk, across: bool = False) -> Plan:
    """The plan of a walk that computes every block again for the gradient."""
    if stream.weight is None:
        most = stream.backend.limits(stream.x.device).logits_bytes
        rows = max(1, min(stream.rows, most // max(1, stream.columns * stream.dtype.itemsize)))
        return Plan("logits", rows, -(-stream.rows // rows), max(1, stream.columns), 0, 0, 0)
    limits = stream.backend.limits(stream.x.device)
    if across:
        limits = replace(limits, recompute_bytes=limits.pair_bytes)
    return stream.plan(replace(walk, schedule="recompute"), limits=limits)


def _counting(keep: Tensor | None, values: Tensor) -> Tensor:
    """Values of rows, 0 where a row does not count. On a CPU those rows were never looked at."""
    if keep is None or values.device.type == "cpu":
        return values
    return torch.where(keep.reshape(-1, *[1] * (values.dim() - 1)), values, 0.0)


def _whole(stream: Stream, part: Tensor, rows: int) -> Tensor:
    """Row results of the kept rows, back among all rows; the others are 0."""
    if stream.kept is None:
        return part
    return part.new_zeros(rows, *part.shape[1:]).index_copy_(0, stream.kept, part)


# --- statistics and their gradient -----------------------------------------------------------------------------------


@torch.library.impl("fusedloss::statistics", "CompositeExplicitAutograd")
def _statistics_forward(text, x, weight, bias, class_scale, class_shift, scale, keep, carried):
    spec = decode(text)
    stream = stream_of(spec, x, weight, bias, class_scale, class_shift, scale, keep)
    stats, across = split(_statistics(spec, carried, stream.kept))
    if stream.symmetric:  # what a column has over its rows is what that row has over its columns
        both = symmetric.statistics_sweep(stream, [*stats, *across], spec.walk.memory_budget)
        states, below = both[: len(stats)], both[len(stats) :]
    else:
        states, below = statistics_sweep(stream, stats, recompute_layout(stream, spec.walk, bool(across)), across)
    values, columns, states = shown(stats, states, stream.rows, x.device)
    return (
        *(_whole(stream, t, x.shape[0]) for t in (_counting(keep, values), columns, states)),
        *shown(across, below, stream.columns, x.device),
    )


def shown(
    stats: Sequence[Statistic], states: Sequence[Tensor], count: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, columns found and states, each in one matrix."""
    found = [s.columns(state) for s, state in zip(stats, states) if hasattr(s, "k")]
    empty = torch.zeros(count, 0, dtype=torch.float64, device=device)
    return (
        torch.cat([s.value(state) for s, state in zip(stats, states)], 1) if stats else empty,
        torch.cat(found, 1) if found else empty.long(),
        torch.cat(states, 1) if stats else empty.clone(),
    )


def skeletons(spec: Spec, carried) -> list[Statistic]:
    tensors = list(carried)
    return [build(static, tensors) for static in spec.statistics]


@torch.library.register_fake("fusedloss::statistics")
def _statistics_fake(text, x, weight, bias, class_scale, class_shift, scale, keep, carried):
    spec = decode(text)
    stats, across = split(skeletons(spec, carried))
    columns = x.shape[1] if weight is None else weight.shape[0]
    return (*_shown_fake(x, stats, x.shape[0]), *_shown_fake(x, across, columns))


def _shown_fake(x, stats, count) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(count, sum(s.outputs for s in stats), dtype=torch.float64),
        x.new_empty(count, sum(s.k for s in stats if hasattr(s, "k")), dtype=torch.int64),
        x.new_empty(count, sum(s.width for s in stats), dtype=torch.float64),
    )


def _zeros(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _gradient_buffers(stream: Stream, x, weight, needs, waiting: bool = False) -> tuple[Gradients, list[Tensor]]:
    """Buffers to fill and, in the order of the op's outputs, the gradients they become; `waiting` as in `_finished`."""
    wide = accumulation_dtype(stream.dtype)
    fresh = _zeros if stream.rows == 0 else empty
    rows = _zeros if stream.kept is not None else fresh
    dx = rows(x.shape, x.dtype if weight is None and not waiting else waiting_dtype(x.dtype), x.device) if needs[0] else None
    dw = fresh(weight.shape, waiting_dtype(weight.dtype), x.device) if weight is not None and needs[1] else None
    vectors = [torch.zeros(stream.columns, dtype=wide, device=x.device) if n else None for n in needs[2:5]]
    total = torch.zeros((), dtype=torch.float64, device=x.device) if needs[5] else None
    return Gradients(dx, dw, Sums(*vectors, total)), [dx, dw, *vectors, total]


def _peak(stream: Stream, factors: Tensor) -> Tensor | None:
    """In float16 score gradients of a mean over 10^4 rows underflow: they are formed relative to the largest factor."""
    if stream.dtype != torch.float16 or stream.weight is None or factors.numel() == 0:
        return None
    peak = factors.abs().max()
    return torch.where((peak == 0) | ~peak.isfinite(), 1.0, peak)


def _rescale(gradients: list[Tensor | None], peak: Tensor | None) -> None:
    for gradient in gradients:
        if peak is not None and gradient is not None:
            gradient.mul_(peak)


def _finished(found: list[Tensor | None], like: list[Tensor | None], waiting: bool) -> tuple[Tensor, ...]:
    """The op's outputs: an empty tensor for what was not asked; float16 ones still in fp32 when they are `waiting`."""
    out = []
    for gradient, source in zip(found, like):
        if gradient is None:
            out.append(torch.empty(0, dtype=torch.float32, device=like[0].device))
        else:
            out.append(gradient.to(waiting_dtype(source.dtype) if waiting else source.dtype))
    return tuple(out)


def _finished_fakes(needs, like: list[Tensor | None], waiting: bool) -> tuple[Tensor, ...]:
    out = []
    for need, source in zip(needs, like):
        if not need:
            out.append(like[0].new_empty(0, dtype=torch.float32))
        else:
            dtype = waiting_dtype(source.dtype) if waiting else source.dtype
            out.append(torch.empty_like(source, dtype=dtype, memory_format=torch.contiguous_format))
    return tuple(out)


@torch.library.impl("fusedloss::statistics_backward", "CompositeExplicitAutograd")
def _statistics_backward(
    text, x, weight, bias, class_scale, class_shift, scale, keep, carried, states, grad, states_across, grad_across, needs
):
    spec = decode(text)
    stream = stream_of(spec, x, weight, bias, class_scale, class_shift, scale, keep)
    stats, below = split(_statistics(spec, carried, stream.kept))
    take = (lambda t: t) if stream.kept is None else (lambda t: t.index_select(0, stream.kept))
    states, grad = parted(stats, take(states), take(_counting(keep, grad)))
    states_across, grad_across = parted(below, states_across, grad_across)
    into, found = _gradient_buffers(stream, x, weight, needs)
    fill_gradients(stream, spec.walk, Across(stats, states, grad), Across(below, states_across, grad_across), into, found)
    return _finished(found, [x, weight, bias, class_scale, class_shift, scale], waiting=False)


def fill_gradients(
    stream: Stream, walk: Walk, rows: Across, columns: Across, into: Gradients, found: list[Tensor | None]
) -> None:
    """Fill `into`, whose buffers are `found`, from the coefficients of rows and of columns."""
    sides = [pair for side in (rows, columns) for pair in zip(side.stats, side.coefficients)]
    heard = [c.reshape(-1) for s, c in sides if not isinstance(s, Count)]  # a count has no derivative
    peak = _peak(stream, torch.cat(heard)) if heard else None
    if peak is not None:
        rows, columns = [replace(c, coefficients=[g / peak for g in c.coefficients]) for c in (rows, columns)]
    if stream.symmetric:
        both = [*rows.stats, *columns.stats], [*rows.states, *columns.states], [*rows.coefficients, *columns.coefficients]
        symmetric.gradient_sweep(stream, *both, into, walk.memory_budget)
    else:
        across = columns if columns.stats else None
        layout = recompute_layout(stream, walk, across is not None)
        gradient_sweep(stream, rows.stats, rows.states, rows.coefficients, into, layout, across)
    _rescale(found, peak)


def parted(stats: Sequence[Statistic], states: Tensor, grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The states and gradients of each statistic."""
    if not stats:
        return [], []
    parts = states.split([s.width for s in stats], 1), grad.split([s.outputs for s in stats], 1)
    return [t.contiguous() for t in parts[0]], [t.contiguous() for t in parts[1]]


@torch.library.register_fake("fusedloss::statistics_backward")
def _statistics_backward_fake(
    text, x, weight, bias, class_scale, class_shift, scale, keep, carried, states, grad, states_across, grad_across, needs
):
    return _finished_fakes(needs, [x, weight, bias, class_scale, class_shift, scale], waiting=False)


# --- losses that separate over rows: everything in one walk -----------------------------------------------------------


@torch.library.impl("fusedloss::eager_gradient", "CompositeExplicitAutograd")
def _eager_gradient(text, x, weight, bias, class_scale, class_shift, scale, keep, row_factor, rows, shared, needs):
    spec = decode(text)
    program = PROGRAMS[spec.program]
    stream = stream_of(spec, x, weight, bias, class_scale, class_shift, scale, keep)
    kept_rows = [stream.take(t, slice(None)) for t in rows] if stream.kept is not None else list(rows)
    factor = stream.take(row_factor, slice(None)) if stream.kept is not None else row_factor
    into, found = _gradient_buffers(stream, x, weight, needs, waiting=True)
    peak = _peak(stream, factor)
    lifted = factor if peak is None else factor / peak
    dtype = accumulation_dtype(stream.dtype)
    losses = torch.empty(stream.rows, dtype=dtype, device=x.device)
    gradient_dtype = None if weight is None else weight.dtype
    walk = _walk_whole_rows if isinstance(program, WholeRows) else _walk_statistics
    walk(program, stream, spec.walk, keep, kept_rows, shared, lifted, losses, into, gradient_dtype)
    _rescale(found, peak)
    total = (losses.double() * factor).sum().to(dtype)
    gradients = _finished(found, [x, weight, bias, class_scale, class_shift, scale], waiting=True)
    return total, _whole(stream, losses, x.shape[0]), *gradients


def _walk_statistics(program, stream, walk, keep, rows, shared, factor, losses, into, gradient_dtype) -> None:
    """Fill losses and gradients of a loss on statistics."""
    stats = program.statistics(rows, shared)

    def step(chunk: slice, states: list[Tensor]) -> list[Tensor]:
        values = [s.value(state) for s, state in zip(stats, states)]
        columns = [s.columns(state) if hasattr(s, "k") else None for s, state in zip(stats, states)]
        mine = [t[chunk] for t in rows]
        found, coefficients = program.step(values, columns, mine, shared, factor[chunk].double())
        counts = None if keep is None else keep[chunk]
        losses[chunk] = _counting(counts, found)
        return [_counting(counts, c) for c in coefficients]

    exponentials = keeps_exponentials(stream, stats, into.sums)
    layout = stream.plan(walk, exponentials, gradient_dtype, stream.fuses(stats))
    if program.linear and stream.weight is not None and walk.schedule == "auto" and not walk.gradient_filter:
        states = [s.identity(stream.rows, stream.x.device) for s in stats]
        coefficients = step(slice(0, stream.rows), states)  # of a linear loss: whatever the states are
        layout = recompute_layout(stream, walk, across=True)
        gradient_sweep(stream, stats, states, coefficients, into, layout, visit=True)
        step(slice(0, stream.rows), states)
    elif layout.schedule == "eager":
        largest = factor.abs().max().item() if stream.rows and walk.gradient_filter else 0.0
        eager_sweep(stream, stats, step, into, layout, walk.gradient_filter * largest)
    else:
        states, _ = statistics_sweep(stream, stats, layout)
        gradient_sweep(stream, stats, states, step(slice(0, stream.rows), states), into, layout)


def _walk_whole_rows(program, stream, walk, keep, rows, shared, factor, losses, into, gradient_dtype) -> None:
    """The same of a loss on whole rows."""

    def step(chunk: slice, z: Tensor, out: Tensor | None) -> None:
        found = program.step(z, [t[chunk] for t in rows], factor[chunk], out, stream.backend.name)
        losses[chunk] = _counting(None if keep is None else keep[chunk], found)

    whole_row_sweep(stream, step, into, walk, gradient_dtype)


@torch.library.register_fake("fusedloss::eager_gradient")
def _eager_gradient_fake(text, x, weight, bias, class_scale, class_shift, scale, keep, row_factor, rows, shared, needs):
    spec = decode(text)
    losses = x.new_empty(x.shape[0], dtype=accumulation_dtype(DTYPES[spec.multiply]))
    return (
        losses.new_empty(()),
        losses,
        *_finished_fakes(needs, [x, weight, bias, class_scale, class_shift, scale], waiting=True),
    )


# --- their losses row by row, where the gradient has to wait for what each row counts: two walks ----------------------

torch.library.define("fusedloss::row_losses", f"(str spec, {STREAMS}, Tensor[] rows) -> Tensor")


@torch.library.impl("fusedloss::row_losses", "CompositeExplicitAutograd")
def _row_losses(text, x, weight, bias, class_scale, class_shift, scale, keep, rows):
    factor = torch.ones(x.shape[0], device=x.device)
    given = text, x, weight, bias, class_scale, class_shift, scale, keep, factor, rows, []
    return torch.ops.fusedloss.eager_gradient(*given, [False] * 6)[1]


@torch.library.register_fake("fusedloss::row_losses")
def _row_losses_fake(text, x, weight, bias, class_scale, class_shift, scale, keep, rows):
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(DTYPES[decode(text).multiply]))
