"""FactoredLinear against a dense layer in float64: autograd, torch.optim.SGD, and the losses of scores in hand."""

import copy
import io
import math
import pickle

import pytest
import torch
from tolerance import error

import fusedloss as fl
from fusedloss.spherical import FactoredLinear
from fusedloss.spherical.engines import engine
from fusedloss.spherical.exact import exact

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
N, D = 97, 8
LOSSES = {
    "z": fl.nn.SphericalZLoss,
    "taylor": fl.nn.TaylorSoftmaxLoss,
    "softmax": fl.nn.SphericalSoftmaxLoss,
    "squared": fl.nn.SquaredErrorLoss,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def layer(loss=None, dtype=F64, **options):
    """Its weight has no mean of 0, and no column that others could stand in for."""
    head = FactoredLinear(D, N, loss, dtype=dtype, **options)
    bias = torch.randn(N, dtype=F64) + 1 if options.get("bias") else None
    head.load_dense(torch.randn(N, D, dtype=F64) / D + 0.1, bias)
    return head


def features(*leading, dtype=F64):
    return torch.randn(*leading, D, dtype=F64).to(dtype).requires_grad_()


def classes(*shape, ignored=None):
    """Distinct in a row of several; `ignored`: the fraction that is -100."""
    target = (
        torch.rand(*shape, N).argsort(-1)[..., 0]
        if len(shape) < 2
        else torch.rand(shape[0], N).argsort(-1)[:, : shape[1]]
    )
    if ignored is not None:
        target[torch.rand(target.shape) < ignored] = -100
    return target


class Dense:
    """The same numbers in a torch.nn.Linear, under autograd and torch.optim.SGD."""

    def __init__(self, head, lr, weight_decay=0.0, **options):
        self.loss, self.linear = head.loss, head.materialize(F64)
        groups = [{"params": [self.linear.weight]}]
        if head.has_bias:
            square = head.bias_scale**2
            groups.append({"params": [self.linear.bias], "lr": lr * square, "weight_decay": weight_decay / square})
        self.optimizer = torch.optim.SGD(groups, lr, weight_decay=weight_decay, **options)

    def __call__(self, h, target, row_weight=None):
        return self.loss(self.linear(h), target, row_weight=row_weight)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def weights(layer):
    linear = layer.materialize() if isinstance(layer, FactoredLinear) else layer.linear
    return torch.cat([p.detach().double().reshape(N, -1) for p in linear.parameters()], 1)


def both(head, dense, h, target, row_weight=None):
    """Backward of both: (loss, gradient of h, of row_weight) of the one and of the other."""
    found = []
    for model in (head, dense):
        x = h.detach().clone().requires_grad_()
        r = None if row_weight is None else row_weight.clone().requires_grad_()
        loss = model(x, target, row_weight=r)
        (loss * torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)).sum().backward()
        found.append((loss.detach(), x.grad) if r is None else (loss.detach(), x.grad, r.grad))
    return found


def near(head, dense, bound=1e-12):
    assert error(weights(head), weights(dense)) <= bound


# --- steps -----------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("bias", [None, 1.0, 0.3], ids=["no bias", "bias", "small bias"])
@pytest.mark.parametrize("several", [False, True], ids=["one target", "three targets"])
def test_steps_are_those_of_sgd(loss, bias, several):
    """Fewer rows than features and more; targets that repeat and that are ignored; weight decay."""
    head = layer(loss(), bias=bias is not None, bias_scale=bias or 1.0)
    dense = Dense(head, 0.03, weight_decay=0.1)
    for m in (5, 30, 5, 30, 1):
        target = classes(m, 3, ignored=0.3) if several else classes(m, ignored=0.2)
        target[-1] = 3
        got, truth = both(head, dense, features(m), target)
        assert [error(*pair) <= 1e-12 for pair in zip(got, truth)] == [True, True]
        norm = torch.cat(
            [dense.linear.weight.grad, *([dense.linear.bias.grad[:, None] * bias] if bias else [])], 1
        ).norm()
        assert error(head.grad_norm(), norm) <= 1e-11
        assert head.step(0.03, weight_decay=0.1) is True
        dense.step()
        near(head, dense)


