"""Real text without a download: the sources of Python's standard library, and a tokenizer trained on them."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

VOCABULARY = 32_000
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.02

INSTALLED = {"site-packages", "dist-packages"}  # other people's code: it would differ from machine to machine
TESTS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Token ids of the training files and of the held-out files, each one long sequence."""

    train: Tensor
    held_out: Tensor
    files: int
    characters: int


def read_sources(skip: set[str]) -> list[str]:
    """The text of every .py file of the standard library that lies in none of the folders named in `skip`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in sorted(root.rglob("*.py")) if not skip.intersection(path.relative_to(root).parts))
    return [text for path in paths if (text := path.read_text(encoding="utf-8", errors="replace"))]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `VOCABULARY` tokens; every merge was seen at least twice."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_corpus(seed: int) -> Corpus:
    """Read the sources, train the tokenizer on them, encode them, and set whole files aside as held out."""
    # The library's own tests are half of the text and odd prose: they are read only where the rest is too little.
    for skip in (INSTALLED | TESTS, INSTALLED):
        texts = read_sources(skip)
        tokenizer = train_tokenizer(texts)
        if tokenizer.get_vocab_size() == VOCABULARY:
            break
    else:
        raise SystemExit(
            f"The sources of the standard library ({len(texts)} files) give {tokenizer.get_vocab_size()} tokens, "
            f"not {VOCABULARY}: this Python seems to be installed without them. Try another one."
        )

    random.Random(seed).shuffle(texts)
    held_out_files = max(1, round(HELD_OUT_SHARE * len(texts)))
    return Corpus(
        train=encode(tokenizer, texts[held_out_files:]),
        held_out=encode(tokenizer, texts[:held_out_files]),
        files=len(texts),
        characters=sum(map(len, texts)),
    )


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts as one sequence of token ids, an end-of-text token after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch_fast(texts)
    return torch.tensor([token for encoding in encodings for token in (*encoding.ids, end)])


def batches(tokens: Tensor, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of shape (rows, length), cut from random places; the same seed gives the same batches."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length + 1, (rows, 1), generator=generator)
        yield tokens[starts + torch.arange(length)]
