"""What the runs of the output layers gave, as a table, a CSV and a figure."""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to a file; needs no display
import matplotlib.pyplot as plt
import torch

import fusedloss

COLOURS = {
    "Z-loss, factored": "#1f5f8b",
    "softmax, fusedloss": "#c8603a",
    "softmax, torch": "#e0a890",
    "adaptive softmax": "#5a8a3c",
}


@dataclass(frozen=True)
class Point:
    """Held-out accuracy after so many seconds of training, in which so many words were seen."""

    seconds: float
    words: int
    accuracy: tuple[float, ...]  # top-1, top-10, top-50


@dataclass
class Run:
    """One output layer's training."""

    name: str
    settings: str
    rows: int
    steps: int = 0
    points: list[Point] = field(default_factory=list)
    finite: bool = True  # the last loss


def describe(threads: int) -> str:
    """Machine and versions, in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return (
        f"{processor}, threads: {threads}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"fusedloss {fusedloss.__version__}"
    )


def table(runs: Sequence[Run], ranks: Sequence[int]) -> str:
    """The end of each run, as a Markdown table."""
    lines = [
        ("output layer", "settings", "words seen", "words per second", *(f"top-{rank}" for rank in ranks)),
        *(
            (
                run.name,
                run.settings,
                f"{run.points[-1].words:,}",
                f"{run.points[-1].words / max(run.points[-1].seconds, 1e-9):,.0f}",
                *(f"{100 * share:.1f} %" for share in run.points[-1].accuracy),
            )
            for run in runs
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    marks = ["-" * width if at < 2 else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    rows = [
        [cell.ljust(w) if at < 2 else cell.rjust(w) for at, (cell, w) in enumerate(zip(line, widths))] for line in lines
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], marks, *rows[1:]))


def write_csv(runs: Sequence[Run], ranks: Sequence[int], path: Path) -> None:
    """One line per evaluation."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("layer", "settings", "seconds", "words", *(f"top{rank}" for rank in ranks)))
        for run in runs:
            for point in run.points:
                shares = (f"{share:.4f}" for share in point.accuracy)
                writer.writerow((run.name, run.settings, f"{point.seconds:.2f}", point.words, *shares))


def draw(runs: Sequence[Run], ranks: Sequence[int], title: str, path: Path) -> None:
    """Held-out accuracy over seconds of training, one panel per rank."""
    figure, panels = plt.subplots(1, len(ranks), figsize=(12, 4), layout="constrained")
    sweep = len({run.name for run in runs}) < len(runs)  # runs of one layer differ by their settings
    for at, (axes, rank) in enumerate(zip(panels, ranks)):
        for run in runs:
            seconds = [point.seconds for point in run.points]
            shares = [100 * point.accuracy[at] for point in run.points]
            colour, label = (None, run.settings) if sweep else (COLOURS[run.name], run.name)
            axes.plot(seconds, shares, "o-", markersize=3, color=colour, label=label)
        axes.set(title=f"top-{rank}", xlabel="seconds of training")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out words, %")
    panels[0].legend(frameon=False, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)
