"""Scores across ranks: gloo processes on this machine against one process with the concatenated batch.

All checks run in one set of four processes, the first two or three of which are groups of their own; each check then is
a test of its own here.
"""

from functools import partial

import processes
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fusedloss
from fusedloss import (
    Columns,
    Count,
    LogSumExp,
    LogSumExpOf,
    Max,
    Moments,
    Other,
    Rest,
    Same,
    Score,
    Sum,
    SumOf,
    TopK,
    trace,
)
from fusedloss.distributed import similarity_scores
from fusedloss.numerics import softplus

pytestmark = pytest.mark.host

D = 8
SIZES = {1: ((5,),), 2: ((5, 5), (6, 3), (0, 4)), 4: ((4, 1, 0, 2),)}
GROUP = None  # of the checks that run: None for all ranks


# --- losses, written once for one process and for many ----------------------------------------------------------------


def clip(scores, labels):
    own = scores.diagonal()
    forth, back, hit = scores.reduce(LogSumExp(where=Rest(own)), Columns(LogSumExp(where=Rest(own))), Score(own))
    return (scores.mean(softplus(forth - hit)) + scores.mean(softplus(back - hit))) / 2


def siglip(scores, labels):
    return scores.mean(scores.reduce(SumOf("softplus"))) - scores.mean(scores.at(scores.diagonal()))


def info_nce(scores, labels):
    positive = Same(labels, scores.of_columns(labels))
    every, good = scores.reduce(LogSumExp(), LogSumExp(where=positive))
    return scores.mean(every - good)


def sup_con(scores, labels):
    own, theirs = scores.diagonal(), scores.of_columns(labels)
    positive = Same(labels, theirs, without=own)
    lse, total, count = scores.reduce(LogSumExp(where=Rest(own)), Sum(where=positive), Count(where=positive))
    losses = torch.where(count > 0, lse - total / count.clamp(min=1), 0.0)
    return scores.mean(losses)


def two_stages(scores, labels):
    """A row parameter that carries a gradient, and scores of partners that live on another rank."""
    own, theirs = scores.diagonal(), scores.of_columns(labels)
    partners = torch.stack([(own + 3) % scores.columns, scores.columns - 1 - own], 1)
    hits = scores.at(partners)
    apart = scores.reduce(SumOf("squared_hinge", 0.7, row=hits[:, 0] - 0.5, where=Other(labels, theirs)))
    return scores.mean(apart) + scores.mean(hits * torch.tensor([0.3, -1.1]).double())


def everything(scores, labels):
    """Each kind of statistic, of rows and of columns; those that find columns, and relations that name them."""
    own, theirs = scores.diagonal(), scores.of_columns(labels)
    wide = scores.columns
    weights = torch.linspace(-1, 1, wide, dtype=torch.float64)
    at = (own * 5 + 1) % wide
    out = scores.reduce(
        LogSumExp(where=Rest(at)),
        Columns(LogSumExp(1.3, where=Other(labels, theirs))),
        Score(torch.stack([at, own], 1)),
        Score(columns=torch.tensor([wide - 1, 0])),
        Sum(weights, where=Other(labels, theirs)),
        Columns(SumOf("hinge", where=Rest(at))),
        Max(Other(labels, theirs)),
        Columns(TopK(2)),
        TopK(3, Rest(own)),
        Columns(Moments()),
        Columns(Score(at)),
        LogSumExpOf("circle", parameter=0.25, weight=3.0, where=Same(labels, theirs, below=labels + 2.0)),
        Columns(Sum((own * 0.1).unsqueeze(1) * weights)),
    )
    total = 0.0
    for number, one in enumerate(out):
        for part in one if isinstance(one, (tuple, list)) else (one,):
            if not part.is_floating_point():  # the columns found must be the same, whatever rank they live on
                part = (part + 1).double()
            part = part.unsqueeze(1) if part.dim() == 1 else part
            factors = torch.linspace(1, 2, part.shape[1]).double()
            finite = torch.where(part.isfinite(), part, 0.0)
            total = total + scores.mean((finite * factors).sum(1) * (number + torch.cos(own.double())))
    return total


@fusedloss.row_loss
def rest_loss(scores, target, *, power=1.0):
    lse, hit = scores.reduce(LogSumExp(where=Rest(target)), Score(target))
    return softplus(lse - hit) * power


