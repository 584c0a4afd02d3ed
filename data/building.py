"""From texts to one prepared folder: a tokenizer for them, then their tokens as train.bin and val.bin."""
import os
import shutil
import sys

import numpy as np
from tqdm import tqdm

from data.binfile import DTYPES, DataError, dtype_for, sync_folder, write_bin
from data.bpe import count_words, train_bpe
from data.corpora.corpus import note
from data.tokenizers import Tokenizer, next_cut

FILES = ("train.bin", "val.bin", "tokenizer.json")
BLOCK = 1 << 20                 # characters encoded at a time
BPE_SAMPLE = 16_000_000         # characters of each corpus that train a BPE: more change only rare tokens


def progress_bar(total, title, quiet, **options):
    """A tqdm bar on stderr; none with --quiet, and none in a file, where control characters would stay."""
    hide = quiet or not sys.stderr.isatty()
    return tqdm(total=total or None, desc=title, disable=hide, leave=False, unit_scale=True, **options)


def limited(documents, chars):
    """The documents up to that many characters (of arrays: token ids) in all; the last one is cut."""
    for document in documents:
        yield document[:chars]
        chars -= len(document)
        if chars <= 0:
            return


def default_part(corpus, split, max_tokens=0):
    """A split as far as it goes by itself: all of it, but of a generated corpus `size`, or a tenth."""
    size = max(corpus.size, max_tokens) // (1 if split == "train" else 10)
    return limited(corpus.documents(split), size) if corpus.generated else corpus.documents(split)


def join_blocks(documents, word_safe):
    """The concatenated texts in pieces of about BLOCK characters.

    word_safe: cut only where the tokens of the pieces are those of the whole; a stretch without such a place
    stays whole.
    """
    pending, size = [], 0
    for text in documents:
        pending.append(text)
        size += len(text)
        if size >= BLOCK:
            joined = "".join(pending)
            cut = next_cut(joined, max(0, len(joined) - 4096)) if word_safe else len(joined)
            if cut < len(joined) or not word_safe:
                yield joined[:cut]
                joined = joined[cut:]
            pending, size = [joined], len(joined)
    yield "".join(pending)


# --- tokenizers that are trained ---


def train_char(corpora, max_tokens):
    """All characters of these corpora, validation included: it could not be encoded otherwise."""
    chars = set()
    for corpus in corpora:
        for split in ("train", "val"):
            for text in default_part(corpus, split, max_tokens):
                chars.update(text)
    if not chars:
        raise DataError(f"{', '.join(corpus.name for corpus in corpora)}: too short: there is no text in it")
    return Tokenizer.from_chars(chars)


def train_tokenizer(kind, vocab_size, corpora, max_tokens=0, quiet=False):
    """One tokenizer for all these corpora, in whatever order: char, or a bpe of their training texts."""
    corpora = sorted(corpora, key=lambda corpus: corpus.name)
    if kind == "char":
        return train_char(corpora, max_tokens)
    total = sum(min(corpus.size, BPE_SAMPLE) for corpus in corpora)

    def texts(bar):
        for corpus in corpora:
            for text in limited(join_blocks(default_part(corpus, "train"), word_safe=True), BPE_SAMPLE):
                bar.update(len(text))
                yield text

    with progress_bar(total, "counting words", quiet, unit="B") as bar:
        words = count_words(texts(bar))
    with progress_bar(vocab_size - 256, f"merging to {vocab_size} tokens", quiet, unit="merge") as bar:
        tokens = train_bpe(words, vocab_size, bar.update)
    if len(tokens) < vocab_size:
        note(f"the text repeats too little for a vocabulary of {vocab_size}: it has {len(tokens)} tokens")
    return Tokenizer.from_bpe(tokens)


# --- the folder ---


def encode_documents(documents, tokenizer):
    """Arrays of the token ids of the concatenated texts. A source of symbols gives arrays already."""
    first = next(documents, "")
    chained = (item for part in ((first,), documents) for item in part)
    if isinstance(first, np.ndarray):
        return chained
    return map(tokenizer.encode_array, join_blocks(chained, word_safe=tokenizer.kind in ("bpe", "gpt2")))


def split_tokens(corpus, split, tokenizer, max_tokens, meta, bar):
    """Yields the arrays of one split, at most `max_tokens` in all (0: what there is), and sums up in `meta`.

    Raises DataError for a split of fewer than two tokens: nothing could be predicted.
    """
    lengths, tokens = tokenizer.token_lengths(), 0

    def counted(documents):
        for document in documents:
            meta["texts"] += 1
            yield document

    documents = corpus.documents(split) if max_tokens else default_part(corpus, split)
    for ids in encode_documents(counted(documents), tokenizer):
        ids = ids[:max_tokens - tokens] if max_tokens else ids
        tokens += len(ids)
        size = int(lengths[ids].sum())
        meta["bytes"] += size
        bar.update(len(ids) if max_tokens else size)
        yield ids
        if max_tokens and tokens >= max_tokens:
            break
    if tokens < 2:
        why = (f"max_tokens = {max_tokens} allows no more" if max_tokens and tokens == max_tokens else
               "a tenth is held out, so a text needs at least 20 characters")
        raise DataError(f"{corpus.name}: too short: its {split} split has {tokens} tokens; {why}")


def build(folder, corpus, tokenizer, settings, max_tokens=0, quiet=False):
    """Makes a prepared folder; returns the headers of its two .bin files, training first.

    The files are made beside it and moved in at the end, all three at once but for a moment, so that a
    failure (no text, a full disk) leaves a folder of before as it was. Of `max_tokens`, that many are for
    training and a tenth, at least 10,000, for validation.
    """
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)          # left by one that was killed
    staging.mkdir(parents=True)
    limits = {"train": max_tokens, "val": max_tokens and max(max_tokens // 10, 10_000)}
    try:
        headers = [write_split(staging, corpus, split, tokenizer, settings, limit, quiet)
                   for split, limit in limits.items()]
        tokenizer.save(staging / "tokenizer.json")
        folder.mkdir(exist_ok=True)
        for name in FILES:
            os.replace(staging / name, folder / name)
        sync_folder(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return headers


def write_split(folder, corpus, split, tokenizer, settings, limit, quiet):
    """Writes train.bin or val.bin; returns its header."""
    meta = {"corpus": corpus.name, "split": split, "settings": settings, "tokenizer": tokenizer.name,
            "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
            "unit": corpus.unit, "texts": 0, "bytes": 0,
            "path": str(corpus.path.resolve()) if corpus.path else None,
            "entropy_floor": corpus.floor() if corpus.floor and split == "train" else None}
    total = limit or corpus.size // (1 if split == "train" else 10)     # tokens, or bytes: as many at most
    expected = total * DTYPES[dtype_for(tokenizer.vocab_size)].itemsize
    with progress_bar(total, f"{corpus.name} {split}", quiet, unit=" tokens" if limit else "B") as bar:
        chunks = split_tokens(corpus, split, tokenizer, limit, meta, bar)
        return write_bin(folder / f"{split}.bin", chunks, meta, expected)
