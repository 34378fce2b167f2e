"""What autograd may ask of a loss on linear scores, and what each answer may cost."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from conftest import BY_NAME
from tolerance import check_linear_gradients, check_score_gradient
from torch.utils.checkpoint import checkpoint

import fusedloss as fl
from fusedloss import cross_entropy, linear_cross_entropy, linear_scores, squentropy, trace
from fusedloss.losses.squentropy import reference

N, D, V = 48, 16, 301
HALF = [torch.bfloat16, torch.float16]


def problem(dtype=torch.float32, n=N, d=D, v=V, ignored=0):
    x, w = torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(v, d).to(dtype).requires_grad_()
    target = torch.randint(0, v, (n,))
    target[:ignored] = -100
    return x, w, target


def dense(x, w, target, **options):
    return F.cross_entropy(F.linear(x, w), target, **options)


def exact(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def close(got, truth, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(got.double(), truth.double(), rtol=rtol, atol=atol)


# --- how much is computed --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_gemms(backend, rows=N, columns=V, width=D):
    """Work of the GEMMs inside, in units of one rows × columns × width product."""
    work = []
    engine = BY_NAME[backend]
    plain = engine.gemm

    def counting(out, a, b, accumulate):
        work.append(out.shape[0] * out.shape[1] * a.shape[1] / (rows * columns * width))
        return plain(out, a, b, accumulate)

    engine.gemm = counting
    try:
        yield work
    finally:
        engine.gemm = plain


@pytest.mark.parametrize("budget", [1 << 28, V * 4 * 7])
@pytest.mark.parametrize(
    ("frozen", "reduction", "schedule", "forward", "backward"),
    [
        ((), "mean", "eager", 3, 0),
        (("x",), "mean", "eager", 2, 0),
        (("w",), "mean", "eager", 2, 0),
        (("x", "w"), "mean", "eager", 1, 0),
        ((), "mean", "recompute", 4, 0),
        ((), "none", "eager", 1, 3),
        (("x",), "none", "auto", 1, 2),
        (("w",), "none", "auto", 1, 2),
    ],
)
def test_number_of_gemms(backend, frozen, reduction, schedule, forward, backward, budget):
    x, w, target = problem()
    for name in frozen:
        {"x": x, "w": w}[name].requires_grad_(False)
    with counted_gemms(backend) as work:
        loss = linear_cross_entropy(x, w, target, reduction=reduction, schedule=schedule, memory_budget=budget)
    assert sum(work) == pytest.approx(forward)
    if len(frozen) < 2:
        with counted_gemms(backend) as work:
            loss.sum().backward()
        assert sum(work) == pytest.approx(backward)
    a, b = exact(x, w)
    dense(a, b, target, reduction=reduction).sum().backward()
    for name, leaf, truth in (("x", x, a), ("w", w, b)):
        if name in frozen:
            assert leaf.grad is None
        else:
            close(leaf.grad, truth.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_only_the_loss_is_computed_without_gradients(backend, mode):
    x, w, target = problem()
    with mode(), counted_gemms(backend) as work:
        loss = linear_cross_entropy(x, w, target)
    assert sum(work) == pytest.approx(1) and not loss.requires_grad
    close(loss, dense(x, w, target))


def test_row_weights_cost_no_pass(backend):
    x, w, target = problem()
    row_weight = torch.rand(N, requires_grad=True)
    with counted_gemms(backend) as work:
        linear_cross_entropy(x, w, target, row_weight=row_weight).backward()
    assert sum(work) == pytest.approx(3)
    a, b, c = exact(x, w, row_weight)
    losses = dense(a, b, target, reduction="none")
    ((losses * c).sum() / c.sum()).backward()
    for got, truth in ((x, a), (w, b), (row_weight, c)):
        close(got.grad, truth.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_cost_no_gemm(backend, reduction):
    x, w, target = problem(ignored=36)
    with counted_gemms(backend) as work:
        linear_cross_entropy(x, w, target, reduction=reduction).sum().backward()
    assert sum(work) == pytest.approx((4 if reduction == "none" else 3) / 4)


def test_a_second_backward_costs_a_second_walk_and_no_more(backend):
    x, w, target = problem()
    loss = linear_cross_entropy(x, w, target)
    loss.backward(retain_graph=True)
    with counted_gemms(backend) as work:
        loss.backward()
    assert sum(work) == pytest.approx(3)


# --- gradients are handed over, not copied ---------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_first_backward_hands_over_the_buffers_of_forward(backend, factor):
    """A V × D gradient exists once."""
    x, w, target = problem()
    loss = linear_cross_entropy(x, w, target)
    held = {g.data_ptr() for g in loss.grad_fn.gradients if g is not None and g.numel()}
    (factor * loss).backward()
    assert {x.grad.data_ptr(), w.grad.data_ptr()} <= held


def test_gradients_are_freed_with_the_graph(backend):
    x, w, target = problem()
    loss = linear_cross_entropy(x, w, target)
    node = loss.grad_fn
    loss.backward()
    assert node.gradients is None


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_backward_twice_gives_the_same_gradients(backend, dtype):
    x, w, target = problem(dtype)
    loss = 1.7 * linear_cross_entropy(x, w, target)
    first = torch.autograd.grad(loss, [x, w], retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, [x, w], retain_graph=True)
    third = torch.autograd.grad(loss, [x, w])
    for a, b, c, k in zip(first, second, third, kept):
        assert torch.equal(a, k) and torch.equal(b, k) and torch.equal(c, k)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, [x, w])


@pytest.mark.parametrize("upstream", [0.0, -2.0, 1e-3, 1e4])
def test_upstream_factor(backend, upstream):
    x, w, target = problem()
    (upstream * linear_cross_entropy(x, w, target)).backward()
    a, b = exact(x, w)
    (upstream * dense(a, b, target)).backward()
    for got, truth in ((x, a), (w, b)):
        close(got.grad, truth.grad, atol=1e-6 * max(abs(upstream), 1e-6))


def test_same_bits_every_time(backend):
    x, w, target = problem()
    runs = []
    for _ in range(3):
        loss = linear_cross_entropy(x, w, target, memory_budget=V * 4 * 7)
        runs.append([loss.detach(), *torch.autograd.grad(loss, [x, w])])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("schedule", ["eager", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inputs_are_never_written(backend, schedule, dtype, reduction):
    x, w, target = problem(dtype, ignored=5)
    given = dict(weight=torch.rand(V), row_weight=torch.rand(N), linear_bias=torch.randn(V).to(dtype))
    everything = [x, w, target, *given.values()]
    before, versions = [t.detach().clone() for t in everything], [t._version for t in everything]
    options = dict(given, reduction=reduction, schedule=schedule, label_smoothing=0.1, memory_budget=V * 4 * 9)
    linear_cross_entropy(x, w, target, **options).sum().backward()
    z = torch.randn(N, V).to(dtype).requires_grad_()
    kept = z.detach().clone()
    cross_entropy(z, target, given["weight"], reduction=reduction).sum().backward()
    assert torch.equal(z, kept)
    for t, b, v in zip(everything, before, versions):
        assert torch.equal(t, b) and t._version == v


def test_an_input_changed_in_place_before_a_recomputing_backward_is_noticed(backend):
    x, w, target = problem()
    loss = linear_cross_entropy(x, w, target, reduction="none")
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_target_changed_in_place_before_backward_changes_nothing(backend, reduction):
    """Loaders reuse their buffers. The first backward of a mean needs nothing more; a recomputing one kept its own."""
    x, w, target = problem()
    a, b = exact(x, w)
    dense(a, b, target).backward()
    loss = linear_cross_entropy(x, w, target, reduction=reduction).sum() / (N if reduction == "none" else 1)
    target.fill_(0)
    loss.backward()
    close(x.grad, a.grad)
    close(w.grad, b.grad)


# --- derivatives of derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_hessian_vector_products(backend, reduction):
    x, w, target = problem(torch.float64, 7, 3, 5)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    leaves = [x, w, bias]
    vectors = [torch.randn_like(t) for t in leaves]

    def product(loss):
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, vectors)), leaves)
        return [*first, *second]

    options = dict(label_smoothing=0.1, reduction=reduction, weight=torch.rand(5, dtype=torch.float64))
    ours = product(linear_cross_entropy(x, w, target, linear_bias=bias, **options).sin().sum())
    truth = product(F.cross_entropy(F.linear(x, w, bias), target, **options).sin().sum())
    for got, expected in zip(ours, truth):
        close(got, expected, 1e-10, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("ignored", [0, 2])
def test_gradgradcheck(reduction, ignored):
    x, w, target = problem(torch.float64, 5, 3, 4, ignored)
    row_weight = torch.rand(5, dtype=torch.float64, requires_grad=True)

    def loss(x, w, row_weight):
        return linear_cross_entropy(
            x, w, target, row_weight=row_weight, reduction=reduction, softcap=2.0, temperature=0.7, z_loss=0.1
        )

    assert torch.autograd.gradcheck(loss, (x, w, row_weight))
    assert torch.autograd.gradgradcheck(loss, (x, w, row_weight))


def test_create_graph_first_and_plain_backward_after(backend):
    x, w, target = problem()
    loss = linear_cross_entropy(x, w, target)
    created = torch.autograd.grad(loss, [x, w], create_graph=True)
    plain = torch.autograd.grad(loss, [x, w], retain_graph=True)
    again = torch.autograd.grad(loss, [x, w])
    for a, b, c in zip(created, plain, again):
        assert a.requires_grad and not b.requires_grad
        close(a, b)
        assert torch.equal(b, c)


def test_create_graph_with_a_lone_class_or_masked_rivals(backend):
    """log of an empty sum: its derivative must not become NaN."""
    x = torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(
        linear_cross_entropy(x, torch.randn(1, 3), torch.zeros(4).long()), x, create_graph=True
    )
    assert (grad == 0).all()
    z = torch.tensor([[1.0, -torch.inf], [0.5, 0.7]], requires_grad=True)
    loss = cross_entropy(z, torch.tensor([0, 1]))
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    assert grad.isfinite().all() and (grad[0] == 0).all()


# --- every gradient there is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["eager", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_bias_scale_and_class_vectors(backend, schedule, reduction, dtype):
    x, w, target = problem(dtype, ignored=7)
    bias, stretch, shift = torch.randn(V).to(dtype), torch.rand(V) + 0.5, torch.randn(V)
    scale = torch.tensor(1.3)
    leaves = [x, w, *(t.requires_grad_() for t in (bias, stretch, shift, scale))]
    options = dict(schedule=schedule, memory_budget=V * 4 * 11)
    scores = linear_scores(x, w, bias=bias, scale=scale, softcap=4.0, **options).adjusted(stretch, shift)
    loss = cross_entropy(scores, target, reduction=reduction)
    found = torch.autograd.grad(loss.sum(), leaves)
    wide = exact(*leaves)
    a, b, c, d, e, f = wide
    z = d * f * 4 * torch.tanh((a @ b.t() + c) / 4) + e
    truth = F.cross_entropy(z, target, reduction=reduction)
    close(loss, truth, 1e-5)
    for leaf, got, expected in zip(leaves, found, torch.autograd.grad(truth.sum(), wide)):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        apart = (got.double() - expected).norm() / expected.norm()
        assert apart < (1e-5 if dtype == torch.float32 else 2**-8), apart


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_target_probabilities(backend, linear, reduction):
    x, w, _ = problem(v=11)
    y = torch.randn(N, 11).softmax(1).requires_grad_()
    if linear:
        loss = linear_cross_entropy(x, w, y, reduction=reduction, label_smoothing=0.1)
    else:
        loss = cross_entropy(F.linear(x, w), y, reduction=reduction, label_smoothing=0.1)
    loss.sum().backward()
    a, b, c = exact(x, w, y)
    F.cross_entropy(F.linear(a, b), c, reduction=reduction, label_smoothing=0.1).sum().backward()
    for got, truth in ((x, a), (w, b), (y, c)):
        close(got.grad, truth.grad, 1e-4, 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_of_row_weights(backend, reduction):
    z, target = torch.randn(2, 7, 3, requires_grad=True), torch.randint(0, 7, (2, 3))
    target[0, 1] = -100
    row_weight = torch.rand(2, 3, requires_grad=True)
    cross_entropy(z, target, row_weight=row_weight, reduction=reduction).sum().backward()
    a, c = exact(z, row_weight)
    losses = F.cross_entropy(a, target, reduction="none") * c
    divisor = c[target >= 0].sum() if reduction == "mean" else 1
    (losses.sum() / divisor).backward()
    close(z.grad, a.grad)
    close(row_weight.grad, c.grad)


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("schedule", ["eager", "recompute"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_scale_saves_float16_gradients(backend, linear, schedule, reduction):
    """Gradients of 1e-8 vanish in fp16; multiplied by a loss scaler's factor first, they must not."""
    n, v, tiny, scale = 512, 4096, 2.0**-5, 65536.0 * 32
    row_weight = torch.full((n,), tiny)
    target = torch.randint(0, v // 2, (n,))
    if linear:
        x, w = (0.1 * torch.randn(n, D)).half().requires_grad_(), torch.randn(v, D).half().requires_grad_()
        walk = dict(schedule=schedule, memory_budget=v * 4 * 200)
        loss = linear_cross_entropy(x, w, target, row_weight=row_weight / n, reduction=reduction, **walk)
        (scale * loss.sum()).backward()
        check_linear_gradients(x.grad, w.grad, lambda s: 65536 * F.cross_entropy(s, target), x, w, target)
    else:
        z = (0.1 * torch.randn(n, v)).half().requires_grad_()
        (scale * cross_entropy(z, target, row_weight=row_weight / n, reduction=reduction).sum()).backward()
        check_score_gradient(z.grad, lambda s: 65536 * F.cross_entropy(s, target), z.detach(), target)
        assert (z.grad != 0).all()


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(backend, device, parameters, reduction):
    x, w = torch.randn(N, D).requires_grad_(), torch.randn(V, D).to(parameters).requires_grad_()
    target = torch.randint(0, V, (N,))
    with torch.autocast(device.type, torch.bfloat16), counted_gemms(backend) as work:
        loss = linear_cross_entropy(x, w, target, reduction=reduction)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == torch.float32 and w.grad.dtype == parameters
    assert sum(work) == pytest.approx(1 if reduction == "none" else 3)
    a, b = (t.detach().bfloat16().double().requires_grad_() for t in (x, w))
    truth = dense(a, b, target, reduction=reduction)
    truth.sum().backward()
    close(loss, truth, 1e-5, 1e-5)
    for got, expected in ((x, a), (w, b)):
        assert (got.grad.double() - expected.grad).norm() < 2**-7 * expected.grad.norm()
    x2, w2 = x.detach().requires_grad_(), w.detach().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        theirs = dense(x2, w2, target, reduction=reduction)
    theirs.sum().backward()
    close(loss, theirs, 2e-2, 2e-2)
    close(w.grad, w2.grad, 5e-2, 5e-2 * w2.grad.abs().max().item())


def test_autocast_of_cross_entropy_keeps_the_logits_type(backend, device):
    z, target = torch.randn(N, V), torch.randint(0, V, (N,))
    with torch.autocast(device.type, torch.bfloat16):
        loss = cross_entropy(z, target)
    close(loss, F.cross_entropy(z.double(), target))


# --- shapes, layouts, graphs ------------------------------------------------------------------------------------------


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "reversed twice": lambda t: t.flip(0).flip(0),
    "expanded rows": lambda t: t[:1].expand(t.shape),
    "expanded columns": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "w", "logits", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend, layout, which, dtype):
    x, w, target = problem(dtype)
    laid = LAYOUTS[layout]
    if which == "logits":
        base = torch.randn(N, V).to(dtype)
        got, truth = base.clone().requires_grad_(), base.double().requires_grad_()
        loss, expected = cross_entropy(laid(got), target), F.cross_entropy(laid(truth), target)
        pairs = [(got, truth)]
    else:
        a, b = exact(x, w)
        x1, w1 = laid(x) if which in ("x", "both") else x, laid(w) if which in ("w", "both") else w
        a1, b1 = laid(a) if which in ("x", "both") else a, laid(b) if which in ("w", "both") else b
        loss, expected = linear_cross_entropy(x1, w1, target), dense(a1, b1, target)
        pairs = [(x, a), (w, b)]
    loss.backward()
    expected.backward()
    close(loss, expected, 1e-5, 1e-5)
    for got, truth in pairs:
        apart = (got.grad.double() - truth.grad).norm()
        # Where all classes or all rows are one, gradients sum to 0 and only rounding is left.
        left = (1e-5 if dtype == torch.float32 else 2e-2) if "expanded" in layout else 1e-9
        assert apart <= (1e-5 if dtype == torch.float32 else 2**-7) * truth.grad.norm() + left


