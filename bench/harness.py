"""Measuring: a correctness gate, contenders that take turns in one run, medians, ratios and peak memory."""

from __future__ import annotations

import csv
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests")]  # the demo's memory sampler, the tests' tolerance policy

import tolerance  # noqa: E402
from memory import SUPPORTED as MEMORY_SUPPORTED  # noqa: E402
from memory import MemoryTrace  # noqa: E402

import fusedloss  # noqa: E402

THREADS = 2
KEPT = fusedloss.memory.WORKSPACE_LIMIT  # bytes of scratch memory that a call leaves to the next one, by default
MIB = 1 << 20
OURS = "fusedloss"
SECONDS = 25  # of turns per case
ROUNDS = 3, 15  # fewest and most turns
GATE = 64  # rows, hit classes and other classes whose gradients the gate looks at
LOSS_ERROR = 1e-6
QUIET = 0.05  # of the processor for other processes, at most

Call = Callable[[], Sequence[Tensor]]  # one step; returns the loss and the gradients asked for


@dataclass
class Comparison:
    """One case: contenders by name, of which OURS is under test and the first is what ratios are taken to."""

    case: str
    dtype: str
    contenders: dict[str, Call]
    check: Callable[[], None]
    chunks: int = 0
    accumulator_bytes: int = 0
    once: dict[str, Callable[[], tuple[float, float]]] = field(default_factory=dict)  # too slow to take turns
    note: str = ""
    seconds: float = SECONDS  # of turns


@dataclass(frozen=True)
class Row:
    machine: str
    commit: str
    torch: str
    case: str
    dtype: str
    contender: str
    ms: float  # median
    ratio: float  # to the case's first contender
    peak_mib: float  # beyond inputs and what is returned
    accumulator_mib: float  # of it: dW in fp32
    chunks: int
    rounds: int
    busy: float  # share of the processor that other processes took meanwhile
    note: str


def compare(benchmark, comparison: Comparison, machine: str, quick: bool = False) -> list[Row]:
    """Check, then time `comparison`; pytest-benchmark times ours, and before each of its rounds the others run."""
    comparison.check()
    calls = comparison.contenders
    first, peaks = {}, {}
    for name, call in calls.items():
        if "compile" in name:
            call()
        fusedloss.set_workspace_limit(0)  # a call that finds scratch memory of an earlier one would seem to need none
        first[name], peaks[name] = traced(call)  # the warm-up too
        fusedloss.set_workspace_limit(KEPT)
    turn = sum(first.values())
    fewest, most = (2, 2) if quick else (2 if turn > SECONDS else ROUNDS[0], ROUNDS[1])
    rounds = max(fewest, min(most, int(comparison.seconds / turn)))
    times: dict[str, list[float]] = {name: [] for name in calls}

    spent = []  # processor time, at the start of every turn

    def others() -> None:
        spent.append(processor_seconds())
        for name, call in calls.items():
            if name != OURS:
                call()  # in a training loop each step finds the memory that the last one gave back; so does each turn
                start = perf_counter()
                call()
                times[name].append(perf_counter() - start)
        calls[OURS]()

    benchmark.pedantic(calls[OURS], setup=others, rounds=rounds)
    times[OURS] = list(benchmark.stats.stats.data)
    turns, busy = undisturbed([*spent, processor_seconds()])
    median = {name: statistics.median(values[turn] for turn in turns) for name, values in times.items()}
    counts = dict.fromkeys(times, len(turns))
    for name, call in comparison.once.items():
        median[name], peaks[name] = call()
        counts[name] = 1
    floor = median[next(iter(calls))]
    about = machine, commit(), torch.__version__, comparison.case, comparison.dtype
    rows = []
    for name, seconds in median.items():
        ours = name.startswith(OURS)
        more = (comparison.accumulator_bytes / MIB, comparison.chunks) if ours else (0.0, 0)
        figures = 1e3 * seconds, seconds / floor, peaks[name] / MIB
        rows.append(Row(*about, name, *figures, *more, counts[name], busy, comparison.note))
        benchmark.extra_info[name] = {k: v for k, v in asdict(rows[-1]).items() if k in ("ms", "ratio", "peak_mib")}
    benchmark.extra_info["chunks"] = comparison.chunks
    return rows


