"""The ranking example: its data, its measures, and a short run of every loss."""

import csv
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")
EXAMPLES = str(Path(__file__).parent.parent / "examples")
pytestmark = pytest.mark.host


@pytest.fixture
def example(monkeypatch):
    """The example's module, on one thread: the threads of a busy machine wait for each other at every small product."""
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    module = pytest.importorskip("train_ranker")
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)
    sys.modules.pop("train_ranker", None)


def test_nothing_of_the_patients_held_out_is_learned_from(example):
    (x, grade, y), held_out = example.patients(seed=3)
    assert len(x) + len(held_out[0]) == 442 and len(held_out[0]) == 147
    assert not (x[:, None] == held_out[0]).all(2).any()
    assert x.mean(0).abs().max() < 1e-5 and (x.std(0) - 1).abs().max() < 1e-5  # their own mean and deviation
    assert grade.unique().tolist() == [0, 1, 2, 3, 4]
    assert (torch.bincount(grade.long()) - len(y) / 5).abs().max() < 5
    assert (grade[y.argsort()].diff() >= 0).all()


def test_wards_are_lists_of_different_patients(example):
    members, offsets = example.wards(50, 100, torch.Generator().manual_seed(0))
    lengths = offsets.diff()
    assert offsets[0] == 0 and offsets[-1] == len(members) and len(lengths) == 50
    assert lengths.min() >= example.SHORTEST and lengths.max() <= example.LONGEST and len(lengths.unique()) > 10
    assert all(len(ward.unique()) == len(ward) for ward in members.split(lengths.tolist()))


def test_the_measures_are_scikit_learns_and_scipys(example):
    from scipy.stats import spearmanr
    from sklearn.metrics import ndcg_score

    generator = torch.Generator().manual_seed(1)
    for n in (3, 10, 40):
        scores, y = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
        grade = torch.randint(0, 5, (n,), generator=generator).float()
        expected = ndcg_score((2**grade - 1)[None].numpy(), scores[None].numpy(), k=example.CUTOFF)
        assert example.ndcg(scores, grade).item() == pytest.approx(expected, abs=1e-6)
        assert example.spearman(scores, y).item() == pytest.approx(spearmanr(scores, y).statistic, abs=1e-6)


def test_it_runs_and_every_loss_learns(example, tmp_path, capsys):
    curves = example.main(["--epochs", "3", "--splits", "2", "--out", str(tmp_path)])
    assert list(curves) == list(example.LOSSES)
    for runs in curves.values():
        assert runs.shape == (2, 4, 2) and runs.isfinite().all()
        assert torch.equal(runs[:, 0], curves[example.BASELINE][:, 0])  # the same first weights and lists
        assert (runs[:, -1] > runs[:, 0] + 0.03).all() and runs[:, -1].min() > 0.35
    with (tmp_path / "ranker.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(curves) * 2 * 4
    assert float(rows[-1]["spearman"]) == pytest.approx(list(curves.values())[-1][1, -1, 1].item(), abs=1e-4)
    assert (tmp_path / "ranker.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in curves)
