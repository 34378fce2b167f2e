"""Scores: the rows × classes matrix, held as what makes it and never as itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import autograd
from .backends import choose
from .backends.tile import Tile
from .checks import expect, fixed
from .dense import DenseScores, dense_scores
from .plan import Plan, Walk, plan
from .relation import IDS, MATRIX, ROWS
from .statistics import Columns, Statistic


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """The one input type of every loss.

    s_ij = class_scale_j · scale · cap(x_i · w_j + bias_j) + class_shift_j,   cap(t) = softcap · tanh(t / softcap)

    or, when ``weight`` is None, the same with given logits in place of x_i · w_j. Every step may be left out.
    Make one with `linear_scores`, `logits_scores` or `similarity_scores`.
    """

    input: Tensor  # (*leading, D), or logits (*leading, V)
    weight: Tensor | None = None  # (V, D)
    bias: Tensor | None = None  # (V,)
    class_scale: Tensor | None = None  # (V,)
    class_shift: Tensor | None = None  # (V,)
    softcap: float = 0.0
    scale: float | Tensor = 1.0
    walk: Walk = field(default_factory=Walk)
    keep: Tensor | None = None  # (N,) bool: rows that count
    symmetric: bool = False  # weight is input: s_ij = s_ji, and half of them are computed

    def __repr__(self) -> str:
        kind = "logits" if self.weight is None else f"{self.weight.shape[0]} columns"
        return f"Scores(input={tuple(self.input.shape)} {self.input.dtype}, {kind})"

    @property
    def columns(self) -> int:
        """Number of classes V."""
        return self.input.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows N."""
        return self.leading.numel()

    def diagonal(self) -> Tensor:
        """(N,) the column that belongs to each row where x_i and y_i are a pair; of x with itself, the row's own column."""
        return torch.arange(self.rows, device=self.input.device)

    def of_columns(self, values: Tensor) -> Tensor:
        """(M, …) values of all columns, given those of the columns that are here: labels, for a relation."""
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean of values of all rows, or of all columns, given those that are here; 0 for none."""
        return values.sum() / max(1, values.numel())

    def total(self, values: Tensor) -> Tensor:
        """Sum of values of all rows, given those that are here."""
        return values.sum()

    @property
    def separable(self) -> bool:
        """Whether losses of some rows and their gradients can be had without looking at the other rows."""
        return self.weight is not None and not self.symmetric

    @property
    def leading(self) -> torch.Size:
        return self.input.shape[:-1]

    @property
    def multiply_dtype(self) -> torch.dtype:
        """The type in which x and W are multiplied: autocast's where it is on."""
        if self.weight is None:
            return self.input.dtype
        kind = self.input.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Type of losses: float64 for float64 scores, float32 for all others."""
        return torch.float64 if self.multiply_dtype == torch.float64 else torch.float32

    def streams(self) -> tuple[Tensor | None, ...]:
        """The tensors that gradients may flow into, in the ops' order."""
        flat = self.input.reshape(self.leading.numel(), self.input.shape[-1])
        scale = self.scale if isinstance(self.scale, Tensor) else None
        weight = flat.detach() if self.symmetric else self.weight  # all of the gradient flows into x
        return (flat, weight, self.bias, self.class_scale, self.class_shift, scale)

    def spec(self, statistics: tuple, program: str = "") -> str:
        scale = 1.0 if isinstance(self.scale, Tensor) else self.scale
        walk = self.walk
        budget = None if walk.memory_budget is None else fixed(walk.memory_budget)
        options = (budget, walk.schedule, fixed(walk.gradient_filter), walk.backend)
        return autograd.encode(
            statistics, fixed(self.softcap), fixed(scale), str(self.multiply_dtype), options, program, self.symmetric
        )

    def keeping(self, keep: Tensor | None) -> Scores:
        """The same scores where only some rows count; the others cost nothing."""
        return replace(self, keep=keep, symmetric=self.symmetric and keep is None)

    def adjusted(self, class_scale: Tensor | None = None, class_shift: Tensor | None = None) -> Scores:
        """Scores with class_scale_j · s_ij + class_shift_j in place of s_ij."""
        old_scale, old_shift = self.class_scale, self.class_shift
        if class_scale is not None:
            old_shift = None if old_shift is None else old_shift * class_scale
            old_scale = class_scale if old_scale is None else old_scale * class_scale
        if class_shift is not None:
            old_shift = class_shift if old_shift is None else old_shift + class_shift
        return replace(self, class_scale=old_scale, class_shift=old_shift, symmetric=False)

    def at_columns(self, columns: Tensor) -> Scores:
        """Scores of the classes ``columns`` (k,) only, in that order; the others are not computed."""
        names = ("weight", "bias", "class_scale", "class_shift")
        vectors = {name: getattr(self, name) for name in names}
        picked = {name: None if v is None else v.index_select(0, columns) for name, v in vectors.items()}
        input = self.input.index_select(-1, columns) if self.weight is None else self.input
        return replace(self, input=input, symmetric=False, **picked)

    def reduce(self, *statistics: Statistic) -> object:
        """Statistics of every row, differentiable, in one pass over the scores.

        Returns one value for one statistic, else a list in order: (N,) tensors, (N, k) where a statistic has k values
        per row, (value, column) for `Max`, `Min` and `TopK`; of a `Columns` the same with V in place of N. They are
        float64, whatever the scores are. Rows that do not count (`keep`) get 0. Backward computes the scores a second
        time.
        """
        self.check_statistics(statistics)
        trained = [t for s in statistics for name, _, t in s.tensors() if name in ("weights", "values") and t.requires_grad]
        if trained and torch.is_grad_enabled():
            if self.keep is None:
                return self.dense().reduce(*statistics)
            raise ValueError("Scores.reduce: statistics: expected constant weights where rows are left out (ignore_index)")
        if self.keep is not None and any(isinstance(s, Columns) for s in statistics):
            raise ValueError("Scores.reduce: statistics: expected no Columns where rows are left out (ignore_index)")
        given = self.reduced(statistics)
        rows, across = _Taken(*given[:3]), _Taken(*given[3:])
        shown = [(across if isinstance(s, Columns) else rows).next(s) for s in statistics]
        return shown[0] if len(shown) == 1 else shown

    def reduced(self, statistics: Sequence[Statistic]) -> tuple[Tensor, ...]:
        """What `reduce` shows, still in matrices: values, columns found and states of rows, then of columns."""
        carried = [
            t if name == "row" and t.requires_grad else t.detach()  # thresholds and the like are constants
            for s in statistics
            for name, _, t in s.tensors()
        ]
        text = self.spec(tuple([s.static() for s in statistics]))
        return autograd.statistics(text, self.streams(), self.keep, carried)

    def sizes(self, across: bool) -> tuple[int, int]:
        """How many rows and columns the tensors of a statistic are for; of one `across`, of columns."""
        return self.rows, self.columns

    def check_statistics(self, statistics: Sequence[Statistic]) -> None:
        """Kernels read what statistics carry without a look at its length."""
        name = "Scores.reduce"
        for s in statistics:
            across = isinstance(s, Columns)
            rows, columns = self.sizes(across)
            for carried, role, t in s.tensors():
                kind = f"{type(s.statistic if across else s).__name__}.{carried}"
                # Words are made for an error only: torch.compile would take the number in them for a constant.
                if role == MATRIX:
                    wanted = (columns, rows) if across else (rows, columns)
                    if t.shape != wanted:
                        expect(False, name, kind, f"shape {wanted}", t)
                elif role != IDS:  # `at` may have several columns to a row
                    wanted = rows if role == ROWS else columns
                    if t.dim() == 0 or t.shape[0] != wanted:
                        expect(False, name, kind, f"{wanted} entries", t)
                if carried in ("at", "columns", "where.without", "where.row_label", "where.column_label"):
                    whole = not (t.is_floating_point() or t.is_complex())
                    expect(whole, name, kind, "integers", t.dtype, TypeError)

    def at(self, columns: Tensor) -> Tensor:
        """Scores at given columns (N,) or (N, k), int64: N·k products instead of a pass over N·V. Differentiable."""
        wide, flat = self.dtype, self.streams()[0]
        picked = columns.reshape(-1)
        if self.weight is None:
            raw = flat.gather(1, columns.unsqueeze(1) if columns.dim() == 1 else columns).to(wide)
        else:
            weight, k = self.weight.index_select(0, picked), columns[0].numel() if len(columns) else 1
            weight = weight.to(self.multiply_dtype).to(wide).reshape(len(flat), k, flat.shape[1])
            raw = (flat.to(self.multiply_dtype).to(wide).unsqueeze(1) * weight).sum(-1)
        vectors = [None if v is None else v.index_select(0, picked).reshape(raw.shape) for v in self.streams()[2:5]]
        return Tile(raw, 0, *vectors, self.softcap, self.scale).scores().reshape(columns.shape).double()

    def dense(self) -> DenseScores:
        """The same scores as a dense matrix in plain PyTorch: any order of derivative, and all the memory."""
        flat, _, *vectors, _ = self.streams()
        return DenseScores(dense_scores(flat, self.weight, *vectors, self.softcap, self.scale, self.multiply_dtype))

    def plan(self) -> Plan:
        """How a loss that separates over rows would walk these scores, and the memory it takes."""
        flat = self.streams()[0]
        backend = choose(flat.device, self.multiply_dtype, self.walk.backend)
        return plan(*flat.shape, self.columns, self.multiply_dtype, self.walk, backend.limits(flat.device))


