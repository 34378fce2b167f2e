"""Random orders of lists: noisy copies of their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lists import Lists


def gumbel(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gumbel noise: scores plus it are in a random order of the Plackett–Luce model."""
    uniform = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
    return -(-(uniform + 1e-10).log() + 1e-10).log()


def positive_scores(lists: Lists, scores: Tensor) -> Tensor:
    """s + |min s| + 1e-10 of each list, by which a smallest score below 0 is a constant: its gradient is exactly 0."""
    least = lists.spread(-lists.max(-scores))
    at_least = scores == least if lists.mask is None else (scores == least) & lists.mask
    share = at_least / lists.spread(lists.sum(at_least.to(scores.dtype)).clamp(min=1))
    low = lists.spread(lists.sum(scores * share))
    shifted = torch.where(at_least & (scores <= 0), 0.0, scores + low.abs()) + 1e-10
    return shifted if lists.mask is None else torch.where(lists.mask, shifted, 1.0)


def copies(lists: Lists, count: int) -> Lists:
    """All lists `count` times, one set after the other."""
    mask = None if lists.mask is None else lists.mask.repeat(count, *[1] * (lists.mask.dim() - 1))
    if lists.offsets is None:
        return Lists(torch.Size((count * lists.rows, lists.shape[lists.dim])), 1, mask)
    items = lists.shape[0]
    starts = torch.arange(count, device=lists.offsets.device).unsqueeze(1) * items
    ends = (starts + lists.offsets[1:]).flatten()
    return Lists(torch.Size((count * items,)), 0, mask, torch.cat([lists.offsets[:1], ends]))