@every_loss
def test_float32(loss):
    head = layer(loss(), F32)
    dense = Dense(head, 0.03)
    for m in (5, 30) * 10:
        got, truth = both(head, dense, features(m), classes(m))
        assert error(got[0], truth[0]) < 1e-5 and error(got[1], truth[1]) < 2e-5
        head.step(0.03)
        dense.step()
    near(head, dense, 2e-6)
    assert got[0].dtype == F64 and head(features(3, dtype=F32), classes(3)).dtype == F32


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("several", [False, True], ids=["one target", "three targets"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class weights"])
@every_loss
def test_weights_and_reductions_are_those_of_scores_in_hand(loss, weighted, several, reduction):
    weight = torch.rand(N, dtype=F64) if weighted else None
    if weighted:
        weight[:30] = 0  # rows whose targets all weigh nothing
    head = layer(loss(reduction=reduction, weight=weight, ignore_index=7))
    dense = Dense(head, 1.0)
    target = classes(12, 3) if several else classes(12)
    target[2], target[3:5, ...] = 7, 1
    got, truth = both(head, dense, features(12), target, torch.rand(12, dtype=F64))
    assert [error(*pair) <= 1e-12 for pair in zip(got, truth)] == [True] * 3
    head.step(1.0)
    dense.step()
    near(head, dense)


def test_any_leading_shape_and_layout():
    head = layer(fl.nn.SphericalZLoss(reduction="none"))
    h, target = features(D, 3, 4).detach(), classes(12).reshape(4, 3)
    turned = torch.randn(D, 3, 4, dtype=F64).permute(2, 1, 0).requires_grad_()
    loss = head(turned, target, torch.rand(4, 3))
    assert loss.shape == (4, 3)
    loss.sum().backward()
    flat = turned.detach().reshape(12, D)
    assert error(head.logits(turned), head.logits(flat).reshape(4, 3, N)) == 0
    assert error(head(turned, target).flatten(), head(flat, target.flatten())) <= 1e-13
    one = head(h[0, 0, :1].new_ones(D), torch.tensor(5))
    assert one.shape == () and error(one, head(torch.ones(1, D, dtype=F64), torch.tensor([5]))[0]) <= 1e-13
    wide = head(turned, classes(12, 2).reshape(4, 3, 2))
    assert wide.shape == (4, 3)


@pytest.mark.parametrize("several", [False, True], ids=["one target", "two targets"])
def test_no_rows(several):
    head = layer(fl.nn.TaylorSoftmaxLoss())
    before = weights(head)
    h = features(0)
    loss = head(h, torch.zeros((0, 2) if several else 0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and h.grad.shape == (0, D) and head.grad_norm() == 0
    assert head.step(0.1)
    assert torch.equal(weights(head), before)


def test_ignored_rows_count_nothing_whatever_is_in_them():
    """And a pass in which all are ignored still decays W, as it would where .grad is 0."""
    head = layer()
    dense = Dense(head, 0.5, weight_decay=0.2)
    h, target = features(6), classes(6)
    target[:2] = -100
    spoilt = h.detach().clone()
    spoilt[:2] = torch.tensor([[torch.nan], [torch.inf]])
    spoilt.requires_grad_()
    head(spoilt, target).backward()
    dense(h, target).backward()
    assert error(spoilt.grad, h.grad) <= 1e-12 and not spoilt.grad[:2].any()
    assert head.step(0.5, 0.2)
    dense.step()
    near(head, dense)
    loss = head(spoilt, torch.full((6,), -100))
    loss.backward()
    dense(h, torch.full((6,), -100)).backward()
    assert loss == 0 and head.step(0.5, 0.2)
    dense.step()
    near(head, dense)


def test_hyperparameters_are_those_of_now():
    head = layer(fl.nn.SphericalZLoss(a=1.0))
    h, target = features(4), classes(4)
    first = head(h, target)
    head.loss.a, head.loss.b = 2.0, 1.0
    assert first != head(h, target) and error(head(h, target), head.loss(head.logits(h), target)) <= 1e-12


def test_zero_weights_start_training_but_under_the_spherical_softmax():
    for name, loss in LOSSES.items():
        head = layer(loss())
        head.load_dense(torch.zeros(N, D))
        head(features(5), classes(5)).backward()
        moves = head.grad_norm() > 0
        assert moves == (name in ("taylor", "squared")), name  # the Z-loss takes constant scores for no information


# --- the queue -------------------------------------------------------------------------------------------------------


def test_backward_passes_add_up_at_the_same_weight():
    head = layer(fl.nn.SquaredErrorLoss())
    dense = Dense(head, 0.01)
    for target in (classes(5), classes(30), classes(4, 3)):
        h = features(len(target))
        for model in (head, dense):
            loss = model(h, target)
            loss.backward(retain_graph=True)
            loss.backward()  # a second time, as .grad would add it
    assert error(head.grad_norm(), dense.linear.weight.grad.norm()) <= 1e-12
    head.step(0.01)
    dense.step()
    near(head, dense)


def test_two_forwards_before_one_step():
    head = layer()
    dense = Dense(head, 0.1)
    h, target = features(5), classes(2, 5)
    for model in (head, dense):
        first, second = model(h, target[0]), model(h, target[1])
        first.backward()
        second.backward()
    head.grad_norm()
    for model in (head, dense):
        (3 * model(h, target[1])).backward()
    head.step(0.1)
    dense.step()
    near(head, dense)


def test_only_training_queues():
    head = layer()
    h, target, before = features(5), classes(5), weights(head := layer())
    head(h, target)
    with torch.no_grad():
        assert not head(h, target).requires_grad
    head.eval()
    head(h, target).backward()
    assert h.grad.abs().sum() > 0 and not head(h.detach(), target).requires_grad
    assert not head.rows(target).requires_grad
    head.train()
    head(h, target).backward()
    head.zero_grad()
    assert head.grad_norm() == 0 and head.step(1.0, weight_decay=0.5)
    assert torch.equal(weights(head), before)


def test_a_frozen_trunk():
    head = layer()
    dense = Dense(head, 0.1)
    h, target = features(5).detach(), classes(5)
    for model in (head, dense):
        model(h, target).backward()
    head.step(0.1)
    dense.step()
    near(head, dense)


def test_features_that_change_before_the_step():
    """A leaf that its optimizer moves in place first."""
    head = layer()
    dense = Dense(head, 0.1)
    h, target = features(5), classes(5)
    for model in (head, dense):
        model(h, target).backward()
    with torch.no_grad():
        h.add_(1)
    head.step(0.1)
    dense.step()
    near(head, dense)


@pytest.mark.parametrize(
    "change", [lambda x: x.step(0.1), lambda x: x.rebalance(), lambda x: x.load_dense(torch.ones(N, D))]
)
def test_backward_through_another_weight(change):
    head = layer()
    loss, rows = head(features(5), classes(5)), head.rows(classes(5))
    head(features(5), classes(5)).backward()
    change(head)
    for stale in (loss, rows.sum()):
        with pytest.raises(RuntimeError, match="FactoredLinear: backward: expected the weight as forward saw it"):
            stale.backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_no_second_derivatives():
    head, h = layer(), features(5)
    with pytest.raises(RuntimeError, match="FactoredLinear: backward: expected first derivatives only"):
        torch.autograd.grad(head(h, classes(5)), h, create_graph=True)
    with pytest.raises(RuntimeError, match="FactoredLinear: backward: expected first derivatives only"):
        head.rows(classes(5)).sum().backward(create_graph=True)
    assert head.grad_norm() == 0


# --- options of a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.01, 1e3])
def test_clipping(max_norm):
    head = layer(fl.nn.SquaredErrorLoss())
    dense = Dense(head, 0.5, weight_decay=0.1)
    h, target = features(30), classes(30)
    for model in (head, dense):
        model(h, target).backward()
    torch.nn.utils.clip_grad_norm_(dense.linear.parameters(), max_norm)
    head.step(0.5, 0.1, max_norm=max_norm)
    dense.step()
    near(head, dense)


def test_clipping_by_the_norm_of_the_whole_model():
    head = layer(fl.nn.SquaredErrorLoss())
    dense, trunk = Dense(head, 0.5), torch.nn.Linear(3, D, dtype=F64)
    x, target = torch.randn(5, 3, dtype=F64), classes(5)
    dense(trunk(x), target).backward()
    torch.nn.utils.clip_grad_norm_([*dense.linear.parameters(), *trunk.parameters()], 0.1)
    trunk.zero_grad()
    head(trunk(x), target).backward()
    norm = torch.stack([head.grad_norm(), *(p.grad.norm() for p in trunk.parameters())]).norm()
    head.step(0.5, grad_scale=(0.1 / (norm + 1e-6)).clamp(max=1))
    dense.step()
    near(head, dense)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["upstream", "features", "scale"])
def test_gradients_that_are_not_finite(where, bad):
    head = layer()
    before, h = weights(head), features(5)
    later = head(features(5), classes(5))
    (
        head(h.detach() * (bad if where == "features" else 1), classes(5)) * (bad if where == "upstream" else 1)
    ).backward()
    head(h, classes(5)).backward()
    assert head.step(0.1, 0.1, grad_scale=bad if where == "scale" else 1.0, max_norm=1.0) is False
    assert torch.equal(weights(head), before) and head.grad_norm() == 0
    later.backward()  # W is still the same
    assert head.step(0.1) is True and not torch.equal(weights(head), before)


def test_rebalancing_keeps_weight_and_queue():
    head = layer(fl.nn.SquaredErrorLoss(), bias=True)
    dense = Dense(head, 0.05)
    for m, lower in ((5, 1), (30, 100), (5, 1e-5), (6, 1e3)):
        with torch.no_grad():  # W in other factors, worse ones
            head.factors.u.mul_(torch.linspace(1, lower, D + 1, dtype=F64).unsqueeze(1))
            head.factors.inverse.div_(torch.linspace(1, lower, D + 1, dtype=F64))
            head.factors.p.div_(torch.linspace(1, lower, D + 1, dtype=F64))
        both(head, dense, features(m), classes(m))
        count, norm = head.rebalances, head.grad_norm()
        both(head, dense, features(m), classes(m))
        head.rebalance()
        assert head.rebalances == count + 1 and head.factors.condition() < 2 and norm > 0
        head.step(0.05)
        dense.step()
        near(head, dense, 1e-10)


def test_rebalanced_when_needed():
    head = layer(fl.nn.SquaredErrorLoss(), condition_limit=4.0)
    dense = Dense(head, 30.0)
    direction = torch.linspace(0.1, 1, D, dtype=F64)
    for _ in range(30):
        both(head, dense, features(20) * direction, classes(20))
        head.step(30.0)
        dense.step()
        assert head.factors.condition() <= 4
    near(head, dense)
    assert 0 < head.rebalances < 15
    shrunk = layer(fl.nn.TaylorSoftmaxLoss(), F32)  # decay alone shrinks U without end
    for _ in range(5):
        shrunk(features(3), classes(3)).backward()
        shrunk.step(1.0, weight_decay=0.99)
    assert shrunk.rebalances > 0 and 1e-6 <= shrunk.factors.u.norm() / math.sqrt(D) <= 1e6


@every_loss
@pytest.mark.parametrize("nesterov", [False, True], ids=["", "nesterov"])
def test_momentum(loss, nesterov):
    """Also over an all-ignored batch, where velocity moves on, and through rebalancing of its own and by hand."""
    options = {"momentum": 0.8, "nesterov": nesterov}
    head = layer(loss(), bias=True, condition_limit=1.5, **options)
    dense = Dense(head, 0.02, weight_decay=0.1, **options)
    for number, m in enumerate((5, 30) * 10):
        target = classes(m) if number != 7 else torch.full((m,), -100)
        got, truth = both(head, dense, features(m), target)
        assert [error(*pair) <= 1e-11 for pair in zip(got, truth)] == [True, True]
        if number == 17:
            head.rebalance()
        assert head.step(0.02, weight_decay=0.1, max_norm=100.0)
        dense.step()
        near(head, dense, 1e-11)
    assert head.rebalances > 1


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_half_precision_features(dtype):
    """Rounded once, after all factors: nothing underflows before."""
    head = layer(fl.nn.SphericalZLoss(reduction="sum"), F32)
    dense = Dense(head, 0.1)
    h, target = features(30, dtype=dtype), classes(30)
    loss = head(h, target)
    (loss * 1e-6).mul(1e6).backward()
    wide = h.detach().double().requires_grad_()
    dense(wide, target).backward()
    assert loss.dtype == F32 and h.grad.dtype == dtype
    assert error(h.grad, wide.grad) <= {F32: 1e-6, BF16: 3e-3, F16: 4e-4}[dtype]
    head.step(0.1)
    dense.step()
    near(head, dense, 1e-6)


def test_gradients_that_a_narrow_type_would_lose():
    head, h, target = layer(dtype=F32), features(4, dtype=F16), classes(4)
    (head(h, target) * 1e-7).mul(1e7).backward()
    wide = h.detach().float().requires_grad_()
    head(wide, target).backward()
    assert error(h.grad, wide.grad) < 1e-3


def test_autocast(device):
    head, trunk = layer(dtype=F32), torch.nn.Linear(3, D)
    plain, x, target = copy.deepcopy(head), torch.randn(6, 3), classes(6)
    with torch.autocast(device.type, BF16):
        h = trunk(x)
        loss = head(h, target)
        loss.backward()
        head.step(0.5)
        again, shown = head(h, target), head.logits(h)
        picked = head.rows(target)
    assert h.dtype == BF16 and loss.dtype == F32 and shown.dtype == F32 and picked.dtype == F32
    assert error(loss, plain(h, target)) == 0
    plain(h.detach(), target).backward()
    plain.step(0.5)
    assert torch.equal(weights(head), weights(plain)) and error(again, plain(h, target)) == 0
    assert torch.equal(shown, plain.logits(h)) and torch.equal(picked, plain.rows(target))


@pytest.mark.parametrize("asked", ["high", "medium"])
def test_products_in_narrower_types_are_refused_and_allowed_again(monkeypatch, asked):
    seen, matmuls = [], (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)

    def spied(function):
        def call(*arguments):
            seen.append((torch.get_float32_matmul_precision(), *(m.fp32_precision for m in matmuls)))
            return function(*arguments)

        return call

    head = layer(dtype=F32)
    steps = engine(head.factors)
    for name in ("visit", "backward", "step"):
        monkeypatch.setattr(steps, name, spied(getattr(steps, name)))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(asked)
        state = [m.fp32_precision for m in matmuls]
        head(features(4), classes(4)).backward()
        head.step(0.1)
        assert torch.get_float32_matmul_precision() == asked and [m.fp32_precision for m in matmuls] == state
        with pytest.raises(ZeroDivisionError), exact(head.factors.p.device):
            1 / 0
        assert torch.get_float32_matmul_precision() == asked and [m.fp32_precision for m in matmuls] == state
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [("highest", "ieee", "ieee")] * 3


def test_gradient_scaler(device):
    """The whole flow in float16: a scale, a step that overflows, and one that does not."""
    trunk, head = torch.nn.Linear(3, D), layer(dtype=F32)
    dense, before = Dense(head, 0.1), weights(head)
    optimizer, scaler = torch.optim.SGD(trunk.parameters(), 0.1), torch.amp.GradScaler(device.type, init_scale=2.0**120)
    x, target = torch.randn(6, 3), classes(6)
    taken = 0
    for number in range(2):
        if number:
            scaler.update(1024.0)
        with torch.autocast(device.type, F16):
            h = trunk(x)
            loss = head(h, target)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() < scale:
            head.zero_grad()
            assert number == 0 and torch.equal(weights(head), before)
        else:
            taken += head.step(0.1, grad_scale=1 / scale)
    dense(h.detach().double(), target).backward()
    dense.step()
    assert taken == 1
    near(head, dense, 1e-6)


# --- the weight ------------------------------------------------------------------------------------------------------


def test_starts_like_a_linear_layer():
    torch.manual_seed(3)
    head = FactoredLinear(D, N)
    torch.manual_seed(3)
    linear = torch.nn.Linear(D, N, bias=False)
    assert torch.equal(head.factors.p, linear.weight) and error(head.rows(torch.arange(N)), linear.weight) < 1e-6
    both = FactoredLinear(D, N, bias=True, bias_scale=0.01).materialize()
    assert 0.9 < both.bias.abs().max() * math.sqrt(D) <= 1 + 1e-5 and both.weight.abs().max() * math.sqrt(D) <= 1 + 1e-5
    assert list(head.parameters()) == [] and list(head.buffers()) == []


@pytest.mark.parametrize("bias", [False, True])
def test_dense_and_back(bias):
    head = FactoredLinear(D, N, bias=bias, bias_scale=0.1, dtype=F64)
    linear = torch.nn.Linear(D, N, bias=bias, dtype=F64)
    head(features(4), classes(4)).backward()
    head.load_dense(linear.weight, linear.bias)
    assert head.grad_norm() == 0
    back = head.materialize()
    assert error(back.weight, linear.weight) <= 1e-14 and back.weight.requires_grad
    assert back.bias is None if not bias else error(back.bias, linear.bias) <= 1e-14
    h = features(2, 3)
    assert error(head.logits(h), linear(h)) <= 1e-14 and head.logits(h).dtype == F64
    half = head.materialize(BF16)
    assert half.weight.dtype == BF16 and error(half.weight, linear.weight) < 4e-3
    if bias:
        head.load_dense(linear.weight)
        assert not head.materialize().bias.any()


@every_loss
@pytest.mark.parametrize("numbers", [1 << 22, 64], ids=["one block", "many blocks"])
def test_topk(monkeypatch, loss, numbers):
    """Ranked by the loss' own rule."""
    monkeypatch.setattr("fusedloss.spherical.evaluation.NUMBERS", numbers)
    head = layer(loss(), bias=True)
    h = features(2, 4)
    rule = {"z": lambda s: s, "squared": lambda s: s, "softmax": torch.abs, "taylor": lambda s: (1 + s).abs()}
    rank = rule[next(name for name, of in LOSSES.items() if of is loss)]
    for k in (1, 5, N):
        scores, found = head.topk(h, k)
        logits = head.logits(h)
        assert found.shape == (2, 4, k) and torch.equal(found, rank(logits).topk(k).indices)
        assert error(scores, logits.gather(-1, found)) <= 1e-13


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_tied_embeddings(momentum):
    """Look-ups and loss in one backward, of one weight."""
    head = layer(fl.nn.SphericalZLoss(b=1.0), bias=True, momentum=momentum)
    dense = Dense(head, 0.2, weight_decay=0.1, momentum=momentum)
    for m in (3, 20, 4):
        index, target = classes(m, 2) % 11, classes(m)
        for model, rows in ((head, head.rows), (dense, lambda i: dense.linear.weight[i])):
            h = torch.tanh(rows(index)).sum(1)
            model(h, target).backward()
            (rows(index[0]) ** 2).sum().backward()
        gradients = torch.cat([dense.linear.weight.grad, dense.linear.bias.grad[:, None]], 1)
        assert error(head.grad_norm(), gradients.norm()) <= 1e-12
        head.step(0.2, 0.1)
        dense.step()
        near(head, dense)
    assert head.rows(torch.tensor(3)).shape == (D,) and head.rows(torch.zeros(0, 2, dtype=torch.int32)).shape == (
        0,
        2,
        D,
    )


def test_rows_alone():
    """Enough of them that a step takes the other path, and some twice."""
    head = layer()
    dense = Dense(head, 0.1)
    index = torch.randint(0, N, (40,))
    factor = torch.randn(40, D, dtype=F64)
    (head.rows(index) * factor).sum().backward()
    (dense.linear.weight[index] * factor).sum().backward()
    head.step(0.1)
    dense.step()
    near(head, dense)


# --- kept, copied, moved ---------------------------------------------------------------------------------------------


def trained(head, count=4, seed=0):
    torch.manual_seed(seed)
    for m in (5, 20) * (count // 2):
        head(features(m), classes(m)).backward()
        head.step(0.1, weight_decay=0.01)
    return head


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_a_copy_continues_alike(way, momentum):
    head = trained(
        FactoredLinear(D, N, fl.nn.SphericalZLoss(weight=torch.rand(N)), bias=True, momentum=momentum, dtype=F64)
    )
    loss = head(features(5), classes(5))
    loss.backward()
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(head.state_dict(), file)
        other = FactoredLinear(
            D, N, fl.nn.SphericalZLoss(weight=torch.ones(N)), bias=True, momentum=momentum, dtype=F64
        )
        other(features(5), classes(5)).backward()
        place = other.factors.p.data_ptr()
        file.seek(0)
        found = other.load_state_dict(torch.load(file))
        assert not found.missing_keys and not found.unexpected_keys and other.factors.p.data_ptr() == place
    else:
        other = copy.deepcopy(head) if way == "deepcopy" else pickle.loads(pickle.dumps(head))
    assert other.grad_norm() == 0 and head.grad_norm() > 0 and other.factors.p.data_ptr() != head.factors.p.data_ptr()
    head.zero_grad()
    assert torch.equal(weights(head), weights(other))
    trained(head, seed=1)
    trained(other, seed=1)
    assert error(weights(other), weights(head)) <= 1e-13


def test_state_dicts_that_do_not_fit():
    head = FactoredLinear(D, N)
    model = torch.nn.Sequential(head)
    state = model.state_dict()
    assert list(state) == [f"0.factors.{name}" for name in ("p", "u", "inverse", "gram", "offset", "mean")]
    before = weights(head)
    other = torch.nn.Sequential(FactoredLinear(D, N)).state_dict()
    for wrong, words in (
        ({**other, "0.factors.p": torch.zeros(N + 1, D)}, "size mismatch for 0.factors.p"),
        ({**other, "0.factors.p": other["0.factors.p"].half()}, "size mismatch for 0.factors.p.*float16"),
        ({**other, "0.factors.u": other["0.factors.u"].float()}, "size mismatch for 0.factors.u.*float32"),
        ({key: other[key] for key in list(other)[1:]}, "Missing key.*0.factors.p"),
        ({**other, "0.weight": torch.zeros(3)}, "Unexpected key.*0.weight"),
    ):
        with pytest.raises(RuntimeError, match=words):
            model.load_state_dict(wrong)
        if "0.weight" not in wrong:
            assert torch.equal(weights(head), before)
    before = weights(head)
    found = model.load_state_dict({"0.factors.p": torch.zeros(N, D)}, strict=False)
    assert found.missing_keys == [f"0.factors.{name}" for name in ("u", "inverse", "gram", "offset", "mean")]
    assert torch.equal(weights(head), before)  # all of the factors or none


def test_conversions_leave_the_state_as_it_is(device):
    head = trained(FactoredLinear(D, N, fl.nn.SphericalZLoss(weight=torch.rand(N))))
    before, version = weights(head), head._queue.version
    loss = head(features(4), classes(4))
    for convert in (lambda x: x.half(), lambda x: x.bfloat16(), lambda x: x.double(), lambda x: x.to(device, F16)):
        convert(head)
        kinds = [getattr(head.factors, name).dtype for name in ("p", "u", "inverse", "gram", "offset", "mean")]
        assert kinds == [F32] + [F64] * 5
    assert head.loss.weight.dtype == F16 and torch.equal(weights(head), before) and head._queue.version == version
    loss.backward()
    assert head.step(0.1)
    with pytest.raises(ValueError, match="FactoredLinear: device: expected one that holds numbers, got meta"):
        head.to("meta")
    with pytest.raises(ValueError, match="FactoredLinear: device: expected one that holds numbers, got meta"):
        FactoredLinear(D, N, device="meta")


def test_repr():
    shown = repr(FactoredLinear(D, N, bias=True, bias_scale=0.5, momentum=0.9, nesterov=True))
    assert (
        f"FactoredLinear(\n  {D}, {N}, dtype=torch.float32, bias=True, bias_scale=0.5, momentum=0.9, nesterov=True\n"
        in shown
    )
    assert "(loss): SphericalZLoss(a=" in shown


@pytest.mark.unpoisoned
def test_compiled():
    """The layer is a break in the graph; all around it is compiled."""
    head, trunk = layer(dtype=F32), torch.nn.Linear(3, D)
    x, target = torch.randn(5, 3), classes(5)
    compiled = torch.compile(lambda x: head(torch.tanh(trunk(x)), target) * 2, backend="aot_eager")
    compiled(x).backward()
    first, got = head.grad_norm(), trunk.weight.grad.clone()
    head.zero_grad()
    trunk.zero_grad()
    (head(torch.tanh(trunk(x)), target) * 2).backward()
    assert error(first, head.grad_norm()) < 1e-6 and error(got, trunk.weight.grad) < 1e-6


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"dtype": F16}, TypeError, "FactoredLinear: dtype: expected float32 or float64, got torch.float16"),
        ({"out_features": 1}, ValueError, "FactoredLinear: out_features: expected an integer ≥ 2, got 1"),
        ({"in_features": 2.5}, ValueError, "FactoredLinear: in_features: expected an integer ≥ 1, got 2.5"),
        (
            {"loss": fl.nn.FocalLoss()},
            TypeError,
            "FactoredLinear: loss: expected one of fusedloss.nn's .*, got FocalLoss",
        ),
        ({"loss": fl.nn.SphericalZLoss(a=0.0)}, ValueError, "a: expected a number"),
        ({"bias_scale": 0.0}, ValueError, "FactoredLinear: bias_scale: expected"),
        ({"momentum": 1.0}, ValueError, r"FactoredLinear: momentum: expected a number in \[0, 1\), got 1.0"),
        ({"nesterov": True}, ValueError, "FactoredLinear: nesterov: expected a momentum above 0 with it, got 0.0"),
        ({"condition_limit": 1.0}, ValueError, "FactoredLinear: condition_limit: expected"),
    ],
)
def test_errors_of_the_constructor(options, kind, words):
    with pytest.raises(kind, match=words):
        FactoredLinear(**{"in_features": D, "out_features": N, **options})


