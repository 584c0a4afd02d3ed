"""From texts to one prepared folder: a tokenizer for them, then their tokens as train.bin and
val.bin."""
import os
import shutil

import numpy as np

from data.binfile import DTYPES, DataError, dtype_for, read_header, sync_folder, write_bin
from data.bpe import count_words, train_bpe
from data.console import note, progress, working
from data.corpora.corpus import short_hash
from data.tokenizers import Tokenizer, next_cut

FILES = ("train.bin", "val.bin", "tokenizer.json")
BLOCK = 1 << 20                 # characters encoded at a time
BPE_SAMPLE = 16_000_000         # characters of each corpus that train a BPE


def limited(documents, chars):
    """The documents up to `chars` characters in all (of arrays: token ids); the last one is cut."""
    for document in documents:
        yield document[:chars]
        chars -= len(document)
        if chars <= 0:
            return


def default_part(corpus, split, max_tokens=0):
    """All documents of a split; of a generated corpus `size` characters or tokens for training, a
    tenth of that for validation."""
    size = max(corpus.size, max_tokens) // (1 if split == "train" else 10)
    return limited(corpus.documents(split), size) if corpus.generated else corpus.documents(split)


def join_blocks(documents, word_safe):
    """The concatenated texts in pieces of about BLOCK characters.

    word_safe: a cut lies only where the tokens of the pieces are those of the whole (see next_cut);
    a stretch without such a place stays whole.
    """
    # texts are collected until they make a block; what follows its last cut begins the next block
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


def train_char(corpora, max_tokens, quiet):
    """A Tokenizer of all characters of these corpora. Those of the validation texts are among them,
    because these texts are encoded, too."""
    chars = set()
    with working("char: collecting the characters", quiet):
        for corpus in corpora:
            for split in ("train", "val"):
                for text in default_part(corpus, split, max_tokens):
                    chars.update(text)
    if not chars:
        names = ", ".join(corpus.name for corpus in corpora)
        raise DataError(f"{names}: too short: there is no text in it")
    return Tokenizer.from_chars(chars)


def train_tokenizer(kind, vocab_size, corpora, max_tokens=0, quiet=False):
    """One tokenizer for all these corpora: char, or a bpe of their training texts. Their order does
    not matter."""
    corpora = sorted(corpora, key=lambda corpus: corpus.name)
    if kind == "char":
        return train_char(corpora, max_tokens, quiet)
    total = sum(min(corpus.size, BPE_SAMPLE) for corpus in corpora)

    def texts(bar):
        for corpus in corpora:
            blocks = join_blocks(default_part(corpus, "train"), word_safe=True)
            for text in limited(blocks, BPE_SAMPLE):
                bar.update(len(text))
                yield text

    with progress(total, "bpe: counting words", quiet, unit="B") as bar:
        words = count_words(texts(bar))
    title = f"bpe: merging to {vocab_size} tokens"
    with progress(vocab_size - 256, title, quiet, unit="merge") as bar:
        tokens = train_bpe(words, vocab_size, bar.update)
    if len(tokens) < vocab_size:
        note(f"the text repeats too little for a vocabulary of {vocab_size}: it has {len(tokens)} "
             "tokens")
    return Tokenizer.from_bpe(tokens)


# --- the folder ---


def encode_documents(documents, tokenizer):
    """Arrays of the token ids of the concatenated texts."""
    # a source of symbols gives arrays of ids already: the first item tells
    first = next(documents, "")
    chained = (item for part in ((first,), documents) for item in part)
    if isinstance(first, np.ndarray):
        return chained
    word_safe = tokenizer.kind in ("bpe", "gpt2", "ids")
    return map(tokenizer.encode_array, join_blocks(chained, word_safe))


def split_tokens(corpus, split, tokenizer, max_tokens, meta, bar):
    """Yields the arrays of one split, at most `max_tokens` in all (0: what there is). Counts texts
    and bytes in `meta`. Raises DataError for a split of fewer than two tokens: no token could be
    predicted.
    """
    lengths = tokenizer.token_lengths()
    tokens = 0

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
        why = "a tenth is held out, so a text needs at least 20 characters"
        if max_tokens and tokens == max_tokens:
            why = f"max_tokens = {max_tokens} allows no more"
        raise DataError(f"{corpus.name}: too short: its {split} split has {tokens} tokens; {why}")


def build(folder, corpus, tokenizer, settings, max_tokens=0, quiet=False, replaces=False):
    """Makes a prepared folder. Returns the headers of train.bin and val.bin, and the folder that
    keeps the tokens of before, or None.

    replaces: the folder holds sound tokens; if the new ones differ, the old ones are kept.
    max_tokens: this many tokens for training and a tenth, at least 10,000, for validation (0: all).
    A failure (no text, a full disk) leaves the folder as it was.
    """
    # the files are made in a folder beside it; a process that was killed may have left one
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    limits = {"train": max_tokens, "val": max_tokens and max(max_tokens // 10, 10_000)}
    try:
        headers = [write_split(staging, corpus, split, tokenizer, settings, limit, quiet)
                   for split, limit in limits.items()]
        tokenizer.save(staging / "tokenizer.json")
        # a run that began with the old tokens can go on only with those
        kept = keep(folder, headers) if replaces else None
        # all three files move in at the end
        folder.mkdir(exist_ok=True)
        for name in FILES:
            os.replace(staging / name, folder / name)
        sync_folder(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return headers, kept


def keep(folder, headers):
    """Keeps the files of a prepared folder as <folder>-old-<hash of the tokens>, unless these are
    the tokens of the new `headers`. Returns the new folder or None."""
    old = [read_header(folder / f"{split}.bin")["sha256"] for split in ("train", "val")]
    if old == [header["sha256"] for header in headers]:
        return None
    kept = folder.with_name(f"{folder.name}-old-{short_hash(*old, digits=8)}")
    if kept.exists():
        return kept
    staging = folder.with_name(f".{kept.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for name in FILES:
        try:
            os.link(folder / name, staging / name)      # a second name of the file takes no space
        except OSError:                                 # some file systems have no hard links
            shutil.copyfile(folder / name, staging / name)
    os.replace(staging, kept)
    return kept


def write_split(folder, corpus, split, tokenizer, settings, limit, quiet):
    """Writes train.bin or val.bin; returns its header."""
    floor = corpus.floor() if corpus.floor and split == "train" else None
    meta = {"corpus": corpus.name, "split": split, "settings": settings,
            "tokenizer": tokenizer.name, "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size, "unit": corpus.unit, "texts": 0, "bytes": 0,
            "path": str(corpus.path.resolve()) if corpus.path else None, "entropy_floor": floor}
    # the size of the split: in tokens if there is a limit, else in bytes, of which a token has one
    # at least
    total = limit or corpus.size // (1 if split == "train" else 10)
    expected = total * DTYPES[dtype_for(tokenizer.vocab_size)].itemsize
    unit = " tokens" if limit else "B"
    with progress(total, f"preparing {corpus.name}, {split}", quiet, unit=unit) as bar:
        chunks = split_tokens(corpus, split, tokenizer, limit, meta, bar)
        return write_bin(folder / f"{split}.bin", chunks, meta, expected)
