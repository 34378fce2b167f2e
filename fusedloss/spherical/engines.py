"""Who computes the steps of a factored layer: each engine has `visit`, `backward` and `step` as steps.py means them."""

from __future__ import annotations

from types import ModuleType

from . import native_steps, steps
from .factors import Factors


def engine(f: Factors) -> ModuleType:
    """The fastest one for where the factors lie."""
    return native_steps if native_steps.supports(f.p) and native_steps.why_not() is None else steps