H, Y = torch.zeros(4, D), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (lambda x: x(H.int(), Y), TypeError, "FactoredLinear: h: expected a floating-point tensor"),
        (lambda x: x(H[:, 1:], Y), ValueError, r"FactoredLinear: h: expected \(\*leading, 8\), got \(4, 7\)"),
        (lambda x: x(H, Y.float()), TypeError, "FactoredLinear: target: expected an integer tensor"),
        (lambda x: x(H, Y[1:]), ValueError, r"FactoredLinear: target: expected shape \(4,\)"),
        (lambda x: x(H, Y, H), ValueError, r"FactoredLinear: row_weight: expected shape \(4,\), got \(4, 8\)"),
        (lambda x: x.step(-1.0), ValueError, "FactoredLinear: lr: expected"),
        (lambda x: x.step(torch.tensor(0.1)), TypeError, "FactoredLinear: lr: expected a number"),
        (lambda x: x.step(0.1, -1.0), ValueError, "FactoredLinear: weight_decay: expected"),
        (lambda x: x.step(0.1, 10.0), ValueError, "FactoredLinear: weight_decay: expected less than 1 / lr"),
        (lambda x: x.step(0.1, max_norm=-1.0), ValueError, "FactoredLinear: max_norm: expected"),
        (lambda x: x.step(0.1, grad_scale="1"), TypeError, "FactoredLinear: grad_scale: expected a number"),
        (lambda x: x.topk(H, N + 1), ValueError, "FactoredLinear: k: expected 1 <= k <= 97, got 98"),
        (
            lambda x: x.load_dense(torch.zeros(D, N)),
            ValueError,
            r"FactoredLinear: weight: expected \(97, 8\), got \(8, 97\)",
        ),
        (lambda x: x.load_dense(torch.zeros(N, D), torch.zeros(N)), ValueError, "FactoredLinear: bias: expected None"),
        (lambda x: x.rows(torch.zeros(3)), TypeError, "FactoredLinear: index: expected an integer tensor"),
    ],
)
def test_errors(call, kind, words):
    with pytest.raises(kind, match=words):
        call(FactoredLinear(D, N))


