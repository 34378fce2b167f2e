"""What the two runs gave, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import matplotlib

matplotlib.use("Agg")  # draws to a file; needs no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from memory import INTERVAL, MemoryTrace

MIB = 2**20
COLOURS = {"ordinary": "#c8603a", "fused": "#1f5f8b"}


@dataclass(frozen=True)
class Step:
    """One step: its loss, four times in seconds, and its memory where that was sampled."""

    loss: float
    started: float
    loss_started: float
    loss_ended: float
    ended: float
    trace: MemoryTrace | None

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def loss_seconds(self) -> float:
        return self.loss_ended - self.loss_started

    @property
    def loss_memory(self) -> float | None:
        """Most MiB resident during the loss step, above the level just before it."""
        if self.trace is None:
            return None
        before = self.trace.level(at=self.loss_started)
        return (self.trace.peak(self.loss_started, self.loss_ended) - before) / MIB


@dataclass
class Run:
    """One training run."""

    name: str
    tokens_per_step: int
    steps: list[Step] = field(default_factory=list)
    held_out: float = float("nan")

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def profiled(self) -> list[Step]:
        return [step for step in self.steps if step.trace is not None]

    def median(self, quantity: Callable[[Step], float]) -> float:
        """The median over the steps that no sampling thread slowed down."""
        return median(quantity(step) for step in self.steps if step.trace is None)

    @property
    def loss_memory(self) -> float | None:
        return max((step.loss_memory for step in self.profiled), default=None)


def differences(one: Run, other: Run) -> list[float]:
    """|loss of one run - loss of the other|, step by step."""
    return [abs(a - b) for a, b in zip(one.losses, other.losses)]


def table(ordinary: Run, fused: Run, threads: int, dtype: str) -> str:
    """The comparison as aligned text, with a note on how each figure was measured."""
    runs = (ordinary, fused)
    step_times = [run.median(lambda step: step.seconds) for run in runs]
    rows = [
        measured("step, median", step_times, "{:,.3f} s"),
        measured("loss step, median", [run.median(lambda step: step.loss_seconds) for run in runs], "{:,.3f} s"),
        measured("loss step, peak extra memory", [run.loss_memory for run in runs], "{:,.0f} MiB"),
        measured("tokens per second", [run.tokens_per_step / time for run, time in zip(runs, step_times)], "{:,.0f}"),
        compared("loss, first step", [run.losses[0] for run in runs]),
        compared("loss, mean of the last five steps", [mean(run.losses[-5:]) for run in runs]),
        compared("loss, held-out files", [run.held_out for run in runs]),
    ]
    lines = [("", "ordinary", "fused", "fused / ordinary"), *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    text.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))

    gaps = differences(ordinary, fused)
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    text += [
        f"largest loss difference over the run: {gaps[worst]:.1e} (step {worst + 1} of {len(gaps)})",
        "",
        f"{len(gaps)} steps of {ordinary.tokens_per_step:,} tokens, {dtype}, {threads} threads. "
        "Loss step: from hidden states to the loss",
        "and back to their gradient and the weight's. Peak extra memory: " + memory_method(ordinary),
    ]
    return "\n" + "\n".join(text)


def measured(name: str, values: Sequence[float | None], form: str) -> tuple[str, ...]:
    """A row with the ratio of the two values."""
    if None in values:
        return (name, "n/a", "n/a", "")
    ordinary, fused = values
    return (name, form.format(ordinary), form.format(fused), f"{fused / ordinary:.2f}")


def compared(name: str, values: Sequence[float]) -> tuple[str, ...]:
    """A row whose two values should be the same."""
    return (name, *(f"{value:.5f}" for value in values), "")


def memory_method(run: Run) -> str:
    if not run.profiled:
        return "n/a, this system has no\n/proc/self/statm."
    return (
        "resident set of this\n"
        f"process, sampled every {1000 * INTERVAL:g} ms, above its level before the loss step; the largest of "
        f"{len(run.profiled)} steps\n"
        "(not among the timed ones). It includes the two gradients, which every way must allocate."
    )


def draw(ordinary: Run, fused: Run, path: Path) -> None:
    """Write a PNG: on the left both loss curves and their difference, on the right both memory profiles."""
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subfigures(1, 2)
    losses, gaps = left.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    draw_losses(losses, ordinary, fused)
    draw_differences(gaps, ordinary, fused)
    profiles = right.subplots(2, 1, sharex=True, sharey=True)
    right.suptitle("Memory of the process over one training step", fontsize="large")
    right.supylabel("MiB above the level before the loss step", fontsize="medium")
    profiles[1].set_xlabel("seconds since the step began")
    for axes, run in zip(profiles, (ordinary, fused)):
        draw_memory(axes, run)
    for axes in (losses, gaps, *profiles):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_losses(axes: Axes, ordinary: Run, fused: Run) -> None:
    steps = range(1, len(ordinary.steps) + 1)
    # Wide below narrow: both stay visible where they coincide.
    axes.plot(steps, ordinary.losses, color=COLOURS["ordinary"], linewidth=5, alpha=0.45, label="ordinary")
    axes.plot(steps, fused.losses, color=COLOURS["fused"], linewidth=1.3, label="fused")
    axes.set(title="Training loss", ylabel="nats per token")
    axes.legend(frameon=False)


def draw_differences(axes: Axes, ordinary: Run, fused: Run) -> None:
    gaps = differences(ordinary, fused)
    axes.plot(range(1, len(gaps) + 1), gaps, color="0.3", linewidth=1)
    axes.set(xlabel="step", ylabel="|difference|")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 2))
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_memory(axes: Axes, run: Run) -> None:
    """Resident memory over the last step at which it was sampled; the time of the loss step is shaded."""
    axes.set_title(run.name, color=COLOURS[run.name], fontsize="medium", loc="left")
    if not run.profiled:
        axes.text(0.5, 0.5, "n/a: no /proc/self/statm here", ha="center", transform=axes.transAxes)
        return
    step, colour = run.profiled[-1], COLOURS[run.name]
    level = step.trace.level(at=step.loss_started)
    samples = [(time - step.started, (resident - level) / MIB) for time, resident in step.trace.samples]
    axes.plot(*zip(*samples), color=colour, linewidth=1.4)
    axes.axvspan(step.loss_started - step.started, step.loss_ended - step.started, color=colour, alpha=0.12, lw=0)
    axes.axhline(step.loss_memory, color=colour, linewidth=0.8, linestyle=":")
    axes.annotate(
        f"loss step (shaded): {step.loss_memory:,.0f} MiB",
        xy=(0.99, step.loss_memory),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
    )
