"""Golden records of the ranking losses: value and gradient, float64, to the nine decimals that they have.

tests/golden/ranking.json holds for each record its inputs and what its official code (where there is one) gave. They
were made independently of this library. Records that give an order have the items in falling order of relevance.
"""

import importlib
import json
from pathlib import Path

import pytest
import torch

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ranking.json").read_text())["cases"]


def loss(name):
    return getattr(importlib.import_module(f"fusedloss.ranking.{name}"), name)


# The loss of each record and its options. allRank's and the spec's lambda losses are sums over the batch.
CALLS = {
    "ranknet": ("ranknet_loss", {}),
    "lambdaloss_none": ("lambda_loss", dict(weighting=None, reduction="sum")),
    "lambdaloss_ndcg1": ("lambda_loss", dict(weighting="ndcg1", reduction="sum")),
    "lambdaloss_ndcg2": ("lambda_loss", dict(weighting="ndcg2", reduction="sum")),
    "lambdaloss_lambdarank": ("lambda_loss", dict(weighting="lambdarank", reduction="sum")),
    "lambdaloss_ndcg2pp": ("lambda_loss", dict(weighting="ndcg2pp", reduction="sum")),
    "lambdaloss_ndcg2pp_k3_mean_natural": (
        "lambda_loss",
        dict(weighting="ndcg2pp", k=3, base=torch.e, normalization="batch"),
    ),
    "listnet": ("listnet_loss", {}),
    "listmle": ("list_mle_loss", {}),
    "p_listmle": ("p_list_mle_loss", {}),
    "approxndcg": ("approx_ndcg_loss", {}),
    "approxndcg_tfr": ("approx_ndcg_loss", dict(temperature=0.1)),
    "neuralndcg": ("neural_ndcg_loss", {}),
    "neuralndcg_k3": ("neural_ndcg_loss", dict(k=3)),
    "neuralndcg_transposed": ("neural_ndcg_loss", dict(transposed=True)),
    "adr_mse_log2": ("adr_mse_loss", {}),
    "adr_mse_reciprocal": ("adr_mse_loss", dict(discount="reciprocal")),
    "adr_mse_none": ("adr_mse_loss", dict(discount=None)),
    "rankt5_point": ("listwise_point_loss", {}),
    "rankt5_pair": ("ranknet_loss", dict(normalization=None)),
    "rankt5_softmax": ("listwise_softmax_loss", {}),
    "rankt5_poly1": ("listwise_poly1_loss", {}),
    "groco": ("gro_co_loss", dict(k=3)),
}
# allRank ends Sinkhorn's steps for the whole batch, here each list has its own end: within 1e-5, as the steps are of
# their own limit. The record of p-ListMLE was made with weights of six digits.
WITHIN = {"neuralndcg": 1e-5, "neuralndcg_k3": 1e-5, "neuralndcg_transposed": 1e-5, "p_listmle": 1e-5}


def inputs(record):
    """Scores and relevance: the record's own, one that falls in the order given, or of positives behind negatives."""
    given = {name: torch.tensor(v, dtype=torch.float64) for name, v in record["inputs"].items()}
    if "n_neg" in record["params"]:
        given["r"] = (torch.arange(given["s"].shape[1]) >= record["params"]["n_neg"]).double().expand(given["s"].shape)
    elif "r" not in given:
        order = given["order"].long()
        falling = torch.arange(order.shape[1], 0, -1, dtype=torch.float64).expand(order.shape)
        given["r"] = torch.zeros_like(falling).scatter(1, order, falling)
    return given["s"].requires_grad_(), given["r"]


def test_every_record_has_a_call():
    assert set(GOLDEN) == set(CALLS)


def check(got, scores, record, within):
    (gradient,) = torch.autograd.grad(got, scores)
    assert got.item() == pytest.approx(record["value"], abs=within)
    torch.testing.assert_close(gradient, torch.tensor(record["grad"]["s"], dtype=torch.float64), rtol=0, atol=within)


@pytest.mark.parametrize("name", CALLS)
def test_record(name, backend):
    of, options = CALLS[name]
    scores, relevance = inputs(GOLDEN[name])
    check(loss(of)(scores, relevance, **options), scores, GOLDEN[name], WITHIN.get(name, 1.1e-9))


def test_neural_ndcg_with_the_ends_of_the_whole_batch():
    """With tolerance=0 nothing ends early; allRank takes 27 steps for the two lists of the record."""
    scores, relevance = inputs(GOLDEN["neuralndcg"])
    got = loss("neural_ndcg_loss")(scores, relevance, max_iterations=27, tolerance=0.0)
    check(got, scores, GOLDEN["neuralndcg"], 1.1e-9)
