"""Class indices: checked before anything is computed, on a CPU at once, on a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import expect

torch.library.define(
    "fusedloss::checked_target",
    "(Tensor target, SymInt columns, SymInt ignore_index, str name) -> (Tensor, Tensor, Tensor)",
)

# Of each device: what is wrong with the first bad target seen since the last `check`: [1, position, value, columns,
# ignore_index, number of the function's name], or zeros.
_found: dict[torch.device, Tensor] = {}
_names: list[str] = []
_strict = False


def integral(target: Tensor) -> bool:
    return target.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)


def checked_target(
    name: str, scores, target: Tensor, ignore_index: int, several: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Flat int64 targets (N,), safe to index with, and which of them count; (N, K) with `several` to a row.

    Third comes what losses are to be multiplied with: None on a CPU, where a target out of range raises; on a device a
    number that is 1, or NaN when a target is out of range.
    """
    expect(integral(target), name, "target", "an integer tensor of class indices", target.dtype, TypeError)
    shape = tuple(scores.leading)
    rows = tuple(target.shape[:-1] if several else target.shape)
    expect(rows == shape, name, "target", f"shape {shape} as the scores' rows{', and targets of each' * several}", target)
    if several:
        refuse_indicators(name, target, scores.columns)
    safe, keep, valid = torch.ops.fusedloss.checked_target(target, scores.columns, ignore_index, name)
    flat = (scores.leading.numel(), target.shape[-1]) if several else (-1,)
    return safe.reshape(flat), keep.reshape(flat), None if target.device.type == "cpu" else valid


def refuse_indicators(name: str, target: Tensor, columns: int) -> None:
    """Several targets to a row are no matrix of 0 and 1, as far as that shows without waiting."""
    if target.shape[-1] == columns > 2 and target.device.type == "cpu" and not torch.compiler.is_compiling():
        dense = target.numel() and bool(((target == 0) | (target == 1)).all())
        expect(not dense, name, "target", "indices of classes", f"a matrix of 0 and 1, {tuple(target.shape)}")


def spoilt(values: Tensor, valid: Tensor | None) -> Tensor:
    """Values that are NaN when a target was out of range; `valid` as `checked_target` returns it."""
    return values if valid is None else values * valid


def check() -> None:
    """Raise IndexError if a target on a device was out of range since the last check. Waits for the devices.

    A loss on a device cannot look at its targets without waiting for it. A call with a target out of range returns NaN,
    loss and gradients; the first such target is remembered there, and told here. On a CPU losses raise at once.
    """
    for device, found in _found.items():
        bad, position, value, columns, ignore_index, number = found.tolist()
        if bad:
            found.zero_()
            place = f"{device}, element {position} of the flat target"
            raise IndexError(_complaint(_names[number], place, value, columns, ignore_index))


def set_strict(strict: bool) -> None:
    """Whether every loss on a device waits for it and raises at once, as `check` does (default: no)."""
    global _strict
    _strict = bool(strict)


def _complaint(name: str, place: str, value: int, columns: int, ignore_index: int) -> str:
    expected = f"0 <= target < {columns} or ignore_index = {ignore_index}"
    return f"{name}: target[{place}] = {value} is out of range: expected {expected}"


@torch.library.impl("fusedloss::checked_target", "CompositeExplicitAutograd")
def _checked_target(target: Tensor, columns: int, ignore_index: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    target = target.long()  # a narrow type would wrap columns and ignore_index around
    keep = target != ignore_index
    bad = ((target < 0) | (target >= columns)) & keep
    valid = torch.ones((), dtype=torch.float32, device=target.device)
    if target.device.type != "cpu":
        valid = remember(bad, target, columns, ignore_index, name)
    elif bad.any():
        where = bad.nonzero()[0].tolist()
        value = target[tuple(where)].item()
        raise IndexError(_complaint(name, ", ".join(map(str, where)), value, columns, ignore_index))
    return torch.where(keep & ~bad, target, 0), keep, valid


def remember(bad: Tensor, target: Tensor, columns: int, ignore_index: int, name: str) -> Tensor:
    """Note the first bad target in the device's own memory; 1, or NaN where there is one. No wait, unless strict."""
    device = target.device
    if name not in _names:
        _names.append(name)
    if device not in _found:
        with torch.inference_mode(False):
            _found[device] = torch.zeros(6, dtype=torch.int64, device=device)
    bad, target, count = bad.reshape(-1), target.reshape(-1), target.numel()
    if count == 0:
        return torch.ones((), dtype=torch.float32, device=device)
    position = torch.where(bad, torch.arange(count, device=device), count).amin()
    any_bad = position < count
    # Not target[…]: an index of no dimensions is read by the host, which then waits.
    value = target.index_select(0, position.clamp(max=count - 1).reshape(1)).squeeze(0)
    constants = [torch.full_like(position, n) for n in (columns, ignore_index, _names.index(name))]
    report = torch.stack([torch.ones_like(position), position, value, *constants])
    found = _found[device]
    found.copy_(torch.where(any_bad & (found[0] == 0), report, found))
    if _strict:
        check()
    return torch.where(any_bad, torch.nan, 1.0)


@torch.library.register_fake("fusedloss::checked_target")
def _checked_target_fake(target, columns, ignore_index, name):
    wide = torch.empty_like(target, dtype=torch.int64)
    return wide, torch.empty_like(target, dtype=torch.bool), target.new_empty((), dtype=torch.float32)
