"""Train a next-word model with hundreds of thousands of classes, with one output layer after the other.

    python examples/train_word_model.py            # or: make words
    python examples/train_word_model.py --sweep    # the Z-loss alone, with other a, b and learning rates

Same text, same trunk, same number of seconds for each output layer; evaluation does not count. Prints a table, and
writes it with a figure and a CSV of held-out accuracy over time.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from heads import HEADS, SWEEP, Head
from torch import Tensor, nn
from tqdm import tqdm
from word_report import Point, Run, describe, draw, table, write_csv
from words import Examples, Words, load_words

CONTEXT, WIDTH, HIDDEN = 8, 128, 256
TRUNK_RATE = 1e-3
MOMENTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the budget: when to evaluate
RANKS = (1, 10, 50)
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
BLOCK = 128  # rows of scores looked at together in an evaluation


class Trunk(nn.Module):
    """The last words' embeddings through one hidden layer: little work, so that the output layer dominates."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, WIDTH, sparse=True)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.layers = nn.Sequential(
            nn.Linear(CONTEXT * WIDTH, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.optimizers = (
            torch.optim.SparseAdam(self.embedding.parameters()),
            torch.optim.Adam(self.layers.parameters(), fused=True),
        )

    def forward(self, contexts: Tensor) -> Tensor:
        return self.layers(self.embedding(contexts).flatten(1))

    def step(self, rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * TRUNK_RATE
            optimizer.step()
            optimizer.zero_grad()


def schedule(done: float) -> float:
    """Learning rates fall along a line to a tenth, over the share of the budget that is spent."""
    return 1 - 0.9 * min(1.0, done)


@torch.no_grad()
def accuracy(trunk: Trunk, head: Head, contexts: Tensor, target: Tensor) -> tuple[float, ...]:
    """The shares of rows whose next word is among the first of `RANKS`; ties, and scores that are NaN, are lost."""
    hits = torch.zeros(len(RANKS))
    for context, wanted in zip(contexts.split(BLOCK), target.split(BLOCK)):
        scores = head.scores(trunk(context))
        ahead = len(scores[0]) - (scores < scores.gather(1, wanted.unsqueeze(1))).sum(1)
        hits += torch.stack([(ahead <= rank).sum() for rank in RANKS])
    return tuple((hits / len(target)).tolist())


def train(make: Callable[..., Head], options: dict, words: Words, seconds: float, held_out: int, seed: int) -> Run:
    """Train for `seconds` of training time; look at `held_out` held-out words at `MOMENTS`."""
    torch.manual_seed(seed)
    trunk, head = Trunk(words.classes + 2), make(WIDTH, words.classes, **options)
    data = Examples(words, words.train, CONTEXT).batches(head.rows, seed)
    asked = next(Examples(words, words.held_out, CONTEXT).batches(held_out, seed=0))
    run = Run(head.name, head.settings, head.rows)
    run.points.append(Point(0.0, 0, accuracy(trunk, head, *asked)))
    spent = 0.0
    with tqdm(total=round(seconds, 1), desc=f"{head.name:>18}", mininterval=1.0, bar_format=BAR) as progress:
        for moment in MOMENTS:
            while spent < moment * seconds:
                started = perf_counter()
                context, target = next(data)
                loss = head.loss(trunk(context), target)
                loss.backward()
                rate = schedule(spent / seconds)
                head.step(rate)
                trunk.step(rate)
                run.steps += 1
                spent += (elapsed := perf_counter() - started)
                progress.update(min(elapsed, max(0.0, seconds - progress.n)))
            run.points.append(Point(spent, run.steps * head.rows, accuracy(trunk, head, *asked)))
            progress.set_postfix(top10=f"{run.points[-1].accuracy[1]:.3f}", loss=f"{loss.item():.3f}")
    run.finite = bool(loss.isfinite())
    return run


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="seconds, on little text: does it still work?")
    parser.add_argument("--heads", nargs="+", choices=tuple(HEADS), default=list(HEADS), help="default: all")
    parser.add_argument("--sweep", action="store_true", help="the Z-loss with the settings of heads.py: SWEEP")
    parser.add_argument("--characters", type=float, default=250e6, help="of text, at most (default: %(default)g)")
    parser.add_argument("--least", type=int, default=2, help="a class was seen this often (default: %(default)s)")
    parser.add_argument("--classes", type=int, help="at most, the most frequent (default: all)")
    parser.add_argument("--held-out", type=int, default=2000, help="words of an evaluation (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="for PyTorch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/words"), help="folder (default: %(default)s)")
    options = parser.parse_args(given)
    if options.quick:
        options.seconds, options.characters, options.held_out = 2.0, 3e6, 200
    return options


def main(given: list[str] | None = None) -> list[Run]:
    options = arguments(given)
    torch.set_num_threads(options.threads)

    print("reading the text of Python's library and of the installed packages ...", flush=True)
    words = load_words(options.seed, int(options.characters), options.least, options.classes)
    data = (
        f"{words.files:,} files, {words.characters / 1e6:.0f} million characters, {len(words.train) / 1e6:.1f} million "
        f"training words; {words.classes:,} classes, which are {100 * words.coverage(words.train):.1f} % of the "
        f"training words and {100 * words.coverage(words.held_out):.1f} % of those held out"
    )
    print(data)

    plans = [("spherical", setting) for setting in SWEEP] if options.sweep else [(name, {}) for name in options.heads]
    runs = []
    for name, settings in plans:
        runs.append(train(HEADS[name], settings, words, options.seconds, options.held_out, options.seed))
        gc.collect()  # the next run must not find this one's weights in memory

    shown = table(runs, RANKS)
    print("\n" + shown)
    options.out.mkdir(parents=True, exist_ok=True)
    name = "word_sweep" if options.sweep else "word_model"
    stem = options.out / (f"{name}_{words.classes}" if options.classes else name)
    where = f"{options.seconds:g} s of training each; {describe(options.threads)}"
    stem.with_suffix(".md").write_text(f"{data}.\n\n{shown}\n\n{where}.\n")
    write_csv(runs, RANKS, stem.with_suffix(".csv"))
    draw(runs, RANKS, f"The next of {words.classes:,} words", stem.with_suffix(".png"))
    print(f"\n{where}\nfigure: {os.path.relpath(stem.with_suffix('.png'))}")
    return runs


if __name__ == "__main__":
    main()
