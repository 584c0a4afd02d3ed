"""Text as vectors of byte trigrams, and the weights of c-BTM (Gururangan et al. 2303.14177).

A text is a vector x of length 1 with F numbers: for each byte trigram its count times
ln((1 + N) / (1 + windows that hold it)) + 1, which is tf-idf over N windows; trigrams are hashed
into F numbers. The paper reduces such vectors by an SVD, these are not.

A branch that learned cluster j, whose centre is c_j, weighs exp(-|x - c_j|^2 / T), x the vector of
the text read so far.
"""
import json
import zipfile
from typing import NamedTuple

import numpy as np
import torch

from data.binfile import DataError, explain

BITS = 14
FEATURES = 2**BITS      # F


class Vectors(NamedTuple):
    """N sparse vectors of length 1: vector row[i] has value[i] at feature[i], (n,) each, and is 0
    elsewhere; so is a text without a trigram."""
    row: np.ndarray
    feature: np.ndarray
    value: np.ndarray
    n: int

    def dense(self, rows):
        """(len(rows), F): some of them in full."""
        out = np.zeros((len(rows), FEATURES))
        for full, row in zip(out, rows):
            here = self.row == row
            full[self.feature[here]] = self.value[here]
        return out


def trigrams(raw):
    """The feature of each three neighbours of n bytes, (n - 2,) int64, 0 .. F - 1."""
    b = raw.astype(np.uint64)
    code = b[:-2] << np.uint64(16) | b[1:-1] << np.uint64(8) | b[2:]
    # a multiplicative hash: of 32 bits the upper ones, which are mixed best
    mixed = code * np.uint64(0x9E3779B1) & np.uint64(0xFFFFFFFF)
    return (mixed >> np.uint64(32 - BITS)).astype(np.int64)


def vectors(windows, idf=None):
    """(Vectors, idf (F,)) of windows, an iterable of uint8 arrays; idf: that of other windows."""
    found = [np.unique(trigrams(raw), return_counts=True) for raw in windows]
    row = np.repeat(np.arange(len(found)), [len(feature) for feature, _ in found])
    feature, count = (np.concatenate(part) for part in zip(*found))
    # tf-idf, then length 1
    if idf is None:
        idf = np.log((1 + len(found)) / (1 + np.bincount(feature, minlength=FEATURES))) + 1
    value = count * idf[feature]
    value = value / np.sqrt(np.bincount(row, value**2, len(found)))[row]
    return Vectors(row, feature, value, len(found)), idf


def distances(x, centres):
    """(N, k): |x_i - c_j|^2 of N Vectors to the centres (k, F)."""
    square = np.bincount(x.row, x.value**2, x.n)
    dots = [np.bincount(x.row, x.value * centre[x.feature], x.n) for centre in centres]
    return square[:, None] + (centres**2).sum(1) - 2 * np.stack(dots, 1)


class Centres(NamedTuple):
    """What weighs a text by its distance to each cluster."""
    centres: np.ndarray                 # (k, F)
    idf: np.ndarray                     # (F,)
    tokens: list                        # the bytes of each token
    temperature: float                  # T
    checksums: list                     # of the clusters' training tokens

    def evidence(self, read):
        """-|x - c_j|^2 / T, (B, T) tokens -> (k, B, T) float64. At each position x is the vector of
        the text up to and with this token; 0 where it has no trigram yet."""
        found = np.stack([self.prefixes(row) for row in read.tolist()], 1)
        return torch.from_numpy(found) / -self.temperature

    def prefixes(self, ids):
        """(k, T): the squared distance of each prefix of T tokens to each centre."""
        ends = np.cumsum([len(self.tokens[i]) for i in ids])
        f = trigrams(np.frombuffer(b"".join(self.tokens[i] for i in ids), np.uint8))
        # how often the same trigram came before
        order = f.argsort(kind="stable")
        seen = np.empty_like(f)
        seen[order] = np.arange(len(f)) - np.searchsorted(f[order], f[order])
        # from count c to c + 1: |x|^2 grows by idf^2 (2 c + 1), x c_j by idf c_j
        square = np.append(0, (self.idf[f]**2 * (2 * seen + 1)).cumsum())
        dots = (self.idf[f] * self.centres[:, f]).cumsum(1)
        dots = np.concatenate([np.zeros((len(dots), 1)), dots], 1)
        # of each prefix, which has two trigrams fewer than bytes
        n = np.maximum(ends - 2, 0)
        cosine = dots[:, n] / np.sqrt(square[n]).clip(1e-9)
        return np.where(n > 0, 1 + (self.centres**2).sum(1, keepdims=True) - 2 * cosine, 0.0)


def open_centres(path, tokenizer, temperature):
    """The Centres in a file that grow.clusters made. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            checksums = json.loads(str(file["about"]))["checksums"]
            return Centres(file["centres"], file["idf"], tokenizer.tokens, temperature, checksums)
    except OSError as e:
        raise DataError(explain(e, path, done="read", remedy="give the NAME.npz of grow.clusters")
                        ) from None
    except (AttributeError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile):
        raise DataError(f"{path}: holds no centres; give the NAME.npz of grow.clusters") from None
