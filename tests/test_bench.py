"""The benchmark suite runs: two small cases, their tables, and their rows."""

import csv
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[1]


SOFTMAXES = ("torch, adaptive softmax", "torch, sampled softmax, 8192", "torch, hierarchical softmax")
CASES = {
    "frozen_weight and bf16": ["floor: two GEMMs", "fusedloss", "torch, eager"],
    "heads": ["torch, dense", "fusedloss", "fusedloss.linear_cross_entropy", *SOFTMAXES],
}


@pytest.mark.parametrize("case", CASES)
def test_quick_cases(tmp_path, case):
    rows = tmp_path / "rows.csv"
    suite = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", "--quick", f"--rows={rows}"]
    suite += ["-k", case]
    run = subprocess.run(suite, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert CASES[case][0] in run.stdout
    measured = list(csv.DictReader(rows.open(newline="")))
    assert {row["contender"] for row in measured} == set(CASES[case])
    assert all(float(row["ms"]) > 0 for row in measured) and float(measured[0]["ratio"]) == 1


def test_quick_sorting(tmp_path):
    """Of each kind of operator one; peers take part where they are installed."""
    rows = tmp_path / "rows.csv"
    suite = [sys.executable, "-m", "pytest", "bench/test_sorting_speed.py", "-p", "no:cacheprovider", "--quick"]
    suite += [f"--rows={rows}", "-k"]
    suite += ["test_soft and kl and 0.001 or neural_sort or test_ranking or test_network or test_entmax"]
    run = subprocess.run(suite, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    measured = list(csv.DictReader(rows.open(newline="")))
    ours = {row["case"] for row in measured if row["contender"] == "fusedloss"}
    assert len(ours) == 2 + 1 + 3 + 1 + 1 and ours == {row["case"] for row in measured}
    assert all(float(row["ms"]) > 0 for row in measured)


def test_the_gpu_benchmark_dry(tmp_path):
    """`make gpu`'s benchmark on a CPU, tiny, with the Triton kernels in their interpreter."""
    rows = tmp_path / "rows.csv"
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--quick", f"--rows={rows}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    measured = list(csv.DictReader(rows.open(newline="")))
    cases = {row["case"] for row in measured}
    what = itertools.product(("soft_rank", "soft_sort"), ("l2", "kl"), ("1", "0.001"))
    soft = {f"{name} {kind} {strength} 3x40" for name, kind, strength in what}
    assert soft | {"neural_sort product 2x300"} < cases and len(cases) == 24
    for case in ("sigmoid 96x32", "clip 96x32"):
        ways = {row["contender"] for row in measured if row["case"] == case}
        assert {"fusedloss", "fusedloss, cpu", "torch, dense", "floor: GEMMs, unchunked"} <= ways
        if importlib.util.find_spec("triton"):
            assert "fusedloss, triton, one kernel" in ways
    linear = {row["contender"] for row in measured if row["case"] == "linear 64x32x300"}
    assert {"fusedloss", "fusedloss, cpu, chunked", "torch, eager", "floor: GEMMs, unchunked"} <= linear
    if importlib.util.find_spec("triton"):
        ways = ("chunked", "chunked, one kernel", "streamed")
        assert {f"fusedloss, triton, {way}" for way in ways} <= linear
    factored = {row["contender"] for row in measured if row["case"] == "factored 8x16x300"}
    assert {"fusedloss", "fusedloss, plain torch", "torch, dense", "floor: products"} <= factored
    if importlib.util.find_spec("triton"):
        assert "fusedloss, triton" in factored
    assert all(float(row["ms"]) > 0 for row in measured)
