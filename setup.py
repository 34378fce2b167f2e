"""Builds fusedloss._native with CMake and ninja. Metadata stand in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Any failure of CMake or the compiler is the build's failure: there is no package without its kernels.

    CMake says whether CUDA kernels are among them; CMAKE_ARGS=-DFUSEDLOSS_CUDA=ON insists, OFF leaves them out.
    """

    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(
            ["cmake", "--build", str(build), *(["-j", str(self.parallel)] if self.parallel else [])], check=True
        )


setup(
    # The folder kernels/ is the package fusedloss.kernels.
    packages=find_packages(include=["fusedloss", "fusedloss.*"])
    + ["fusedloss.kernels"]
    + [f"fusedloss.kernels.{name}" for name in find_packages("kernels")],
    package_dir={"fusedloss.kernels": "kernels"},
    ext_modules=[Extension("fusedloss._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
