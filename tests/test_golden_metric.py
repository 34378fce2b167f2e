"""Golden records of the metric, margin and recommender losses: value and gradients, float64, to 1e-10.

tests/golden/metric.json holds the embeddings and labels that all records share, and for each record what its official
code (where there is one) gave, with the gradients in the embeddings. They were made independently of this library.
"""

import json
from pathlib import Path

import pytest
import torch

import fusedloss as fl

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metric.json").read_text())


def inputs():
    labels = {name: torch.tensor(GOLDEN["inputs"][name]) for name in ("lab", "cls")}
    floating = {"ell": 10.0, **{name: v for name, v in GOLDEN["inputs"].items() if name not in labels}}
    wide = {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in floating.items()}
    return {**labels, **wide}


def own(function, **options):
    """A loss of the labelled embeddings X."""
    return lambda i, p, walk: function(fl.similarity_scores(i["X"], normalize=True, **walk), i["lab"], **options)


def pairs(function, scale=1.0, normalize=True, **options):
    """A loss of X with Y."""

    def loss(i, p, walk):
        return function(fl.similarity_scores(i["X"], i["Y"], scale=scale, normalize=normalize, **walk), **options)

    return loss


def classes(**options):
    """The margin softmax of X with class vectors W."""

    def loss(i, p, walk):
        scores = fl.similarity_scores(i["X"], i["W"], normalize=True, **walk)
        return fl.margin_softmax_loss(scores, i["cls"], **options)

    return loss


def adaface(i, p, walk):
    """Running statistics start at 20 and 100, and take this batch in before they are used."""
    norm, t = i["X"].norm(dim=1), p["t_alpha"]
    running = dict(norm_mean=t * norm.mean() + (1 - t) * 20, norm_deviation=t * norm.std() + (1 - t) * 100)
    return classes(margin="adaface", norm=norm, **{k: v.detach() for k, v in running.items()})(i, p, walk)


def one_negative(i, p, walk):
    """BPR with a negative of each row's own: two columns of scores."""
    scores = [(i["X"] * other).sum(1) for other in (i["Y"], i["Q1"])]
    return fl.bpr_loss(torch.stack(scores, 1), torch.zeros(len(i["X"]), dtype=torch.int64))


def scaled_softmax(i, p, walk):
    """NormFace with its learnable scale."""
    return fl.cross_entropy(fl.similarity_scores(i["X"], i["W"], scale=i["ell"], normalize=True, **walk), i["cls"])


CALLS = {
    "triplet_all": own(fl.triplet_loss, mining="all", margin=0.2),
    "triplet_batch_hard": own(fl.triplet_loss, mining="hard", margin=0.2),
    "triplet_semihard_sq": own(fl.triplet_loss, mining="semihard", margin=0.2, squared=True),
    "multi_similarity": own(fl.multi_similarity_loss, alpha=2.0, beta=40.0, base=0.5, epsilon=0.1),
    "circle_pair": own(fl.circle_loss, margin=0.4, scale=80.0, reduction="nonzero_mean"),
    "circle_class": classes(margin="circle", m=0.25, scale=64.0),
    "normface": classes(margin="none", scale=10.0),
    "normface_scale": scaled_softmax,
    "cosface": classes(margin="cosface"),
    "cosface_paper_m": classes(margin="cosface", m=0.35),
    "arcface": classes(margin="arcface"),
    "adaface": adaface,
    "adaface_talpha1": adaface,
    "psl_tanh": pairs(fl.pairwise_softmax_loss, scale=0.5, form="tanh"),
    "psl_atan": pairs(fl.pairwise_softmax_loss, scale=0.5, form="atan"),
    "psl_relu": pairs(fl.pairwise_softmax_loss, scale=0.5, form="relu"),
    "softmax_loss_neg_only": pairs(fl.pairwise_softmax_loss, form="sl"),
    "bpr": one_negative,
    "bpr_all_pairs": pairs(fl.bpr_loss, normalize=False),
    "ccl": pairs(fl.cosine_contrastive_loss, margin=0.4, negative_weight=150.0),
    "mw": pairs(fl.auc_loss, temperature=0.1),
}


def test_every_record_has_a_call():
    assert set(GOLDEN["cases"]) == set(CALLS)


@pytest.mark.parametrize("walk", [{}, {"schedule": "eager"}, {"memory_budget": 100}], ids=["auto", "eager", "chunks"])
@pytest.mark.parametrize("name", CALLS)
def test_record(name, walk):
    record, given = GOLDEN["cases"][name], inputs()
    loss = CALLS[name](given, record["params"], walk)
    assert loss.item() == pytest.approx(record["value"], rel=1e-10)
    got = torch.autograd.grad(loss, [given[k] for k in record["grad"]])
    for (argument, truth), gradient in zip(record["grad"].items(), got):
        truth = torch.tensor(truth, dtype=torch.float64)
        assert (gradient - truth).norm() <= 1e-10 * truth.norm(), argument
