"""Golden records of the contrastive losses: value and gradients, float64, to 1e-10.

tests/golden/contrastive.json holds their inputs, and the records with their section in the catalogue of formulas. They
were made independently of this library, from float64 autograd and the official code where there is one ("verified").
"""

import json
from pathlib import Path

import pytest
import torch

import fusedloss as fl

GOLDEN = json.loads((Path(__file__).parent / "golden" / "contrastive.json").read_text())


def matrix(values):
    return torch.tensor(values, dtype=torch.float64)


LABEL = torch.tensor(GOLDEN["inputs"]["lab"])
GRADES, TEACHER = (matrix(GOLDEN["inputs"][name]) for name in ("grades", "T"))


class Leaves:
    """The record's inputs and learnable numbers, by its names for them, and scores of them on a schedule."""

    def __init__(self, record, schedule):
        self.params, self.schedule = record["params"], schedule
        self.all = {k: matrix(GOLDEN["inputs"][k]).requires_grad_() for k in ("X", "Y")}
        if "logit_scale" in self.params:
            self.all["logit_scale"] = matrix(self.params["logit_scale"]).requires_grad_()
        if "t" in self.params and "b" in self.params:
            self.all["t_prime"] = matrix(self.params["t"]).log().requires_grad_()
            self.all["bias"] = matrix(self.params["b"]).requires_grad_()

    def pairs(self, scale=None, **more):
        scale = 1 / self.params["tau"] if scale is None else scale
        options = {"normalize": True, **more}
        return fl.similarity_scores(self.all["X"], self.all["Y"], scale=scale, schedule=self.schedule, **options)

    def itself(self, views=False, scale=None):
        x = torch.cat([self.all["X"], self.all["Y"]]) if views else self.all["X"]
        scale = 1 / self.params["tau"] if scale is None else scale
        return fl.similarity_scores(x, scale=scale, schedule=self.schedule, normalize=True)


def sigmoid(o):
    return fl.sigmoid_loss(o.pairs(o.all["t_prime"].exp(), bias=o.all["bias"]))


def soft_info_nce(o):
    p, guide = o.params, fl.similarity_scores(TEACHER, scale=1 / o.params["t"], normalize=True)
    scores = o.pairs(1.0, normalize=False)
    return fl.soft_info_nce_loss(scores, guide, alpha=p["alpha"], beta=p["beta"], least=p["w_min"])


def supcon(form):
    return lambda o: fl.supcon_loss(
        o.itself(views=True), LABEL.repeat(2), form=form, temperature_ratio=o.params["tau"] / o.params["base_tau"]
    )


def orthogonal(form):
    return lambda o: fl.orthogonal_projection_loss(o.itself(scale=1.0), LABEL, form=form, gamma=o.params["gamma"])


CALLS = {
    "siglip": sigmoid,
    "siglip_G": sigmoid,
    "bixse": lambda o: fl.bixse_loss(o.pairs(o.params["scale"], bias=o.params["bias"]), GRADES),
    "infonce": lambda o: fl.info_nce_loss(o.pairs()),
    "clip": lambda o: fl.clip_loss(o.pairs()),
    "clip_logit_scale": lambda o: fl.clip_loss(o.pairs(o.all["logit_scale"].exp())),
    "soft_infonce": soft_info_nce,
    "cwcl": lambda o: fl.cwcl_loss(o.pairs(), TEACHER),
    # The official code adds the means over the two views.
    "ntxent_simclr_official": lambda o: 2 * fl.nt_xent_loss(o.itself(views=True)),
    "ntxent_mean": lambda o: fl.nt_xent_loss(o.itself(views=True)),
    # pytorch-metric-learning's: with one positive a row, InfoNCE whose negatives are the other labels.
    "ntxent_pml": lambda o: fl.info_nce_loss(o.itself(), torch.tensor([1, 0, 3, 2]), row_group=LABEL),
    "supcon_out": supcon("out"),
    "supcon_in": supcon("in"),
    "opl_root": orthogonal("identity"),
    "opl_abs": orthogonal("abs"),
    "npairs": lambda o: fl.info_nce_loss(o.pairs(1.0, normalize=False)),
}


def test_every_record_has_a_call():
    assert [r["record"] for r in GOLDEN["records"]] == list(CALLS)


@pytest.mark.parametrize("record", GOLDEN["records"], ids=lambda r: r["record"])
@pytest.mark.parametrize("schedule", ["auto", "eager", "recompute"])
def test_record(record, schedule):
    leaves = Leaves(record, schedule)
    loss = CALLS[record["record"]](leaves)
    assert loss.item() == pytest.approx(record["value"], rel=1e-10)
    names = list(record["grad"])
    for name, got in zip(names, torch.autograd.grad(loss, [leaves.all[n] for n in names])):
        right = matrix(record["grad"][name])
        assert (got - right).norm() <= 1e-10 * right.norm(), name