def classification(scores, labels):
    """`row_loss` functions: the mean's divisor is that of all rows; one row is ignored, wherever it lives."""
    own = scores.diagonal()
    target = torch.where(own == 1, -100, (own * 2 + 1) % scores.columns)
    weight = torch.linspace(0.5, 1.5, scores.columns, dtype=scores.dtype)
    first = rest_loss(scores, target, weight=weight, power=2.0)
    smooth = fusedloss.cross_entropy(scores, target, weight=weight, label_smoothing=0.1, z_loss=0.01)
    each = rest_loss(scores, target, reduction="none")
    rows = fusedloss.sigmoid_focal_loss(scores, own, row_weight=torch.cos(own.to(scores.dtype)), reduction="sum")
    return first + smooth + scores.mean(each) + 0.1 * rows


PAIRS = {f.__name__: f for f in (clip, siglip, info_nce, two_stages, everything, classification)}
SELF = {f.__name__: f for f in (sup_con, two_stages, everything, classification)}


# --- checks, run by every rank in step: communication first, assertions last -------------------------------------------


def rank():
    return dist.get_rank(GROUP)


def world():
    return dist.get_world_size(GROUP)


def distributed(*features, **options):
    return similarity_scores(*features, group=GROUP, **options)


def relative(got, truth):
    return ((got.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-12)).item()


def average(tensor):
    dist.all_reduce(tensor, group=GROUP)
    return tensor / world()


def features(sizes, dtype, same):
    torch.manual_seed(1)
    total = sum(sizes)
    x, y = torch.randn(2, total, D, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 3, (total,))
    start = sum(sizes[: rank()])
    mine = slice(start, start + sizes[rank()])
    return x, None if same else y, labels, mine


