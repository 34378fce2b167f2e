"""Golden records of the classification losses: value and gradient, float64, to 1e-10.

tests/golden/classification.json holds the records of the losses that exist, each with its number in the catalogue of
formulas. They were made independently of this library, from float64 autograd and the official code where there is one.
"""

import json
import math
from pathlib import Path

import pytest
import torch

import fusedloss as fl
from fusedloss.losses import class_counts

RECORDS = json.loads((Path(__file__).parent / "golden" / "classification.json").read_text())
CLAMP = -math.log(1e-4)  # reverse cross-entropy's −log 0


def counts():
    return torch.tensor([500.0, 100.0, 20.0, 5.0], dtype=torch.float64)


def vector(values):
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def ce(s, y, p):
    options = {name: p[name] for name in ("label_smoothing", "reduction", "ignore_index") if name in p}
    if "bias" in p:
        s = s + vector(p["bias"])
    capped = {name: p[name] for name in ("softcap", "temperature") if name in p}
    return fl.cross_entropy(s, y, vector(p.get("weight")), z_loss=p.get("lambda", 0.0), **options, **capped)


def number(s, y, p, **options):
    ids = torch.tensor(p.get("is_number", [True, True, True, False])).nonzero().squeeze(1)
    values = vector(p.get("values", [1.0, 2.0, 5.0, 0.0]))[ids]
    return fl.number_token_loss(s, y, number_ids=ids, number_values=values, reweigh=p["reweigh"], **options)


def mae(factor):
    return lambda s, y, p: fl.mean_absolute_error_loss(s, y, factor=factor(p))


def with_reverse(active):
    return lambda s, y, p: p["alpha"] * active(s, y) + p["beta"] * fl.mean_absolute_error_loss(s, y, factor=CLAMP)


def equity(s, y, p):
    """A weight per sample that depends on the data set alone is a row weight."""
    weight = (p["eta"] + (1 - p["sample_likelihood"]) ** p["gamma"]) / (p["eta"] + 1)
    return fl.cross_entropy(s, y, reduction="sum", row_weight=vector([weight]))


CALLS = {
    "cross_entropy": ce,
    "cross_entropy_label_smoothing": ce,
    "cross_entropy_weight_label_smoothing_sum": ce,
    "cross_entropy_weight_ls_ignore_mean": ce,
    "cross_entropy_softcap": ce,
    "cross_entropy_full": ce,
    "ce_plus_lse_square": ce,
    "spherical_z_loss": lambda s, y, p: fl.spherical_z_loss(s, y, **p),
    "log_spherical_softmax": lambda s, y, p: fl.spherical_softmax_loss(s, y, **p),
    "log_taylor_softmax": lambda s, y, p: fl.taylor_softmax_loss(s, y),
    "focal_softmax": lambda s, y, p: fl.focal_loss(s, y, gamma=p["gamma"], alpha=p["alpha_c"]),
    "focal_softmax_detached_weight": lambda s, y, p: fl.focal_loss(s, y, gamma=p["gamma"], detach_weight=True),
    "focal_sigmoid_sum_over_classes": lambda s, y, p: fl.sigmoid_focal_loss(s, y, **p),
    "dataset_equity_generalized_focal": equity,
    "poly1_cross_entropy": lambda s, y, p: fl.poly_loss(s, y, **p),
    "polyN_cross_entropy": lambda s, y, p: fl.poly_loss(s, y, epsilon=tuple(p["epsilons"])),
    "poly1_focal_softmax": lambda s, y, p: fl.poly_focal_loss(s, y, epsilon=p["epsilon"], gamma=p["gamma"]),
    "poly1_cross_entropy_label_smoothing": lambda s, y, p: fl.poly_loss(s, y, **p),
    "generalized_cross_entropy": lambda s, y, p: fl.generalized_cross_entropy(s, y, **p),
    "truncated_gce_paper_form": lambda s, y, p: fl.generalized_cross_entropy(s, y, q=p["q"], k=p["k"]),
    "comp_sum": lambda s, y, p: fl.comp_sum_loss(s, y, **p),
    "nce_normalized_cross_entropy": lambda s, y, p: fl.normalized_cross_entropy(s, y),
    "mae_repo": mae(lambda p: 1.0),
    "mae_paper": mae(lambda p: 2.0),
    "nmae_paper": mae(lambda p: 1 / (p["K"] - 1)),
    "nmae_repo": mae(lambda p: 1 / (2 * (p["K"] - 1))),
    "rce": mae(lambda p: CLAMP),
    "nrce_paper": mae(lambda p: 1 / (p["K"] - 1)),
    "nrce_repo": mae(lambda p: CLAMP * (p["K"] - 1) / 4),
    "apl_nce_plus_rce": with_reverse(fl.normalized_cross_entropy),
    "sce_symmetric_cross_entropy": with_reverse(fl.cross_entropy),
    "squentropy": lambda s, y, p: fl.squentropy(s, y),
    "rescaled_square_loss": lambda s, y, p: fl.squared_error_loss(s, y, k=p["k"], value=p["M"]),
    "sparsemax_loss": lambda s, y, p: fl.sparsemax_loss(s, y),
    "entmax15_loss": lambda s, y, p: fl.entmax15_loss(s, y),
    "one_vs_rest": lambda s, y, p: fl.one_vs_rest_loss(s, y),
    "ldam": lambda s, y, p: fl.logit_adjusted_cross_entropy(
        s, y, class_scale=torch.full_like(counts(), p["s"]), **class_counts.target_margin(counts(), p["max_m"])
    ),
    "logit_adjustment": lambda s, y, p: fl.logit_adjusted_cross_entropy(
        s, y, **class_counts.logit_adjustment(counts(), p["tau"])
    ),
    "balanced_softmax": lambda s, y, p: fl.logit_adjusted_cross_entropy(s, y, **class_counts.balanced_softmax(counts())),
    "vector_scaling_loss": lambda s, y, p: fl.logit_adjusted_cross_entropy(
        s, y, **class_counts.vector_scaling(counts(), p["gamma"], p["tau"])
    ),
    "class_balanced_weights_ce_sum": lambda s, y, p: fl.cross_entropy(
        s, y, **class_counts.class_balanced_weight(counts(), p["beta"]), reduction="sum"
    ),
    "number_token_loss_mse": lambda s, y, p: number(s, y, p, form="mse"),
    "number_token_loss_was": number,
    "number_token_loss_was_squash": lambda s, y, p: number(s, y, p, squash_factor=p["squash_factor"]),
    "ce_plus_ntl_was": lambda s, y, p: fl.cross_entropy(s, y) + p["ntl_weight"] * number(s, y, p),
}