def test_errors_of_weights():
    head = FactoredLinear(D, N, fl.nn.SphericalZLoss(weight=torch.ones(N - 1)))
    with pytest.raises(ValueError, match=r"FactoredLinear: loss.weight: expected \(97,\) class weights, got \(96,\)"):
        head(H, Y)
    learnt = FactoredLinear(D, N, fl.nn.SphericalZLoss(weight=torch.nn.Parameter(torch.ones(N))))
    learnt(H + 1, Y).backward()
    with pytest.raises(TypeError, match="FactoredLinear: loss.weight: expected constants with several targets"):
        learnt(H, Y[:, None])


@pytest.mark.host
def test_targets_out_of_range():
    head = FactoredLinear(D, N)
    with pytest.raises(IndexError, match=r"FactoredLinear: target\[2\] = 97 is out of range"):
        head(H, torch.tensor([0, -100, N, 0]))
    for index in (-1, N):
        with pytest.raises(IndexError, match="FactoredLinear: index: expected 0 <= index < 97"):
            head.rows(torch.tensor([0, index]))


@pytest.mark.parametrize("kind", ["matrix", "muon", "shampoo"])
def test_right_preconditioners(kind):
    """Gradient accumulation, decay and a preconditioner together, against the dense gradient times R."""
    torch.manual_seed(3)
    n, d, lr, decay = 300, 8, 0.2, 0.01
    head = FactoredLinear(d, n, fl.nn.TaylorSoftmaxLoss(), dtype=F64)
    weight = head.materialize().weight.detach().clone()
    fixed = torch.eye(d, dtype=torch.float64) + 0.1 * torch.randn(d, d, dtype=torch.float64)
    given = {"matrix": fixed, "muon": fl.spherical.Muon(), "shampoo": fl.spherical.Shampoo()}[kind]
    same = {"matrix": lambda _: fixed, "muon": fl.spherical.Muon(), "shampoo": fl.spherical.Shampoo()}[kind]
    for _ in range(5):
        gradient = torch.zeros_like(weight)
        for _ in range(2):
            h, target = torch.randn(12, d, dtype=torch.float64), torch.randint(0, n, (12,))
            head(h, target).backward()
            dense = weight.clone().requires_grad_()
            gradient += torch.autograd.grad(head.loss(h @ dense.t(), target), dense)[0]
        assert head.step(lr, weight_decay=decay, preconditioner=given)
        weight = (1 - lr * decay) * weight - lr * gradient @ same(gradient.t() @ gradient)
    found = head.materialize().weight
    assert (found - weight).norm() <= 1e-11 * weight.norm()
    moving = FactoredLinear(d, n, momentum=0.5)
    with pytest.raises(ValueError, match="preconditioner: expected None in a layer with momentum"):
        moving.step(0.1, preconditioner=fixed)


