"""The CUDA kernels on the host: built with the host's compiler against tests/cuda_host, called like the extension."""

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

import torch

from fusedloss import _native

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    ROOT / name
    for name in ("csrc/row_statistics.cu", "csrc/column_statistics.cu", "csrc/row_gradient.cu", "tests/cuda_host/host.cpp")
]
SORTING = [ROOT / name for name in ("csrc/permutahedron.cu", "csrc/permutahedron_long.cu", "tests/cuda_host/host.cpp")]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build(folder, name, *defines, sources=SOURCES, others=(), optimized="-O2"):
    """A library of the kernels, one process per source; `others` are objects of an earlier build."""
    flags = ["-std=c++17", optimized, "-fPIC", "-Wno-psabi", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DFL_CUDA_ON_HOST"]
    flags += [f"-D{define}" for define in defines] + [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda_host'}"]
    objects = [folder / f"{name}_{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen([COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", str(o)], stderr=subprocess.PIPE, text=True)
        for source, o in zip(sources, objects)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    library = folder / f"lib{name}.so"
    subprocess.run([COMPILER, "-shared", *map(str, (*objects, *others)), "-o", str(library)], check=True)
    return HostCuda(library)


SOFT = ("soft_rank", "soft_rank_backward", "soft_sort", "soft_sort_backward")


class HostCuda:
    """Stands in for the extension in its CUDA functions, and for its CPU kernels where a test calls those."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.fl_error.restype = ctypes.c_char_p
        for name in ("statistics", "column_statistics", "gradient", *SOFT):
            if hasattr(self.library, f"fl_cuda_{name}_workspace"):
                getattr(self.library, f"fl_cuda_{name}_workspace").restype = ctypes.c_int64

    def __getattr__(self, name):
        return getattr(_native, name)

    def seed(self, seed):
        self.library.fl_host_seed(ctypes.c_uint64(seed))

    def call(self, name, *arguments):
        if getattr(self.library, name)(*arguments):
            raise RuntimeError(self.library.fl_error().decode())

    # As the extension has them.

    def cuda_statistics_workspace(self, tile, stats):
        return self.library.fl_cuda_statistics_workspace(bytes(tile), *_array(stats))

    def cuda_statistics(self, tile, stats, *memory):
        self.call("fl_cuda_statistics", bytes(tile), *_array(stats), *_memory(memory))

    def cuda_column_statistics_workspace(self, tile, stats):
        return self.library.fl_cuda_column_statistics_workspace(bytes(tile), *_array(stats))

    def cuda_column_statistics(self, tile, stats, *memory):
        self.call("fl_cuda_column_statistics", bytes(tile), *_array(stats), *_memory(memory))

    def cuda_gradient_workspace(self, tile, stats, sums, across=()):
        what = bytes(tile), *_array(stats), *_array(across), sums and bytes(sums)
        return self.library.fl_cuda_gradient_workspace(*what)

    def cuda_gradient(self, tile, out, out_stride, out_dtype, stats, sums, across, *memory):
        to = ctypes.c_void_p(out), ctypes.c_int64(out_stride), out_dtype
        what = *_array(stats), *_array(across), sums and bytes(sums)
        self.call("fl_cuda_gradient", bytes(tile), *to, *what, *_memory(memory))

    def cuda_gradient_of_exponentials(self, tile, stats, sums, *memory):
        what = bytes(tile), *_array(stats), sums and bytes(sums)
        self.call("fl_cuda_gradient_of_exponentials", *what, *_memory(memory))

    def cuda_soft(self, name, problem, *arguments):
        """soft_rank, soft_sort and their backward: pointers, then the workspace's three."""
        pointers, memory = arguments[:-3], arguments[-3:]
        self.call(f"fl_cuda_{name}", bytes(problem), *map(ctypes.c_void_p, pointers), *_memory(memory))

    def cuda_soft_workspace(self, name, problem):
        return getattr(self.library, f"fl_cuda_{name}_workspace")(bytes(problem))

    # As the CPU kernels are called: with a workspace that holds NaN, and nothing behind its end to be touched.

    def statistics(self, tile, stats):
        with Workspace(self.cuda_statistics_workspace(tile, stats)) as memory:
            self.cuda_statistics(tile, stats, *memory)

    def column_statistics(self, tile, stats):
        with Workspace(self.cuda_column_statistics_workspace(tile, stats)) as memory:
            self.cuda_column_statistics(tile, stats, *memory)

    def gradient(self, tile, out, out_stride, out_dtype, statistics, sums=None, across=()):
        with Workspace(self.cuda_gradient_workspace(tile, statistics, sums, across)) as memory:
            self.cuda_gradient(tile, out, out_stride, out_dtype, statistics, sums, across, *memory)

    def gradient_of_exponentials(self, tile, stats, sums=None):
        with Workspace(self.cuda_gradient_workspace(tile, stats, sums)) as memory:
            self.cuda_gradient_of_exponentials(tile, stats, sums, *memory)


def _array(stats):
    return b"".join(map(bytes, stats)), len(stats)


def _memory(memory):
    workspace, size, stream = memory
    return ctypes.c_void_p(workspace), ctypes.c_int64(size), ctypes.c_void_p(stream)


class Workspace:
    def __init__(self, size):
        self.size, self.memory = size, torch.full((size + 80,), 255, dtype=torch.uint8)

    def __enter__(self):
        self.start = self.memory.data_ptr() + -self.memory.data_ptr() % 16
        return self.start, self.size, 0

    def __exit__(self, *error):
        end = self.start - self.memory.data_ptr() + self.size
        assert (self.memory[end:] == 255).all(), "written past the workspace"


@functools.cache
def missing():
    """Why the kernels cannot be built here; None when they can."""
    return None if COMPILER else "no C++ compiler (CXX, g++ or clang++) to build the kernels for the host"
