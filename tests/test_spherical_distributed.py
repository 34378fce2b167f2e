"""The factored layer across ranks: gloo processes on this machine against one process with the joined batch.

All checks run in one set of three processes, the first two of which are a group of their own; each check then is a test
of its own here.
"""

import copy

import processes
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fusedloss import nn
from fusedloss.spherical import FactoredLinear, ranks, steps
from fusedloss.spherical.factors import Factors
from fusedloss.spherical.family import member

pytestmark = pytest.mark.host

N, D = 40, 6
SIZES = {2: ((5, 5), (4, 9), (0, 3)), 3: ((4, 0, 7),)}
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
    "softmax": nn.SphericalSoftmaxLoss(eps=1.0),  # at a small eps rounding grows along the way
    "taylor": nn.TaylorSoftmaxLoss(),
    "squared": nn.SquaredErrorLoss(),
}


# --- models, and what they should do --------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """A trunk and the head; ranks begin differently."""

    def __init__(self, loss, **options):
        super().__init__()
        torch.manual_seed(10 + rank())
        self.trunk = torch.nn.Linear(5, D, dtype=torch.float64)
        self.head = FactoredLinear(D, N, loss, process_group=GROUP, dtype=torch.float64, **options)
        self.head.load_dense(torch.randn(N, D).double() + 0.3)

    def forward(self, x, target):
        return self.head(torch.tanh(self.trunk(x)), target)


def weight(head):
    return head.rows(torch.arange(N)).detach()


def replicated(model):
    return DistributedDataParallel(model, process_group=GROUP)


def sharded(model):
    return fully_shard(model, mesh=DeviceMesh.from_group(GROUP, "cpu"))


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


