"""Text to token ids and back. One class; the kinds differ in their tokens and in how text is cut
into them.

    byte   the 256 bytes: no training, nothing is ever unknown, the sequences are long
    char   the characters of the corpus, sorted, as in nanoGPT's Shakespeare; any other is an error
    bpe    byte-pair encoding trained on the corpus (bpe.py), run by tiktoken
    gpt2   GPT-2's own 50,257 tokens, from the file that tiktoken downloads or has in its cache
    imported   byte-pair encoding of a published model, with its own pattern (data/bytelevel.py)
    ids    no text at all, but the ids themselves, written as numbers: "12 7 345 "

Every token is a string of bytes. To decode is to join them, and the bytes of a text (for bits per
byte) are the sum of its tokens' lengths. byte, bpe, gpt2 and imported are lossless for every valid
text: they spell in single bytes what they cannot merge. char is lossless for the characters of its
corpus.
"""
import hashlib
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import tiktoken

from data.binfile import DataError, explain, replacing
from data.bpe import PATTERN

GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
PIECE = 1 << 16         # characters that a thread of tiktoken gets at a time


class Tokenizer:
    """kind: byte, char, bpe, gpt2, imported or ids. tokens: a list of bytes; the position of a
    token is its id. found (imported): ids of tokens that are looked for in a text before it is cut
    into words, the longest first; unread: ids of tokens that no text is encoded as. Made by byte(),
    from_chars(), from_bpe(), gpt2(), numbers() or load(). `fingerprint` is a short hash of what
    _plain() says: two tokenizers with one fingerprint give the same ids.
    """

    def __init__(self, kind, tokens, pattern=PATTERN, found=(), unread=()):
        self.kind, self.tokens, self.pattern = kind, tokens, pattern
        self.found, self.unread = list(found), list(unread)
        self.vocab_size = len(tokens)
        self.name = f"{kind}{len(tokens)}" if kind in ("bpe", "imported", "ids") else kind
        if kind == "char":
            # a table from code point to id; -1 is unknown, and so is the last row, for all code
            # points above
            codes = np.array([ord(token.decode()) for token in tokens])
            self._ids = np.full(codes.max() + 2, -1, np.int32)
            self._ids[codes] = np.arange(len(codes))
        elif kind in ("bpe", "gpt2"):
            # <|endoftext|> keeps its id, but no text is encoded as it: the user's text stays text
            ranks = {token: rank for rank, token in enumerate(tokens) if token != b"<|endoftext|>"}
            self._encoding = tiktoken.Encoding(self.name, pat_str=pattern, mergeable_ranks=ranks,
                                               special_tokens={})
        elif kind == "imported":
            apart = {*self.found, *self.unread}
            ranks = {token: rank for rank, token in enumerate(tokens) if rank not in apart}
            self._encoding = tiktoken.Encoding(self.name, pat_str=pattern, mergeable_ranks=ranks,
                                               special_tokens={})
            self._found = {tokens[i].decode(): i for i in self.found}
            longest = sorted(self._found, key=len, reverse=True)
            self._split = re.compile(f"({'|'.join(map(re.escape, longest))})")
        plain = json.dumps(self._plain(), sort_keys=True)
        self.fingerprint = hashlib.sha256(plain.encode()).hexdigest()[:16]

    # --- making one ---

    @classmethod
    def byte(cls):
        return cls("byte", [bytes([byte]) for byte in range(256)])

    @classmethod
    def from_chars(cls, chars):
        """chars: an iterable of the characters that the texts hold; sorted here."""
        return cls("char", [char.encode() for char in sorted(set(chars))])

    @classmethod
    def from_bpe(cls, tokens):
        """tokens: the list that bpe.train_bpe returns."""
        return cls("bpe", tokens)

    @classmethod
    def numbers(cls, vocab_size):
        """The ids 0 to vocab_size - 1 as they are: of a model whose tokenizer is not known here."""
        if not 0 < vocab_size < 2**24:
            raise ValueError(f"{vocab_size} token ids")
        return cls("ids", [b"%d " % i for i in range(vocab_size)])

    @classmethod
    def gpt2(cls, patience=30):
        """GPT-2's tokenizer. Raises DataError with the remedy if it cannot be had in `patience`
        seconds."""
        encoding = fetch_gpt2(patience)
        tokens = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.n_vocab)]
        return cls("gpt2", tokens, encoding._pat_str)

    # --- using it ---

    def encode(self, text):
        """The token ids of a text: list of int. Raises DataError for what a char tokenizer never
        saw."""
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        """The same as an integer array, for whole corpora (10 MB in about a second)."""
        # char reads code points (4 bytes each), the other kinds read bytes
        try:
            raw = text.encode("utf-32-le" if self.kind == "char" else "utf-8")
        except UnicodeEncodeError as error:
            raise DataError("the text holds something that is not valid Unicode at character "
                            f"{error.start}; give it as UTF-8") from None
        if self.kind == "byte":
            return np.frombuffer(raw, np.uint8)
        if self.kind == "char":
            codes = np.frombuffer(raw, "<u4")
            ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
            if (ids < 0).any():
                self._refuse(text, ids)
            return ids
        if self.kind == "ids":
            return self._read_numbers(text)
        # imported: the tokens that are looked for first stand at the odd places
        if self.kind == "imported":
            parts = self._split.split(text) if self._found else [text]
            ids = [[self._found[part]] if i % 2 else self._encoding.encode_ordinary(part)
                   for i, part in enumerate(parts)]
            return np.array([i for part in ids for i in part], np.int32)
        # bpe, gpt2: tiktoken encodes the pieces on several threads
        pieces = list(split_pieces(text, PIECE))
        threads = min(8, os.cpu_count() or 1)
        parts = self._encoding.encode_ordinary_batch(pieces, num_threads=threads)
        parts = [np.array(part, np.int32) for part in parts]
        return np.concatenate(parts or [np.empty(0, np.int32)])

    def _read_numbers(self, text):
        words = text.split()
        odd = [word for word in words if not re.fullmatch(r"[0-9]{1,9}", word)
               or int(word) >= self.vocab_size]
        if odd:
            raise DataError(f"{odd[0][:40]!r} is no token id: this model's tokenizer is not known "
                            f"here; write ids below {self.vocab_size}, such as 12 7 345")
        return np.array(words, np.int32)

    def _refuse(self, text, ids):
        unknown = sorted({text[i] for i in np.flatnonzero(ids < 0)})
        named = [f"{char!r} (U+{ord(char):04X})" for char in unknown[:5]]
        if len(unknown) > 5:
            named.append("...")
        raise DataError(f"the char tokenizer has never seen {', '.join(named)}: it knows "
                        f"{self.vocab_size} characters, those of its corpus; leave these out, or "
                        "use --tokenizer byte or bpe")

    def decode_bytes(self, ids):
        """The bytes of these ids, which may end within a character. Raises DataError for an unknown
        id."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"token {i} is not one of the {self.vocab_size} of this tokenizer: "
                                "was the model made for another one?")
        return b"".join(self.tokens[i] for i in ids)

    def decode(self, ids):
        """The text that the ids stand for, with U+FFFD where the bytes are no whole character."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_lengths(self):
        """(vocab_size,) int32: bytes of each token. loss in nats / ln 2 * tokens / bytes = bits per
        byte."""
        return np.array([len(token) for token in self.tokens], np.int32)

    # --- keeping it ---

    def _plain(self):
        if self.kind == "byte":
            return {"kind": "byte"}
        if self.kind == "char":
            return {"kind": "char", "chars": b"".join(self.tokens).decode()}
        if self.kind == "ids":
            return {"kind": "ids", "size": len(self.tokens)}
        # bytes as characters 0 to 255: legible where the token is ASCII, and exact
        tokens = [token.decode("latin-1") for token in self.tokens]
        apart = {"found": self.found, "unread": self.unread} if self.kind == "imported" else {}
        return {"kind": self.kind, "pattern": self.pattern, "tokens": tokens, **apart}

    def to_dict(self):
        """Everything as JSON-able values, for tokenizer.json beside the data and for every
        checkpoint."""
        return {**self._plain(), "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}

    @classmethod
    def from_dict(cls, plain):
        """The tokenizer that to_dict described. Raises DataError unless it is that one to the
        fingerprint."""
        try:
            if plain["kind"] == "byte":
                tokenizer = cls.byte()
            elif plain["kind"] == "char":
                tokenizer = cls("char", [char.encode() for char in plain["chars"]])
            elif plain["kind"] == "ids":
                tokenizer = cls.numbers(plain["size"])
            elif plain["kind"] in ("bpe", "gpt2", "imported"):
                tokens = [token.encode("latin-1") for token in plain["tokens"]]
                tokenizer = cls(plain["kind"], tokens, plain["pattern"], plain.get("found", ()),
                                plain.get("unread", ()))
            else:
                raise KeyError(f"kind {plain['kind']!r}")
            stated = plain["fingerprint"], plain["vocab_size"]
            if (tokenizer.fingerprint, tokenizer.vocab_size) != stated:
                raise ValueError("its content does not fit its fingerprint")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"not a valid tokenizer ({error})") from error
        return tokenizer

    def save(self, path):
        """Writes tokenizer.json atomically."""
        with replacing(path) as file:
            file.write(json.dumps(self.to_dict(), indent=0).encode())

    @classmethod
    def load(cls, path):
        """Reads tokenizer.json. Raises DataError with file and remedy when it is missing or
        damaged."""
        remedy = "prepare the corpus again: python data/prepare.py NAME --force"
        try:
            return cls.from_dict(json.loads(Path(path).read_text("utf-8")))
        except OSError as error:
            raise DataError(explain(error, path, done="read", remedy=remedy)) from error
        except (ValueError, RecursionError) as error:   # DataError and broken JSON are ValueErrors
            raise DataError(f"{path}: cannot be used as a tokenizer: {error}; {remedy}") from error


