"""Modules of the losses between embeddings: the function's numbers, what is learned, saved and pickled."""

import inspect
import io
import math
import pickle

import pytest
import torch

import fusedloss as fl
from fusedloss.losses import PAIR_LOSSES, function_of, name_of
from fusedloss.nn.pair import OF_BATCH, LabelLoss, PairLoss

ROWS, WIDTH, COLUMNS = 12, 5, 15


def every(kind):
    """All modules of this kind, however deep."""
    return [c for sub in kind.__subclasses__() for c in ([sub] if hasattr(sub, "function") else []) + every(sub)]


MODULES = {c.function.__name__: c for c in dict.fromkeys(every(PairLoss))}
CASES = [
    pytest.param(MODULES[name_of(m)], m, case, id=f"{name_of(m)}-{i}")
    for m in PAIR_LOSSES
    for i, case in enumerate(m.CASES)
    if m.SCORES != "classes"
]


def test_every_loss_has_a_module():
    assert set(MODULES) == {name_of(m) for m in PAIR_LOSSES}
    for name, module in MODULES.items():
        assert getattr(fl.nn, module.__name__) is module and module.__name__.lower() == name.replace("_", "")
        assert inspect.getdoc(getattr(fl, name)) in module.__doc__


def apart(case, rows, columns):
    """Options of the constructor, and what belongs to the batch."""
    made = {k: v(rows, columns) if callable(v) else v for k, v in case.items()}
    return [{k: v for k, v in made.items() if (k in OF_BATCH) is batch} for batch in (False, True)]


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file)


# How the originals make their scores of embeddings; the others take cosines.
SCORES = {
    "sigmoid_loss": dict(scale=10.0, bias=-10.0, normalize=True),
    "bixse_loss": dict(scale=10.0, bias=-10.0, normalize=True),
    "clip_loss": dict(scale=1 / 0.07, normalize=True),
    "cwcl_loss": dict(scale=1 / 0.07, normalize=True),
    "info_nce_loss": dict(scale=1 / 0.07, normalize=True),
    "supcon_loss": dict(scale=1 / 0.07, normalize=True),
    "nt_xent_loss": dict(scale=10.0, normalize=True),
    "pairwise_softmax_loss": dict(scale=0.5, normalize=True),
    "soft_info_nce_loss": {},
    "bpr_loss": {},
}
SQUARE = ("clip_loss", "cwcl_loss")


@pytest.mark.parametrize("module, loss, case", CASES)
def test_the_function_in_a_module(module, loss, case):
    name, labelled = name_of(loss), issubclass(module, LabelLoss)
    columns = ROWS if loss.SCORES == "self" or name in SQUARE else COLUMNS
    options, of_batch = apart(case, ROWS, columns)
    ratio = {"temperature_base": 0.07 / options["temperature_ratio"]} if "temperature_ratio" in options else {}
    given = {k: v for k, v in options.items() if k != "temperature_ratio"} | ratio
    made = pickle.loads(pickle.dumps(module(**given, schedule="recompute")))
    made.load_state_dict(saved_and_loaded(made))
    x, y = (torch.randn(n, WIDTH, requires_grad=True) for n in (ROWS, columns))
    label = (of_batch.pop("label"),) if labelled else ()
    got = made(x, *(label or () if loss.SCORES == "self" else (y,)), **of_batch)
    way = SCORES.get(name, dict(normalize=True)) | ({"scale": 1.0} if options.get("form") == "sl" else {})
    scores = fl.similarity_scores(x, None if loss.SCORES == "self" else y, **way)
    truth = function_of(loss)(scores, *label, **options, **of_batch)
    torch.testing.assert_close(got, truth)
    (ours,), (theirs,) = (torch.autograd.grad(v, [x]) for v in (got, truth))
    torch.testing.assert_close(ours, theirs)
    shown = repr(made)
    assert shown.startswith(module.__name__ + "(") and "schedule='recompute'" in shown
    defaults = {n: p.default for n, p in module.__signature__.parameters.items()}
    assert all(f"{n}=" in shown for n, value in given.items() if value != defaults[n])