# Records of the catalogue that no loss here belongs to yet, and what they wait for.
MISSING = {
    "two logit streams, or a margin that depends on the target's score": range(29, 31),
    "normalized losses with a second pass or a second temperature": (32, 33, 41),
    "label-distributionally robust losses": range(44, 48),
    "encouraging loss": range(48, 52),
    "losses that rank the batch": (56,),
    "hinge losses": range(57, 62),
    "Dice, Tversky, AnyLoss, EnsLoss": range(62, 74),
    "multi-label targets": (75,),
    "soft targets on bins, levels or tokens, and distances between them": range(86, 93),
    "weights from the batch's losses, learnable task weights": range(95, 100),
    "label proportions": range(100, 104),
    "rejection, calibration, value learning, tree search, noise contrast, energies": range(104, 117),
}


def test_every_record_is_covered_or_said_to_be_missing():
    covered = [r["record"] for r in RECORDS]
    missing = [number for numbers in MISSING.values() for number in numbers]
    assert sorted(covered + missing) == list(range(117))
    assert {r["loss"] for r in RECORDS} == set(CALLS)


def cases(record):
    """(logits (N, V), target (N,), gradient) of a record; one row is a batch of one."""
    logits, target, grad = (torch.tensor(record[key]) for key in ("logits", "target", "grad"))
    wide = [vector(record["logits"]), vector(record["grad"])]
    if target.dim() == 0:
        wide, target = [t.unsqueeze(0) for t in wide], target.unsqueeze(0)
    return wide[0], target, wide[1]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r['record']}-{r['loss']}")
@pytest.mark.parametrize("given", ["logits", "eager", "recompute"])
def test_record(record, given):
    logits, target, grad = cases(record)
    logits.requires_grad_()
    # x = logits and W = 1: the same scores as a linear layer's, so that dX is the recorded gradient.
    scores = logits
    if given != "logits":
        bias = vector(record["params"].get("bias"))
        capped = {k: record["params"][k] for k in ("softcap", "temperature") if k in record["params"]}
        identity = torch.eye(logits.shape[1], dtype=torch.float64)
        scores = fl.linear_scores(logits, identity, bias=bias, schedule=given, **capped)
        record = {**record, "params": {k: v for k, v in record["params"].items() if k not in ("bias", *capped)}}
    loss = CALLS[record["loss"]](scores, target, record["params"])
    (got,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(record["value"], rel=1e-10, abs=1e-12)
    assert (got - grad).norm() <= 1e-10 * max(grad.norm(), 1e-2)
