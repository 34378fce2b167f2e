"""Training steps of output layers of many classes: the factored one beside dense, sampled and hierarchical softmax."""

from functools import partial
from itertools import cycle

import pytest
import torch
from harness import OURS, Comparison
from spherical import HEADS, SWEEP, batches, check, contenders, dense, factored, weight

QUICK = (3000, 32, 16)
NOTE = "forward, backward and SGD step, targets of Zipf frequencies"
STEPS = 50  # of the layer with momentum, in one turn: passes over P among them


def shown(shape):
    return "x".join(map(str, shape))


@pytest.mark.parametrize("size", HEADS, ids=shown)
def test_heads(compare, quick, size):
    if quick and size is not HEADS[0]:
        pytest.skip("--quick measures one small shape")
    shape = QUICK if quick else size
    compare(Comparison(f"spherical {shown(shape)}", "fp32", contenders(shape), partial(check, shape), note=NOTE))


@pytest.mark.parametrize("classes", SWEEP)
def test_number_of_classes(compare, quick, classes):
    """What the slopes of time over n are taken from."""
    shape = (classes // 50 if quick else classes, *HEADS[0][1:])
    made = batches(shape)
    calls = {"torch, dense": dense(weight(*shape[:2]), cycle(made)), OURS: factored(shape, cycle(made))[0]}
    compare(Comparison(f"classes {shown(shape)}", "fp32", calls, partial(check, shape)))


def test_rebalance(compare, quick):
    """One pass over P, beside a copy of it."""
    shape = QUICK if quick else HEADS[0]
    head = factored(shape, iter(()))[1]
    p, copied = head.factors.p, torch.ones_like(head.factors.p)

    def copy():
        copied.copy_(p)
        return ()

    def rebalance():
        head.rebalance()
        return ()

    compare(
        Comparison(
            f"rebalance {shown(shape[:2])}",
            "fp32",
            {"floor: a copy of P": copy, OURS: rebalance},
            partial(check, shape),
        )
    )


def test_momentum(compare, quick):
    shape = QUICK if quick else HEADS[0]
    made = batches(shape)
    plain, _ = factored(shape, cycle(made))
    moving, head = factored(shape, cycle(made), momentum=0.9)

    def several(call):
        def calls():
            for _ in range(STEPS):
                result = call()
            return result

        return calls

    several(moving)()
    note = f"{STEPS} steps a turn, {head.rebalances} passes over P in the first {STEPS}"
    calls = {f"{OURS}, no momentum": several(plain), OURS: several(moving)}
    compare(Comparison(f"momentum {shown(shape)}", "fp32", calls, partial(check, shape), note=note))
