"""Draws the time of a step over the number of classes, from rows of test_number_of_classes, and tells its slopes.

python bench/plot_classes.py bench/results/*.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to a file; needs no display
import matplotlib.pyplot as plt  # noqa: E402
from report import ROOT, read, slope, sweep  # noqa: E402

PICTURE = ROOT / "bench" / "results" / "classes.png"

if __name__ == "__main__":
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, points in sweep(read([Path(p) for p in sys.argv[1:]])).items():
        told = f"{name}: n^{slope(points):.2f}"
        axis.loglog(*zip(*points), marker="o", label=told)
        print(told)
    axis.set_xlabel("classes")
    axis.set_ylabel("ms per step (d = m = 128)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)
