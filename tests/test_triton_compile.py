"""Every Triton kernel compiled for every target that it is meant for, and what it takes there. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
# The budget of each kernel: registers of a thread and bytes of shared
# memory of a program. 64 registers leave room for four programs of 256 threads on a multiprocessor,
# 80 for three, 128 for two, 255 for one.
REGISTERS = {
    "statistics": 128,
    "gradient": 255,  # with all five sums over rows at once, options and all; 96 without
    "gradient_of_exponentials": 96,
    "derivatives": 64,
    "merge_parts": 64,
    "linear_statistics": 255,
    "linear_gradient": 255,
    # The factored layer's: many short programs, whose launch takes longer than they do.
    "visit": 64,
    "backward": 40,
    "prepare": 48,
    "column_sums": 96,
    "grams": 88,
    "state": 96,
    "fold": 136,
    "settle": 40,
    "segments": 80,
    "threshold_rows": 128,
    "threshold_backward": 64,
    # Sums over pairs.
    "pair_sums": 112,
    "position_sums": 72,
    # Relaxed permutations; fp64 numbers take two registers.
    "sides": 80,
    "banded_sums": 80,
    "banded_slopes": 96,
    "neural_slopes": 80,
}
# Several targets of a row at a time, their losses in float64; several columns times a permutation.
SEVERAL_REGISTERS = {"visit": 168, "banded_sums": 128, "banded_slopes": 128}
PLAIN_REGISTERS = {"statistics": 112, "gradient": 96}  # where raw scores are the scores
COLUMN_REGISTERS = {"statistics": 232, "gradient": 200}  # a program of one warp, and of four where sums are gathered
SPILLED = {}  # bytes, by kernel and title
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):  # measured with 3.6 and its ptxas 12.8
    PLAIN_REGISTERS = {"statistics": 120, "gradient": 104}  # 119 ("others") and 101 ("smooth")
    REGISTERS |= {"column_sums": 112, "fold": 168, "banded_sums": 96, "neural_slopes": 96}
    SEVERAL_REGISTERS |= {"visit": 176, "banded_sums": 152}  # 175
    SPILLED = {("statistics", "list"): 8, ("gradient", "log_relu with options"): 8}
    SPILLED |= {("threshold_rows", "entmax15 loss"): 8, ("banded_slopes", "soft sort"): 8}
SHARED = {"linear_statistics": 128 << 10, "linear_gradient": 128 << 10}  # a pipeline of four steps
SHARED |= {"gradient": 16 << 10, "gradient_of_exponentials": 8 << 10}
SHARED |= dict.fromkeys(("visit", "backward", "prepare"), 4 << 10) | dict.fromkeys(("grams", "state", "fold"), 8 << 10)
COLUMN_SHARED = SHARED | {"statistics": 2 << 10, "gradient": 8 << 10}
MOST_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "mfma"}
PRODUCTS = {"linear_statistics", "linear_gradient"}
FACTORED = {"visit", "backward", "prepare", "column_sums", "grams", "state", "fold", "settle", "segments"}
THRESHOLD = {"threshold_rows", "threshold_backward"}
PAIRS = {"pair_sums", "position_sums"}
PERMUTATIONS = {"sides", "banded_sums", "banded_slopes", "neural_slopes"}
OTHERS = {"statistics", "merge_parts", "gradient", "gradient_of_exponentials", "derivatives"}
KERNELS = PRODUCTS | FACTORED | THRESHOLD | PAIRS | PERMUTATIONS | OTHERS


@pytest.mark.parametrize("target", MATRIX)
def test_kernels_compile_within_their_budget(target, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # what is tested is this compiler, not what a cache remembers
    command = [sys.executable, str(HERE / "triton_compile.py"), target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-6000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {each["kernel"] for each in found} == KERNELS
    over = []
    for each in found:
        kernel, plain, columns = each["kernel"], "options" not in each["title"], "of columns" in each["title"]
        most = (
            (COLUMN_SHARED if columns else SHARED).get(kernel, 1 << 10) if target != "gfx942" else MOST_SHARED[target]
        )
        if each["shared"] > most + 64:  # barriers of the pipeline
            over.append(each)
        if target == "sm_90":
            special = COLUMN_REGISTERS if columns else PLAIN_REGISTERS if plain else {}
            special = SEVERAL_REGISTERS if "several" in each["title"] else special
            registers = special.get(kernel, REGISTERS[kernel])
            if each["registers"] > registers or each["spilled"] > SPILLED.get((kernel, each["title"]), 0):
                over.append(each)
        if kernel in PRODUCTS and MATRIX[target] not in each["instructions"]:
            over.append(each)
    assert not over, "\n".join(map(str, over))
