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

# Registers of a thread, of 65536 on a multiprocessor: 80 leave three blocks of 256 threads running, 128 leave two.
BUDGET = {
    "row_statistics": {"softmax_kernel": 80, "statistics_kernel": 128, "merge_kernel": 64},
    "row_gradient": {"gradient_kernel": 128, "derivative_kernel": 64, "join_kernel": 64},
}

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH: the CUDA kernels were not compiled")


@pytest.fixture(scope="module")
def usage(tmp_path_factory):
    """{source: {(kernel, architecture): (registers, bytes of shared memory, bytes of stack and spills)}} as ptxas tells."""
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
            kernel = next(name for name in BUDGET[source] if name in entry.split()[0])
            instance, architecture = re.match(r"'(\S+)' for 'sm_(\w+)'", entry).groups()
            registers = int(re.search(r"Used (\d+) registers", entry)[1])
            shared = re.search(r"(\d+) bytes smem", entry)
            stack = sum(map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", entry).groups()))
            instance = "".join(re.findall(r"Lb\dE", instance))  # template arguments
            measured = registers, int(shared[1]) if shared else 0, stack
            found.setdefault(source, {})[kernel, instance, architecture] = measured
    return found


@pytest.mark.parametrize("source", BUDGET)
def test_registers_and_spills(usage, source):
    compiled = usage[source]
    for kernel, registers in BUDGET[source].items():
        assert {a for name, _, a in compiled if name == kernel} == set(ARCHITECTURES), kernel
        for key, (used, shared, stack) in compiled.items():
            if key[0] == kernel:
                assert used <= registers and shared <= 4096 and stack == 0, (key, used, shared, stack)


def test_the_extension_asks_for_no_cuda_library():
    """Its CUDA runtime is linked in, and looks for a driver when it is first called."""
    _native = pytest.importorskip("fusedloss._native")
    if not _native.cuda_compiled():
        pytest.skip("the extension was built without CUDA kernels")
    if sys.platform != "linux" or shutil.which("ldd") is None:
        pytest.skip("no ldd to ask")
    needed = subprocess.run(["ldd", _native.__file__], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in needed and not re.search(r"libcu|libnv", needed), needed
