"""The resident memory of this process over time, where the system tells it (Linux: /proc)."""

from __future__ import annotations

import ctypes
import os
import threading
from time import perf_counter

STATM = "/proc/self/statm"
SUPPORTED = os.path.exists(STATM)
INTERVAL = 0.0005  # seconds between samples


class MemoryTrace:
    """Samples the resident set from a thread while a with-block runs.

    PyTorch releases the interpreter lock inside its kernels, so the samples go on while those run. Peaks shorter
    than `INTERVAL` can be missed; a score matrix lives a thousand times longer.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []  # (perf_counter seconds, bytes)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryTrace:
        self._file = os.open(STATM, os.O_RDONLY)
        self.settle()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self._file)

    def settle(self) -> None:
        """Give freed memory back to the system, then sample.

        The allocator keeps some of what was freed. A measured step that filled it again would seem to need nothing.
        """
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)
        self._sample()

    def level(self, at: float) -> int:
        """Bytes at the last sample up to the time `at`."""
        return [resident for time, resident in self.samples if time <= at][-1]

    def peak(self, start: float, end: float) -> int:
        """The most bytes seen between two times."""
        return max(resident for time, resident in self.samples if start <= time <= end)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        resident_pages = int(os.pread(self._file, 128, 0).split()[1])
        self.samples.append((perf_counter(), resident_pages * os.sysconf("SC_PAGE_SIZE")))
