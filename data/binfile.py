"""The .bin file: one fixed header, then the tokens of one split, little-endian, 1, 2 or 4 bytes each.

    byte 0      8 bytes   MAGIC
    byte 8      4 bytes   VERSION (uint32)
    byte 12     4 bytes   length of the JSON below (uint32)
    byte 16    32 bytes   sha256 of that JSON
    byte 48               JSON: tokenizer, fingerprint, vocab_size, dtype, count, corpus, split, bytes, sha256
                          of the tokens, the settings of the preparation
    byte 4096             the tokens: `count` of `dtype`, back to back

A header of a fixed size is what makes the file both streamable (its numbers are known only at the end, and
are written over the blank page at the beginning) and mappable (token i lies at 4096 + i * itemsize).
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

MAGIC = b"MOETOKEN"
VERSION = 1
HEADER = 4096                   # a memory page, so that the tokens start aligned for every dtype
FIXED = struct.Struct("<8sII32s")
DTYPES = {"uint8": np.dtype("<u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class DataError(ValueError):
    """What is wrong with data that a person can put right: one line that says what, where, what to do."""


def dtype_for(vocab_size):
    """The name of the smallest integer type that holds the ids 0 .. vocab_size - 1."""
    return "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"


@contextmanager
def replacing(path, expected=0):
    """Yields a binary file that takes the place of `path` only when the block ends well.

    The new content goes to a temporary file in the same folder, is flushed to the disk and then renamed,
    which is atomic: whoever opens `path`, at whatever moment the process dies, finds the whole old file or
    the whole new one. A full disk raises DataError with the space needed (`expected` bytes, if larger than
    what was written so far).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        with suppress(OSError):                         # on a disk that only reads
            temporary.unlink()
        raise DataError(explain(error, path, max(expected, written))) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def explain(error, path, needed):
    """One line for a person about a failed write."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: cannot be written: {error.strerror or error}; choose another folder"
    free = shutil.disk_usage(path.parent).free / 1e6
    return (f"{path}: the disk is full: this file needs at least {needed / 1e6:.1f} MB, {free:.1f} are free; "
            "make room or choose another folder, then run the command again (what was there is untouched)")


def sync_folder(folder):
    """A new name survives a power cut only once its folder is on the disk. Windows cannot open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bin(path, chunks, meta, expected=0):
    """Streams arrays of token ids to `path`, atomically; returns the complete header.

    chunks: an iterable of 1-D integer arrays, consumed once; nothing but one chunk is in memory. meta: a dict
    with at least `vocab_size`; it is read after the last chunk, so a generator may fill it in as it goes.
    Raises DataError for an id outside the vocabulary and for a full disk; the old file then stays as it was.
    """
    kind = dtype_for(meta["vocab_size"])
    count, digest = 0, hashlib.sha256()
    with replacing(path, expected) as file:
        file.write(bytes(HEADER))
        for ids in chunks:
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < meta["vocab_size"]:
                raise DataError(f"{path}: a token id lies outside the vocabulary of {meta['vocab_size']}")
            payload = ids.astype(DTYPES[kind]).tobytes()
            file.write(payload)
            digest.update(payload)
            count += len(ids)
        meta = {**meta, "dtype": kind, "count": count, "sha256": digest.hexdigest()}
        file.seek(0)
        file.write(pack_header(meta))
    return meta


def pack_header(meta):
    text = json.dumps(meta).encode()
    if FIXED.size + len(text) > HEADER:
        raise DataError(f"the header of {meta.get('corpus')} takes {len(text)} bytes, more than {HEADER}")
    fixed = FIXED.pack(MAGIC, VERSION, len(text), hashlib.sha256(text).digest())
    return (fixed + text).ljust(HEADER, b"\0")


def read_header(path):
    """The header as a dict. Raises DataError, naming the file and the remedy, for anything but an intact .bin
    file.

    Cheap enough for every start: one page is read, its checksum compared, and the file's size with the count.
    """
    remedy = "prepare the corpus again: python data/prepare.py NAME --force"
    try:
        with open(path, "rb") as file:
            page = file.read(HEADER)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if len(page) < HEADER or page[:8] != MAGIC:
        raise DataError(f"{path}: is not a .bin file of tokens, or its beginning is lost; {remedy}")
    _, version, length, digest = FIXED.unpack_from(page)
    if version != VERSION:
        raise DataError(f"{path}: has format version {version}, this code reads {VERSION}; {remedy}")
    text = page[FIXED.size:FIXED.size + length]
    if hashlib.sha256(text).digest() != digest or any(page[FIXED.size + length:]):
        raise DataError(f"{path}: the header is damaged; {remedy}")
    meta = json.loads(text)
    wanted = HEADER + meta["count"] * DTYPES[meta["dtype"]].itemsize
    if size != wanted:
        raise DataError(f"{path}: has {size} bytes, not {wanted}: cut short or overwritten; {remedy}")
    return meta


def verify_payload(path, meta):
    """Reads the tokens once, in blocks, and compares their checksum with the header's. Raises DataError."""
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

    The map is read from the disk page by page as it is indexed. `verify` also compares the checksum of all
    tokens.
    """
    meta = read_header(path)
    if verify:
        verify_payload(path, meta)
    return np.memmap(path, DTYPES[meta["dtype"]], "r", HEADER, (meta["count"],)), meta