class _Taken:
    """Values, columns found and states of the `statistics` op, taken off statistic by statistic."""

    def __init__(self, values: Tensor, columns: Tensor, states: Tensor):
        self.matrices, self.starts = (values, columns, states), [0, 0, 0]

    def next(self, s: Statistic) -> object:
        """What the user of `reduce` sees of the next one."""
        s = s.statistic if isinstance(s, Columns) else s
        sizes = (s.outputs, getattr(s, "k", 0), s.width)
        value, found, state = [m[:, a : a + n] for m, a, n in zip(self.matrices, self.starts, sizes)]
        self.starts = [a + n for a, n in zip(self.starts, sizes)]
        row = getattr(s, "row", None)
        if row is not None and row.requires_grad:
            apart = torch.where(row.isfinite(), row - row.detach(), 0.0).unsqueeze(1)  # zero, with row's gradient
            value = value + s.row_slope(state).to(value.dtype) * apart
        return s.present(value, found)


FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KINDS = "float64, float32, bfloat16 or float16"


def check_logits(name: str, argument: str, logits: Tensor, classes: int) -> None:
    expect(logits.dtype in FLOATING, name, argument, _KINDS, logits.dtype, TypeError)
    expect(classes > 0, name, argument, "at least one class", logits)


def check_linear(name: str, input: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Checks of a linear layer whose weight (V, …, D) and bias (V, …) are called ``prefix`` + weight, bias."""
    of_weight, of_bias = f"{prefix}weight", f"{prefix}bias"
    expect(isinstance(input, Tensor) and input.dim() >= 1, name, "input", "a tensor (*leading, D)", input)
    expect(isinstance(weight, Tensor) and weight.dim() >= 2, name, of_weight, "a tensor (V, D)", weight)
    expect(input.shape[-1] == weight.shape[-1], name, of_weight, f"(V, {input.shape[-1]}) to match input", weight)
    expect(weight.shape[0] > 0, name, of_weight, "at least one class", weight)
    expect(bias is None or bias.shape == weight.shape[:-1], name, of_bias, f"{tuple(weight.shape[:-1])}", bias)
    for argument, tensor in (("input", input), (of_weight, weight), (of_bias, bias)):
        expect(
            tensor is None or tensor.dtype in FLOATING,
            name,
            argument,
            _KINDS,
            getattr(tensor, "dtype", None),
            TypeError,
        )
    autocast = torch.is_autocast_enabled(input.device.type)
    expect(autocast or input.dtype == weight.dtype, name, of_weight, f"{input.dtype} as input", weight.dtype, TypeError)


def linear_scores(
    input: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    memory_budget: int | None = None,
    schedule: str = "auto",
    gradient_filter: float = 0.0,
    backend: str = "auto",
) -> Scores:
    """Scores of a linear output layer, scale · cap(x · Wᵀ + bias) / temperature, that are never stored.

    Args:
        input: (*leading, D) hidden states; float64, float32, bfloat16 or float16.
        weight: (V, D), of the same type (under autocast both are multiplied in autocast's type).
        bias: (V,), added before the softcap.
        softcap: cap(t) = softcap · tanh(t / softcap), > 0 (Gemma 2, arXiv 2408.00118); None leaves it out.
        scale: number, or a 0-dimensional tensor that may be learnable; multiplies after the softcap.
        temperature: > 0, divides after the softcap.
        memory_budget: bytes that the tile of scores may take; None: 256 MiB on a CPU, 1 GiB on a GPU.
        schedule: "eager" (three GEMMs, a tile of rows × V), "recompute" (four GEMMs, a tile of a few MiB), or "auto".
        gradient_filter: opt-in; in each chunk of rows leave out the classes for which every |∂L/∂s_ij| is below this
            number times the largest row factor (1/N for a mean). Every entry of ∂L/∂s is then off by at most that much.
        backend: "auto", or the name of one (see `fusedloss.info`).

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.
    """
    name = "linear_scores"
    check_linear(name, input, weight, bias)
    expect(weight.dim() == 2, name, "weight", "(V, D)", weight)
    expect(schedule in ("auto", "eager", "recompute"), name, "schedule", "auto, eager or recompute", schedule)
    expect(
        memory_budget is None or memory_budget > 0, name, "memory_budget", "a positive number of bytes", memory_budget
    )
    expect(gradient_filter >= 0, name, "gradient_filter", "a number >= 0", gradient_filter)
    softcap, scale = _options(name, softcap, scale, temperature)
    walk = Walk(memory_budget, schedule, gradient_filter, backend)
    return Scores(input, weight, bias, None, None, softcap, scale, walk)


def logits_scores(
    logits: Tensor,
    *,
    softcap: float | None = None,
    scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Scores:
    """Scores from given logits (*leading, V); options as in `linear_scores`."""
    name = "logits_scores"
    expect(isinstance(logits, Tensor) and logits.dim() >= 1, name, "logits", "a tensor (*leading, V)", logits)
    check_logits(name, "logits", logits, logits.shape[-1])
    softcap, scale = _options(name, softcap, scale, temperature)
    return Scores(logits, None, None, None, None, softcap, scale, Walk(backend=backend))


def _options(
    name: str, softcap: float | None, scale: float | Tensor, temperature: float
) -> tuple[float, float | Tensor]:
    expect(softcap is None or softcap > 0, name, "softcap", "a number > 0 or None", softcap)
    expect(temperature > 0, name, "temperature", "a number > 0", temperature)
    if isinstance(scale, Tensor):
        expect(scale.dim() == 0, name, "scale", "a number or a 0-dimensional tensor", tuple(scale.shape))
    else:
        finite = isinstance(scale, (int, float)) and scale - scale == 0
        expect(finite, name, "scale", "a number or a 0-dimensional tensor", scale)
    return softcap or 0.0, scale if temperature == 1.0 else scale / temperature


def as_scores(scores: Scores | Tensor) -> Scores:
    return scores if isinstance(scores, Scores) else logits_scores(scores)
