"""Ranking losses over pairs, and soft positions, against dense formulas in fp64: one list and many, every engine."""

import importlib
import subprocess
import sys

import pytest
import torch
from in_interpreter import passes_in_the_interpreter
from torch._dynamo.testing import CompileCounterWithBackend

from fusedloss import backends, ranking
from fusedloss.lists import lists_of
from fusedloss.ranking import pairs, pairs_torch

F32, F64 = torch.float32, torch.float64
NAMES = ("ranknet_loss", "lambda_loss", "kendall_loss", "approx_ndcg_loss", "adr_mse_loss")
MODULES = {name: importlib.import_module(f"fusedloss.ranking.{name}") for name in NAMES}
CASES = [(name, case) for name, module in MODULES.items() for case in module.CASES]
IDS = [f"{name}-{case}" for name, case in CASES]
# Of layouts the interpreter, which takes its time, sees one case of each loss.
FEW = [(name, module.CASES[0]) for name, module in MODULES.items()] if backends.triton.interpreted() else CASES
TOLERANCE = {F32: 3e-6, F64: 1e-12}


def batch(rows=3, n=37, dtype=F64, seed=0, ties=True):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, n, generator=g, dtype=F64) * 2
    scores = (scores * 4).round() / 4 if ties else scores
    relevance = torch.randint(0, 5, (rows, n), generator=g).double()
    return scores.to(dtype).to(torch.get_default_device()), relevance.to(dtype).to(torch.get_default_device())


def truth(name, scores, relevance, upstream=None, **case):
    """Losses and gradient of single lists in fp64, by the reference."""
    leaves = [s.detach().double().requires_grad_() for s in scores]
    losses = [MODULES[name].reference(s, r.double(), **case) for s, r in zip(leaves, relevance)]
    upstream = [1.0] * len(leaves) if upstream is None else upstream
    total = sum(loss * u for loss, u in zip(losses, upstream))
    found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    return torch.stack([loss.detach() for loss in losses]), [
        torch.zeros_like(s) if g is None else g for s, g in zip(leaves, found)
    ]


def close(got, wanted, tolerance, what=""):
    size = wanted.abs().max().clamp(min=1e-3) if wanted.numel() else 1
    assert got.shape == wanted.shape, (what, got.shape, wanted.shape)
    apart = (got.double() - wanted).abs().max() if wanted.numel() else 0
    assert apart <= tolerance * size, f"{what}: {apart:.3g} of {size:.3g}"


def gradient(loss, scores):
    return torch.autograd.grad(loss, scores)[0]


def gradient_kept(loss, scores):
    return torch.autograd.grad(loss, scores, retain_graph=True)[0]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name, case", CASES, ids=IDS)
def test_values_and_gradients(backend, name, case, dtype):
    """Ties in scores and in relevance; lists of several blocks of items."""
    scores, relevance = batch(dtype=dtype)
    scores.requires_grad_()
    loss = getattr(ranking, name)(scores, relevance, reduction="none", **case)
    upstream = torch.tensor([0.5, 2.0, -1.0], dtype=dtype)
    wanted, slopes = truth(name, scores, relevance, upstream.tolist(), **case)
    assert loss.dtype == dtype
    close(loss, wanted, TOLERANCE[dtype], "losses")
    close(gradient(loss @ upstream, scores), torch.stack(slopes), TOLERANCE[dtype], "gradient")


