"""`markov`: a hashed order-2 Markov source, for what real text lacks: a loss whose lowest value is
known.

With probability p the next symbol is table[hash(a, b) mod n_context], where a, b are the two before
it; otherwise it is drawn afresh from the unigram distribution, Zipf's 1 / rank. Nothing repeats, so
a larger model is better only where it holds more of the table, and no model gets below the source's
entropy: 1.036 nats a symbol for 256 symbols, p = 0.85.

The domains `markov-0`, `markov-1`, ... share half of their table's rows with `markov` and with one
another; the others are their own. `markov1024` and its domains are the same with 1024 symbols and
2^18 contexts, for models of GPU size.

Symbols are tokens. A file is made of independent sequences of 4096, because sequences can be
generated side by side: only 2 of 4096 symbols lack their context, and a training window rarely
meets a border (one in 32 at 128 tokens).

Mind that the next symbol is a function of the last two: routing by token identity (hash) is close
to an oracle here.
"""
import itertools
import re

import numpy as np

from data.binfile import DataError
from data.corpora.corpus import Corpus
from data.tokenizers import Tokenizer

LENGTH = 4096           # symbols in a sequence
LANES = 256             # sequences generated side by side
TABLE, PRIVATE, TEXT = 0, 1, 2      # what a random stream is for: the first number of its key
NAME = re.compile(r"markov(1024)?(?:-(\d{1,3}))?")


class MarkovSource:
    """The source with `vocab_size` symbols; symbol 0 is the most frequent. domain None is `markov`
    itself."""

    def __init__(self, vocab_size=256, n_context=2**14, p=0.85, domain=None):
        self.vocab_size, self.n_context, self.p, self.domain = vocab_size, n_context, p, domain
        zipf = 1 / np.arange(1, vocab_size + 1)
        self.unigram = zipf / zipf.sum()                        # (V,)
        self.table = self._draw(stream(TABLE, 0), n_context)    # (n_context,)
        if domain is not None:
            # rows are hashed, so the upper half of them is a random half of all contexts
            half = n_context // 2
            self.table[half:] = self._draw(stream(PRIVATE, domain), n_context - half)

    def _draw(self, rng, size):
        """Symbols from the unigram distribution, by its inverse."""
        ids = np.searchsorted(np.cumsum(self.unigram), rng.random(size), side="right")
        # the cumulated sum may end just below 1
        return np.minimum(ids, self.vocab_size - 1).astype(np.uint16)

    def context(self, a, b):
        """The table's row for two symbols, elementwise: a multiplicative hash, its well mixed upper
        bits."""
        key = a.astype(np.uint64) * np.uint64(self.vocab_size) + b.astype(np.uint64) + np.uint64(1)
        mixed = key * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        return ((mixed >> np.uint64(32)) % np.uint64(self.n_context)).astype(np.int64)

    def generate(self, key, n=LANES, length=LENGTH):
        """(n, length) uint16: independent sequences, the same for the same key, others in every
        domain."""
        rng = stream(TEXT, 0 if self.domain is None else self.domain + 1, key)
        fresh, keep = self._draw(rng, (n, length)), rng.random((n, length)) < self.p
        out = fresh.copy()
        for t in range(2, length):
            usual = self.table[self.context(out[:, t - 2], out[:, t - 1])]
            out[:, t] = np.where(keep[:, t], usual, fresh[:, t])
        return out

    def stationary(self, tolerance=1e-7):
        """(V, V): how often a, b follow one another in the long run: the chain, run until it
        rests."""
        size = self.vocab_size
        a, b = np.divmod(np.arange(size * size), size)
        # the pair that follows (a, b) when the table decides
        follows = b * size + self.table[self.context(a, b)]
        pairs, change = np.outer(self.unigram, self.unigram).ravel(), 1.0
        while change > tolerance:
            fresh = np.outer(pairs.reshape(size, size).sum(0), self.unigram).ravel()
            new = self.p * np.bincount(follows, pairs, size * size) + (1 - self.p) * fresh
            pairs, change = new, np.abs(new - pairs).sum()
        return pairs.reshape(size, size)

    def symbol_frequencies(self):
        """(V,): how often each symbol occurs in the long run (what a frequency-balanced hash table
        wants)."""
        return self.stationary().sum(0)

    def entropy_floor(self):
        """The source's entropy in nats per symbol: the loss of whoever knows table, p and unigram.

        After a pair whose table entry is s, the next symbol has probability (1 - p) unigram, and p
        more at s. Its entropy depends on s alone, so the floor is a mean of V entropies: by how
        often each entry is met.
        """
        size = self.vocab_size
        a, b = np.divmod(np.arange(size * size), size)
        entries = self.table[self.context(a, b)]                                    # (V^2,)
        met = np.bincount(entries, self.stationary().ravel(), size)                 # (V,)
        other = (1 - self.p) * self.unigram
        peak = other + self.p
        entropy = -(other * np.log(other)).sum() + other * np.log(other) - peak * np.log(peak)
        return float(met @ entropy)


def stream(*key):
    """A random generator for each key of integers, independent of all others and of any global
    state."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def source_of(name):
    """The MarkovSource that a name (markov, markov-3, markov1024, markov1024-0) stands for, or
    None."""
    found = NAME.fullmatch(name)
    if not found:
        return None
    large, domain = found.groups()
    shape = dict(vocab_size=1024, n_context=2**18) if large else {}
    return MarkovSource(domain=None if domain is None else int(domain), **shape)


def tokenizer_of(name):
    """Symbols as bytes; 1024 of them as Chinese characters, so that each is visible. None for other
    names."""
    found = NAME.fullmatch(name)
    if found and found.group(1):
        return Tokenizer.from_chars(chr(0x4E00 + symbol) for symbol in range(1024))
    return Tokenizer.byte() if found else None


def documents(source, split):
    """Endless blocks of token ids; training takes the even keys, validation the odd ones."""
    for key in itertools.count({"train": 0, "val": 1}[split], 2):
        yield source.generate(key).ravel()


def corpus(name):
    source = source_of(name)
    if source is None:
        raise DataError(f"{name}: is none of markov, markov-0, markov-1, ..., nor of those with "
                        "markov1024")
    about = f"generated, p {source.p}, {source.n_context} contexts"
    return Corpus(name, lambda split: documents(source, split), about, 8_000_000, generated=True,
                  tokenizer=tokenizer_of(name), floor=source.entropy_floor)
