"""Which tokens each training step sees: arithmetic from the step, with no state to save.

A corpus of n tokens is cut into windows of block_size + 1 tokens, one every block_size tokens, so that each
token is predicted once per pass. Pass (epoch) e visits the windows in a permutation that only (seed, corpus,
e) decide, and moves the grid of windows by an offset of its own (none in epoch 0), so that later passes see
other cuts. Sequence g of a run is window g mod W of pass g div W: whoever knows the step knows the batch.
Resuming needs no replay, and two configs with the same data.seed see the same batches.

With several corpora, every 1000 consecutive sequences hold each corpus exactly by its weight, in an order
that only (seed, block) decide, so the number of sequences that corpus j gave before sequence g is arithmetic,
too.
"""
from pathlib import Path

import numpy as np
import torch

from data.binfile import DTYPES, HEADER, DataError, open_bin, read_header

BLOCK = 1000            # sequences within which the weights hold exactly
ORDER, SHIFT, MIX = 0, 1, 2     # what a random stream is for: the first number of its key


def keyed_generator(*key):
    """A random generator that depends on the integers of its key alone, never on any global state."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class TokenFile:
    """One .bin file, read window by window.

    Windows are read with plain reads: a memory map would do as well, but every page that it touches counts as
    memory of the process, and a run would seem to grow by the size of its corpus.
    """

    def __init__(self, path, block_size):
        self.path, self.block_size, self.meta = Path(path), block_size, read_header(path)
        self.dtype, self.count = DTYPES[self.meta["dtype"]], self.meta["count"]
        if self.count < block_size + 1:
            raise DataError(f"{path}: holds {self.count} tokens, fewer than one window of block_size + 1 = "
                            f"{block_size + 1}: choose a smaller model.block_size or prepare a longer text")
        self.file = open(path, "rb", buffering=0)

    def read(self, starts):
        """(len(starts), block_size + 1) int64: the windows that begin at these tokens."""
        rows = np.empty((len(starts), self.block_size + 1), self.dtype)
        for row, start in zip(rows, starts):
            self.file.seek(HEADER + int(start) * self.dtype.itemsize)
            if self.file.readinto(row) != row.nbytes:
                raise DataError(f"{self.path}: was cut short while it was read; prepare the corpus again")
        return rows.astype(np.int64)


class Windows:
    """The endless sequence of one corpus' training windows: pass after pass, each in its own order."""

    def __init__(self, path, block_size, seed, corpus):
        self.tokens, self.block_size, self.key = TokenFile(path, block_size), block_size, (seed, corpus)
        # one window less than fit, so that all of them still fit wherever the grid is moved to
        self.per_epoch = max(1, (self.tokens.count - block_size) // block_size)
        self.room = min(block_size, self.tokens.count - self.per_epoch * block_size)    # offsets: below this
        self.cached = {}

    def order(self, epoch):
        """(offset of the grid, permutation (W,)) of a pass. A batch can touch two passes, so two are kept."""
        if epoch not in self.cached:
            if len(self.cached) > 1:
                self.cached.pop(next(iter(self.cached)))        # the older one
            shift = int(keyed_generator(SHIFT, *self.key, epoch).integers(self.room)) if epoch else 0
            self.cached[epoch] = shift, keyed_generator(ORDER, *self.key, epoch).permutation(self.per_epoch)
        return self.cached[epoch]

    def starts(self, ordinals):
        """The first token of each window; ordinals (n,) count this corpus' windows since the run began."""
        epochs, places = np.divmod(ordinals, self.per_epoch)
        starts = np.empty(len(ordinals), np.int64)
        for epoch in np.unique(epochs):
            shift, permutation = self.order(int(epoch))
            here = epochs == epoch
            starts[here] = shift + permutation[places[here]] * self.block_size
        return starts


def quotas_of(weights, total):
    """How many of `total` each weight gets: its share rounded down, the rest to the largest remainders."""
    exact = np.array(weights) / np.sum(weights) * total
    quotas = np.floor(exact).astype(np.int64)
    largest = np.argsort(quotas - exact, kind="stable")[:total - quotas.sum()]
    quotas[largest] += 1
    return quotas


class Batches:
    """Training batches of one or several prepared corpora.

    folders: prepared folders with one and the same tokenizer. weights: how often each corpus is drawn, in any
    unit; None or empty: all alike, because corpora that differ in size are put together to be learned alike
    (a small one then repeats, which epochs() shows; weights by size would let the largest drown the others).
    batch_size: sequences per optimizer step, of all micro-steps and processes together. seed: data.seed.
    Raises DataError: a corpus shorter than a window, other tokenizers, or weights that do not fit.
    """

    def __init__(self, folders, weights, block_size, batch_size, seed):
        if seed < 0:
            raise DataError(f"data.seed {seed}: give a number from 0 on")
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.corpora = [Windows(Path(folder) / "train.bin", block_size, seed, j)
                        for j, folder in enumerate(folders)]
        same_tokenizer([windows.tokens for windows in self.corpora])
        self.checksums = [windows.tokens.meta["sha256"] for windows in self.corpora]    # for a resumed run
        weights = list(weights or [1] * len(folders))
        if len(weights) != len(folders) or min(weights) < 0 or sum(weights) <= 0:
            raise DataError(f"data.weights {weights}: give one weight, not negative, for each of the "
                            f"{len(folders)} corpora")
        self.quotas, self.cached = quotas_of(weights, BLOCK), (None,)
        for folder, weight, quota in zip(folders, weights, self.quotas):
            if weight and not quota:
                raise DataError(f"data.weights {weights}: {folder} would get less than one sequence in "
                                f"{BLOCK}; raise its weight, or set it to 0")

    def mix(self, block):
        """Per sequence of a block: its corpus, and how many before it in the block are from the same one."""
        if self.cached[0] != block:
            corpus = np.repeat(np.arange(len(self.quotas)), self.quotas)
            corpus = keyed_generator(MIX, self.seed, block).permutation(corpus)
            before = np.empty(BLOCK, np.int64)
            for j, quota in enumerate(self.quotas):
                before[corpus == j] = np.arange(quota)
            self.cached = block, corpus, before
        return self.cached[1:]

    def assign(self, sequences):
        """The corpus that each sequence of the run is drawn from, and its number in it: two (n,) arrays."""
        blocks, places = np.divmod(sequences, BLOCK)
        corpus, ordinal = np.empty_like(sequences), np.empty_like(sequences)
        for block in np.unique(blocks):
            mix, count = self.mix(int(block))
            here = blocks == block
            corpus[here] = mix[places[here]]
            ordinal[here] = block * self.quotas[corpus[here]] + count[places[here]]
        return corpus, ordinal

    def batch(self, step, micro=0, grad_accum=1, rank=0, world=1):
        """(x, y, domain): int64 (b, T), (b, T), (b,); y is x one token later, domain the corpus of each row.

        b = batch_size / (grad_accum * world). The step's sequences are cut into micro-batches and those over
        the ranks, in order: whatever the cut, together they are the same sequences in the same order.
        """
        size, rest = divmod(self.batch_size, grad_accum * world)
        if rest or not size:
            raise DataError(f"train.batch_size {self.batch_size} cannot be cut into grad_accum {grad_accum} "
                            f"x {world} processes; choose a multiple of {grad_accum * world}")
        first = step * self.batch_size + (micro * world + rank) * size
        corpus, ordinal = self.assign(np.arange(first, first + size))
        rows = np.empty((size, self.block_size + 1), np.int64)
        for j in np.unique(corpus):
            here = corpus == j
            rows[here] = self.corpora[j].tokens.read(self.corpora[j].starts(ordinal[here]))
        return *split_rows(rows), torch.from_numpy(corpus)

    def epochs(self, step):
        """How often each corpus has been gone through before this step: list of float."""
        block, place = divmod(step * self.batch_size, BLOCK)
        drawn = block * self.quotas
        if place:
            drawn = drawn + np.bincount(self.mix(block)[0][:place], minlength=len(drawn))
        return [float(n / windows.per_epoch) for n, windows in zip(drawn, self.corpora)]


class EvalBatches:
    """A fixed set of validation windows, evenly spaced over each val.bin: the same for all models and seeds.

    A sequence of (x, y, domain, size): x, y (b, T) and domain (b,) int64, all of one corpus; size, the bytes
    that y stands for, so that bits per byte = sum of the loss in nats over y / ln 2 / size, whatever the
    tokenizer. n_batches per corpus, fewer where it is short; the last of a corpus may have fewer rows, so
    weigh by rows. Several processes share it as batches[rank::world].
    """

    def __init__(self, folders, block_size, batch_size, n_batches, token_lengths):
        self.files = [TokenFile(Path(folder) / "val.bin", block_size) for folder in folders]
        same_tokenizer(self.files)
        self.token_lengths, self.plan = token_lengths, []
        for domain, file in enumerate(self.files):
            fit = (file.count - 1) // block_size
            chosen = min(fit, n_batches * batch_size)
            starts = np.arange(chosen) * fit // chosen * block_size
            self.plan += [(domain, starts[i:i + batch_size]) for i in range(0, chosen, batch_size)]

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        domain, starts = self.plan[index]
        rows = self.files[domain].read(starts)
        return *split_rows(rows), torch.full((len(rows),), domain), int(self.token_lengths[rows[:, 1:]].sum())


def token_counts(folders, vocab_size):
    """(vocab_size,) int64: how often each token occurs in the training parts, read a piece at a time."""
    counts = np.zeros(vocab_size, np.int64)
    for folder in folders:
        tokens, _ = open_bin(Path(folder) / "train.bin")
        for start in range(0, len(tokens), 1 << 20):
            counts += np.bincount(tokens[start:start + (1 << 20)], minlength=vocab_size)
    return counts


def split_rows(rows):
    """(b, T + 1) tokens -> inputs and targets, (b, T) each."""
    rows = torch.from_numpy(rows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def same_tokenizer(files):
    """Raises DataError when token ids would mean different things in different files."""
    if len({file.meta["fingerprint"] for file in files}) > 1:
        raise DataError("these were prepared with different tokenizers: "
                        + ", ".join(f"{file.path} ({file.meta['tokenizer']})" for file in files)
                        + "; prepare them in one call, or with --tokenizer PATH of one tokenizer.json")
