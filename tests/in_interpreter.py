"""Tests of Triton kernels start again in Triton's interpreter, which a process has from its start or not at all."""

import os
import subprocess
import sys


def passes_in_the_interpreter(file, *selection):
    """That pytest passes on this file; what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", file, *selection]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    return found.stdout
