"""The next-word example on a few words: its data, one run of every output layer, what it writes."""

import csv
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("tokenizers")
EXAMPLES = str(Path(__file__).parent.parent / "examples")
pytestmark = pytest.mark.host


@pytest.fixture
def example(monkeypatch):
    """The example's module, on one thread: the threads of a busy machine wait for each other at every small product."""
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    module = pytest.importorskip("train_word_model")
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)
    for name in ("train_word_model", "word_report", "words", "heads", "corpus"):
        sys.modules.pop(name, None)


@pytest.fixture
def text(tmp_path, monkeypatch, example):
    """Sixty folders of text whose words follow each other by a rule, frequent ones more often."""
    generator = torch.Generator().manual_seed(0)
    folders = []
    for folder in range(60):
        path = tmp_path / "text" / f"{folder}.py"
        path.parent.mkdir(exist_ok=True)
        starts = (600 ** torch.rand(400, generator=generator)).int().tolist()
        path.write_text("\n".join(f"w{at} = v{at // 2}(u{at // 3})" for at in starts) + f"\nonce_{folder}\n")
        folders.append([path])
    monkeypatch.setattr(sys.modules["words"], "text_folders", lambda: list(folders))
    return folders


@pytest.fixture
def clock(monkeypatch, example):
    """A clock of which a step takes 10 ms, on any machine."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(example, "perf_counter", lambda: 0.01 * next(ticks))


def test_words_are_numbered_by_falling_frequency(text, example):
    words = sys.modules["words"].load_words(seed=0, characters=10**9, least=2)
    counts = torch.bincount(words.train, minlength=words.classes + 2)[: words.classes]
    assert (counts[:-1] >= counts[1:]).all() and counts[-1] >= 2
    assert words.files == len(text) and 0.98 < words.coverage(words.train) < 1
    assert words.unknown in words.held_out  # the word that only this file has
    fewer = sys.modules["words"].load_words(seed=0, characters=10**9, least=2, most=100)
    assert fewer.classes == 100 and torch.equal((fewer.train < 100), (words.train < 100))


def test_the_same_text_twice_is_read_once(text, example):
    text.append(text[-1])
    assert sys.modules["words"].load_words(seed=0, characters=10**9, least=2).files == len(text) - 1


def test_a_context_is_the_words_before(text, example):
    words = sys.modules["words"].load_words(seed=0, characters=10**9, least=2)
    examples = sys.modules["words"].Examples(words, words.train, 3)
    contexts, target = examples.batch(examples.places[[0, 5]])
    place = int(examples.places[5])
    assert contexts[0].tolist() == [words.end] * 3  # before the first word of all
    assert [*contexts[1].tolist(), int(target[1])] == words.train[place - 3 : place + 1].tolist()


def test_it_runs_and_every_layer_learns(text, example, clock, tmp_path):
    runs = example.main(["--seconds", "0.3", "--held-out", "300", "--threads", "1", "--out", str(tmp_path / "out")])
    assert len(runs) == len(example.HEADS)
    for run in runs:
        assert run.finite and run.steps >= 30
        first, last = run.points[0], run.points[-1]
        assert len(run.points) == 1 + len(example.MOMENTS) and last.words == run.steps * run.rows
        for point in run.points:
            assert 0 <= point.accuracy[0] <= point.accuracy[1] <= point.accuracy[2] <= 1
        assert last.accuracy[2] > max(0.3, 2 * first.accuracy[2])  # of some 1,000 classes; chance is 0.05
    with (tmp_path / "out" / "word_model.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(run.points) for run in runs)
    assert float(rows[-1]["top50"]) == pytest.approx(runs[-1].points[-1].accuracy[2], abs=1e-4)
    assert (tmp_path / "out" / "word_model.png").stat().st_size > 10_000
    assert runs[0].name in (tmp_path / "out" / "word_model.md").read_text()


def test_scores_that_are_nan_find_nothing(example):
    class Lost:
        def scores(self, h):
            return torch.full((len(h), 60), torch.nan)

    found = example.accuracy(lambda contexts: contexts, Lost(), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    assert found == (0.0, 0.0, 0.0)


def test_a_sweep_is_of_one_layer(text, example, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "SWEEP", example.SWEEP[:2])
    arguments = ["--sweep", "--classes", "300", "--seconds", "0.05", "--held-out", "50", "--threads", "1"]
    runs = example.main([*arguments, "--out", str(tmp_path / "out")])
    assert {run.name for run in runs} == {"Z-loss, factored"} and len({run.settings for run in runs}) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"word_sweep_300.{end}" for end in ("md", "csv", "png")
    }