def split_pieces(text, size):
    """Yields a text in pieces of about `size` characters; the tokens of the pieces are those of the
    text.

    A cut lies between a visible character and the white space after it: every pattern here ends a
    word there. A stretch without such a place stays whole.
    """
    start = 0
    while len(text) - start > size:
        cut = next_cut(text, start + size)
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def next_cut(text, at):
    """The first place from `at` on where the text may be cut (see split_pieces), else its end."""
    found = re.compile(r"(?<=\S)[ \t\r\n]").search(text, at)
    return found.start() if found else len(text)


def fetch_gpt2(patience):
    """tiktoken's GPT-2 encoding. Raises DataError with the remedy after `patience` seconds, or at a
    failure."""
    # tiktoken's download has no time limit: a thread does it, and is left alone when the time is
    # over
    result = {}

    def fetch():
        try:
            result["encoding"] = tiktoken.get_encoding("gpt2")
        except Exception as error:
            result["error"] = error

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(patience)
    if "encoding" in result:
        return result["encoding"]
    reason = type(result["error"]).__name__ if "error" in result else f"no answer in {patience} s"
    # tiktoken's cache names a file by the SHA-1 of its address
    files = [(GPT2_FILES + name, hashlib.sha1((GPT2_FILES + name).encode()).hexdigest())
             for name in ("vocab.bpe", "encoder.json")]
    raise DataError(f"tiktoken could not get GPT-2's tokenizer ({reason}); download "
                    + " and ".join(f"{address} as {name}" for address, name in files)
                    + " into one folder and set the environment variable TIKTOKEN_CACHE_DIR to it, "
                      "or choose --tokenizer bpe, which needs no download")
