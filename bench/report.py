"""Writes the tables of docs/performance.md from rows that the suite recorded; of a case measured twice, the later.

python bench/report.py bench/results/*.csv
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
OURS = "fusedloss"
QUIET = 0.05  # as harness.QUIET; not imported, so that no torch is needed here
# What was asked for, × floor: the shapes of the first three GEMM cases in order, see cases.SHAPES.
SHAPES = ("2048x512x32000", "1024x1024x128256", "4096x256x50257", "8192x64x8000", "16384x512x32000", "4096x1024x128256")
TARGETS = {"fp32": (1.05, 1.05, 1.10, 1.25, 1.05, 1.05), "bf16": (1.10, 1.10, 1.25, 1.9, 1.10, 1.10)}
TIGHT_TARGETS = {"fp32": (1.5, 1.5, 1.5, 1.5), "bf16": (1.5, 1.8, 1.5, 1.5)}

PAIR_TARGETS = {"fp32": 1.10, "bf16": 1.35}

Cases = dict[tuple[str, str], dict[str, dict[str, str]]]


def replace_section(page: Path, name: str, text: str) -> None:
    """Put `text` between the page's markers `<!-- name -->` and `<!-- end of name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def read(paths: list[Path]) -> Cases:
    latest: dict[tuple[str, str], tuple[str, dict]] = {}
    for path in paths:
        with path.open(newline="") as file:
            before = None
            for row in csv.DictReader(file):
                key = row["case"], row["dtype"]
                if key != before:
                    latest[key] = {}
                latest[key][row["contender"]] = row
                before = key
    return latest


def times(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    ratio = float(row["ratio"])
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.0f}" if ratio < float("inf") else "over the time limit"


def noted(row: dict[str, str]) -> str:
    """The row's note, and whether the machine was busy."""
    busy = float(row["busy"])
    return "; ".join(filter(None, [row["note"], f"others took {busy:.0%} of the processor" if busy > QUIET else ""]))


def mib(row: dict[str, str] | None, key: str = "peak_mib") -> str:
    return "" if row is None else f"{float(row[key]):.0f}"


def grid(head: str, lines: list[str]) -> str:
    words = "N, D, V|case|loss|type|contender|B, D|n, d, m|lists, items|fastest of PyTorch|target|commit|note".split("|")
    rule = ["---" if cell.strip() in words else "---:" for cell in head.strip("|").split("|")]
    return "\n".join([head, f"|{'|'.join(rule)}|", *lines])


def linear_table(cases: Cases) -> str:
    lines = []
    for dtype, targets in TARGETS.items():
        for shape, target in zip(SHAPES, targets):
            rows = cases.get((f"linear {shape}", dtype))
            if rows is None:
                continue
            turns = {name: row for name, row in rows.items() if name.startswith("torch")}
            fastest = min(turns, key=lambda name: float(turns[name]["ratio"]))
            ours, floor = rows[OURS], next(iter(rows.values()))
            met = "met" if float(ours["ratio"]) <= target else "missed"
            others = [times(rows.get(f"torch, chunked, {how}")) for how in ("512 rows", "default")]
            cells = [
                *(shape.replace("x", ", "), dtype, f"{float(floor['ms']):.0f}"),
                *(f"**{times(ours)}**", f"{target} {met}"),
                *(f"{times(rows[fastest])} ({fastest.removeprefix('torch, ')})", times(rows["torch, eager"])),
                *(times(rows.get("torch, eager, fp32 logits")), times(rows.get("torch.compile of eager")), *others),
                *(mib(ours), mib(ours, "accumulator_mib"), mib(rows["torch, eager"])),
                *(ours["chunks"], ours["commit"], noted(ours)),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    head = (
        "| N, D, V | type | floor, ms | fusedloss | target | fastest of PyTorch | eager | eager, fp32 logits |"
        " compile | chunked, 512 | chunked, default | fusedloss, peak MiB | of it dW in fp32 | eager, peak MiB |"
        " chunks | commit | note |"
    )
    return grid(head, lines)


def is_pair(case: str) -> bool:
    return case.split()[0] in ("sigmoid", "clip", "supcon")


def pair_table(cases: Cases) -> str:
    lines = []
    for (case, dtype), rows in sorted(cases.items()):
        if not is_pair(case):
            continue
        ours, floor = rows[OURS], next(iter(rows.values()))
        dense, loop = (rows.get(f"torch, {how}") for how in ("dense", "loop over tiles"))
        name, shape = case.split()
        target = PAIR_TARGETS[dtype]
        met = "" if name == "supcon" else f"{target:.2f} {'met' if float(ours['ratio']) <= target else 'missed'}"
        cells = [f"`{name}_loss`", shape.replace("x", ", "), dtype, f"{float(floor['ms']):.0f}", f"**{times(ours)}**", met]
        cells += [times(dense), times(loop), mib(ours), mib(dense), mib(loop), ours["commit"], noted(ours)]
        lines.append("| " + " | ".join(cells) + " |")
    head = (
        "| loss | B, D | type | floor, ms | fusedloss | target | dense torch | loop over tiles | fusedloss, peak MiB |"
        " dense, peak MiB | loop, peak MiB | commit | note |"
    )
    return grid(head, lines)


def milliseconds(row: dict[str, str] | None) -> str:
    figure = float(row["ms"]) if row else 0.0
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.2f}" if row else ""


HEADS = {
    "dense": "torch, dense",
    "`linear_cross_entropy`": "fusedloss.linear_cross_entropy",
    "adaptive": "torch, adaptive softmax",
    "sampled": "torch, sampled softmax, 8192",
    "hierarchical": "torch, hierarchical softmax",
}


def spherical_table(cases: Cases) -> str:
    """Milliseconds of a step, and what it needs beside the weight."""
    lines = []
    for (case, _), rows in cases.items():
        if case.startswith("spherical "):
            ours, others = rows[OURS], [rows.get(name) for name in HEADS.values()]
            faster = float(others[0]["ms"]) / float(ours["ms"])
            cells = [case.split()[1].replace("x", ", "), f"**{milliseconds(ours)}**", f"{faster:.0f}"]
            cells += [milliseconds(row) for row in others] + [mib(ours)] + [mib(row) for row in others]
            lines.append("| " + " | ".join([*cells, ours["commit"], noted(ours)]) + " |")
    names = " | ".join(HEADS)
    peaks = " | ".join(f"{name}, MiB" for name in ("FactoredLinear", *HEADS))
    return grid(f"| n, d, m | FactoredLinear, ms | dense / it | {names} | {peaks} | commit | note |", lines)


def sweep(cases: Cases) -> dict[str, list[tuple[int, float]]]:
    """Of each contender (classes, milliseconds of a step), by classes."""
    points: dict[str, list[tuple[int, float]]] = {}
    for (case, _), rows in cases.items():
        if case.startswith("classes "):
            for name, row in rows.items():
                points.setdefault(name, []).append((int(case.split()[1].split("x")[0]), float(row["ms"])))
    return {name: sorted(pairs) for name, pairs in points.items()}


def slope(points: list[tuple[int, float]]) -> float:
    """The power of n by which the time grows: the least-squares line through the logarithms."""
    x, y = ([math.log(value) for value in side] for side in zip(*points))
    middle = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y)) / sum((a - middle[0]) ** 2 for a in x)


def classes_table(cases: Cases) -> str:
    points = sweep(cases)
    if not points:
        return grid("| contender |", [])
    head = [f"{classes} classes, ms" for classes, _ in points[OURS]]
    lines = [
        f"| {name} | {' | '.join(milliseconds({'ms': str(ms)}) for _, ms in pairs)} | {slope(pairs):.2f} |"
        for name, pairs in points.items()
    ]
    return grid(f"| contender | {' | '.join(head)} | power of n |", lines)


SORTING = ("soft_", "NeuralSort", "neural_ndcg_loss", "lambda_loss", "approx_ndcg_loss", "bitonic", "entmax15")
SOFT = [(kind, strength) for kind in ("l2", "kl") for strength in ("1", "0.001")]


def soft_table(cases: Cases) -> str:
    """How many times faster than torch.sort alone, and than torchsort, shape by shape."""
    found = {tuple(case.split()): rows for (case, _), rows in cases.items() if case.startswith("soft_")}
    lines = []
    for operator, shape in dict.fromkeys((operator, shape) for operator, _, _, shape in found):
        cells = []
        for kind, strength in SOFT:
            rows = found[operator, kind, strength, shape]
            ms = {name: float(row["ms"]) for name, row in rows.items()}
            cells.append(" / ".join(f"{ms[name] / ms[OURS]:.1f}" for name in ms if name != OURS))
        shown = shape.replace("x", ", ")
        lines.append(f"| `{operator}` | {shown} | {' | '.join(cells)} | {rows[OURS]['commit']} |")
    head = " | ".join(f"{kind}, {strength}" for kind, strength in SOFT)
    return grid(f"| case | lists, items | {head} | commit |", lines)


def sorting_table(cases: Cases) -> str:
    """The other cases of the sort engine."""
    lines = []
    for (case, _), rows in cases.items():
        if not case.startswith(SORTING) or case.startswith("soft_"):
            continue
        for name, row in rows.items():
            lines.append(f"| {case} | {name} | {milliseconds(row)} | {mib(row)} | {row['commit']} | {noted(row)} |")
    return grid("| case | contender | ms | peak MiB | commit | note |", lines)


def other_table(cases: Cases) -> str:
    """Every case that has no table of its own: contenders and their ratios and peaks."""
    lines = []
    for (case, dtype), rows in cases.items():
        if case.startswith(("linear ", "spherical ", "classes ", *SORTING)) or "cross_entropy" in rows or is_pair(case):
            continue
        for name, row in rows.items():
            figures = f"{float(row['ms']):.0f} | {times(row)} | {mib(row)}"
            chunks = row["chunks"] if row["chunks"] != "0" else ""
            note = noted(row) if name == OURS else ""
            lines.append(f"| {case} | {dtype} | {name} | {figures} | {chunks} | {row['commit']} | {note} |")
    return grid("| case | type | contender | ms | ratio | peak MiB | chunks | commit | note |", lines)


def losses_table(cases: Cases) -> str:
    lines = []
    for (case, dtype), rows in cases.items():
        if "cross_entropy" in rows:
            ours = rows[OURS]
            lines.append(f"| `{case.split()[0]}` | {dtype} | {float(ours['ms']):.0f} | {times(ours)} | {mib(ours)} |")
    return grid("| loss | type | ms | × cross_entropy | peak MiB |", lines)


if __name__ == "__main__":
    found = read([Path(p) for p in sys.argv[1:]])
    tables = {"linear": linear_table, "pairs": pair_table, "spherical": spherical_table, "classes": classes_table}
    for name, make in (tables | {"soft": soft_table, "sorting": sorting_table, "other": other_table, "losses": losses_table}).items():
        replace_section(PAGE, name, make(found))
