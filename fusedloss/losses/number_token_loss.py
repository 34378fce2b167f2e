"""Number token loss: how far a number is missed by, for language models that write numbers token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number, expect
from ..row_loss import COMMON, row_loss
from ..scores import Scores, as_scores
from ..statistics import LogSumExp, Score
from ..targets import checked_target, spoilt


@row_loss
def _number_token_loss(scores, target, *, columns: Tensor, table: Tensor, squared: bool, reweigh: bool):
    """`target` counts among the number tokens, `columns`; row t of `table` holds all tokens' distances from token t."""
    asked = Score(columns=columns)
    numbers, *lse = scores.reduce(asked, LogSumExp()) if reweigh else (scores.reduce(asked),)
    lse_numbers = numbers.logsumexp(1)
    missed_by = (torch.exp(numbers - lse_numbers.unsqueeze(1)) * table[target]).sum(1)
    loss, largest = (missed_by.square(), table.square().max()) if squared else (missed_by, table.max())
    if not reweigh:
        return loss
    elsewhere = -torch.expm1(lse_numbers - lse[0])  # probability of all tokens that are no number
    return loss + elsewhere * (1.01 * largest - loss)


def number_token_loss(
    scores: Tensor | Scores,
    target: Tensor,
    *,
    number_ids: Tensor,
    number_values: Tensor,
    form: str = "wasserstein",
    reweigh: bool = False,
    squash_factor: float | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Number token loss: L = Σ_j p̃_j |v_j − v_y| ("wasserstein") or L = (Σ_j p̃_j v_j − v_y)² ("mse").

    p̃ is the softmax over the number tokens alone, v their values. Jonas Zausinger et al., "Regress, Don't Guess: A
    Regression-like Loss on Number Tokens for Language Models", ICML 2025, arXiv 2411.02083, which adds 0.3 of it to
    cross-entropy. Only the k columns of number tokens are computed, unless `reweigh` asks for the full softmax.

        number_ids: (k,) int64, different tokens that are numbers (single digits, as a rule). number_values: (k,) v.
        reweigh: with m the full softmax's mass on number tokens, m L + 1.01 d (1 − m), d the largest distance; default
            of the authors' package ntloss, not in the paper, so False here.
        squash_factor: f > 1, wasserstein only: distances other than 0 are mapped linearly onto [1, f].

    Rows whose target is no number token are left out of the loss and of the mean, as ignored rows are. No class weight.
    """
    name, scores = "number_token_loss", as_scores(scores)
    expect(form in ("wasserstein", "mse"), name, "form", "wasserstein or mse", form)
    expect(number_ids.dim() == 1 and number_ids.numel() > 0, name, "number_ids", "shape (k,), k ≥ 1", number_ids)
    expect(number_ids.dtype == torch.int64, name, "number_ids", "torch.int64", number_ids.dtype, TypeError)
    expect(number_values.shape == number_ids.shape, name, "number_values", "the shape of number_ids", number_values)
    values = number_values.to(scores.dtype)
    table = values - values.unsqueeze(1)
    table = table if form == "mse" else table.abs()
    if squash_factor is not None:
        expect(form == "wasserstein", name, "squash_factor", "None for the mse form", squash_factor)
        check_number(name, "squash_factor", squash_factor, 1, above=True)
        least, largest = torch.where(table > 0, table, torch.inf).amin(), table.amax()
        step = torch.where(largest > least, (squash_factor - 1) / (largest - least), 0.0)
        table = torch.where(table > 0, 1 + (table - least) * step, 0.0)
    _, _, valid = checked_target(name, scores, target, ignore_index)
    same = target.unsqueeze(-1) == number_ids
    index = torch.where(same.any(-1) & (target != ignore_index), same.long().argmax(-1), -100)
    if not reweigh:
        scores, number_ids = scores.at_columns(number_ids), torch.arange(number_ids.shape[0], device=number_ids.device)
    options = dict(columns=number_ids, table=table, squared=form == "mse", reweigh=reweigh)
    return spoilt(_number_token_loss(scores, index, **options, row_weight=row_weight, reduction=reduction), valid)


number_token_loss.__doc__ += COMMON


def reference(logits, target, number_ids, number_values, form="wasserstein", reweigh=False, squash_factor=None):
    """(N,) losses, densely; 0 where the target is no number token."""
    v, p = number_values.to(logits.dtype), torch.softmax(logits[:, number_ids], 1)
    same = target[:, None] == number_ids
    apart = (v[:, None] - v).abs()
    if squash_factor is not None:
        known = apart[apart > 0]
        apart[apart > 0] = 1 + (known - known.min()) * (squash_factor - 1) / (known.max() - known.min())
    loss = (p * apart[same.long().argmax(1)]).sum(1)
    if form == "mse":
        loss, apart = ((p * v).sum(1) - (same * v).sum(1)).square(), apart.square()
    if reweigh:
        mass = torch.softmax(logits, 1)[:, number_ids].sum(1)
        loss = mass * loss + 1.01 * apart.max() * (1 - mass)
    return torch.where(same.any(1), loss, 0.0)


_DIGITS = {"number_ids": lambda _: torch.arange(5), "number_values": lambda _: torch.tensor([0.0, 1.0, 2.0, 4.0, 7.0])}
_MSE, _SQUASHED = {"form": "mse"}, {"reweigh": True, "squash_factor": 2.0}
CASES = (_DIGITS, {**_DIGITS, **_MSE}, {**_DIGITS, **_MSE, "reweigh": True}, {**_DIGITS, **_SQUASHED})
