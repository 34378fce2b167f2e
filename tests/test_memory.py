"""Scratch memory that is kept from call to call."""

import threading

import pytest
import torch

from fusedloss import linear_cross_entropy, memory, set_workspace_limit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    monkeypatch.setattr(memory, "_idle", [])
    monkeypatch.setattr(memory, "_limit", 1 << 24)


def take(*shapes):
    with memory.workspace(CPU, *((shape, torch.float32) for shape in shapes)) as tensors:
        return [t.data_ptr() for t in tensors]


def test_tensors_do_not_overlap_and_come_back():
    with memory.workspace(CPU, ((3, 5), torch.float32), ((0, 7), torch.float64), ((4,), torch.bfloat16)) as (a, b, c):
        assert (a.shape, b.shape, c.shape) == ((3, 5), (0, 7), (4,)) and c.dtype == torch.bfloat16
        a.fill_(1), c.fill_(2)
        assert (a == 1).all()
        where = a.data_ptr()
    assert take((3, 5)) == [where]
    assert take((3, 5), (1000, 1000)) and len(memory._idle) == 1  # a larger one takes its place
    assert memory._idle[0].nbytes >= 4_000_000


def test_calls_at_once_have_memory_of_their_own():
    with memory.workspace(CPU, ((8,), torch.float32)) as (a,), memory.workspace(CPU, ((8,), torch.float32)) as (b,):
        assert a.data_ptr() != b.data_ptr()
    assert len(memory._idle) == 1


def test_the_limit():
    take((1 << 23,))
    assert not memory._idle  # 32 MiB are more than the limit
    take((1000,))
    set_workspace_limit(0)
    assert not memory._idle
    take((1000,))
    assert not memory._idle
    for bad in (-1, 2.5, None):
        with pytest.raises(ValueError, match="set_workspace_limit: bytes: expected an integer >= 0"):
            set_workspace_limit(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("walk", [{}, {"schedule": "recompute"}, {"gradient_filter": 1e-6}], ids=str)
def test_what_the_last_call_left_changes_nothing(dtype, walk):
    x, w = torch.randn(40, 48).to(dtype).requires_grad_(), torch.randn(900, 48).to(dtype).requires_grad_()
    target = torch.randint(0, 900, (40,))

    def step():
        loss = linear_cross_entropy(x, w, target, memory_budget=900 * 4 * 16, **walk)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w))]

    first = step()
    for left in (0xFF, 0x7F):  # NaN, and large numbers
        assert len(memory._idle) == 1
        memory._idle[0].fill_(left)
        assert all(torch.equal(a, b) for a, b in zip(step(), first))


def test_threads():
    x, w, target = torch.randn(64, 16), torch.randn(2000, 16), torch.randint(0, 2000, (64,))
    truth = [linear_cross_entropy(x + n, w, target, schedule="recompute").item() for n in range(4)]
    wrong = []

    def work(n):
        for _ in range(20):
            if linear_cross_entropy(x + n, w, target, schedule="recompute").item() != truth[n]:
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong
