"""Which tokens each training step sees: arithmetic from the step, with no state to save.

Windows. A corpus of n tokens is cut into windows of T + 1 tokens (T = block_size), one every T
tokens: each token is predicted once per pass. A pass (epoch) visits its W windows in the order of a
permutation. The grid of windows starts at an offset below T, 0 in epoch 0, so that later passes cut
the text elsewhere. Permutation and offset depend on (data.seed, corpus, epoch) alone.

Steps. Sequence g of a run is window g mod W of pass g div W, so the step tells the batch. A resumed
run replays nothing, and two configs of one data.seed see the same batches.

Mixtures. Of several corpora, each block of 1000 consecutive sequences holds each corpus exactly by
its weight, in an order that depends on (data.seed, block) alone. How many sequences corpus j gave
before sequence g is therefore arithmetic, too.
"""
import math
from pathlib import Path

import numpy as np
import torch

from data.answers import IGNORE, answer_mask, are_answers
from data.binfile import DTYPES, HEADER, DataError, open_bin, read_header

BLOCK = 1000            # sequences within which the weights hold exactly
ORDER, SHIFT, MIX = 0, 1, 2     # what a random stream is for: the first number of its key


def keyed_generator(*key):
    """A random generator that depends on the integers of its key alone, never on any global
    state."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class TokenFile:
    """One .bin file of tokens, read window by window. Raises DataError if it is shorter than one
    window.

    Windows are read, not mapped: every page that a memory map touches counts as memory of the
    process, and a run would seem to grow by the size of its corpus.
    """

    def __init__(self, path, block_size):
        self.path, self.block_size, self.meta = Path(path), block_size, read_header(path)
        self.dtype, self.count = DTYPES[self.meta["dtype"]], self.meta["count"]
        if self.count < block_size + 1:
            raise DataError(f"{path}: holds {self.count} tokens, fewer than one window of "
                            f"block_size + 1 = {block_size + 1}: choose a smaller model.block_size "
                            "or prepare a longer text")
        self.file = open(path, "rb", buffering=0)

    def read(self, starts):
        """(len(starts), block_size + 1) int64: the windows that begin at these tokens."""
        rows = np.empty((len(starts), self.block_size + 1), self.dtype)
        for row, start in zip(rows, starts):
            self.file.seek(HEADER + int(start) * self.dtype.itemsize)
            if self.file.readinto(row) != row.nbytes:
                raise DataError(f"{self.path}: was cut short while it was read; prepare the corpus "
                                "again")
        return rows.astype(np.int64)


class Windows:
    """The endless sequence of one corpus' training windows: pass after pass, each in its own
    order."""

    def __init__(self, path, block_size, seed, corpus):
        self.tokens = TokenFile(path, block_size)
        self.block_size, self.key = block_size, (seed, corpus)
        # W windows per pass: one less than fit, so that all of them fit at every offset of the grid
        self.per_epoch = max(1, (self.tokens.count - block_size) // block_size)
        # offsets lie below this
        self.room = min(block_size, self.tokens.count - self.per_epoch * block_size)
        self.cached = {}

    def order(self, epoch):
        """(offset of the grid, permutation (W,)) of a pass."""
        if epoch not in self.cached:
            # a batch can touch two passes, so two are kept: the older one goes
            if len(self.cached) > 1:
                self.cached.pop(next(iter(self.cached)))
            shift = 0
            if epoch:
                shift = int(keyed_generator(SHIFT, *self.key, epoch).integers(self.room))
            permutation = keyed_generator(ORDER, *self.key, epoch).permutation(self.per_epoch)
            self.cached[epoch] = shift, permutation
        return self.cached[epoch]

    def starts(self, ordinals):
        """The first token of each window; ordinals (n,) count this corpus' windows since the run
        began."""
        epochs, places = np.divmod(ordinals, self.per_epoch)       # window g mod W of pass g div W
        starts = np.empty(len(ordinals), np.int64)
        for epoch in np.unique(epochs):
            shift, permutation = self.order(int(epoch))
            here = epochs == epoch
            starts[here] = shift + permutation[places[here]] * self.block_size
        return starts


def quotas_of(weights, total):
    """How many of `total` each weight gets, (len(weights),) int64: its share rounded down; what is
    left goes to the largest remainders."""
    exact = np.array(weights) / np.sum(weights) * total
    quotas = np.floor(exact).astype(np.int64)
    largest = np.argsort(quotas - exact, kind="stable")[:total - quotas.sum()]
    quotas[largest] += 1
    return quotas


class Batches:
    """Training batches of one or several prepared corpora.

    folders: prepared folders with one tokenizer. weights: how often each corpus is drawn, in any
    unit; None or empty: equally often, so that a small corpus is learned like a large one (it then
    repeats, see epochs). batch_size: sequences per optimizer step, of all micro-steps and processes
    together. seed: data.seed. answers_only: targets outside of answers are IGNORE
    (data/answers.py). Raises DataError: a corpus shorter than a window, different tokenizers,
    weights that do not fit, no corpus with answers.
    """

    def __init__(self, folders, weights, block_size, batch_size, seed, answers_only=False):
        if seed < 0:
            raise DataError(f"data.seed {seed}: give a number from 0 on")
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        # one stream of windows per corpus, all of one tokenizer
        self.corpora = [Windows(Path(folder) / "train.bin", block_size, seed, j)
                        for j, folder in enumerate(folders)]
        same_tokenizer([windows.tokens for windows in self.corpora])
        # what a resumed run compares
        self.checksums = [windows.tokens.meta["sha256"] for windows in self.corpora]
        # how many sequences of a block each corpus gives: at least one, unless its weight is 0
        weights = list(weights or [1] * len(folders))
        if len(weights) != len(folders) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise DataError(f"data.weights {weights}: give one weight, not negative, for each of "
                            f"the {len(folders)} corpora")
        self.quotas, self.cached = quotas_of(weights, BLOCK), (None,)
        for folder, weight, quota in zip(folders, weights, self.quotas):
            if weight and not quota:
                raise DataError(f"data.weights {weights}: {folder} would get less than one "
                                f"sequence in {BLOCK}; raise its weight, or set it to 0")
        # which tokens of each corpus are answers; None: every target counts
        self.masks = [answer_mask(windows.tokens.path) if answers_only else None
                      for windows in self.corpora]
        if answers_only and all(mask is None for mask in self.masks):
            raise DataError("data.answers_only: none of the corpora is a row of \"Q: ...\" and "
                            "\"A: ...\", as math and gsm8k are; leave it out")

    def mix(self, block):
        """Per sequence of a block: its corpus, and how many before it in the block are from the
        same one."""
        if self.cached[0] != block:
            corpus = np.repeat(np.arange(len(self.quotas)), self.quotas)
            corpus = keyed_generator(MIX, self.seed, block).permutation(corpus)
            before = np.empty(BLOCK, np.int64)
            for j, quota in enumerate(self.quotas):
                before[corpus == j] = np.arange(quota)
            self.cached = block, corpus, before
        return self.cached[1:]

    def assign(self, sequences):
        """The corpus that each sequence of the run is drawn from, and its number in it: two (n,)
        arrays."""
        blocks, places = np.divmod(sequences, BLOCK)
        corpus, ordinal = np.empty_like(sequences), np.empty_like(sequences)
        for block in np.unique(blocks):
            mix, count = self.mix(int(block))
            here = blocks == block
            corpus[here] = mix[places[here]]
            ordinal[here] = block * self.quotas[corpus[here]] + count[places[here]]
        return corpus, ordinal

    def batch(self, step, micro=0, grad_accum=1, rank=0, world=1):
        """(x, y, domain): int64 (b, T), (b, T), (b,); y is x one token later, domain the corpus of
        each row.

        b = batch_size / (grad_accum * world). The step's sequences are cut in order, first into
        micro-batches, then over the ranks: every cut gives the same sequences. Raises DataError
        where b is no whole number.
        """
        size, rest = divmod(self.batch_size, grad_accum * world)
        if rest or not size:
            raise DataError(f"train.batch_size {self.batch_size} cannot be cut into grad_accum "
                            f"{grad_accum} x {world} processes; choose a multiple of "
                            f"{grad_accum * world}")
        # the corpus of each sequence and its number there, then the windows of each corpus together
        first = step * self.batch_size + (micro * world + rank) * size
        corpus, ordinal = self.assign(np.arange(first, first + size))
        rows = np.empty((size, self.block_size + 1), np.int64)
        ignored = np.zeros((size, self.block_size), bool)
        for j in np.unique(corpus):
            here = corpus == j
            starts = self.corpora[j].starts(ordinal[here])
            rows[here] = self.corpora[j].tokens.read(starts)
            if self.masks[j] is not None:
                ignored[here] = ~are_answers(self.masks[j], starts, self.block_size)
        x, y = split_rows(rows)
        return x, y.masked_fill_(torch.from_numpy(ignored), IGNORE), torch.from_numpy(corpus)

    def epochs(self, step):
        """How often each corpus has been gone through before this step: list of float."""
        # whole blocks by their quotas, the begun block by counting
        block, place = divmod(step * self.batch_size, BLOCK)
        drawn = block * self.quotas
        if place:
            drawn = drawn + np.bincount(self.mix(block)[0][:place], minlength=len(drawn))
        return [float(n / windows.per_epoch) for n, windows in zip(drawn, self.corpora)]


class EvalBatches:
    """A fixed set of validation windows, evenly spaced over each val.bin: the same for all models
    and seeds.

    A sequence of (x, y, domain, size). x, y: (b, T) and domain: (b,), int64, all of one corpus.
    size: the bytes that y stands for. Bits per byte = (sum of the loss in nats) / ln 2 / size, for
    every tokenizer. There are n_batches per corpus, fewer where it is short. The last batch of a
    corpus may have fewer rows: weigh by rows. Several processes share the set as
    batches[rank::world].
    """

    def __init__(self, folders, block_size, batch_size, n_batches, token_lengths):
        self.files = [TokenFile(Path(folder) / "val.bin", block_size) for folder in folders]
        same_tokenizer(self.files)
        self.token_lengths, self.plan = token_lengths, []
        for domain, file in enumerate(self.files):
            # `fit` windows fit side by side; `chosen` of them, evenly spaced, are read
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
        size = int(self.token_lengths[rows[:, 1:]].sum())
        return *split_rows(rows), torch.full((len(rows),), domain), size


def token_counts(folders, vocab_size):
    """(vocab_size,) int64: how often each token occurs in the training parts, read a piece at a
    time."""
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
                        + "; prepare them in one call, or with --tokenizer PATH of one "
                          "tokenizer.json")
