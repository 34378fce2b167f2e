"""Soft sort and rank, relaxed permutations, ranking losses, entmax, beside dense PyTorch and peers that are there."""

from functools import partial

import pytest
import sorting
from harness import Comparison

SECONDS = 4  # of turns
NOTE = "forward and backward"


def shown(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("shape", sorting.SHAPES, ids=shown)
@pytest.mark.parametrize("strength", sorting.STRENGTHS)
@pytest.mark.parametrize("kind", ("l2", "kl"))
@pytest.mark.parametrize("operator", ("soft_rank", "soft_sort"))
def test_soft(compare, quick, operator, kind, strength, shape):
    if quick and shape is not sorting.SHAPES[0]:
        pytest.skip("--quick measures one small shape")
    what = operator, kind, strength, shape
    case = f"{operator} {kind} {strength:g} {shown(shape)}"
    repeat = max(1, sorting.NUMBERS // (shape[0] * shape[1]))
    note = f"{NOTE}, {repeat} a turn"
    check = partial(sorting.check_soft, *what)
    compare(Comparison(case, "fp32", sorting.soft(*what), check, note=note, seconds=SECONDS))


@pytest.mark.parametrize("shape", ((16, 1000), (1, 10_000)), ids=shown)
def test_neural_sort(compare, quick, shape):
    if quick and shape[0] == 1:
        pytest.skip("--quick measures one small shape")
    shape = (2, 100) if quick else shape
    contenders, check = sorting.relaxed(shape), partial(sorting.check_relaxed, shape)
    compare(Comparison(f"NeuralSort {shown(shape)}", "fp32", contenders, check, note=NOTE, seconds=SECONDS))


@pytest.mark.parametrize("shape", ((16, 240), (16, 1000)), ids=shown)
@pytest.mark.parametrize("name", sorting.RANKING)
def test_ranking(compare, quick, name, shape):
    if quick and shape[1] > 240:
        pytest.skip("--quick measures one small shape")
    shape = (2, 30) if quick else shape
    contenders, check = sorting.ranked(name, shape), partial(sorting.check_ranked, name, shape)
    compare(Comparison(f"{name} {shown(shape)}", "fp32", contenders, check, note=NOTE, seconds=SECONDS))


def test_network(compare, quick):
    shape = (2, 16) if quick else (16, 512)

    def check():
        (got, slope), *others = (call() for call in reversed(sorting.network(2, 32).values()))
        for other, _ in others:
            assert (got - other).abs().max() < 1e-4

    compare(Comparison(f"bitonic network {shown(shape)}", "fp32", sorting.network(*shape), check, note=NOTE))


def test_entmax(compare, quick):
    shape = (8, 300) if quick else (64, 32_000)

    def check():
        (got, slope), *others = (call() for call in reversed(sorting.entmax(16, 500).values()))
        if len(others) > 1:
            assert (got - others[0][0]).abs() < 1e-5 and (slope - others[0][1]).abs().max() < 1e-6

    contenders = sorting.entmax(*shape)
    compare(Comparison(f"entmax15_loss {shown(shape)}", "fp32", contenders, check, note=NOTE, seconds=SECONDS))