def test_clipping_and_a_factor_together():
    """max_norm is of the gradient times grad_scale."""
    head, h, target = layer(), features(6), classes(6)
    weight = head.materialize().weight.detach().clone().requires_grad_()
    gradient = torch.autograd.grad(head.loss(h.detach() @ weight.t(), target), weight)[0] * 0.25
    for part in (0.5, 2.0):
        same = copy.deepcopy(head)
        same(h, target).backward()
        same.step(0.7, max_norm=part * gradient.norm().item(), grad_scale=0.25)
        wanted = weight - 0.7 * min(1.0, part) * gradient
        assert error(same.materialize().weight, wanted.detach()) < 1e-6  # of clip_grad_norm_'s 1e-6


@pytest.mark.parametrize("part", ["alpha", "t", "gamma", "h", "gh"])
def test_whatever_is_not_finite_stops_a_step(part):
    head, h, target = layer(), features(6), classes(6)
    before = head.materialize().weight
    head(h, target).backward()
    getattr(head._queue.batches[0], part).view(-1)[3] = math.inf
    assert head.step(0.1) is False
    assert torch.equal(head.materialize().weight, before) and head.grad_norm() == 0


def test_another_loss_from_one_step_to_the_next():
    head, h, target = layer(fl.nn.SphericalZLoss(a=30.0, b=15.0, eps=0.0)), features(6), classes(6)
    head(h, target)
    for loss in (fl.nn.SquaredErrorLoss(value=30.0, k=15.0, mean_over_classes=False), fl.nn.TaylorSoftmaxLoss()):
        head.loss = loss
        assert error(head(h, target), loss(h @ head.materialize().weight.t(), target)) < 1e-12
    head.loss = torch.nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match="FactoredLinear: loss: expected one of"):
        head(h, target)


