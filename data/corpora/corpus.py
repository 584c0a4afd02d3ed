"""What every source of text hands to prepare.py."""
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Corpus:
    """A stream of texts for each split, and what tells when the corpus must be prepared anew.

    A model is trained on the concatenated texts, so a source may cut them anywhere. A source of
    symbols (markov) yields arrays of token ids instead and brings its own tokenizer.
    """
    name: str
    documents: Callable[[str], Iterator]    # "train" or "val" -> texts; generated corpora never end
    source: str                     # what it is made from; another value: prepare it again
    size: int                       # bytes of training text, roughly; of a generated corpus to make
    unit: str = ""                  # what one text is (files, problems ...), if it is anything
    generated: bool = False
    tokenizer: object = None        # a source of symbols: the Tokenizer whose ids it yields
    floor: Callable[[], float] | None = None    # nats per token of the best model, where known
    path: Path | None = None        # the user's file or folder, if it was made from one


def short_hash(*values, digits=12):
    """A few hexadecimal digits that stand for these values, the same in every process."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:digits]


def split_of(name, share=0.1):
    """Whether a file is "train" or "val", by its name alone: the same on every machine."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    draw = int.from_bytes(digest[:4], "big") / 2**32            # even in 0 .. 1
    return "val" if draw < share else "train"


def titled(name, text):
    """One file among several in a corpus: a comment line with its name, then its text and a line
    end."""
    name = name.encode("utf-8", "replace").decode()
    return f"# {name}\n{text}" + ("" if text.endswith("\n") else "\n")


def walk(folder):
    """os.walk that raises the OSError of a subfolder that cannot be read, instead of leaving it
    out."""
    def refuse(error):
        raise error
    return os.walk(folder, onerror=refuse)