def undisturbed(spent: list[tuple[float, float]]) -> tuple[list[int], float]:
    """The turns that other processes left alone (all turns, if fewer than two), and the others' share during them."""
    shares = []
    for before, after in zip(spent, spent[1:]):
        everybody, own = (b - a for a, b in zip(before, after))
        shares.append(max(0.0, everybody - own) / max(everybody, 1e-9))
    quiet = [turn for turn, share in enumerate(shares) if share <= QUIET]
    turns = quiet if len(quiet) >= 2 else list(range(len(shares)))
    return turns, statistics.mean(shares[turn] for turn in turns)


def processor_seconds() -> tuple[float, float]:
    """Seconds of processor time that all processes have taken (as far as Linux tells), and that this one has."""
    own = sum(os.times()[:2])
    try:
        user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    except OSError:
        return own, own
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK"), own


def traced(call: Call) -> tuple[float, float]:
    """Seconds and peak bytes of one call, beyond what was there before and what it returns."""
    if not MEMORY_SUPPORTED:
        start = perf_counter()
        call()
        return perf_counter() - start, float("nan")
    with MemoryTrace() as trace:
        start = perf_counter()
        result = call()
        seconds = perf_counter() - start
        trace.settle()
    extra = trace.peak(start, perf_counter()) - trace.level(start) - sum(t.nbytes for t in result)
    return seconds, max(0, extra)


def alone(limit: float, make: Callable[..., Call], *arguments: object) -> tuple[float, float]:
    """`traced` of a call that may take very long: made and run in a process that is ended after `limit` seconds."""
    here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_alone, args=(there, make, arguments), daemon=True)
    process.start()
    here.recv()  # it is ready; now the clock runs
    result = here.recv() if here.poll(limit) else (float("inf"), float("nan"))
    process.kill()
    process.join()
    return result


def _alone(pipe, make: Callable[..., Call], arguments: tuple) -> None:
    torch.set_num_threads(THREADS)
    call = make(*arguments)
    pipe.send("ready")
    pipe.send(traced(call))


# --- the gate ------------------------------------------------------------------------------------------------------


def check_linear(call: Call, x: Tensor, w: Tensor, target: Tensor) -> None:
    """Assert a mean cross-entropy of x wᵀ and its gradients (dX, and dW unless frozen) by the tests' tolerance policy.

    Looked at: the loss; dX of some rows; dW of some classes that are targets and of some that are none.
    """
    loss, dx, *dw = call()
    x, w, keep = x.detach(), w.detach(), target >= 0
    x, dx, target = x[keep], dx[keep], target[keep]
    count = len(target)
    lse = log_partitions(x, w)
    truth = (lse - (x.double() * w[target].double()).sum(1)).mean()
    allowed = LOSS_ERROR + (0 if x.device.type == "cpu" else 4 * honest_error(x, w, target, truth))
    assert tolerance.error(loss, truth) <= allowed, f"loss {loss.item()}, expected {truth.item()}"

    picked = torch.randperm(count, device=x.device)[:GATE]
    gradients = []
    for dtype in (torch.float64, torch.float32):
        p = torch.softmax(x[picked].to(dtype) @ w.to(dtype).t(), 1)
        p[torch.arange(len(picked), device=x.device), target[picked]] -= 1
        gradients.append(p / count)
    exact, honest = gradients[0], gradients[1].to(w.dtype).double()
    tolerance.check(dx[picked], exact @ w.double(), (honest @ w.double()).to(x.dtype), "dX")
    if not dw:
        return
    hit = torch.zeros(w.shape[0], dtype=torch.bool, device=w.device).index_fill_(0, target, True)
    for what, classes in (("dW of hit classes", hit), ("dW of the other classes", ~hit)):
        classes = classes.nonzero().squeeze(1)
        classes = classes[torch.randperm(len(classes), device=w.device)[:GATE]]
        gradients = []
        for dtype in (torch.float64, torch.float32):
            p = torch.exp(x.to(dtype) @ w[classes].to(dtype).t() - lse.to(dtype)[:, None])
            gradients.append((p - (target[:, None] == classes).to(dtype)) / count)
        exact, honest = gradients[0], gradients[1].to(w.dtype).double()
        tolerance.check(dw[0][classes], exact.t() @ x.double(), (honest.t() @ x.double()).to(w.dtype), what)


