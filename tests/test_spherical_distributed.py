"""The factored layer across ranks: gloo processes on this machine against one process with the joined batch.

All checks run in one set of three processes, the first two of which are a group of their own; each check then is a test
of its own here.
"""

import datetime
import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fusedloss import nn
from fusedloss.spherical import ranks, steps
from fusedloss.spherical.factors import Factors
from fusedloss.spherical.family import member

pytestmark = pytest.mark.host

N, D = 40, 6
SIZES = {2: ((5, 5), (4, 9), (0, 3)), 3: ((4, 0, 7),)}
SECONDS = 60
GROUP = None  # of the checks that run


def rank():
    return dist.get_rank(GROUP)


def world():
    return dist.get_world_size(GROUP)


def mine(sizes):
    start = sum(sizes[: rank()])
    return slice(start, start + sizes[rank()])


def relative(got, truth):
    return ((got - truth).norm() / truth.norm()).item()


def same_everywhere(*tensors):
    """Bit for bit."""
    flat = torch.cat([t.detach().reshape(-1).view(torch.uint8) for t in tensors])
    every = [torch.empty_like(flat) for _ in range(world())]
    dist.all_gather(every, flat, group=GROUP)
    return all(torch.equal(every[0], one) for one in every)


LOSSES = {
    "z": nn.SphericalZLoss(),
    "softmax": nn.SphericalSoftmaxLoss(),
    "taylor": nn.TaylorSoftmaxLoss(),
    "squared": nn.SquaredErrorLoss(),
}


# --- checks, run by every rank in step: communication first, assertions last -------------------------------------------


def visited(f, h, target, share, loss):
    """The batch of one backward of the sum of the losses."""
    found = steps.visit(f, h, target, share, loss)
    return steps.backward(f, found, torch.ones(len(h), dtype=torch.float64))[1]


def check_steps(name, sizes):
    """Three steps of replicas that did not begin alike, with different numbers of targets to a row on each rank."""
    loss = member("test", LOSSES[name])
    torch.manual_seed(0)
    w = torch.randn(N, D).double() + 0.3
    whole = Factors.of(w.clone())
    f = Factors.of(w * (rank() + 1))
    ranks.broadcast("test", f, GROUP)
    wrong = {}
    for number in range(3):
        h = torch.randn(sum(sizes), D).double()
        target = torch.stack([torch.randperm(N)[: world()] for _ in h])
        who = torch.cat([torch.full((size,), r) for r, size in enumerate(sizes)])
        share = (torch.arange(world()) <= who.unsqueeze(1)).double()  # rank r has r + 1 targets
        part, wide = mine(sizes), rank() + 1
        batch = visited(f, h[part], target[part, :wide], share[part, :wide], loss) if sizes[rank()] else None
        batch = ranks.gather("test", f, batch, GROUP)
        truth = visited(whole, h, target, share, loss).scaled(1 / world())
        wrong[number, "norm"] = relative(steps.squared_norm(f, batch), steps.squared_norm(whole, truth))
        steps.step(f, batch, 0.05, 0.1)
        steps.step(whole, truth, 0.05, 0.1)
        wrong[number, "w"] = relative(f.rows(torch.arange(N)), whole.rows(torch.arange(N)))
    same = same_everywhere(f.p, f.u, f.inverse, f.gram, f.offset, f.mean)
    wrong = {k: v for k, v in wrong.items() if not v <= 1e-13}
    assert not wrong, wrong
    assert same


def check_nobody():
    """No rank has a batch."""
    assert ranks.gather("test", Factors.of(torch.randn(N, D)), None, GROUP) is None


def check_errors():
    wrong = []
    for width, rows, dtype, words in (
        (D + rank(), N, torch.float32, ["in_features", f"[{D}, {D + 1}"]),
        (D, N + rank(), torch.float32, ["out_features", f"[{N}, {N + 1}"]),
        (D, N, torch.float64 if rank() else torch.float32, ["dtype", "torch.float64"]),
    ):
        try:
            ranks.broadcast("FactoredLinear", Factors.of(torch.randn(rows, width, dtype=dtype)), GROUP)
        except ValueError as error:
            wrong += [w for w in ["FactoredLinear", *words] if w not in str(error)]
        else:
            wrong.append(f"no error: {words}")
    assert not wrong, wrong


CASES = [
    *[(size, "check_steps", name, sizes) for size, every in SIZES.items() for sizes in every for name in LOSSES],
    *[(size, check) for size in SIZES for check in ("check_nobody", "check_errors")],
]


def worker(number, folder):
    global GROUP
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and NaN in memory that nobody filled
    patience = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=number, world_size=max(SIZES), timeout=patience)
    groups, results = {size: dist.new_group(range(size), timeout=patience) for size in SIZES}, {}
    for case in CASES:
        size, check, *arguments = case
        if number >= size:
            continue
        GROUP = groups[size]
        try:
            globals()[check](*arguments)
            results[case] = None
        except AssertionError:
            results[case] = traceback.format_exc()
        except Exception:  # the ranks are out of step now
            results |= {c: f"in {case}: {traceback.format_exc()}" for c in CASES if c not in results}
            break
    torch.save(results, f"{folder}/{number}")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank found wrong, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload([__name__])  # torch is imported once
    mp.start_processes(worker, (str(folder),), nprocs=max(SIZES), start_method="forkserver")
    return [torch.load(folder / str(number), weights_only=False) for number in range(max(SIZES))]


def named(case):
    return "-".join(str(part) for part in case if part != "").replace("check_", "")


@pytest.mark.parametrize("case", CASES, ids=named)
def test_against_one_process(results, case):
    failed = [f"rank {n}:\n{found[case]}" for n, found in enumerate(results[: case[0]]) if found[case]]
    assert not failed, "\n".join(failed)
