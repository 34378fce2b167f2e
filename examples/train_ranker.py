"""Train a small ranker with ranking losses, with a differentiable rank correlation, and by regression.

    python examples/train_ranker.py          # or: make rank

The data are scikit-learn's: ten measurements of each of 442 diabetes patients, and how far the disease progressed in
the year after (Bradley Efron, Trevor Hastie, Iain Johnstone and Robert Tibshirani, "Least Angle Regression", 2004). A
list is a ward: 10 to 40 patients, to be put in the order of their progression. Squared error learns the progression
itself, the loss of Spearman's correlation its order in the ward alone, the other three its quintiles, grades of 0 to 4.

All losses see the same splits, first weights and wards, for the same number of steps, and share all settings. Prints
NDCG@10 and Spearman's rank correlation on the patients held out after the last epoch, means over the splits, and the
same less squared error's on the same split, with the standard error of that difference (a little too small: splits
share patients). Writes a CSV and a figure of all epochs.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to a file; needs no display
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

from fusedloss.ranking import lambda_loss, listnet_loss, neural_ndcg_loss, spearman_loss

GRADES = 5
SHORTEST, LONGEST = 10, 40  # patients of a ward
WARDS = 16  # to a step
STEPS = 8  # to an epoch
CUTOFF = 10  # of NDCG


def soft_spearman(scores: Tensor, progression: Tensor, offsets: Tensor) -> Tensor:
    """With soft ranks whose softness follows the typical gap between the scores of a ward (docs/sorting.md)."""
    gap = 12**0.5 * scores.detach().std() / offsets.diff()
    return spearman_loss(scores, progression, offsets=offsets, regularization_strength=gap)


# loss(scores, grades, progression, offsets). They differ in size, sums over pairs most, but AdamW's steps do not follow
# the size of a gradient: one learning rate serves all.
BASELINE = "squared error"
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    BASELINE: lambda s, grade, y, offsets: mse_loss(s, y),
    "NeuralNDCG": lambda s, grade, y, offsets: neural_ndcg_loss(s, grade, offsets=offsets),
    "LambdaLoss": lambda s, grade, y, offsets: lambda_loss(s, grade, offsets=offsets),
    "ListNet": lambda s, grade, y, offsets: listnet_loss(s, grade, offsets=offsets),
    "Spearman, soft ranks": lambda s, grade, y, offsets: soft_spearman(s, y, offsets),
}
COLOURS = dict(zip(LOSSES, ("#808080", "#1f5f8b", "#c8603a", "#5a8a3c", "#8a5a9c")))


def patients(seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(measurements, grade, progression) of those to learn from, and of a third that is held out."""
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True, scaled=False))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, held_out = order[len(y) // 3 :], order[: len(y) // 3]
    x = (x - x[train].mean(0)) / x[train].std(0)
    edges = y[train].quantile(torch.arange(1, GRADES) / GRADES)
    grade, progression = torch.bucketize(y, edges).float(), (y - y[train].mean()) / y[train].std()
    return tuple((x[part], grade[part], progression[part]) for part in (train, held_out))


def wards(count: int, people: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Who lies in each of `count` wards, one after the other, and where each ward begins."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=source)
    members = [torch.randperm(people, generator=source)[:length] for length in lengths]
    return torch.cat(members), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def ndcg(scores: Tensor, grade: Tensor) -> Tensor:
    """NDCG@CUTOFF of one list."""
    gain, count = 2**grade - 1, min(CUTOFF, len(grade))
    discount = 1 / torch.arange(2.0, count + 2).log2()
    best = (gain.sort(descending=True).values[:count] * discount).sum()
    return (gain[scores.argsort(descending=True)][:count] * discount).sum() / best.clamp(min=1e-10)


def spearman(scores: Tensor, y: Tensor) -> Tensor:
    """Rank correlation, no ties."""
    ranks = torch.stack([scores, y]).argsort(1).argsort(1).float()
    return torch.corrcoef(ranks)[0, 1]


def evaluate(model: nn.Module, held_out: tuple[Tensor, ...], lists: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean NDCG over wards of the patients held out, and the rank correlation over all of these."""
    (x, grade, y), (members, offsets) = held_out, lists
    with torch.no_grad():
        scores = model(x).squeeze(1)
    each = [ndcg(scores[i], grade[i]) for i in members.split(offsets.diff().tolist())]
    return torch.stack(each).mean().item(), spearman(scores, y).item()


def train(name: str, seed: int, epochs: int) -> list[tuple[float, float]]:
    """What `evaluate` gives before training and after each epoch."""
    learned_from, held_out = patients(seed)
    x, grade, y = learned_from
    source = torch.Generator().manual_seed(seed)
    lists = wards(200, len(held_out[0]), source)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    found = [evaluate(model, held_out, lists)]
    for _ in range(epochs):
        for _ in range(STEPS):
            who, offsets = wards(WARDS, len(x), source)
            loss = LOSSES[name](model(x[who]).squeeze(1), grade[who], y[who], offsets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(evaluate(model, held_out, lists))
    return found


def draw(curves: dict[str, Tensor], path: Path) -> None:
    """A column per measure: means over the splits; below, less the baseline on the same split, and standard errors."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for at, title in enumerate((f"NDCG@{CUTOFF}", "Spearman's rank correlation")):
        for name, runs in curves.items():
            apart = (runs - curves[BASELINE])[..., at]
            mean, error = apart.mean(0), apart.std(0) / len(apart) ** 0.5
            colour, epochs = COLOURS[name], range(len(mean))
            panels[0, at].plot(runs[..., at].mean(0), color=colour, label=name)
            panels[1, at].plot(mean, color=colour)
            panels[1, at].fill_between(epochs, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
        panels[0, at].set(title=f"{title}, patients held out")
        panels[1, at].set(title=f"less {BASELINE}", xlabel="epoch")
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(curves: dict[str, Tensor]) -> str:
    """Means after the last epoch, and the differences from the baseline, split by split."""
    before, baseline = curves[BASELINE][:, 0].mean(0).tolist(), curves[BASELINE][:, -1]
    lines = [f"| loss | NDCG@{CUTOFF} | less {BASELINE} | Spearman | less {BASELINE} |", "|---|---:|---:|---:|---:|"]
    lines.append(f"| before training | {before[0]:.3f} | | {before[1]:.3f} | |")
    for name, runs in curves.items():
        apart = runs[:, -1] - baseline
        error = apart.std(0) / len(apart) ** 0.5
        numbers = zip(*(part.tolist() for part in (runs[:, -1].mean(0), apart.mean(0).round(decimals=3) + 0.0, error)))
        cells = [f"{mean:.3f} | {'' if name == BASELINE else f'{d:+.3f} ± {e:.3f}'}" for mean, d, e in numbers]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Tensor]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--splits", type=int, default=20, help="of patients into learned from and held out")
    parser.add_argument("--out", type=Path, default=Path("build/ranker"), help="folder for the CSV and the figure")
    options = parser.parse_args(arguments)
    work = [(name, seed) for name in LOSSES for seed in range(options.splits)]
    runs: dict[str, list] = {name: [] for name in LOSSES}
    for name, seed in tqdm(work, unit="run"):
        runs[name].append(train(name, seed, options.epochs))
    curves = {name: torch.tensor(found) for name, found in runs.items()}  # (splits, epochs + 1, 2)
    print(table(curves))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "ranker.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("loss", "split", "epoch", "ndcg", "spearman"))
        for name, found in curves.items():
            for split, run in enumerate(found.tolist()):
                writer.writerows((name, split, epoch, f"{a:.4f}", f"{b:.4f}") for epoch, (a, b) in enumerate(run))
    draw(curves, options.out / "ranker.png")
    print(f"written to {options.out}: ranker.csv, ranker.png")
    return curves


if __name__ == "__main__":
    main()
