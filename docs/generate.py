"""Writes the table of losses into docs/losses.md and, in short, into README.md: ``python docs/generate.py``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from unittest import mock

import torch

import fusedloss
from fusedloss.losses import LOSSES, function_of, hyperparameters, name_of

README = Path(__file__).parent.parent / "README.md"
LOSSES_PAGE = Path(__file__).parent / "losses.md"
BEGIN, END = "<!-- losses: begin -->", "<!-- losses: end -->"
COMMON = {"weight", "row_weight", "ignore_index", "reduction", "size_average", "reduce"}
HEAD = """# Losses

Written by `python docs/generate.py` from the losses' own files. All of them take logits or
`fusedloss.linear_scores(…)`, and `weight` (classes; not number_token_loss), `row_weight`, `ignore_index` and
`reduction`. s are the scores, y the target, p = softmax(s) (p alone: its value at y), V the number of classes. A pass
is one streaming read of the scores; what it gathers is what the loss depends on.

| loss | formula | hyperparameters | gathers | passes | papers |
|---|---|---|---|---|---|
"""


def formula(documentation: str) -> str:
    """The first formula of a docstring: from "L =" to the end of its sentence or line."""
    text = re.search(r"\bL(?:_i)? = .*", documentation).group()
    text = re.sub(r"^L_i", "L", text.split(",   ")[0])
    return text.rstrip(". ").replace("|", "\\|")


def options(function) -> str:
    found = [p for p in list(inspect.signature(function).parameters.values())[2:] if p.name not in COMMON]
    shown = [f"{p.name}" if p.default is p.empty else f"{p.name}={p.default!r}" for p in found]
    return ", ".join(f"`{text}`" for text in shown)


def gathered(module) -> list[set[str]]:
    """The statistics that each pass asks for, watched while the loss runs in its first case."""
    passes = []
    reduce = fusedloss.Scores.reduce

    def watched(self, *statistics):
        passes.append({type(s).__name__ for s in statistics})
        return reduce(self, *statistics)

    with mock.patch.object(fusedloss.Scores, "reduce", watched):
        function_of(module)(torch.randn(3, 9), torch.tensor([0, 1, 2]), **hyperparameters(module.CASES[0], 9))
    return passes


def row(module) -> str:
    function, passes = function_of(module), gathered(module)
    documentation = inspect.getdoc(function)
    papers = dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", documentation))
    links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in papers)
    names = ", ".join(sorted(set().union(*passes)))
    cells = (f"`{name_of(module)}`", formula(documentation), options(function), names, str(len(passes)), links)
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    return HEAD + "".join(row(module) for module in LOSSES)


def readme() -> str:
    """README.md with its short table made anew."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = [f"| `{name_of(m)}` | {formula(inspect.getdoc(function_of(m)))} |\n" for m in LOSSES]
    return f"{before}{BEGIN}\n| loss | one row of it |\n|---|---|\n{''.join(rows)}{END}{after}"


if __name__ == "__main__":
    LOSSES_PAGE.write_text(table())
    README.write_text(readme())
