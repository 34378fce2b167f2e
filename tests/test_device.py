"""The whole way on the device under test (`pytest --device cuda`), for every live backend; on a CPU otherwise."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import BY_NAME
from tolerance import check_linear_gradients, check_loss, check_score_gradient, error

import fusedloss as fl
from fusedloss.losses import LOSSES, function_of, hyperparameters, name_of
from fusedloss.spherical import engines
from fusedloss.spherical.factors import Factors
from fusedloss.spherical.family import MEMBERS, member

N, D, V = 37, 64, 1500
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["random", "rising", "confident"])
def regime(request):
    return request.param


def problem(dtype, regime="random", rows=N, columns=V):
    x, w = torch.randn(rows, D), torch.randn(columns, D) * D**-0.5
    target = torch.randint(0, columns, (rows,))
    if regime == "rising":  # the last classes' scores are far above the first ones'
        x[:, 0], w[:, 0] = 1, torch.linspace(0, 40, columns)
    if regime == "confident":
        x += 14 * w[target] / w[target].square().sum(1, keepdim=True)
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", ["eager", "recompute"])
def test_linear_cross_entropy(backend, device, dtype, schedule, regime):
    x, w, target = problem(dtype, regime)
    loss = fl.linear_cross_entropy(x, w, target, schedule=schedule)
    assert loss.device.type == device.type
    dx, dw = torch.autograd.grad(loss, (x, w))
    dense = lambda s: F.cross_entropy(s, target)  # noqa: E731
    check_linear_gradients(dx, dw, dense, x, w, target)
    check_loss(loss, dense, x.detach().double() @ w.detach().double().t())


def test_linear_cross_entropy_out_of_the_product(backend, regime, monkeypatch):
    """The eager schedule whose scores are never in memory: the product leaves exponentials."""
    engine = BY_NAME[backend]
    if not hasattr(engine, "fuses"):
        pytest.skip(f"backend {backend!r} takes no statistics out of a product")
    plain, taken = engine.limits, []
    monkeypatch.setattr(engine, "limits", lambda device: replace(plain(device), fuses_eager=True))
    product = engine.linear_statistics
    monkeypatch.setattr(engine, "linear_statistics", lambda *given: taken.append(given[5]) or product(*given))
    x, w, target = problem(torch.bfloat16, regime)
    loss = fl.linear_cross_entropy(x, w, target, schedule="eager")
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert taken and all(kept.block == plain(x.device).fused_columns for kept in taken)
    check_linear_gradients(dx, dw, lambda s: F.cross_entropy(s, target), x, w, target)


def test_linear_cross_entropy_with_its_gradient_out_of_the_product(backend, regime, monkeypatch):
    """The recompute schedule whose blocks of scores are never in memory: the product leaves their gradient."""
    engine = BY_NAME[backend]
    if not hasattr(engine, "fuses_gradient"):
        pytest.skip(f"backend {backend!r} takes no gradient out of a product")
    plain, product, taken = engine.limits, engine.linear_gradient, []
    monkeypatch.setattr(engine, "limits", lambda device: replace(plain(device), fuses_gradient=True))
    monkeypatch.setattr(engine, "linear_gradient", lambda *given: taken.append(given[3].dtype) or product(*given))
    x, w, target = problem(torch.bfloat16, regime)
    loss = fl.linear_cross_entropy(x, w, target, schedule="recompute", memory_budget=20 << 11)
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert len(taken) > 1 and set(taken) == {torch.bfloat16}
    check_linear_gradients(dx, dw, lambda s: F.cross_entropy(s, target), x, w, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_logits(backend, dtype):
    z, target = (3 * torch.randn(N, V)).to(dtype), torch.randint(0, V, (N,))
    z[:, ::7] = -torch.inf
    z.scatter_(1, target[:, None], 1.0)
    z.requires_grad_()
    loss = fl.cross_entropy(z, target)
    (found,) = torch.autograd.grad(loss, z)
    check_score_gradient(found, lambda s: F.cross_entropy(s, target), z.detach(), target)
    assert (found[z == -torch.inf] == 0).all()


@pytest.mark.parametrize("module", LOSSES, ids=name_of)
@pytest.mark.parametrize("schedule", ["eager", "recompute"])
def test_losses(backend, module, schedule):
    classes = 300
    x, w, target = problem(torch.float32, rows=20, columns=classes)
    target %= 5
    for case in module.CASES:
        options = hyperparameters(case, classes)
        scores = fl.linear_scores(x, w, schedule=schedule)
        found = torch.autograd.grad(function_of(module)(scores, target, **options, reduction="sum"), (x, w))
        exact = [t.detach().double().requires_grad_() for t in (x, w)]
        options = hyperparameters(case, classes, torch.float64)
        truth = module.reference(exact[0] @ exact[1].t(), target, **options).sum()
        for got, gradient in zip(found, torch.autograd.grad(truth, exact)):
            assert error(got, gradient) < 1e-5, case


def test_ignored_rows_and_options(backend):
    x, w, target = problem(torch.float32)
    target[::3] = -100
    bias, row_weight = torch.randn(V).requires_grad_(), torch.rand(N)
    options = dict(linear_bias=bias, row_weight=row_weight, softcap=20.0, temperature=0.7, z_loss=1e-3)
    keep = target >= 0
    for reduction in ("mean", "none"):
        loss = fl.linear_cross_entropy(x, w, target, reduction=reduction, **options)
        found = torch.autograd.grad(loss.sum(), (x, w, bias))
        scores = 20 * torch.tanh((x.double() @ w.double().t() + bias.double()) / 20) / 0.7
        losses = F.cross_entropy(scores, target, reduction="none") + 1e-3 * scores.logsumexp(1).square() * keep
        losses = losses * row_weight
        truth = losses.sum() / (row_weight * keep).sum() if reduction == "mean" else losses.sum()
        for got, exact in zip(found, torch.autograd.grad(truth, (x, w, bias))):
            assert error(got, exact) < 2e-6
        assert (found[0][~keep] == 0).all() and (reduction == "mean" or (loss[~keep] == 0).all())


def test_log_probs_without_gradients(backend):
    x, w, target = problem(torch.float32)
    with torch.no_grad():
        found = fl.linear_log_probs(x, w, target, return_entropy=True, return_lse=True)
    log_p = torch.log_softmax(x.double() @ w.double().t(), 1)
    assert error(found.log_probs, log_p.gather(1, target[:, None])[:, 0]) < 1e-6
    assert error(found.entropy, -(log_p.exp() * log_p).sum(1)) < 1e-6


def test_targets_out_of_range(backend, device):
    x, w, target = problem(torch.float32)
    target[4] = V
    if device.type == "cpu":
        with pytest.raises(IndexError, match="out of range"):
            fl.linear_cross_entropy(x, w, target)
        return
    loss = fl.linear_cross_entropy(x, w, target)
    assert loss.isnan() and torch.autograd.grad(loss, x)[0].isnan().all()
    with pytest.raises(IndexError, match=f"element 4 of the flat target\\] = {V}"):
        fl.check()


# --- the factored layer ----------------------------------------------------------------------------------------------

FACTORED = (5000, 64)  # classes, features


def factored_problem(dtype, rows):
    """Factors of some weight, and what two steps are made of: features, targets of which some come twice, shares."""
    p = torch.randn(FACTORED, dtype=torch.float64).to(dtype)
    batches = [torch.randn(rows, FACTORED[1], dtype=torch.float64).to(dtype) for _ in range(2)]
    target = torch.randint(0, 20, (rows, 1))
    return Factors.of(p), batches, target, torch.ones(rows, 1, dtype=torch.float64)


def factored_step(f, h, target, share, loss, lr):
    """(losses, gradient of the features) of a step of SGD on the sum of the losses."""
    engine = engines.engine(f)
    visited = engine.visit(f, h, target, share, loss)
    dh, batch = engine.backward(f, visited, torch.ones_like(visited.losses))
    engine.step(f, batch, lr, 0.1)
    return visited.losses, dh


@pytest.mark.parametrize(
    ("dtype", "rows", "module"),
    [(torch.float64, 24, module) for module in MEMBERS]
    + [(torch.float64, 72, module) for module in (MEMBERS[0], MEMBERS[3])]
    + [(torch.float32, rows, MEMBERS[3]) for rows in (24, 72)],
    ids=lambda given: name_of(given) if given in MEMBERS else str(given),
)
def test_factored_steps(backend, dtype, rows, module):
    """As dense SGD on the whole weight. The squared error's steps are as long as makes U singular: P takes it over."""
    f, batches, target, share = factored_problem(dtype, rows)
    w, limit = f.p.clone().double(), 1e-12 if dtype == torch.float64 else 1e-5
    options = {MEMBERS[0]: dict(mean_over_classes=False), MEMBERS[1]: dict(eps=1.0)}.get(module, {})
    loss = member("tests", getattr(fl.nn, module_of(module))(**options))
    for h in batches:
        lr = 1 / (2 * torch.linalg.matrix_norm(h, 2).square().item() + 0.1) if module is MEMBERS[0] else 0.1
        losses, dh = factored_step(f, h, target, share, loss, lr)
        x, w = h.double().requires_grad_(), w.detach().requires_grad_()
        truth = module.reference(x @ w.t(), target[:, 0], **options)
        dx, dw = torch.autograd.grad(truth.sum(), (x, w))
        w = (1 - 0.1 * lr) * w.detach() - lr * dw
        assert error(losses, truth) < limit and error(dh, dx) < limit
        assert (f.u == torch.eye(FACTORED[1])).all() == (module is MEMBERS[0])
    assert error(f.rows(torch.arange(FACTORED[0])), w) < limit


