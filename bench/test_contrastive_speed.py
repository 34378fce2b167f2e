"""sigmoid_loss, clip_loss and supcon_loss, forward and backward with all gradients, against the bare GEMMs and PyTorch."""

from functools import partial

import pytest
from cases import DTYPES
from contrastive import SHAPES, STARTS, check, contenders, operands
from harness import OURS, Comparison

QUICK = (256, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("size", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_contrastive(compare, quick, size, name, dtype):
    if quick and size is not SHAPES[0]:
        pytest.skip("--quick measures one small shape")
    shape = QUICK if quick else size
    inputs = operands(shape, DTYPES[dtype], name)
    calls = contenders(name, inputs, dense=quick or size is SHAPES[0])  # at 16384 it takes gigabytes, and minutes
    case = f"{name} {shape[0]}x{shape[1]}"
    compare(Comparison(case, dtype, calls, partial(check, name, calls[OURS], inputs)))