@pytest.mark.parametrize("name, case", FEW, ids=str)
def test_masks_and_offsets_are_single_lists(backend, name, case):
    """Padding holds NaN; lists of lengths 5, 0, 1, 40, 2."""
    lengths, dtype = [5, 0, 1, 40, 2], F32 if backend == "triton" else F64
    scores, relevance = batch(5, 40, dtype)
    single = ([x[:n] for x, n in zip(part, lengths)] for part in (scores, relevance))
    wanted, slopes = truth(name, *single, **case)
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    spread = torch.stack([torch.randperm(40) for _ in lengths])  # the same lists, padding in between
    place = spread.sort(1).indices  # items keep their order where they count
    keep = torch.zeros_like(mask)
    for row, n in enumerate(lengths):
        keep[row, place[row, :n].sort().values] = True
    padded = torch.full_like(scores, torch.nan).masked_scatter(keep, scores[mask]).requires_grad_()
    labels = torch.full_like(scores, torch.nan).masked_scatter(keep, relevance[mask])
    loss = getattr(ranking, name)(padded, labels, mask=keep, reduction="none", **case)
    close(loss, wanted, 10 * TOLERANCE[dtype], "masked losses")
    found = gradient(loss.sum(), padded)
    assert (found[~keep] == 0).all()
    close(found[keep], torch.cat(slopes), 10 * TOLERANCE[dtype], "masked gradient")
    flat, labels = scores[mask].requires_grad_(), relevance[mask]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    loss = getattr(ranking, name)(flat, labels, offsets=offsets, reduction="none", **case)
    close(loss, wanted, 10 * TOLERANCE[dtype], "losses by offsets")
    close(gradient(loss.sum(), flat), torch.cat(slopes), 10 * TOLERANCE[dtype], "gradient by offsets")


def test_both_at_once(backend):
    """A mask on lists by offsets, a truncation, leading shapes."""
    dtype = F32 if backend == "triton" else F64
    scores, relevance = batch(4, 11, dtype)
    keep = torch.rand(4, 11) < 0.7
    offsets = torch.arange(0, 45, 11)
    for name, case in FEW:
        loss, options = getattr(ranking, name), dict(reduction="none", **case)
        padded = loss(scores, relevance, mask=keep, **options)
        flat = loss(scores.flatten(), relevance.flatten(), mask=keep.flatten(), offsets=offsets, **options)
        shaped = loss(scores.view(2, 2, 11), relevance.view(2, 2, 11), mask=keep.view(2, 2, 11), **options)
        close(flat, padded.double(), TOLERANCE[dtype], name)
        close(shaped.flatten(), padded.double(), TOLERANCE[dtype], name)


@pytest.mark.parametrize("name", NAMES)
def test_little_to_do(backend, name):
    """One item, no item, no list; relevance all equal; half precision; a view that is not contiguous; frozen scores."""
    loss = getattr(ranking, name)
    for shape in ((1,), (0,), (3, 0), (0, 4), (2, 1)):
        scores = torch.randn(shape, requires_grad=True)
        total = loss(scores, torch.zeros(shape))
        assert total.shape == () and total.isfinite()
        assert gradient(total, scores).eq(0).all()
    scores, relevance = torch.randn(2, 20), torch.full((2, 20), 3.0)
    if name in ("ranknet_loss", "lambda_loss", "kendall_loss"):
        scores.requires_grad_()
        total = loss(scores, relevance)
        assert total == 0 and gradient(total, scores).eq(0).all()
    relevance = torch.randint(0, 4, (2, 20)).float()
    for dtype in (torch.bfloat16, torch.float16):
        half = scores.detach().to(dtype).requires_grad_()
        total = loss(half, relevance, reduction="sum")
        wanted, slopes = truth(name, half, relevance)
        assert total.dtype == F32
        close(total, wanted.sum(), 1e-5)
        close(gradient(total, half), torch.stack(slopes), 1e-2 if dtype == torch.bfloat16 else 2e-3)
    across = scores.detach().t().contiguous().t()
    assert loss(across, relevance) == loss(across.contiguous(), relevance)
    assert not loss(across, relevance).requires_grad


