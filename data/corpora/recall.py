"""`recall`: associative recall, for what a layer that forgets cannot do: look up what it was told.

    v7k0Q3v7m5k0 ... Q3.

Each line has a dictionary of its own, of 2, 4, 8, 16 or 32 letters with a digit each, all drawn
anew, and 63 random look-ups in it: a letter and its digit. The first time that a line asks for a
letter, its digit is anyone's guess; from then on it is known to whoever remembers. Small
dictionaries show what the task is, and large ones ask for more than a small state can hold.

A line has 128 characters: with model.block_size = 128 and bytes, a window of the first pass is a
line (data/batches.py).
"""
import itertools
import string

import numpy as np

from data.corpora.corpus import Corpus

KEYS, VALUES = string.ascii_letters, string.digits
SIZES = (2, 4, 8, 16, 32)
LOOK_UPS = 63           # of a line: 126 characters, and 2 that end it
BLOCK = 256             # lines generated side by side


def lines(key, n=BLOCK, sizes=SIZES):
    """Keys and values (n, LOOK_UPS) of n lines, as indices; the same for the same key."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((3, key))))
    digits = rng.integers(len(VALUES), size=(n, len(KEYS)))
    letters = rng.permuted(np.tile(np.arange(len(KEYS)), (n, 1)), axis=1)
    # the dictionary of a line is its first `size` letters
    size = rng.choice(sizes, size=(n, 1))
    asked = (rng.random((n, LOOK_UPS)) * size).astype(np.int64)
    asked = np.take_along_axis(letters, asked, 1)
    return asked, np.take_along_axis(digits, asked, 1)


def as_text(asked, values):
    """One line of the corpus."""
    return "".join(KEYS[k] + VALUES[v] for k, v in zip(asked, values)) + ".\n"


def known(asked):
    """(n, LOOK_UPS): whether a line has asked for the letter before."""
    return np.array([[k in row[:i] for i, k in enumerate(row)] for row in asked.tolist()])


def documents(split):
    """Endless lines; training takes the even keys, validation the odd ones."""
    for key in itertools.count({"train": 0, "val": 1}[split], 2):
        yield "".join(itertools.starmap(as_text, zip(*lines(key))))


def corpus(name="recall"):
    about = f"generated, {LOOK_UPS} look-ups in {', '.join(map(str, SIZES))} letters"
    return Corpus("recall", documents, about, 4_000_000, generated=True)