def test_batch_and_time(backend):
    x, w = torch.randn(2, 3, 5, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    target = torch.randint(0, V, (2, 3, 5))
    target[0, 1] = -100
    losses = linear_cross_entropy(x, w, target, reduction="none")
    assert losses.shape == (2, 3, 5) and (losses[0, 1] == 0).all()
    linear_cross_entropy(x.transpose(0, 1), w, target.transpose(0, 1)).backward()
    a, b = exact(x, w)
    dense(a.flatten(0, 2), b, target.flatten()).backward()
    close(x.grad, a.grad)
    close(w.grad, b.grad)
    assert (x.grad[0, 1] == 0).all()


def test_hidden_states_are_no_leaf_and_weights_are_tied(backend):
    """The embedding is the output layer: both gradients meet in one parameter."""

    def model(table, layer, tokens, head):
        h = torch.tanh(F.embedding(tokens, table) @ layer)
        return head(h, table, tokens.roll(-1))

    tokens = torch.randint(0, V, (N,))
    table, layer = torch.randn(V, D, requires_grad=True), torch.randn(D, D, requires_grad=True)
    a, b = exact(table, layer)
    model(table, layer, tokens, linear_cross_entropy).backward()
    model(a, b, tokens, dense).backward()
    close(table.grad, a.grad)
    close(layer.grad, b.grad)


def test_one_tensor_as_input_and_weight(backend):
    w, target = torch.randn(V, D, requires_grad=True), torch.randint(0, V, (V,))
    (a,) = exact(w)
    linear_cross_entropy(w, w, target).backward()
    dense(a, a, target).backward()
    close(w.grad, a.grad, 1e-4, 1e-6)


def test_two_losses_of_one_layer(backend):
    x, w, target = problem()
    a, b = exact(x, w)
    (linear_cross_entropy(x, w, target) + 0.3 * squentropy(linear_scores(x, w), target)).backward()
    (dense(a, b, target) + 0.3 * reference(F.linear(a, b), target).mean()).backward()
    close(x.grad, a.grad, 1e-4, 1e-5)
    close(w.grad, b.grad, 1e-4, 1e-5)


def test_micro_batches_add_up(backend):
    x, w, target = problem()
    for part in range(4):
        rows = slice(12 * part, 12 * part + 12)
        (linear_cross_entropy(x[rows], w, target[rows]) / 4).backward()
    a, b = exact(x, w)
    dense(a, b, target).backward()
    close(x.grad, a.grad)
    close(w.grad, b.grad)


def test_hooks_see_and_change_gradients(backend):
    x, w, target = problem()
    seen = []
    w.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    x.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    linear_cross_entropy(x, w, target).backward()
    a, b = exact(x, w)
    dense(a, b, target).backward()
    close(w.grad, 2 * b.grad)
    assert len(seen) == 2
    close(next(s for s in seen if s.shape == x.shape), a.grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpoint(backend, reentrant, reduction):
    for key in [k for k, p in trace.PROGRAMS.items() if isinstance(p, trace.Program)]:
        del trace.PROGRAMS[key]  # so that the loss is traced among the checkpoint's hooks
    x, w, target = problem()

    def head(x):
        return linear_cross_entropy(torch.tanh(x), w, target, reduction=reduction)

    checkpoint(head, x, use_reentrant=reentrant).sum().backward()
    a, b = exact(x, w)
    dense(torch.tanh(a), b, target, reduction=reduction).sum().backward()
    close(x.grad, a.grad)
    close(w.grad, b.grad)


def test_a_loss_that_nobody_differentiates(backend):
    x, w, target = problem()
    loss = linear_cross_entropy(x, w, target)
    losses = linear_cross_entropy(x, w, target, reduction="none")
    other = x.square().sum()
    (other + 0 * losses.detach().sum()).backward()
    assert w.grad is None and loss.requires_grad


def test_modules_and_optimisers(backend):
    layer = torch.nn.Linear(D, V)
    twin = torch.nn.Linear(D, V)
    twin.load_state_dict(layer.state_dict())
    x, target = torch.randn(N, D), torch.randint(0, V, (N,))
    fit, twin_fit = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (layer, twin))
    for _ in range(5):
        fit.zero_grad(), twin_fit.zero_grad()
        linear_cross_entropy(x, layer.weight, target, linear_bias=layer.bias).backward()
        F.cross_entropy(twin(x), target).backward()
        fit.step(), twin_fit.step()
    close(layer.weight, twin.weight, 1e-4, 1e-4)
    close(layer.bias, twin.bias, 1e-4, 1e-4)


def made_of_each_other():
    """Losses of which one tensor is computed from another: (name, loss of W)."""
    x, token, target = torch.randn(6, 8, dtype=torch.float64), torch.arange(6), torch.arange(6) % 5
    some = torch.randn(8, 8, dtype=torch.float64)
    return {
        "tied": lambda w: fl.linear_cross_entropy(torch.tanh(w[token] @ some), w, target),
        "tied rows": lambda w: fl.linear_cross_entropy(
            torch.tanh(w[token] @ some), w, target, reduction="none"
        ).sum(),
        "bias": lambda w: fl.linear_cross_entropy(x, w, target, linear_bias=w.sum(1)),
        "row weight": lambda w: fl.linear_cross_entropy(x, w, target, row_weight=w.sum(1)[:6].exp()),
        "row parameter": lambda w: fl.bpr_loss(fl.similarity_scores(x, w)),
        "similarity": lambda w: fl.info_nce_loss(fl.similarity_scores(w[:3] @ some, w)),
    }


@pytest.mark.parametrize("name", made_of_each_other())
def test_first_derivatives_with_create_graph_are_those_without(name):
    w = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    loss = made_of_each_other()[name]
    plain, graph = (torch.autograd.grad(loss(w), w, create_graph=again)[0] for again in (False, True))
    torch.testing.assert_close(graph, plain, rtol=1e-10, atol=1e-12)


def test_what_a_statistic_carries_must_not_change_before_backward():
    label, x = torch.arange(6) % 2, torch.randn(6, 4, requires_grad=True)
    value = fl.similarity_scores(x).reduce(fl.LogSumExp(where=fl.Same(label, label)))
    label.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()
