"""The next word of real text without a download: the text of Python's library and of what is installed beside it.

Words are runs of letters, digits and underscores, as they are: code is full of names, so that hundreds of thousands
of different ones are seen more than once. Which files there are differs from machine to machine.
"""

from __future__ import annotations

import random
import re
import sysconfig
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from corpus import INSTALLED
from torch import Tensor

SUFFIXES = {".py", ".pyi", ".txt", ".rst", ".md"}
WORD = re.compile(r"\w+")
HELD_OUT_SHARE = 0.02  # of the folders: copies of a file tend to lie beside it
MARGIN = 64  # boundaries before the first word: the longest context there may be


@dataclass(frozen=True)
class Words:
    """Two long sequences of word numbers: 0 … classes − 1 by falling frequency, `unknown`; `end` after each file."""

    train: Tensor  # int32
    held_out: Tensor  # int32
    classes: int
    files: int
    characters: int

    @property
    def unknown(self) -> int:
        return self.classes

    @property
    def end(self) -> int:
        return self.classes + 1

    def coverage(self, sequence: Tensor) -> float:
        """The share of the words that are a class."""
        return float((sequence < self.classes).sum() / (sequence != self.end).sum())


def text_folders() -> list[list[Path]]:
    """The text files of the standard library and of the installed packages, by folder."""
    paths = sysconfig.get_paths()
    standard = Path(paths["stdlib"])
    folders = defaultdict(list)
    for root in sorted({standard, Path(paths["purelib"]), Path(paths["platlib"])}):
        for path in sorted(root.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                if root != standard or not INSTALLED.intersection(path.relative_to(root).parts):
                    folders[path.parent].append(path)
    return list(folders.values())


def read(folders: list[list[Path]], seen: set[int]) -> Iterator[str]:
    """The texts, each once."""
    for path in (path for folder in folders for path in folder):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text and hash(text) not in seen:
            seen.add(hash(text))
            yield text


def load_words(seed: int, characters: int, least: int, most: int | None = None) -> Words:
    """Read `characters` of text; the classes are the words that the training files show at least `least` times.

    Where those are more than `most`, the most frequent.
    """
    folders = text_folders()
    random.Random(seed).shuffle(folders)
    held_out = max(1, round(HELD_OUT_SHARE * len(folders)))
    number: defaultdict[str, int] = defaultdict(count(1).__next__)  # 0 is the end of a file
    sequences, seen, files, read_so_far = [], set(), 0, 0
    for part, share in ((folders[held_out:], 1 - HELD_OUT_SHARE), (folders[:held_out], HELD_OUT_SHARE)):
        sequence, room = array("i", [0] * MARGIN), share * characters
        for text in read(part, seen):
            sequence.extend(map(number.__getitem__, WORD.findall(text)))
            sequence.append(0)
            files, room, read_so_far = files + 1, room - len(text), read_so_far + len(text)
            if room <= 0:
                break
        sequences.append(torch.frombuffer(sequence, dtype=torch.int32))

    counts = torch.bincount(sequences[0], minlength=len(number) + 1)
    counts[0] = 0
    order = counts.argsort(descending=True, stable=True)
    classes = min(int((counts >= least).sum()), most or len(counts))
    table = torch.full((len(counts),), classes, dtype=torch.int32)  # unknown
    table[order[:classes]] = torch.arange(classes, dtype=torch.int32)
    table[0] = classes + 1
    train, held = (table[sequence] for sequence in sequences)
    return Words(train, held, classes, files, read_so_far)


class Examples:
    """Contexts of `length` words and the word that follows, where that one is a class."""

    def __init__(self, words: Words, sequence: Tensor, length: int) -> None:
        self.sequence, self.length = sequence, length
        self.places = (sequence < words.classes).nonzero().squeeze(1).int()

    def batch(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, length) contexts and (rows,) next words."""
        window = places.long().unsqueeze(1) + torch.arange(-self.length, 1)
        words = self.sequence[window].long()
        return words[:, :-1], words[:, -1]

    def batches(self, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches from random places; the same seed gives the same batches."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.batch(self.places[torch.randint(len(self.places), (rows,), generator=generator)])
