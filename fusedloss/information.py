"""`fusedloss.info()`: which backend computes what, and why not the others."""

from __future__ import annotations

import torch

from . import backends
from ._version import __version__


class Info(str):
    """A report that shows itself readably at the prompt."""

    def __repr__(self) -> str:
        return str(self)


def info() -> Info:
    """Which backend is live for which device and dtype, and why the others are not."""
    lines = [f"fusedloss {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"]
    lines += [f"  {device:5} {dtype:9} {what}" for device, dtype, what in backends.report()]
    from .spherical import native_products  # which is made of all the rest

    lines.append(f"  {'cpu':5} spherical {native_products.why_not() or 'compiled steps, BLAS of torch'}")
    from .sorting import projection

    lines += [f"  {kind:5} sorting   {what}" for kind, what in projection.report()]
    return Info("\n".join(lines))
