"""`recall`: associative recall, for what a layer that forgets cannot do: look up what it was told.

    k km h hf k km m mc h hf ...

Each line has a dictionary of its own, of 2, 4, 8, 16 or 24 letters with one of 9 values each, all
drawn anew, and 64 random look-ups in it: a letter, and its answer. The first time that a line asks
for a letter, its value is anyone's guess; from then on it is known to whoever remembers. Small
dictionaries show what the task is, and large ones ask for more than a small state can hold.

Symbols are tokens, and an answer is one symbol for letter and value together: to find it, one look
back for a symbol of this letter is enough. With the value alone attention first has to learn that
it belongs to the letter before it, for which small models need millions of tokens.

A line has 128 symbols: with model.block_size = 128 a window of the first pass is a line
(data/batches.py).
"""
import itertools

import numpy as np

from data.corpora.corpus import Corpus
from data.tokenizers import Tokenizer

LETTERS, VALUES = 24, 9         # 24 letters and 24 * 9 answers are 240 symbols
SIZES = (2, 4, 8, 16, 24)
LOOK_UPS = 64                   # of a line
BLOCK = 256                     # lines generated side by side


def lines(key, n=BLOCK, sizes=SIZES):
    """(n, 2 LOOK_UPS) uint16: n lines, the same for the same key; at even places letters, at odd
    ones answers, LETTERS + VALUES letter + value."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((3, key))))
    value = rng.integers(VALUES, size=(n, LETTERS))
    letters = rng.permuted(np.tile(np.arange(LETTERS), (n, 1)), axis=1)
    # the dictionary of a line is its first `size` letters
    size = rng.choice(sizes, size=(n, 1))
    place = (rng.random((n, LOOK_UPS)) * size).astype(np.int64)
    asked = np.take_along_axis(letters, place, 1)
    answer = LETTERS + VALUES * asked + np.take_along_axis(value, asked, 1)
    return np.stack([asked, answer], 2).reshape(n, -1).astype(np.uint16)


def known(line):
    """(n, LOOK_UPS): whether a line has asked for the letter before."""
    asked = line[:, ::2].tolist()
    return np.array([[letter in row[:i] for i, letter in enumerate(row)] for row in asked])


def documents(split):
    """Endless blocks of token ids; training takes the even keys, validation the odd ones."""
    for key in itertools.count({"train": 0, "val": 1}[split], 2):
        yield lines(key).ravel()


def corpus(name="recall"):
    about = f"generated, {LOOK_UPS} look-ups in {', '.join(map(str, SIZES))} letters"
    return Corpus("recall", documents, about, 4_000_000, generated=True, tokenizer=Tokenizer.byte())
