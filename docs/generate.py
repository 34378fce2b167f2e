"""Writes the table of losses into docs/losses.md and, in short, into README.md: ``python docs/generate.py``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from unittest import mock

import torch

import fusedloss
from fusedloss import ranking
from fusedloss.losses import LOSSES, PAIR_LOSSES, function_of, hyperparameters, name_of, pair_arguments

README = Path(__file__).parent.parent / "README.md"
LOSSES_PAGE = Path(__file__).parent / "losses.md"
BEGIN, END = "<!-- losses: begin -->", "<!-- losses: end -->"
OF_LISTS = {"mask", "offsets", "list_weight"}
COMMON = {"weight", "row_weight", "ignore_index", "reduction", "size_average", "reduce"}
HEAD = """# Losses

Written by `python docs/generate.py` from the losses' own files. All of them take logits or
`fusedloss.linear_scores(…)`, and `weight` (classes; not number_token_loss), `row_weight`, `ignore_index` and
`reduction`. s are the scores, y the target, p = softmax(s) (p alone: its value at y), V the number of classes. A pass
is one streaming read of the scores; what it gathers is what the loss depends on. No pass: the loss reads whole rows,
a chunk of them at a time.

| loss | formula | hyperparameters | gathers | passes | papers |
|---|---|---|---|---|---|
"""

PAIR_HEAD = """
## Pairs of embeddings

Of similarities z = scale · x·y + bias: `fusedloss.similarity_scores(x, y, …)`, or a dense matrix of them. "pair": x_i
and y_i belong together, N ≤ M; "self": x with itself, of whose symmetric scores half are computed; "classes": x with
one vector per class. No pass: the loss needs no statistic of the scores, or walks them in plain PyTorch (then its
docstring says so).

| loss | of | formula | arguments | gathers | passes | papers |
|---|---|---|---|---|---|---|
"""

LIST_HEAD = """
## Lists

`fusedloss.ranking`: of scores s and relevance r of the items of each list, along the last dimension; also `mask`,
`offsets`, `list_weight` and `reduction`. n is the number of a list's own items.

| loss | formula | arguments | papers |
|---|---|---|---|
"""


def formula(documentation: str) -> str:
    """The first formula of a docstring: from "L =" to the end of its sentence or line."""
    text = re.search(r"\bL(?:_i)? = .*", documentation).group()
    text = re.sub(r"^L_i", "L", text.split(",   ")[0])
    return text.rstrip(". ").replace("|", "\\|")


def options(function, first: int = 2) -> str:
    found = [p for p in list(inspect.signature(function).parameters.values())[first:] if p.name not in COMMON | OF_LISTS]
    shown = [f"{p.name}" if p.default is p.empty else f"{p.name}={p.default!r}" for p in found]
    return ", ".join(f"`{text}`" for text in shown)


def named(statistic) -> str:
    across = isinstance(statistic, fusedloss.Columns)
    return f"{named(statistic.statistic)} of columns" if across else type(statistic).__name__


def gathered(call) -> list[set[str]]:
    """The statistics that each pass of a call asks for."""
    passes = []
    reduce = fusedloss.Scores.reduce

    def watched(self, *statistics):
        passes.append({named(s) for s in statistics})
        return reduce(self, *statistics)

    with mock.patch.object(fusedloss.Scores, "reduce", watched):
        call()
    return passes


def first_case(module) -> list[set[str]]:
    function, target = function_of(module), torch.tensor([0, 1, 2])
    return gathered(lambda: function(torch.randn(3, 9), target, **hyperparameters(module.CASES[0], 9)))


def first_pair_case(module) -> list[set[str]]:
    x, y = (torch.nn.functional.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    scores = fusedloss.similarity_scores(x, x if module.SCORES == "self" else y)
    return gathered(lambda: function_of(module)(scores, **pair_arguments(module.CASES[0], 6, 6)))


def papers(documentation: str) -> str:
    numbers = dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", documentation))
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers)


def row(module, passes: list[set[str]], *of: str, first: int = 2) -> str:
    function = function_of(module)
    documentation = inspect.getdoc(function)
    names = ", ".join(sorted(set().union(*passes)))
    cells = (f"`{name_of(module)}`", *of, formula(documentation), options(function, first))
    return f"| {' | '.join((*cells, names, str(len(passes)), papers(documentation)))} |\n"


def list_row(module) -> str:
    function = function_of(module)
    documentation = inspect.getdoc(function)
    cells = f"`{name_of(module)}`", formula(documentation), options(function), papers(documentation)
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    pairs = [row(m, first_pair_case(m), m.SCORES, first=1) for m in PAIR_LOSSES]
    lists = [list_row(m) for m in ranking.losses()]
    losses = [row(m, first_case(m)) for m in LOSSES]
    return "".join((HEAD, *losses, PAIR_HEAD, *pairs, LIST_HEAD, *lists))


def readme() -> str:
    """README.md with its short table made anew."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = [f"| `{name_of(m)}` | {formula(inspect.getdoc(function_of(m)))} |\n" for m in LOSSES]
    return f"{before}{BEGIN}\n| loss | one row of it |\n|---|---|\n{''.join(rows)}{END}{after}"


if __name__ == "__main__":
    LOSSES_PAGE.write_text(table())
    README.write_text(readme())