def test_a_matrix_of_0_and_1_is_no_list_of_classes():
    head, h = layer(), features(6)
    for loss in (head, lambda h, target: fl.spherical_z_loss(h @ head.materialize().weight.t(), target)):
        with pytest.raises(ValueError, match="target: expected indices of classes, got a matrix of 0 and 1"):
            loss(h, torch.randint(0, 2, (6, N)))
        assert loss(h, torch.zeros(6, 0, dtype=torch.int64)) == 0


@pytest.mark.parametrize("momentum, quiet", [(0.9, 200), (0.9, 1000), (0.5, 60)])
def test_momentum_after_steps_without_a_gradient(momentum, quiet):
    """V = 0 for a while: U⁻¹ grows as momentum^-t all the same, and the next gradient meets it."""
    head = layer(fl.nn.TaylorSoftmaxLoss(), dtype=F32, momentum=momentum)
    dense = Dense(head, 0.1, momentum=momentum)
    for number in range(quiet + 2):
        h, target, on = features(4).detach(), classes(4), float(number in (0, quiet + 1))
        (head(h, target) * on).backward()
        head.step(0.1)
        dense.optimizer.zero_grad()
        (head.loss(dense.linear(h), target) * on).backward()
        dense.optimizer.step()
    assert error(weights(head).double(), dense.linear.weight.detach()) < 1e-6
    assert head.rebalances > 0


