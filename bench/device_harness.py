"""Measuring on a device: contenders in turn, medians, peak memory, rows, bars."""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from harness import MIB, OURS, Call, Row, append

ROUNDS = 3, 12
SECONDS = 8.0  # of turns per case


def importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception as error:  # a peer that does not import is told, never a reason to stop
        print(f"  {name} is left out: {type(error).__name__}: {error}".splitlines()[0], flush=True)
        return False
    return True


@contextmanager
def limited(backend, **limits: object):
    """With these `Limits` of a backend: what it does only where they say so."""
    plain = backend.limits
    backend.limits = lambda device: replace(plain(device), **limits)
    try:
        yield
    finally:
        backend.limits = plain


class Clock:
    """Seconds of a call on the device, and its peak memory."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.device = device

    def seconds(self, call: Call) -> float:
        if not self.cuda:
            start = perf_counter()
            call()
            return perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize(self.device)
        del result
        return start.elapsed_time(end) / 1e3

    def peak(self, call: Call) -> float:
        if not self.cuda:
            call()
            return float("nan")
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before - sum(t.nbytes for t in result)


failures: list[str] = []  # of ours; the run goes on, and fails at its end


def measure(
    case: str, calls: dict[str, Call], check: Callable[[Call], None], clock: Clock, about, quick: bool, dtype="bf16"
):
    """Rows of one case. A contender that fails (out of memory, wrong answer) is told and left out."""
    peaks, notes = {}, {}
    for name, call in list(calls.items()):
        try:
            peaks[name] = clock.peak(call)
            if not name.startswith("floor"):
                check(call)
        except AssertionError as wrong:
            notes[name] = f"wrong: {str(wrong).splitlines()[0]}"
        except Exception as error:
            notes[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:160]
            print(f"  {case}: {name} {notes[name]}", flush=True)
            del calls[name]
            if clock.cuda:
                torch.cuda.empty_cache()
    failures.extend(f"{case}: {name}: {note}" for name, note in notes.items() if name.startswith(OURS))
    spent = sum(clock.seconds(call) for call in calls.values())
    rounds = 2 if quick else max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / max(spent, 1e-9))))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock.seconds(call))
    median = {name: statistics.median(values) for name, values in times.items()}
    least = min(seconds for name, seconds in median.items() if name.startswith("floor"))
    fields = lambda name: (1e3 * median[name], median[name] / least, peaks[name] / MIB, 0.0, 0, rounds, 0.0)  # noqa: E731
    return [Row(*about, case, dtype, name, *fields(name), notes.get(name, "")) for name in calls]


def versions() -> str:
    found = [f"torch {torch.__version__}"]
    for name in ("triton", "liger_kernel", "cut_cross_entropy", "quack", "siglip_kernel", "inf_cl", "torchsort"):
        module = sys.modules.get(name)
        if module is not None:
            found.append(f"{name} {getattr(module, '__version__', '?')}")
    return ", ".join(found)


def colour(contender: str) -> str:
    named = {"floor": "tab:gray", OURS: "tab:blue"}
    return next((c for name, c in named.items() if contender.startswith(name)), "tab:orange")


def plot(rows: list[Row], path: Path) -> None:
    """Bars of the times as multiples of the floor, a panel per case."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed", flush=True)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = plt.subplots(len(cases), 1, figsize=(9, 2.6 * len(cases)), squeeze=False)
    for case, axis in zip(cases, axes[:, 0]):
        mine = [row for row in rows if row.case == case]
        axis.barh([r.contender for r in mine], [r.ratio for r in mine], color=[colour(r.contender) for r in mine])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(case, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("time, × floor")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


_written = 0


def report(rows: list[Row], path: Path | None) -> None:
    """Write what is new at once: a run that is cut short has told what it saw."""
    global _written
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, rows[_written:])
    for row in rows[_written:]:
        figures = f"{row.ms:9.2f} ms {row.ratio:7.3f} {row.peak_mib:8.0f} MiB"
        print(f"  {row.case:34} {row.contender:38} {figures} {row.note}", flush=True)
    _written = len(rows)
