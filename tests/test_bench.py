"""The benchmark suite runs: one small case, its table, and its rows."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[1]


def test_one_quick_case(tmp_path):
    rows = tmp_path / "rows.csv"
    suite = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", "--quick", f"--rows={rows}"]
    suite += ["-k", "frozen_weight and bf16"]
    run = subprocess.run(suite, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "floor: two GEMMs" in run.stdout
    measured = list(csv.DictReader(rows.open(newline="")))
    assert [row["contender"] for row in measured] == ["floor: two GEMMs", "fusedloss", "torch, eager"]
    assert all(float(row["ms"]) > 0 for row in measured) and float(measured[0]["ratio"]) == 1
