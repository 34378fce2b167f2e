"""ListMLE: the Plackett–Luce likelihood of the order in which the relevance puts the items."""

from dataclasses import replace

import torch
from torch import Tensor

from ..lists import Lists
from ..sorting.running import running_logsumexp
from .list_loss import list_loss, spoilt

ABSENT = -1e30  # the score of an item that is masked out: adds exactly 0, and unlike −inf its gradient is no NaN


@list_loss
def list_mle_loss(lists, scores, relevance, *, shuffle_ties: bool = False, generator: torch.Generator | None = None):
    """ListMLE: L = Σ_k (log Σ_{m≥k} e^{s_(m)} − s_(k)), (k) being the k-th item in falling order of relevance.

    Items of equal relevance stand in their given order, or with ``shuffle_ties`` in a random one (from
    ``generator``). The sum over an item and all that follow it is a running log-sum-exp: O(n) after the sort.

    Fen Xia, Tie-Yan Liu, Jue Wang, Wensheng Zhang and Hang Li, "Listwise Approach to Learning to Rank: Theory and
    Algorithm", ICML 2008. allRank always shuffles ties, and adds 1e-10 to sums relative to the list's largest score,
    which end 23 below it: [0, −200, −201] in the right order but for the first cost it 354.9 instead of 1.313; this
    form does not.
    """
    ordered, losses = choices(lists, spoilt(scores, relevance), falling(lists, relevance, shuffle_ties, generator))
    return ordered.sum(losses)


def falling(lists: Lists, values: Tensor, shuffle_ties: bool = False, generator=None) -> Tensor:
    """Positions of flat values by list, those masked out last in theirs, falling, ties in given or in random order."""
    keys = [values] if lists.mask is None else [values, lists.mask.to(values.dtype)]
    if lists.offsets is not None:
        keys.append(-lists.row)
    if shuffle_ties:
        keys.insert(0, torch.rand(values.shape, generator=generator, device=values.device))
    order = None
    for key in keys:  # the last counts most: all sorts are stable
        found = (key if order is None else key.gather(-1, order)).sort(dim=-1, descending=True, stable=True).indices
        order = found if order is None else order.gather(-1, found)
    return order


def choices(lists: Lists, scores: Tensor, order: Tensor) -> tuple[Lists, Tensor]:
    """−log of the probability of each choice, in `order`, 0 of what is masked out; and lists as those lie."""
    if lists.mask is None:
        chosen = scores.gather(-1, order)
        return lists, running_logsumexp(chosen, lists.offsets) - chosen
    present = lists.mask.gather(-1, order)
    chosen = torch.where(present, scores.gather(-1, order), ABSENT)
    losses = torch.where(present, running_logsumexp(chosen, lists.offsets) - chosen, 0.0)
    return replace(lists, mask=present), losses


def reference(scores: Tensor, relevance: Tensor, **_) -> Tensor:
    """The loss of one list (n,), by its definition."""
    s = scores[relevance.sort(descending=True, stable=True).indices]
    return sum((s[k:].logsumexp(0) - s[k] for k in range(len(s))), 0 * scores.sum())


CASES = ({},)