def test_a_parameter_may_be_shared_and_single_numbers_stay_float32():
    scale = torch.nn.Parameter(torch.tensor(2.0))
    assert fl.nn.ClipLoss(log_scale=scale).log_scale is scale
    made = fl.nn.SigmoidLoss().bfloat16()
    assert made.log_scale.dtype == made.bias.dtype == torch.float32
    made = fl.nn.MarginSoftmaxLoss(5, 4, margin="adaface").half()
    assert made.norm_mean.dtype == torch.float32 and made.weight.dtype == torch.float16
    with pytest.raises(ValueError, match=r"InfoNCELoss: temperature: expected a number in \(0, inf\], got 0"):
        fl.nn.InfoNCELoss(temperature=0)


def test_what_is_learned():
    """Scale and bias get gradients, are saved, and are kept within bounds on demand."""
    x, y = torch.randn(6, WIDTH), torch.randn(6, WIDTH)
    made = fl.nn.SigmoidLoss(log_scale=2.0, bias=-3.0)
    assert [n for n, _ in made.named_parameters()] == ["log_scale", "bias"]
    log_scale, bias = (torch.tensor(v, requires_grad=True) for v in (2.0, -3.0))
    truth = fl.sigmoid_loss(fl.similarity_scores(x, y, scale=log_scale.exp(), bias=bias, normalize=True))
    got = made(x, y)
    assert torch.equal(got, truth)
    for g, t in zip(torch.autograd.grad(got, made.parameters()), torch.autograd.grad(truth, (log_scale, bias))):
        torch.testing.assert_close(g, t)
    other = fl.nn.SigmoidLoss()
    other.load_state_dict(saved_and_loaded(made))
    assert torch.equal(other(x, y), truth)
    made = fl.nn.ClipLoss(log_scale=9.0)
    made.clamp_()
    assert made.log_scale.item() == pytest.approx(math.log(100)) and list(made.state_dict()) == ["log_scale"]
    made.clamp_(high=1.0)
    assert made.log_scale == 1 and made.log_scale.requires_grad


def test_two_views():
    x, y = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    made = fl.nn.NTXentLoss(temperature=0.5)
    truth = fl.nt_xent_loss(fl.similarity_scores(torch.cat([x, y]), scale=2.0, normalize=True))
    assert torch.equal(made(x, y), truth) and torch.equal(made(torch.cat([x, y])), truth)


def test_the_scores_are_the_users_choice():
    x, y = torch.randn(4, 3), torch.randn(6, 3)
    plain = fl.nn.AUCLoss(temperature=0.5, normalize=False, score_scale=0.3)(x, y)
    assert torch.equal(plain, fl.auc_loss(fl.similarity_scores(x, y, scale=0.3), temperature=0.5))
    assert fl.nn.TripletLoss(memory_budget=1000).scores(x).walk.memory_budget == 1000


def test_more_columns_than_rows():
    x, more, label = torch.randn(6, 3), torch.randn(4, 3), torch.arange(10) % 3
    y = torch.cat([x, more])
    got = fl.nn.CircleLoss(margin=0.4)(x, label[:6], y, column_label=label)
    scores = fl.similarity_scores(x, y, normalize=True)
    assert torch.equal(got, fl.circle_loss(scores, label[:6], column_label=label, margin=0.4))


def test_unknown_arguments():
    with pytest.raises(TypeError, match="TripletLoss: .*gamma"):
        fl.nn.TripletLoss(gamma=1)
    with pytest.raises(TypeError, match="norm_mean"):
        fl.nn.MarginSoftmaxLoss(3, 2, norm_mean=0.0)
    with pytest.raises(TypeError, match="taregt"):
        fl.nn.BPRLoss()(torch.randn(2, 3), torch.randn(2, 3), taregt=torch.arange(2))


# --- class vectors and AdaFace's running statistics -------------------------------------------------------------------