def test_extreme_scores(backend):
    """Differences of 1e4: allRank's λ-loss ends at 33 a pair there, with gradient 0. NaN is not hidden."""
    scores = torch.tensor([[-1e4, 0.0, 1e4, 1e4]], requires_grad=True)
    relevance = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    for name in NAMES:
        loss = getattr(ranking, name)(scores, relevance, reduction="sum")
        wanted, slopes = truth(name, scores, relevance)
        close(loss, wanted.sum(), 1e-6, name)
        close(gradient(loss, scores), slopes[0][None], 1e-6, name)
        assert getattr(ranking, name)(torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([0.0, 1.0, 2.0])).isnan()
    ranknet = ranking.ranknet_loss(torch.tensor([-torch.inf, 0.0, 1.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert ranknet.isfinite()  # −∞ of the least relevant item
    assert ranking.ranknet_loss(torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 1.0])) == torch.inf


def test_nan_relevance_is_not_hidden(backend):
    scores = torch.randn(2, 5, requires_grad=True)
    relevance = torch.tensor([[0.0, 1.0, 2.0, torch.nan, 1.0], [0.0, 1.0, 2.0, 3.0, 1.0]])
    for name in ("ranknet_loss", "lambda_loss", "kendall_loss"):
        loss = getattr(ranking, name)(scores, relevance, reduction="none")
        assert loss.isnan().tolist() == [True, False]
        found = gradient(loss.sum(), scores)
        assert found[0].isnan().all() and found[1].isfinite().all()


def test_gains_of_any_relevance(backend):
    scores = torch.tensor([0.3, 0.1, -0.2], dtype=F32)
    wanted = truth("approx_ndcg_loss", [scores.double()], [torch.tensor([500.0, 499.0, 0.0], dtype=F64)])[0]
    close(ranking.approx_ndcg_loss(scores, torch.tensor([500.0, 499.0, 0.0])), wanted[0], 1e-6)


def test_no_pairs_is_no_nan(backend):
    """allRank's RankNet is NaN where the batch has no pair."""
    for normalization in (None, "pairs", "batch"):
        assert ranking.ranknet_loss(torch.randn(2, 3), torch.ones(2, 3), normalization=normalization) == 0


def test_normalizations(backend):
    scores, relevance = batch(3, 9)
    relevance[1] = 0  # no pairs there
    count = (relevance[:, :, None] > relevance[:, None]).sum((1, 2))
    loss = ranking.ranknet_loss
    sums = loss(scores, relevance, normalization=None, reduction="none")
    own = loss(scores, relevance, normalization="pairs", reduction="none")
    assert torch.equal(own, sums / count.clamp(min=1))
    close(loss(scores, relevance, normalization="pairs"), own.mean(), 1e-14)
    close(loss(scores, relevance), sums.sum() / count.sum(), 1e-14)
    assert torch.equal(loss(scores, relevance, normalization="batch", reduction="none"), sums)


def test_kendall_is_kendalls_tau(backend):
    """Without ties and at no temperature it is τ; with ties in relevance a perfect order still has τ = 1."""
    g = torch.Generator().manual_seed(3)
    scores, relevance = torch.randn(30, generator=g, dtype=F64), torch.randn(30, generator=g, dtype=F64)
    signs = (scores[:, None] - scores).sign() * (relevance[:, None] - relevance).sign()
    tau = signs.sum() / (30 * 29)
    close(1 - ranking.kendall_loss(scores, relevance, temperature=1e-6), tau, 1e-9)
    scores = torch.arange(6.0)
    assert ranking.kendall_loss(scores, (scores / 2).floor(), temperature=1e-3) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_and_a_penalty_of_its_gradient(backend, name):
    """In one backward, where what comes to the loss and what comes to its gradient meet."""
    scores, relevance = batch(2, 6, F32 if backend == "triton" else F64, ties=False)
    scores.requires_grad_()
    loss = getattr(ranking, name)(scores, relevance)
    penalty = torch.autograd.grad(loss, scores, create_graph=True)[0].square().sum()
    apart = gradient_kept(loss, scores) + gradient_kept(penalty, scores)
    close(gradient(loss + penalty, scores), apart.double(), 1e-5)


def test_third_derivatives_are_an_error():
    scores, relevance = batch(1, 5)
    scores.requires_grad_()
    for name in NAMES:
        first = torch.autograd.grad(getattr(ranking, name)(scores, relevance), scores, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), scores, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="third derivatives"):
            torch.autograd.grad(second.sum(), scores)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("by_offsets", [False, True])
