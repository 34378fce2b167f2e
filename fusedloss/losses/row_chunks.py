"""The walk of losses that no statistic gives: dense scores of a few rows at a time.

Such a loss compares the scores of a row, or of the batch, with each other: more work per score than a pass over them,
in plain PyTorch. What it holds is what every loss holds: a chunk of rows, which backward computes again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checks import expect
from ..dense import dense_scores
from ..plan import spans
from ..scores import Scores

BUDGET = 64 << 20  # bytes, where the scores come without a memory budget


def again(function: Callable, *arguments: object):
    """Call a function that keeps its arguments for backward, and nothing that it makes of them."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def over_chunks(name: str, scores: Scores, function: Callable, *rows: Tensor, copies: int) -> list[Tensor]:
    """Sums over chunks of rows of what ``function(z, *rows)`` returns, a tuple of numbers; z (n, M) are dense scores.

    ``copies``: how many numbers the function holds per score. Derivatives of any order, in the type of the sums.
    """
    expect(type(scores) is Scores, name, "scores", "scores of one process", type(scores).__name__)
    x, weight, *vectors, scale = scores.streams()
    weight = x if scores.symmetric else weight  # its gradient too
    x, weight = (None if t is None else t.to(scores.multiply_dtype).to(scores.dtype) for t in (x, weight))
    scale = scores.scale if scale is None else scale

    def part(chunk: slice, x, weight, vectors, scale):
        z = dense_scores(x[chunk], weight, *vectors, scores.softcap, scale, scores.dtype)
        return function(z, *[r[chunk] for r in rows])

    cells = (scores.walk.memory_budget or BUDGET) // (copies * scores.dtype.itemsize)
    chunks = list(spans(len(x), max(1, cells // max(1, scores.columns)))) or [slice(0, 0)]
    parts = [again(part, chunk, x, weight, vectors, scale) for chunk in chunks]
    return [torch.stack(numbers).sum(0) for numbers in zip(*parts)]