@pytest.mark.parametrize("margin", ["none", "cosface", "arcface", "circle"])
def test_margin_softmax(margin):
    counts = torch.rand(7)
    made = fl.nn.MarginSoftmaxLoss(7, WIDTH, margin=margin, scale=20.0, class_weight=counts)
    other = fl.nn.MarginSoftmaxLoss(7, WIDTH, margin=margin, scale=20.0, class_weight=torch.ones(7))
    other.load_state_dict(saved_and_loaded(made))
    other = pickle.loads(pickle.dumps(other))
    x, target, row_weight = torch.randn(ROWS, WIDTH), torch.randint(0, 7, (ROWS,)), torch.rand(ROWS)
    scores = fl.similarity_scores(x, made.weight, normalize=True)
    options = dict(margin=margin, scale=20.0, weight=counts, row_weight=row_weight)
    truth = fl.margin_softmax_loss(scores, target, **options)
    assert made.weight.shape == (7, WIDTH) and set(made.state_dict()) == {"weight", "class_weight"}
    for m in (made, other):
        got = m(x, target, row_weight=row_weight)
        assert torch.equal(got, truth)
        got.backward()
        torch.testing.assert_close(m.weight.grad, torch.autograd.grad(truth, made.weight, retain_graph=True)[0])
    assert repr(made).startswith("MarginSoftmaxLoss(7, 5, ")


def test_adaface_keeps_running_lengths():
    made = fl.nn.MarginSoftmaxLoss(4, WIDTH, margin="adaface", momentum=0.1)
    x, target = 30 * torch.rand(ROWS, WIDTH), torch.arange(ROWS) % 4
    norm = x.norm(dim=1)
    mean, deviation = 0.9 * 20 + 0.1 * norm.mean(), 0.9 * 100 + 0.1 * norm.std()
    truth = fl.margin_softmax_loss(
        fl.similarity_scores(x, made.weight, normalize=True),
        target,
        margin="adaface",
        norm=norm,
        norm_mean=mean,
        norm_deviation=deviation,
    )
    torch.testing.assert_close(made(x, target), truth)  # this batch's lengths are in before they are used
    torch.testing.assert_close((made.norm_mean, made.norm_deviation), (mean, deviation))
    saved = {k: v.clone() for k, v in made.state_dict().items()}
    assert set(saved) == {"weight", "norm_mean", "norm_deviation"}
    torch.testing.assert_close(made.eval()(x, target), truth)
    assert all(torch.equal(saved[k], v) for k, v in made.state_dict().items()), "no update outside of training"
    new = fl.nn.MarginSoftmaxLoss(4, WIDTH, margin="adaface").eval()
    new.load_state_dict(saved)
    torch.testing.assert_close(new(x, target), truth)


def test_adaface_with_a_batch_of_one_and_of_none():
    made = fl.nn.MarginSoftmaxLoss(4, WIDTH, margin="adaface", momentum=0.5)
    loss = made(torch.full((1, WIDTH), 10.0), torch.tensor([2]))
    assert loss.isfinite() and made.norm_deviation == 100  # of one number there is no deviation
    torch.testing.assert_close(made.norm_mean, torch.tensor((20 + 10 * WIDTH**0.5) / 2))
    before = made.norm_mean.clone()
    assert made(torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64)) == 0 and made.norm_mean == before


def test_adaface_twice_before_backward():
    """The second batch's update does not spoil the first one's gradient."""
    made = fl.nn.MarginSoftmaxLoss(4, WIDTH, margin="adaface", schedule="recompute")
    x, target = torch.randn(2, ROWS, WIDTH), torch.arange(ROWS) % 4
    sum(made(part, target, row_weight=torch.ones(ROWS, requires_grad=True)) for part in x).backward()
    assert made.weight.grad.isfinite().all()


def test_half_precision_embeddings():
    made = fl.nn.MarginSoftmaxLoss(4, WIDTH, margin="adaface", dtype=torch.bfloat16)
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    loss = made(x, torch.arange(ROWS) % 4)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.isfinite().all() and made.norm_mean.dtype == torch.float32