def test_few_compilations(by_offsets):
    """Of an operator of pairs and of one of positions."""

    def both(*lists, **options):
        return ranking.lambda_loss(*lists, **options) + ranking.approx_ndcg_loss(*lists, **options)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, backend=counter)
    for n in (5, 7, 12, 33):
        scores, relevance = batch(n - 1, n, dtype=F32)
        offsets = torch.arange(0, (n - 1) * n + 1, n) if by_offsets else None
        if by_offsets:
            scores, relevance = scores.flatten(), relevance.flatten()
        scores.requires_grad_()
        found, wanted = (f(scores, relevance, offsets=offsets) for f in (compiled, both))
        close(found, wanted.detach().double(), 1e-6)
        close(gradient(found, scores), gradient(wanted, scores).double(), 1e-6)
    assert counter.frame_count <= 2


@pytest.mark.unpoisoned
@pytest.mark.host
def test_operators():
    scores, relevance = batch(2, 7)
    mask = torch.rand(2, 7) < 0.8
    offsets, flat = torch.tensor([0, 4, 14]), scores.flatten()
    rest = ("softplus", "ndcg2pp", 1.0, 10.0, 1.0, 0)
    op, check = torch.ops.fusedloss, torch.library.opcheck
    check(op.pair_losses, (scores.clone().requires_grad_(), relevance, mask, None, *rest))
    check(op.pair_losses, (flat.clone().requires_grad_(), relevance.flatten(), None, offsets, *rest))
    check(op.soft_positions, (scores.clone().requires_grad_(), mask, None, 2.0))
    given = scores.clone().requires_grad_(), relevance.clone().requires_grad_(), mask, None, 2.0
    check(op.soft_positions_backward, given)


@pytest.mark.host
@pytest.mark.parametrize("name", NAMES)
def test_a_long_list(name):
    """5,000 items in single precision, once; and the same bits from one thread and from two."""
    scores, relevance = batch(1, 5000, dtype=F32, ties=False)
    scores.requires_grad_()
    threads, found = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        loss = getattr(ranking, name)(scores, relevance)
        found.append((loss.detach(), gradient(loss, scores)))
    torch.set_num_threads(threads)
    if pairs._engine(scores) == "cpu":
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    wide = scores.detach().double().requires_grad_()
    wanted = getattr(ranking, name)(wide, relevance.double())
    close(found[0][0], wanted.detach(), 1e-6)
    close(found[0][1], gradient(wanted, wide), 2e-6)


@pytest.mark.host
def test_short_and_long_lists_by_any_number_of_threads():
    g = torch.Generator().manual_seed(1)
    lengths = [1500, 3, 700, 0, 1100, 64, 1]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    items = (sum(lengths),)
    scores, relevance = torch.randn(items, generator=g), torch.randint(0, 3, items, generator=g).float()
    scores.requires_grad_()
    threads = torch.get_num_threads()
    for name in NAMES:
        found = []
        for number in (1, 2):
            torch.set_num_threads(number)
            loss = getattr(ranking, name)(scores, relevance, offsets=offsets, reduction="none")
            found.append((loss.detach(), gradient(loss.sum(), scores)))
        assert pairs._engine(scores) != "cpu" or all(map(torch.equal, *found))
        for row in (0, 2, 4):
            part = slice(int(offsets[row]), int(offsets[row + 1]))
            single = getattr(ranking, name)(scores[part], relevance[part], reduction="sum")
            close(found[0][0][row], single.detach().double(), 1e-6, name)
    torch.set_num_threads(threads)


