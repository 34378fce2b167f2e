"""The CUDA kernels compiled for every architecture: no spills, and no more registers than leave enough threads running."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "90a", "100")

# Registers of a thread, of 65536 on a multiprocessor: 80 leave three blocks of 256 threads running, 128 leave two. By name
# and template arguments: what knows no labels, thresholds and statistics of columns, the last of them, is held to less.
BUDGET = {
    "row_statistics": {"softmax_kernel.0": 80, "softmax_kernel.1": 128, "statistics_kernel": 128, "merge_kernel": 64},
    "column_statistics": {"column_kernel": 128, "merge_kernel": 64},
    "row_gradient": {
        **{"gradient_kernel0.0": 80, "gradient_kernel1.0": 128, "gradient_kernel..1": 128},
        **{"derivative_kernel": 64, "derivative_across_kernel": 64, "join_kernel": 64},
    },
    # A row's block of 512 threads may fill a multiprocessor with its shared memory; 128 registers are there for each.
    "permutahedron": {"forward_kernel.": 104, "backward_kernel.": 104},
    "permutahedron_long": {
        **{"leaf_kernel.": 104, "merge_kernel.": 104},
        **{"answer_kernel.": 104, "derivative_kernel.": 120, "summand_kernel.": 80},
        **{"(gather|gather_sorted|rows|spread|scan|carry|total|clear)_kernel.": 88},
    },
}
STACK = {"column_kernel": 192}  # bytes: states of 8 statistics of 3 doubles, which a thread has to itself

pytestmark = [pytest.mark.host, pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH: the CUDA kernels were not compiled")]


@pytest.fixture(scope="module")
def usage(tmp_path_factory):
    """{source: {(kernel, architecture): (registers, bytes of shared memory, of stack, of spills)}} as ptxas tells."""
    folder, running = tmp_path_factory.mktemp("cubins"), {}
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    for source in BUDGET:
        command = [NVCC, "-std=c++17", "-O3", "-fatbin", "-Xptxas=-v", *targets, "-o", folder / source]
        command.append(ROOT / "csrc" / f"{source}.cu")
        running[source] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    found = {}
    for source, process in running.items():
        _, said = process.communicate()
        assert process.returncode == 0, said
        entries = re.split(r"Compiling entry function ", said)[1:]
        assert not re.search(r"warning", said, re.IGNORECASE), said
        for entry in entries:
            mangled, architecture = re.match(r"'(\S+)' for 'sm_(\w+)'", entry).groups()
            if "2fl4cuda" not in mangled.split("_kernel")[0]:
                continue  # of CUB's sort, which has budgets of its own
            kernel = re.search(r"[a-z_]+_kernel", mangled)[0] + "".join(re.findall(r"Lb(\d)E", mangled))
            registers = int(re.search(r"Used (\d+) registers", entry)[1])
            shared = re.search(r"(\d+) bytes smem", entry)
            stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", entry).groups()
            stack, *spills = map(int, stack)
            measured = registers, int(shared[1]) if shared else 0, stack, sum(spills)
            seen = found.setdefault(source, {}).get((kernel, architecture), measured)  # of another type of values
            found[source][kernel, architecture] = tuple(map(max, seen, measured))
    return found


@pytest.mark.parametrize("source", BUDGET)
def test_registers_and_spills(usage, source):
    left = dict(usage[source])
    for pattern, registers in BUDGET[source].items():
        mine = {key: left.pop(key) for key in list(left) if re.fullmatch(pattern, key[0])}
        assert {a for _, a in mine} == set(ARCHITECTURES), pattern
        for key, (used, shared, stack, spills) in mine.items():
            assert used <= registers and shared <= 4096 and spills == 0, (key, used, shared, stack, spills)
            assert stack <= STACK.get(pattern, 0), (key, stack)
    assert not left, "kernels without a budget"


def test_the_extension_asks_for_no_cuda_library():
    """Its CUDA runtime is linked in, and looks for a driver when it is first called."""
    _native = pytest.importorskip("fusedloss._native")
    if not _native.cuda_compiled():
        pytest.skip("the extension was built without CUDA kernels")
    if sys.platform != "linux" or shutil.which("ldd") is None:
        pytest.skip("no ldd to ask")
    needed = subprocess.run(["ldd", _native.__file__], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in needed and not re.search(r"libcu|libnv", needed), needed