def test_decay_holds_a_weight_that_the_z_loss_lets_grow():
    """γ < 0 for targets below the mean, so U grows while W does not, and with it errors of Q and δ, if they stay."""
    head = FactoredLinear(D, N, fl.nn.SphericalZLoss())
    while head.rebalances == 0:
        head(torch.randn(16, D), torch.randint(0, N, (16,))).backward()
        head.step(0.8, weight_decay=0.01)
    away = weights(head) - weights(head).mean(0)
    assert error(head.factors.gram, away.t() @ away) < 1e-6
    assert (head.factors.mean - weights(head).mean(0)).norm() < 1e-6 * weights(head).norm()


@pytest.mark.parametrize("loss", [fl.nn.SquaredErrorLoss(), fl.nn.TaylorSoftmaxLoss(), fl.nn.SphericalZLoss()])
@pytest.mark.parametrize("size", [1e12, 1e19, 1e25])
def test_features_too_large_for_float32_leave_the_weight(loss, size):
    head = FactoredLinear(D, N, loss)
    before = weights(head)
    head(torch.randn(3, D) * size, classes(3)).backward()
    went = head.step(1e-3, max_norm=1.0)
    moved = (weights(head) - before).norm()
    assert moved <= 1.1e-3 if went else moved == 0
    assert weights(head).isfinite().all()


def test_gradients_of_other_inputs_alone_queue_nothing():
    head, h, target = layer(), features(4), classes(4)
    torch.autograd.grad(head(h, target), h)
    head(h, target).backward(inputs=[h])
    torch.autograd.grad(head.rows(target).sum() + h.sum(), h)
    assert head.grad_norm() == 0
    loss = head(h, target)
    torch.autograd.grad(loss, h, retain_graph=True)
    loss.backward()
    once = head.grad_norm()
    head.zero_grad()
    head(h, target).backward()
    assert once == head.grad_norm() > 0


def test_a_state_dict_from_before_load_dense_is_that_of_the_layer():
    """As a Linear's: its tensors are the layer's own, and never half of them."""
    head = layer()
    state = head.state_dict()
    head.load_dense(torch.randn(N, D))
    head.load_state_dict(state)
    fresh = FactoredLinear(D, N, dtype=F64)
    fresh.load_dense(weights(head))
    assert error(head.factors.gram, fresh.factors.gram) < 1e-12


def test_no_examples_to_evaluate():
    head = layer()
    assert head.logits(torch.zeros(0, D)).shape == (0, N)
    assert head.topk(torch.zeros(2, 0, D), 3)[1].shape == (2, 0, 3)