class Dense:
    """One process with the parts of all ranks: the average of their losses, autograd and torch.optim.SGD."""

    def __init__(self, model, loss, lr, **options):
        self.loss, self.trunk = loss, [whole(p).detach().clone().requires_grad_() for p in model.trunk.parameters()]
        self.w = weight(model.head).clone().requires_grad_()
        self.optimizers = [torch.optim.SGD(self.trunk, lr), torch.optim.SGD([self.w], lr, **options)]

    def backward(self, x, target, sizes):
        hidden = torch.tanh(torch.nn.functional.linear(x, *self.trunk))
        parts = zip((hidden @ self.w.t()).split(sizes), target.split(sizes))
        sum(self.loss(scores, c) for scores, c in parts if len(c)).div(len(sizes)).backward()

    def step(self, max_norm=None):
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([self.w], max_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def data(sizes):
    x = torch.randn(sum(sizes), 5, dtype=torch.float64)
    return x, torch.randint(0, N, (sum(sizes),))


# --- checks, run by every rank in step: communication first, assertions last ------------------------------------------


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


def train(wrap, sizes, loss, *, micro=1, momentum=0.0, nesterov=False, decay=0.0, max_norm=None, lr=0.1, count=10):
    """Steps of the model, and of one process: the relative errors of the trunk and of W."""
    model = Model(loss, momentum=momentum, nesterov=nesterov)
    wrapped = wrap(model)
    truth = Dense(model, loss, lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr)
    torch.manual_seed(5)  # the same data on every rank
    norms = []
    for _ in range(count):
        for number in range(micro):
            x, target = data(sizes)
            if wrap is replicated:
                wrapped.require_backward_grad_sync = number == micro - 1  # what no_sync does
            wrapped(x[mine(sizes)], target[mine(sizes)]).backward()
            truth.backward(x, target, sizes)
        norms.append(relative(model.head.grad_norm(), truth.w.grad.norm()))
        optimizer.step()
        optimizer.zero_grad()
        assert model.head.step(lr, weight_decay=decay, max_norm=max_norm)
        truth.step(max_norm)
    errors = {name: relative(whole(p), q) for (name, p), q in zip(model.trunk.named_parameters(), truth.trunk)}
    errors |= {"w": relative(weight(model.head), truth.w), "norm": torch.tensor(norms).max().item()}
    wrong = {name: error for name, error in errors.items() if not error <= 1e-12}
    same = same_everywhere(weight(model.head))
    assert not wrong, wrong
    assert same


def check_training(name, sizes):
    train(replicated, sizes, LOSSES[name], lr=0.1 if name != "squared" else 0.01)


def check_sum(sizes):
    train(replicated, sizes, nn.SphericalZLoss(reduction="sum"))


def check_decay(sizes):
    train(replicated, sizes, LOSSES["z"], decay=0.1)


def check_accumulation(sizes):
    train(replicated, sizes, LOSSES["z"], micro=3)


def check_momentum(sizes):
    train(replicated, sizes, LOSSES["z"], momentum=0.9, nesterov=True, decay=0.1)


def check_clipping(sizes):
    train(replicated, sizes, LOSSES["taylor"], max_norm=0.05)


def check_sharded(sizes):
    """FSDP shards the trunk, and leaves the head alone."""
    train(sharded, sizes, LOSSES["z"], decay=0.1)


def check_nobody():
    """No rank has a batch."""
    model = Model(LOSSES["z"])
    before = weight(model.head)
    norm, stepped = model.head.grad_norm(), model.head.step(0.1, 0.1)
    assert norm == 0 and stepped
    assert torch.equal(before, weight(model.head))


def check_left_alone():
    """DistributedDataParallel sends nothing of the head: it has no parameters or buffers, and stays what it is."""
    model = Model(LOSSES["z"])
    kept = {"head." + name: tuple(value.shape) for name, value in model.head.state_dict().items()}
    wrapped = replicated(model)
    trunk = 8 * (5 * D + D)
    found = {
        "head": [*model.head.parameters(), *model.head.buffers()] == [],
        "bytes": wrapped._get_ddp_logging_data()["total_parameter_size_bytes"] == trunk,
        "state": {name for name in model.state_dict() if name.startswith("head.")} == set(kept),
        "checkpoint": get_model_state_dict(wrapped).keys() == model.state_dict().keys(),
        "p": kept["head.factors.p"] == (N, D),
    }
    model.head.factors.p.add_(rank())
    ours = model.head.factors.p.clone()
    wrapped(torch.randn(3, 5).double(), torch.arange(3)).backward()
    found["forward"] = torch.equal(ours, model.head.factors.p)
    assert all(found.values()), found


def check_once():
    """Features are gathered once, however often they are asked for; a later backward brings only its own."""
    sent, real = [], ranks.gathered

    def counted(group, tensor, counts):
        sent.append(tuple(counts))
        return real(group, tensor, counts)

    model, once = Model(LOSSES["z"]), Model(LOSSES["z"])
    torch.manual_seed(rank())
    parts = [data([3]) for _ in range(2)]
    ranks.gathered = counted
    try:
        model(*parts[0]).backward()
        norms = [model.head.grad_norm(), model.head.grad_norm()]
        model.head.rebalance()  # the queue stays what it is
        norms.append(model.head.grad_norm())
        first = len(sent)
        if rank() == 1:
            model(*parts[1]).backward()
        model.head.step(0.1, max_norm=10.0)
    finally:
        ranks.gathered = real
    once(*parts[0]).backward()
    if rank() == 1:
        once(*parts[1]).backward()
    once.head.step(0.1)
    assert norms[0] == norms[1] and abs(norms[2] / norms[0] - 1) < 1e-12
    assert first == 1 and sent == [(3,) * world(), tuple(3 * (r == 1) for r in range(world()))]
    assert relative(weight(model.head), weight(once.head)) < 1e-12


def check_bits(sizes):
    """float32, and U mended often: by all ranks at the same steps."""
    head = FactoredLinear(D, N, LOSSES["squared"], bias=True, condition_limit=1.1, process_group=GROUP)
    torch.manual_seed(5)
    for _ in range(30):
        h, target = torch.randn(sum(sizes), D), torch.randint(0, N, (sum(sizes),))
        head(h[mine(sizes)], target[mine(sizes)]).backward()
        head.step(3.0)
    f = head.factors
    same = same_everywhere(f.p, f.u, f.inverse, f.gram, f.offset, f.mean)
    assert same and head.rebalances > 0 and weight(head).isfinite().all()


def check_not_finite():
    """NaN on the last rank: nobody steps, and the next step is as if nothing had been."""
    model = Model(LOSSES["z"])
    before, bits = weight(model.head), model.head.factors.p.clone()
    x, target = data([3])
    model(x * (torch.nan if rank() == world() - 1 else 1), target).backward()
    norm, stepped = model.head.grad_norm(), model.head.step(0.1, 0.1, max_norm=1.0)
    unmoved = torch.equal(before, weight(model.head)) and torch.equal(bits, model.head.factors.p)
    empty = model.head.grad_norm()
    model(x, target).backward()
    again = model.head.step(0.1)
    same = same_everywhere(weight(model.head))
    assert norm.isnan() and not stepped and unmoved and empty == 0 and again and same


def check_rows():
    """Rows that one rank alone looks up, beside the losses of all."""
    model, index = Model(LOSSES["z"]), torch.tensor([3, 7, 3])
    w = weight(model.head).requires_grad_()
    torch.manual_seed(5)
    x, target = data([4])
    factor = torch.randn(3, D).double()
    loss, scores = model(x, target), torch.tanh(model.trunk(x)).detach() @ w.t()
    (loss + (model.head.rows(index) * factor).sum() * (rank() == 0)).backward()
    (LOSSES["z"](scores, target) + (w[index] * factor).sum() * (rank() == 0)).backward()
    model.head.step(0.1)
    dist.all_reduce(w.grad, group=GROUP)
    assert relative(weight(model.head), w.detach() - 0.1 * w.grad / world()) < 1e-13


def check_copies():
    """A copy is of the same group; a state comes back; a dense weight is that of the first rank."""
    model = Model(LOSSES["z"])
    dense = torch.randn(N, D).double() * (rank() + 1)
    copied = copy.deepcopy(model)
    fresh = Model(LOSSES["z"])
    fresh.head.load_dense(dense)
    loaded = weight(fresh.head)
    fresh.load_state_dict(model.state_dict())
    torch.manual_seed(rank())
    x, target = data([3])
    for one in (model, copied, fresh):
        one(x, target).backward()
        one.head.step(0.1)
    weights = [weight(one.head) for one in (model, copied, fresh)]
    same = same_everywhere(*weights, loaded)
    assert same and copied.head.process_group is GROUP
    assert all(relative(w, weights[0]) < 1e-13 for w in weights)


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


Z = "z"
CASES = [
    *[(size, "check_steps", name, sizes) for size, every in SIZES.items() for sizes in every for name in LOSSES],
    *[(size, "check_training", Z, sizes) for size, every in SIZES.items() for sizes in every],
    *[(2, "check_training", name, (4, 9)) for name in LOSSES if name != Z],
    *[
        (size, check, sizes)
        for size, sizes in ((2, (4, 9)), (3, (4, 0, 7)))
        for check in (
            "check_sum",
            "check_decay",
            "check_accumulation",
            "check_momentum",
            "check_clipping",
            "check_sharded",
        )
    ],
    *[(size, check) for size in SIZES for check in ("check_nobody", "check_left_alone", "check_not_finite")],
    (3, "check_bits", (4, 1, 7)),
    *[(2, check) for check in ("check_once", "check_rows", "check_copies", "check_errors")],
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return processes.ask(tmp_path_factory.mktemp("ranks"), __name__, SIZES, CASES)


@pytest.mark.parametrize("case", CASES, ids=processes.named)
def test_against_one_process(results, case):
    assert not processes.wrong(results, case)