def leaves(x, y, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = [x.detach().clone(), None if y is None else y.detach().clone()]
    made += [torch.tensor(2.5, dtype=wide), torch.tensor(-1.0, dtype=wide)]
    return [None if t is None else t.requires_grad_() for t in made]


def compare(loss, sizes, exchange, same, dtype=torch.float64, backend="torch", tolerance=1e-12, normalize=True):
    """Loss and gradients of this rank against those of one process that has all rows."""
    x, y, labels, mine = features(sizes, dtype, same)
    whole = leaves(x, y, dtype)
    options = dict(normalize=normalize, backend=backend)
    truth = loss(fusedloss.similarity_scores(*whole[:2], scale=whole[2], bias=whole[3], **options), labels)
    truth.backward()
    here = leaves(x[mine], None if same else y[mine], dtype)
    options |= dict(exchange=exchange, memory_budget=400)
    got = loss(distributed(*here[:2], scale=here[2], bias=here[3], **options), labels[mine])
    got.backward()
    errors = {"loss": relative(got, truth)}
    errors["x"] = relative(here[0].grad / world(), whole[0].grad[mine]) if len(here[0]) else 0.0
    if not same and len(here[1]):
        errors["y"] = relative(here[1].grad / world(), whole[1].grad[mine])
    errors["scale"] = relative(average(here[2].grad), whole[2].grad)
    errors["bias"] = abs(average(here[3].grad) - whole[3].grad).item()  # may well be 0
    wrong = {k: v for k, v in errors.items() if not v <= tolerance}
    assert not wrong, f"{sizes}, {exchange}, {dtype}: relative errors {wrong}"


def check_pairs(name, exchange):
    for sizes in SIZES[world()]:
        compare(PAIRS[name], sizes, exchange, same=False)


def check_self(name, exchange):
    for sizes in SIZES[world()]:
        compare(SELF[name], sizes, exchange, same=True)


def check_kernels(name, exchange):
    """On the fastest backend, in the types of training. Half precision rounds each rank's gradients once."""
    loss, same = (SELF | PAIRS)[name], name == "sup_con"
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        compare(loss, SIZES[world()][-1], exchange, same, dtype, "auto", tolerance)


class Towers(torch.nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(2)
        self.images, self.texts = torch.nn.Linear(6, D, dtype=dtype), torch.nn.Linear(7, D, dtype=dtype)
        self.log_scale, self.bias = [torch.nn.Parameter(torch.tensor(v, dtype=dtype)) for v in (0.7, -2.0)]

    def forward(self, images, texts):
        return self.images(images), self.texts(texts), self.log_scale.exp(), self.bias


def check_model(name, exchange):
    """Parameters' gradients, averaged by DistributedDataParallel, are those of one process: no factor is missing."""
    for sizes in SIZES[world()]:
        torch.manual_seed(3)
        data = [torch.randn(sum(sizes), n, dtype=torch.float64) for n in (6, 7)]
        labels = torch.randint(0, 3, (sum(sizes),))
        start = sum(sizes[: rank()])
        mine = slice(start, start + sizes[rank()])
        single, model = Towers(), DistributedDataParallel(Towers(), process_group=GROUP)
        for towers, make, rows in (
            (single, fusedloss.similarity_scores, slice(None)),
            (model, partial(distributed, exchange=exchange), mine),
        ):
            x, y, scale, bias = towers(*[d[rows] for d in data])
            PAIRS[name](make(x, y, scale=scale, bias=bias, normalize=True), labels[rows]).backward()
        named = model.module.named_parameters()
        errors = {n: relative(p.grad, q.grad) for (n, p), q in zip(named, single.parameters()) if n != "bias"}
        errors["bias"] = abs(model.module.bias.grad - single.bias.grad).item()
        wrong = {n: e for n, e in errors.items() if not e <= 1e-12}
        assert not wrong, f"{sizes}: {wrong}"


def check_frozen(name, exchange):
    """Each subset of gradients alone: what nobody asked for is left out, and the rest does not change."""
    sizes = SIZES[world()][-1]
    x, y, labels, mine = features(sizes, torch.float64, False)

    def gradients(make, x, y, wanted):
        given = [t.requires_grad_(n in wanted) for n, t in enumerate(leaves(x, y, torch.float64))]
        PAIRS[name](make(*given[:2], scale=given[2], bias=given[3]), labels[: len(x)] * 0).backward()
        return [None if t.grad is None else t.grad for t in given]

    whole, wrong = gradients(fusedloss.similarity_scores, x, y, range(4)), []
    for wanted in ([0], [1], [2], [1, 2, 3], [0, 3]):
        got = gradients(partial(distributed, exchange=exchange), x[mine], y[mine], wanted)
        for n, (a, b) in enumerate(zip(got, whole)):
            if n not in wanted:
                wrong += [(wanted, n)] if a is not None else []
            elif n < 2 and sizes[rank()]:
                wrong += [(wanted, n)] if relative(a / world(), b[mine]) > 1e-12 else []
            elif n >= 2:
                wrong += [(wanted, n)] if abs(average(a) - b).item() > 1e-12 else []
    assert not wrong


def check_rectangular(name, exchange):
    """More columns than rows, and none on a rank: the rows' partners come first among their rank's columns."""
    rows, columns = (2, 0, 3, 1)[: world()], (4, 1, 3, 2)[: world()]
    torch.manual_seed(4)
    x, y = torch.randn(sum(rows), D).double(), torch.randn(sum(columns), D).double()
    own = torch.cat([torch.arange(n) + sum(columns[:r]) for r, n in enumerate(rows)])
    a, b = [slice(sum(c[: rank()]), sum(c[: rank() + 1])) for c in (rows, columns)]

    def run(make, x, y, own):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        scores = make(x, y)
        out = scores.reduce(LogSumExp(where=Rest(own)), Score(own), Columns(LogSumExp(0.5)))
        loss = scores.mean(out[0] - 2 * out[1]) + scores.mean(out[2].square())
        return loss, *torch.autograd.grad(loss, [x, y]), scores.diagonal()

    truth = run(fusedloss.similarity_scores, x, y, own)
    got = run(partial(distributed, exchange=exchange), x[a], y[b], own[a])
    assert relative(got[0], truth[0]) < 1e-12
    assert torch.equal(got[3], own[a])
    assert torch.allclose(got[1] / world(), truth[1][a], rtol=1e-12, atol=1e-14)
    assert torch.allclose(got[2] / world(), truth[2][b], rtol=1e-12, atol=1e-14)


def check_determinism(name, exchange):
    x, y, labels, mine = features(SIZES[world()][-1], torch.float32, False)

    def run():
        given = leaves(x[mine], y[mine], torch.float32)
        scores = distributed(*given[:2], scale=given[2], bias=given[3], exchange=exchange)
        loss = PAIRS[name](scores, labels[mine])
        return [loss, *torch.autograd.grad(loss, given)]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    every = [torch.empty_like(first[0]) for _ in range(world())]
    dist.all_gather(every, first[0].detach(), group=GROUP)
    assert all(torch.equal(every[0], e) for e in every)


def check_errors(name, exchange):
    own, wrong = torch.randn(3, D), []

    def expect_error(call, kind, *words):
        try:
            call()
        except kind as error:
            wrong.extend(w for w in words if w not in str(error))
        else:
            wrong.append(f"no {kind.__name__}: {words}")

    def make(x=own, y=own + 1, **options):
        return distributed(x, y, exchange=exchange, **options)

    expect_error(
        lambda: make(own[:, : D - rank()], own[:, : D - rank()]),
        ValueError,
        "similarity_scores",
        " D: ",
        f"{D}, {D - 1}",
    )
    odd = own.double() if rank() == 1 else own
    expect_error(lambda: make(odd, odd), ValueError, "x's dtype", "[torch.float32, torch.float64]")
    expect_error(lambda: make(own, None if rank() == 1 else own + 1), ValueError, "y is x", "[False, True]")
    expect_error(lambda: make(own.clone().requires_grad_(rank() == 1)), ValueError, "requires_grad")
    expect_error(lambda: make(own, own[:, 1:]), ValueError, "y", f"(M, {D})")
    expect_error(lambda: distributed(own, exchange="mail"), ValueError, "exchange", "gather or ring", "mail")
    scores = make(own.clone().requires_grad_())
    loss = clip(scores, None)
    expect_error(lambda: torch.autograd.grad(loss, scores.input, create_graph=True), RuntimeError, "second derivatives")
    expect_error(lambda: scores.reduce(Sum(torch.ones(scores.columns, requires_grad=True))), ValueError, "gradient")
    assert not wrong, wrong


def check_memory(name, exchange):
    """Most bytes alive at once on rank 0, for the parent to compare between numbers of ranks."""
    n, width = 96, 256
    torch.manual_seed(rank())
    x, y = [torch.randn(n, width).requires_grad_() for _ in range(2)]

    def step():
        loss = PAIRS[name](distributed(x, y, exchange=exchange, memory_budget=1 << 14), torch.arange(n) % 5)
        return torch.autograd.grad(loss, [x, y])

    step()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak / (n * width * 4)  # in blocks of features


BOTH = ("gather", "ring")
CHECKS = {  # by the number of ranks; the largest groups first
    4: (
        *[("check_pairs", name) for name in ("clip", "two_stages", "everything")],
        *[("check_self", name) for name in ("sup_con", "everything")],
        *[("check_model", "siglip"), ("check_rectangular", ""), ("check_memory", "clip")],
    ),
    3: [("check_memory", "clip")],
    1: [("check_pairs", "everything")],
    2: (
        *[("check_pairs", name) for name in PAIRS],
        *[("check_self", name) for name in SELF],
        *[("check_kernels", name) for name in ("clip", "siglip", "sup_con")],
        *[("check_model", name) for name in ("clip", "siglip", "info_nce")],
        *[("check_frozen", name) for name in ("clip", "siglip")],
        *[("check_rectangular", ""), ("check_determinism", "clip"), ("check_errors", "clip"), ("check_memory", "clip")],
    ),
}
CASES = [(ranks, *check, exchange) for ranks, checks in CHECKS.items() for check in checks for exchange in BOTH]


def begin_rank():
    trace.program_key = lambda *arguments: None  # tracing takes seconds, and the one process' loss is right without


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return processes.ask(tmp_path_factory.mktemp("ranks"), __name__, CHECKS, CASES)


@pytest.mark.parametrize("case", CASES, ids=processes.named)
def test_against_one_process(results, case):
    assert not processes.wrong(results, case)


def test_memory_of_a_ring_does_not_grow(results):
    """One rank more holds one rank's features more; with the ring, no other rank's peak shows it."""
    two, three, four = [
        {exchange: results[0][ranks, "check_memory", "clip", exchange][1] for exchange in BOTH} for ranks in (2, 3, 4)
    ]
    assert four["ring"] <= 1.01 * three["ring"]
    assert four["ring"] <= two["ring"] + 1.1  # two ranks need one place less
    assert four["gather"] >= two["gather"] + 4  # x and y of two more: what is measured grows where it should


def test_no_process_group():
    with pytest.raises(RuntimeError, match="similarity_scores: group: .*init_process_group"):
        similarity_scores(torch.randn(3, 4))
