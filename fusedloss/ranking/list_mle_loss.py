"""ListMLE: the Plackett–Luce likelihood of the order in which the relevance puts the items."""

import torch
from torch import Tensor

from ..lists import Lists
from .list_loss import list_loss

ABSENT = -1e30  # the score of an item that is masked out: adds exactly 0, and unlike −inf its gradient is no NaN


@list_loss
def list_mle_loss(lists, scores, relevance, *, shuffle_ties: bool = False, generator: torch.Generator | None = None):
    """ListMLE: L = Σ_k (log Σ_{m≥k} e^{s_(m)} − s_(k)), (k) being the k-th item in falling order of relevance.

    Items of equal relevance stand in their given order, or with ``shuffle_ties`` in a random one (from
    ``generator``). The sum over an item and all that follow it is a running log-sum-exp: O(n) after the sort; with
    offsets, O(n log n).

    Fen Xia, Tie-Yan Liu, Jue Wang, Wensheng Zhang and Hang Li, "Listwise Approach to Learning to Rank: Theory and
    Algorithm", ICML 2008. allRank always shuffles ties, and adds 1e-10 to sums relative to the list's largest score,
    which end 23 below it: [0, −200, −201] in the right order but for the first cost it 354.9 instead of 1.313; this
    form does not.
    """
    order = falling(lists, relevance, shuffle_ties, generator)
    return lists.sum(order_losses(lists, scores, order))


def falling(lists: Lists, values: Tensor, shuffle_ties: bool = False, generator=None) -> Tensor:
    """Positions of flat values by list, those masked out last in theirs, falling, ties in given or in random order."""
    keys = [values] if lists.mask is None else [values, lists.mask.to(values.dtype)]
    if lists.offsets is not None:
        keys.append(-lists.row)
    if shuffle_ties:
        keys.insert(0, torch.rand(values.shape, generator=generator, device=values.device))
    order = torch.arange(values.shape[-1], device=values.device).expand(values.shape)
    for key in keys:  # the last one first: all sorts are stable
        order = order.gather(-1, key.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    return order


def order_losses(lists: Lists, scores: Tensor, order: Tensor) -> Tensor:
    """−log of the probability of each choice, flat, back at the item chosen; 0 where masked out."""
    present = scores if lists.mask is None else torch.where(lists.mask, scores, ABSENT)
    chosen = present.gather(-1, order)
    losses = running_logsumexp(lists, chosen) - chosen
    losses = torch.zeros_like(losses).scatter(-1, order, losses)
    return losses if lists.mask is None else torch.where(lists.mask, losses, 0.0)


def running_logsumexp(lists: Lists, values: Tensor) -> Tensor:
    """log Σ e^v of each item and those behind it in its list."""
    if lists.offsets is None:
        return values.flip(-1).logcumsumexp(-1).flip(-1)
    step, place, last = 1, torch.arange(len(values), device=values.device), lists.offsets[1:][lists.row]
    while step < len(values):  # each item has the sum of `step` items; take the next step's along
        further = values.roll(-step)
        values = torch.where(place + step < last, torch.logaddexp(values, further), values)
        step *= 2
    return values


def reference(scores: Tensor, relevance: Tensor, **_) -> Tensor:
    """The loss of one list (n,), by its definition."""
    s = scores[relevance.sort(descending=True, stable=True).indices]
    return sum((s[k:].logsumexp(0) - s[k] for k in range(len(s))), 0 * scores.sum())


CASES = ({},)