@pytest.mark.host
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets(isa):
    native = pairs._native
    if native is None:
        pytest.skip("the compiled extension is missing")
    try:
        native.set_isa(isa)
    except RuntimeError:
        pytest.skip(f"this processor has no {isa}")
    try:
        scores, relevance = batch(2, 83, dtype=F32)
        for name, case in CASES:
            s = scores.clone().requires_grad_()
            loss = getattr(ranking, name)(s, relevance, reduction="none", **case)
            wanted, slopes = truth(name, scores, relevance, **case)
            close(loss, wanted, 3e-6, name)
            close(gradient(loss.sum(), s), torch.stack(slopes), 3e-6, name)
    finally:
        native.set_isa(None)


@pytest.mark.host
def test_memory():
    """8,000 items have 64 million pairs: 256 MB as one matrix of floats."""
    script = """
import resource, torch
from fusedloss import ranking
names = ("ranknet_loss", "lambda_loss", "kendall_loss", "approx_ndcg_loss")
def step(n):
    scores = torch.randn(n, requires_grad=True)
    for name in names:
        getattr(ranking, name)(scores, torch.randint(0, 4, (n,)).float()).backward()
step(100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    most = 24 << 10 if backends.cpu.why_not() is None else 120 << 10  # KiB; PyTorch makes blocks of 4 MB
    assert int(run.stdout) < most, f"{int(run.stdout)} KiB"


def test_plain_blocks(monkeypatch):
    """The plain meaning in many small blocks, and several lists at a time."""
    monkeypatch.setattr(pairs, "engine", lambda *_: "torch")
    scores, relevance = batch(5, 13)
    whole = [getattr(ranking, name)(scores, relevance, reduction="none") for name in NAMES]
    for block in (1, 40, 400):
        monkeypatch.setattr(pairs_torch, "BLOCK", block)
        for name, wanted in zip(NAMES, whole):
            close(getattr(ranking, name)(scores, relevance, reduction="none"), wanted, 1e-13, name)


def test_ranks():
    values = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 9.0, 2.0, 5.0]])
    mask = torch.tensor([[True, True, True, True], [True, False, True, True]])
    got = pairs_torch.ranks(lists_of("tests", values, -1, mask), values)
    assert got.tolist() == [[3, 1, 2, 4], [2, 4, 3, 1]]
    offsets = torch.tensor([0, 3, 3, 8])
    flat, keep = values.flatten(), mask.flatten()
    got = pairs_torch.ranks(lists_of("tests", flat, -1, keep, offsets), flat)
    assert got.tolist() == [3, 1, 2, 4, 2, 5, 3, 1]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda s: ranking.ranknet_loss(s, s, weighting="gap"), "ranknet_loss: weighting"),
        (lambda s: ranking.ranknet_loss(s, s, normalization="list"), "ranknet_loss: normalization"),
        (lambda s: ranking.ranknet_loss(s, s, sigma=0.0), "ranknet_loss: sigma"),
        (lambda s: ranking.lambda_loss(s, s, weighting="ndcg3"), "lambda_loss: weighting"),
        (lambda s: ranking.lambda_loss(s, s, k=0), "lambda_loss: k"),
        (lambda s: ranking.lambda_loss(s, s, base=1), "lambda_loss: base"),
        (lambda s: ranking.approx_ndcg_loss(s, s, temperature=-1.0), "approx_ndcg_loss: temperature"),
        (lambda s: ranking.kendall_loss(s, s, temperature=0.0), "kendall_loss: temperature"),
        (lambda s: ranking.adr_mse_loss(s, s, discount="log"), "adr_mse_loss: discount"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, 3))


if not backends.triton.interpreted() and backends.triton._loaded()[0] is not None:

    def test_in_the_interpreter():
        assert " passed" in passes_in_the_interpreter(__file__, "-k", "triton and not float64")