def module_of(module):
    return "".join(part.capitalize() for part in name_of(module).split("_"))


def test_factored_steps_have_the_same_bits(backend):
    loss = member("tests", fl.nn.SphericalZLoss())
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        f, batches, target, share = factored_problem(torch.float32, 24)
        made = [factored_step(f, h, target, share, loss, 1.0) for h in batches]
        found.append([*vars(f).values(), *(t for pair in made for t in pair)])
    assert all(torch.equal(one, two) for one, two in zip(*found))


@pytest.mark.unpoisoned
def test_cuda_graph_of_factored_steps(device, backend):
    if device.type != "cuda" or backend != "triton":
        pytest.skip("needs a CUDA device: graphs")
    f, (h, other), target, share = factored_problem(torch.float32, 24)
    loss = member("tests", fl.nn.SphericalZLoss())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            factored_step(f, h, target, share, loss, 1.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = factored_step(f, h, target, share, loss, 1.0)
    same = Factors(**{name: t.clone() for name, t in vars(f).items()})
    h.copy_(other)
    graph.replay()
    for got, expected in zip(recorded, factored_step(same, other, target, share, loss, 1.0)):
        assert torch.equal(got, expected)
    assert all(torch.equal(getattr(f, name), t) for name, t in vars(same).items())


@pytest.mark.unpoisoned
def test_cuda_graph(device, backend):
    """Nothing in a step waits for the device: a graph records it, and replays it with other numbers."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device: graphs")
    x, w, target = problem(torch.bfloat16)

    def step():
        loss = fl.linear_cross_entropy(x, w, target)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    other, _, others = problem(torch.bfloat16)
    with torch.no_grad():
        x.copy_(other), target.copy_(others)
    graph.replay()
    for got, expected in zip(recorded, step()):
        assert torch.equal(got, expected)


# ---- soft sort and soft rank: rows in a block's shared memory, and longer ones ---------------------------------------


@pytest.mark.parametrize("shape", [(5, 37), (3, 1000), (2, 20000), (2, 50000)], ids=str)
@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("name", ["soft_rank", "soft_sort"])
def test_soft_sorts(device, name, regularization, shape):
    """Beside the same in fp64 on the host, at strengths of few blocks, of many, and of none."""
    from fusedloss import sorting

    if not hasattr(sorting, name):
        pytest.skip("no soft sorts")
    if device.type != "cuda":
        shape = shape[0], min(shape[1], 300)
    operator = getattr(sorting, name)
    x, g = torch.randn(shape), torch.randn(shape)
    for strength in (3.0, 5.0 / shape[1], 0.0):
        strength = strength if name == "soft_rank" or strength == 0 else 1 / strength
        got, exact = x.clone().requires_grad_(), x.cpu().double().requires_grad_()
        y, truth = operator(got, regularization, strength), operator(exact, regularization, strength)
        assert (y.cpu() - truth).abs().max() <= 2.0**-21 * truth.abs().max()
        (dx,), (expected,) = torch.autograd.grad(y, got, g), torch.autograd.grad(truth, exact, g.cpu().double())
        assert (dx.cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert all(torch.equal(operator(x, regularization, strength), y.detach()) for _ in range(3))


def test_soft_ranks_of_ragged_rows(device):
    from fusedloss import sorting

    if not hasattr(sorting, "soft_rank"):
        pytest.skip("no soft sorts")
    lengths = torch.tensor([5, 0, 700, 40000 if device.type == "cuda" else 400, 1, 33], device="cpu")
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    x = torch.randn(int(offsets[-1]))
    ranks = sorting.soft_rank(x, regularization_strength=0.01, offsets=offsets.to(device))
    for a, b in zip(offsets.tolist(), offsets[1:].tolist()):
        truth = sorting.soft_rank(x[a:b].cpu().double(), regularization_strength=0.01)
        assert b == a or (ranks[a:b].cpu() - truth).abs().max() <= 2.0**-21 * (b - a)