def honest_error(x: Tensor, w: Tensor, target: Tensor, truth: Tensor) -> float:
    """Relative error of the mean loss from fp32 scores as the device's matrix units make them, which round toward 0."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part, at in zip(x.split(256), target.split(256)):
        scores = torch.mm(part, w.t(), out_dtype=torch.float32).double()
        total += (scores.logsumexp(1) - scores.gather(1, at[:, None])[:, 0]).sum()
    return tolerance.error(total / len(target), truth)


def log_partitions(x: Tensor, w: Tensor, rows: int = 256) -> Tensor:
    """(N,) float64 log-sum-exps of x wᵀ; fp32 scores, whose errors the sum over the classes averages away."""
    wide = torch.float32 if x.device.type == "cpu" else torch.float64  # a device has the time
    w = w.to(wide)
    parts = []
    for part in x.split(rows):
        scores = part.to(wide) @ w.t()
        top = scores.amax(1, keepdim=True)
        sums = scores.sub_(top).exp_().sum(1, dtype=torch.float64)
        parts.append(sums.log() + top.squeeze(1).double())
    return torch.cat(parts)


# --- rows and tables -----------------------------------------------------------------------------------------------


def machine() -> str:
    """Processor, cores, and the instructions that decide how fast it multiplies."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    found = dict(tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    flags = set(found.get("flags", found.get("Features", "")).split())
    known = (("avx512_bf16", "AVX-512 BF16"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
    best = next((name for flag, name in known if flag in flags), "no AVX2")
    amx = "AMX" if "amx_bf16" in flags else "no AMX"
    return f"{found.get('model name', 'unknown')}, {THREADS} threads, {best}, {amx}"


def commit() -> str:
    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:  # no git
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "fusedloss", "csrc")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def append(path: Path, rows: list[Row]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(f.name for f in fields(Row))
        for row in rows:
            writer.writerow(f"{v:.5g}" if isinstance(v, float) else v for v in asdict(row).values())


def table(rows: list[Row]) -> str:
    """Plain text, one line per contender, a case's lines together."""
    head = f"{'ms':>9} {'ratio':>7} {'peak MiB':>9} {'dW fp32':>8} {'chunks':>6}"
    lines = [f"{'case':40} {'dtype':5} {'contender':25} {head}"]
    before = None
    for row in rows:
        case = (row.case, row.dtype)
        if case != before:
            lines.append("")
        shown = case if case != before else ("", "")
        own = f"{row.accumulator_mib:8.0f} {row.chunks:6d}" if row.chunks else ""
        figures = f"{row.ms:9.1f} {row.ratio:7.3f} {row.peak_mib:9.0f}"
        lines.append(f"{shown[0]:40} {shown[1]:5} {row.contender:25} {figures} {own}".rstrip())
        notes = [row.note] if row.note else []
        if row.busy > QUIET:
            notes.append(f"NOT QUIET: other processes took {row.busy:.0%} of the processor time")
        if case != before and notes:
            lines.append(f"    ({'; '.join(notes)})")
        before = case
    return "\n".join(lines)
