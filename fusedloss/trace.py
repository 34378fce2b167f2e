"""From a loss on statistics to a program that an op can run on a chunk of rows.

Inside an op neither autograd nor `torch.func` works under `torch.compile`, so loss and derivative are traced once,
outside, by `make_fx` of `torch.func.grad_and_value`, with a symbolic number of rows. A program is found by its key,
a string, because an op's arguments can hold no function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .checks import fixed
from .statistics import Columns, Statistic, build

FUNCTIONS: dict[str, Callable] = {}  # row losses by unique name
PROGRAMS: dict[str, Program | type | None] = {}


class _Recorded(Exception):
    def __init__(self, stats: Sequence[Statistic]):
        self.stats = stats


class Recorder:
    """Stands in for `Scores` while a loss is traced: it notes what is asked for, or plays given values back."""

    def __init__(self, columns: int | None, values: Sequence[Tensor] | None = None, found: Sequence[Tensor | None] = ()):
        self._columns = columns
        self._values, self._found, self._reduced = values, found, False

    @property
    def columns(self) -> int:
        if self._columns is None:
            raise OfColumns
        return self._columns

    def reduce(self, *stats: Statistic) -> object:
        if self._values is None:
            raise _Recorded(stats)
        if self._reduced:
            raise TwoStages
        self._reduced = True
        shown = [s.present(v, c) for s, v, c in zip(stats, self._values, self._found)]
        return shown[0] if len(shown) == 1 else shown


class OfColumns(Exception):
    """The loss depends on the number of columns: it is traced for each."""


class TwoStages(Exception):
    """The loss reduces twice: its second pass needs values of the first, so it cannot be done in one eager walk."""


@dataclass(frozen=True)
class Program:
    """A row loss and its derivative, ready to run on chunks."""

    function: Callable
    names: tuple[str, ...]  # of the shared tensors
    options: tuple[tuple[str, object], ...]
    static: tuple  # of the statistics
    prepare: Callable  # (rows, shared) -> the statistics' tensors
    run: Callable  # (values, found columns, rows, shared, factor) -> losses, coefficients
    linear: bool  # in its values: the coefficients are known before the first pass, and one pass does it all

    def call(self, scores: object, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        return self.function(scores, *rows, **dict(zip(self.names, shared)), **dict(self.options))

    def statistics(self, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> list[Statistic]:
        tensors = list(self.prepare(list(rows), list(shared)))
        return [build(static, tensors) for static in self.static]

    def step(self, values, found, rows, shared, factor) -> tuple[Tensor, list[Tensor]]:
        """Losses of a chunk and ∂(Σ factor · loss)/∂value of every statistic."""
        return self.run(values, found, rows, list(shared), factor)


def _example(kind: tuple[str, tuple[int, ...]], rows: int | None, device: str) -> Tensor:
    """A tensor of the described type; the content is never looked at, so ones do."""
    dtype, shape = kind
    shape = shape if rows is None else (rows, *shape)
    return torch.ones(shape, dtype=getattr(torch, dtype), device=device)


@contextmanager
def _without_saved_tensor_hooks() -> Iterator[None]:
    """Set aside the caller's (a checkpoint's, say): `torch.func` refuses to work among them."""
    hooks, taken = torch._C._autograd, []
    while (top := hooks._top_saved_tensors_default_hooks(False)) is not None:
        taken.append(top)
        hooks._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in reversed(taken):
            hooks._push_saved_tensors_default_hooks(*pair)


COLUMNS = -1  # in the place of a length: as many as there are columns


def find(
    name: str, scores: object, rows: Sequence[Tensor], shared: dict[str, Tensor], options: dict[str, object], dtype: str
) -> str:
    """Where in PROGRAMS the loss `name` stands, traced for such arguments; "" when it takes two stages, or columns.

    One program serves any number of columns, unless the loss depends on it.
    """
    known = tuple([(k, fixed(v)) for k, v in options.items()])
    kinds = tuple([_kind(t.dtype, t.shape[1:], None) for t in rows])

    def key(alike: int | None, columns: int | None) -> str | None:
        shared_kinds = tuple([_kind(t.dtype, t.shape, alike) for t in shared.values()])
        device = str(scores.input.device)
        return program_key(name, tuple(shared), known, kinds, shared_kinds, columns, dtype, device)

    found = key(scores.columns, None)
    return key(None, fixed(scores.columns)) if found is None else found


def _kind(dtype: torch.dtype, shape: Sequence[int], columns: int | None) -> tuple[str, tuple[int, ...]]:
    """Type and lengths of a tensor; COLUMNS stands for a length of so many."""
    return str(dtype)[6:], tuple([COLUMNS if d == columns and d > 1 else fixed(d) for d in shape])


@torch.compiler.assume_constant_result
def program_key(
    name: str, names: tuple, options: tuple, rows: tuple, shared: tuple, columns: int | None, dtype: str, device: str
) -> str | None:
    """Trace the loss `name` for these options and kinds of arguments, once, and say where it is in PROGRAMS.

    "" when it takes two stages, or columns. `columns` None: for any number of them; None when the loss depends on it.
    """
    key = repr((name, names, options, rows, shared, columns, dtype, device))
    if key not in PROGRAMS:
        try:
            with torch.enable_grad(), _without_saved_tensor_hooks():
                PROGRAMS[key] = _trace(
                    FUNCTIONS[name], names, options, rows, shared, columns, getattr(torch, dtype), device
                )
        except Exception:
            if columns is not None:
                raise
            PROGRAMS[key] = OfColumns  # or a length that is that of the columns by chance: the number itself will tell
    if PROGRAMS[key] is OfColumns:
        return None
    return "" if PROGRAMS[key] is None else key


def _row_count(lengths: set[int]) -> int:
    """Rows to trace with. The trace is symbolic in them; equal lengths would be one symbol, so it equals no other."""
    return next(n for n in range(7, 8 + len(lengths)) if n not in lengths)


def _trace(function, names, options, rows, shared, columns, dtype, device) -> Program | None:
    lengths = {columns, *(length for _, shape in (*rows, *shared) for length in shape)}
    if columns is None:  # a length like no other, so that it has a symbol of its own
        length = max(31, 1 + max(filter(None, lengths), default=0))
        shared = [(kind, tuple(length if d == COLUMNS else d for d in shape)) for kind, shape in shared]
        lengths.add(length)
    row_examples = [_example(kind, _row_count(lengths), device) for kind in rows]
    shared_examples = [_example(kind, None, device) for kind in shared]

    def call(scores, row_tensors, shared_tensors):
        return function(scores, *row_tensors, **dict(zip(names, shared_tensors)), **dict(options))

    recorded: list[Sequence[Statistic]] = []

    def prepare(row_tensors, shared_tensors):
        try:
            call(Recorder(columns), row_tensors, shared_tensors)
        except _Recorded as asked:
            recorded.append(asked.stats)
            return [t for s in asked.stats for _, _, t in s.tensors()]
        raise TypeError(f"{function.__name__}: a row loss must call scores.reduce(...)")

    def run(values, found, row_tensors, shared_tensors, factor):
        def total(values):
            losses = call(Recorder(columns, values, found), row_tensors, shared_tensors).to(factor.dtype)
            return (losses * factor).sum(), losses

        gradients, (_, losses) = torch.func.grad_and_value(total, has_aux=True)(values)
        return losses, gradients

    prepared = make_fx(prepare, tracing_mode="symbolic")(row_examples, shared_examples)
    stats = recorded[0]
    if any(isinstance(s, Columns) for s in stats):  # a column is whole only when all chunks of rows have been seen
        return None
    count = _row_count({*lengths, *(int(s.outputs) for s in stats)})
    row_examples = [_example(kind, count, device) for kind in rows]
    values = [torch.ones(count, int(s.outputs), dtype=dtype, device=device) for s in stats]
    found = [torch.ones(count, s.k, dtype=torch.int64, device=device) if hasattr(s, "k") else None for s in stats]
    try:
        factor = torch.ones(count, dtype=dtype, device=device)
        ran = make_fx(run, tracing_mode="symbolic")(values, found, row_examples, shared_examples, factor)
    except TwoStages:
        return None
    if columns is None and (prepared.shape_env.guards or ran.shape_env.guards):  # it looked at some length
        raise OfColumns
    ran.graph.eliminate_dead_code()
    ran.recompile()
    static = tuple(s.static() for s in stats)
    linear = all(s.stateless for s in stats) and not _uses(ran.graph, len(values))
    return Program(function, names, options, static, prepared, ran, linear)


_SHAPE_ONLY = ("sym_size", "ones_like", "zeros_like", "new_ones", "new_zeros", "full_like", "new_full", "new_empty_strided")


def _uses(graph: torch.fx.Graph, inputs: int) -> bool:
    """Whether the coefficients, all outputs but the first (the losses), are computed from what the first `inputs` inputs
    hold; their shapes do not count."""
    values = {node for node, _ in zip((n for n in graph.nodes if n.op == "placeholder"), range(inputs))}
    (output,) = [node for node in graph.nodes if node.op == "output"]
    waiting, seen = [n for n in output.all_input_nodes if n is not output.args[0][0]], set()
    while waiting:
        node = waiting.pop()
        if node in values:
            return True
        if node not in seen and not any(name in str(node.target) for name in _SHAPE_ONLY):
            seen.add(node)
            waiting += node.all_input_nodes
    return False
