"""Targets out of range on a device: remembered without a wait, told by `check`. Run here on CPU tensors."""

import pytest
import torch

import fusedloss as fl
from fusedloss import targets


@pytest.fixture
def as_on_a_device(monkeypatch):
    """What `_checked_target` does where the target is not on a CPU."""
    monkeypatch.setattr(targets, "_found", {})

    def remember(target, columns=10, ignore_index=-100, name="a_loss"):
        bad = ((target < 0) | (target >= columns)) & (target != ignore_index)
        return targets.remember(bad, target, columns, ignore_index, name)

    return remember


def test_good_targets_leave_nothing(as_on_a_device):
    assert as_on_a_device(torch.tensor([0, 9, -100])) == 1
    assert as_on_a_device(torch.empty(0, dtype=torch.int64)) == 1
    fl.check()


def test_the_first_bad_target_is_told_once(as_on_a_device):
    assert as_on_a_device(torch.tensor([3, 12, -5])).isnan()
    assert as_on_a_device(torch.tensor([[1, 2], [77, 3]]), name="another_loss").isnan()
    assert as_on_a_device(torch.tensor([3])) == 1  # a good call afterwards is not spoilt
    with pytest.raises(IndexError, match=r"a_loss: target\[cpu, element 1 of the flat target\] = 12 .* target < 10"):
        fl.check()
    fl.check()
    as_on_a_device(torch.tensor([[1, 2], [77, 3]]), name="another_loss")
    with pytest.raises(IndexError, match=r"another_loss: .*element 2 of the flat target\] = 77"):
        fl.check()


def test_strict_raises_at_once(as_on_a_device):
    fl.set_strict(True)
    try:
        as_on_a_device(torch.tensor([3]))
        with pytest.raises(IndexError, match="= 10 is out of range"):
            as_on_a_device(torch.tensor([10]))
    finally:
        fl.set_strict(False)
