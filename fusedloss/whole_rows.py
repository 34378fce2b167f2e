"""The walk of losses whose rows are looked at whole: no summary of a row that is small and can be merged will do.

Of a chunk of rows all scores are there at once, in one tile within the memory budget, which becomes its own gradient:
three GEMMs, as in `schedule.eager_sweep`. The chunk has at least one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .memory import workspace
from .plan import Walk, accumulation_dtype, spans
from .schedule import Gradients, _add_to_weight, _part_classes
from .statistics import Sum
from .stream import Stream, narrowed


@dataclass(frozen=True)
class WholeRows:
    """A row loss on whole rows, in the place of a `trace.Program`."""

    on_dense: Callable  # (z, *rows) -> (n,) losses, differentiable as often as wanted
    # (z, rows, factor, out, backend's name) -> (n,) losses; out = factor ∂loss/∂z, in z's memory or elsewhere, or None
    step: Callable

    def call(self, scores: object, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        return self.on_dense(scores.z, *rows)


def whole_row_sweep(
    stream: Stream, step: Callable[[slice, Tensor, Tensor | None], None], into: Gradients, walk: Walk, gradient_dtype
) -> None:
    """Chunk by chunk ``step(rows, z, out)`` on scores z, and the gradients from what it leaves in `out`."""
    wide, narrow, sums = accumulation_dtype(stream.dtype), stream.dtype, into.sums
    given, width, columns = stream.weight is None, stream.x.shape[1], slice(0, stream.columns)
    summed = any(s is not None for s in (sums.bias, sums.class_scale, sums.class_shift, sums.scale))
    wanted = into.x is not None or into.weight is not None or summed
    scaled = bool(stream.softcap) or stream.class_scale is not None or not _is_one(stream.scale)
    apart = wanted and (scaled or summed)  # scores become a gradient in one place, stay in another for what made them
    limits = stream.backend.limits(stream.x.device)
    budget = (limits.budget if walk.memory_budget is None else walk.memory_budget) // (2 if apart else 1)
    layout = stream.plan(replace(walk, schedule="eager", memory_budget=budget), False, gradient_dtype)
    if given:
        budget = limits.logits_bytes if walk.memory_budget is None else budget
        layout = replace(layout, chunk_rows=max(1, budget // max(1, stream.columns * wide.itemsize)))
    direct = into.x is not None and stream.kept is None and (given or into.x.dtype == wide)
    accumulates = into.weight is not None and layout.accumulator_bytes > 0
    rounds = into.weight is not None and into.weight.dtype != wide and not accumulates
    rooms = [
        ((0 if given else layout.chunk_rows, stream.columns), wide),
        ((layout.chunk_rows if into.x is not None and not direct and not given else 0, width), wide),
        (into.weight.shape if accumulates else (0,), wide),
        ((_part_classes(layout, width) if rounds else 0, width), wide),
    ]
    with workspace(stream.x.device, *rooms) as (buffer, dx, accumulator, part):
        dw = accumulator if accumulates else into.weight
        for rows in spans(stream.rows, layout.chunk_rows):
            x, count = stream.input(rows), rows.stop - rows.start
            raw = x if given else buffer[:count]
            if given:
                here = None if into.x is None else into.x[rows] if direct else torch.empty_like(x, dtype=into.x.dtype)
                out, tile = here, stream.tile(raw, columns, rows.start)
            else:
                here = None if into.x is None else into.x[rows] if direct else dx[:count]
                out, tile = narrowed(raw, columns, narrow), stream.compute(raw, x, columns, rows.start)
            z = raw if not scaled and tile.bias is None and tile.class_shift is None else tile.scores()
            step(rows, z, z if apart else out if wanted else None)
            if apart:
                out = torch.empty_like(raw) if out is None else out
                slopes = Sum(z)  # its derivative in a score: what stands there
                ones = torch.ones(count, 1, dtype=torch.float64, device=z.device)
                stream.backend.gradient(tile, out, [slopes], [slopes.identity(count, z.device)], [ones], sums)
            if not given and here is not None:
                stream.backend.gemm(here, out, stream.weight, accumulate=False)
            if dw is not None and dw.numel():
                _add_to_weight(stream, dw, out, x, None, part, rows.start == 0, None)
            if here is not None and not direct:
                stream.put(into.x, rows, here)
        if dw is not into.weight:
            into.weight.copy_(dw)


def _is_one(scale: float | Tensor) -> bool:
    return not isinstance(scale, Tensor) and scale == 1.0
