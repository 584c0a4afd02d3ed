"""The .bin file: one fixed header, then the tokens of one split, little-endian, 1, 2 or 4 bytes
each.

    byte 0      8 bytes   MAGIC
    byte 8      4 bytes   VERSION (uint32)
    byte 12     4 bytes   length of the JSON below (uint32)
    byte 16    32 bytes   sha256 of that JSON
    byte 48               JSON: tokenizer, fingerprint, vocab_size, dtype, count, corpus, split,
                          bytes, sha256 of the tokens, the settings of the preparation
    byte 4096             the tokens: `count` of `dtype`, back to back

The header has a fixed size for two reasons. The file can be streamed: the numbers of the header are
known only after the last token, and are then written over the blank page at the beginning. The file
can be mapped: token i lies at byte 4096 + i * itemsize.
"""
import errno
import hashlib
import json
import os
import shutil
import struct
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from data.console import plain

MAGIC = b"MOETOKEN"
VERSION = 1
HEADER = 4096                   # a memory page, so that the tokens start aligned for every dtype
FIXED = struct.Struct("<8sII32s")
DTYPES = {"uint8": np.dtype("<u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class DataError(ValueError):
    """What is wrong with data that a person can put right: one line that says what, where, what to
    do."""

    def __init__(self, text):
        super().__init__(plain(text))


def dtype_for(vocab_size):
    """The name of the smallest integer type that holds the ids 0 .. vocab_size - 1."""
    if vocab_size <= 1 << 8:
        return "uint8"
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@contextmanager
def replacing(path, expected=0):
    """Yields a binary file that takes the place of `path` only when the block ends well.

    Whenever the process dies, `path` holds the whole old file or the whole new one. expected: bytes
    of the new file, if that is known. Raises DataError; of a full disk with the space that is
    needed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # write beside it, flush to the disk, rename: only the renaming can be seen, and it is
        # atomic
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        written = 0
        with suppress(OSError):                         # none was made, or the disk only reads
            written = temporary.stat().st_size
            temporary.unlink()
        raise DataError(explain(error, path, max(expected, written))) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def explain(error, path, needed=0, done="written", remedy="choose another folder"):
    """One line for a person about an OSError: which file could not be `done`, why, and the remedy.

    needed: the size in bytes of a file that is written. done: "written" or "read". A ValueError of
    a path (a NUL byte) does as well.
    """
    path = str(path)
    shown = path if len(path) <= 200 else path[:200] + "..."
    code = getattr(error, "errno", None)                # a ValueError has none
    if code in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(Path(path).parent).free / 1e6
        return (f"{shown}: the disk is full: this file needs at least {needed / 1e6:.1f} MB, "
                f"{free:.1f} are free; make room or choose another folder, then run the command "
                "again (what was there is untouched)")
    if code in (errno.EACCES, errno.EPERM) and done == "read":
        remedy = "change its permissions (chmod u+r, of a folder u+rx), or give a readable copy"
    elif code == errno.ENAMETOOLONG or isinstance(error, ValueError):
        remedy = "give another name"
    elif code == errno.ELOOP:
        remedy = "this symbolic link leads to itself; give the file that is meant"
    return f"{shown}: cannot be {done}: {getattr(error, 'strerror', None) or error}; {remedy}"


@contextmanager
def explained(path, **words):
    """Turns an OSError of the block into a DataError with the sentence of `explain`."""
    try:
        yield
    except OSError as error:
        raise DataError(explain(error, error.filename or path, **words)) from error


def sync_folder(folder):
    """A new name survives a power cut only once its folder is on the disk. Windows cannot open
    folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bin(path, chunks, meta, expected=0):
    """Streams arrays of token ids to `path`, atomically; returns the complete header.

    chunks: an iterable of 1-D integer arrays, consumed once; nothing but one chunk is in memory.
    meta: a dict with at least `vocab_size`; it is read after the last chunk, so a generator may
    fill it in as it goes. Raises DataError for an id outside the vocabulary and for a full disk;
    the old file then stays as it was.
    """
    kind = dtype_for(meta["vocab_size"])
    count = 0
    digest = hashlib.sha256()
    with replacing(path, expected) as file:
        file.write(bytes(HEADER))           # a blank page, which the header replaces at the end
        for ids in chunks:
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < meta["vocab_size"]:
                raise DataError(f"{path}: a token id lies outside the vocabulary of "
                                f"{meta['vocab_size']}")
            payload = ids.astype(DTYPES[kind]).tobytes()
            file.write(payload)
            digest.update(payload)
            count += len(ids)
        meta = {**meta, "dtype": kind, "count": count, "sha256": digest.hexdigest()}
        file.seek(0)
        file.write(pack_header(meta))
    return meta


def pack_header(meta):
    """The first page of the file: the fixed part, the JSON, zeros up to HEADER bytes."""
    text = json.dumps(meta).encode()
    if FIXED.size + len(text) > HEADER:
        raise DataError(f"the header of {meta.get('corpus')} takes {len(text)} bytes, more than "
                        f"{HEADER - FIXED.size}; move the text to a shorter path")
    fixed = FIXED.pack(MAGIC, VERSION, len(text), hashlib.sha256(text).digest())
    return (fixed + text).ljust(HEADER, b"\0")


def read_header(path):
    """The header as a dict. Raises DataError, which names the file and the remedy, for anything but
    an intact .bin file. One page is read; the tokens themselves are not compared (see
    verify_payload)."""
    remedy = "prepare the corpus again: python data/prepare.py NAME --force"
    try:
        with open(path, "rb") as file:
            page = file.read(HEADER)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise DataError(explain(error, path, done="read", remedy=remedy)) from error
    # the fixed part: magic, version, length and checksum of the JSON
    if len(page) < HEADER or page[:8] != MAGIC:
        raise DataError(f"{path}: is not a .bin file of tokens, or its beginning is lost; {remedy}")
    _, version, length, digest = FIXED.unpack_from(page)
    if version != VERSION:
        raise DataError(f"{path}: has format version {version}, this code reads {VERSION}; "
                        f"{remedy}")
    # the JSON, and nothing but zeros after it
    text = page[FIXED.size:FIXED.size + length]
    if hashlib.sha256(text).digest() != digest or any(page[FIXED.size + length:]):
        raise DataError(f"{path}: the header is damaged; {remedy}")
    # as many bytes of tokens as the header counts
    meta = json.loads(text)
    wanted = HEADER + meta["count"] * DTYPES[meta["dtype"]].itemsize
    if size != wanted:
        raise DataError(f"{path}: has {size} bytes, not {wanted}: cut short or overwritten; "
                        f"{remedy}")
    return meta


def verify_payload(path, meta):
    """Reads the tokens once, in blocks, and compares their checksum with the header's. Raises
    DataError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(HEADER)
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != meta["sha256"]:
        raise DataError(f"{path}: the tokens are damaged (checksum differs from the header's); "
                        "prepare the corpus again: python data/prepare.py NAME --force")


def open_bin(path, verify=False):
    """(tokens, meta): the tokens as a read-only memory map of shape (count,), the header as a dict.

    The map is read from the disk page by page when it is indexed. verify: the checksum of all
    tokens is compared, too.
    """
    meta = read_header(path)
    if verify:
        verify_payload(path, meta)
    return np.memmap(path, DTYPES[meta["dtype"]], "r", HEADER, (meta["count"],)), meta
