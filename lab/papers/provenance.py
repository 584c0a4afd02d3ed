"""Where a row of results comes from, beside its commit: the Python that ran it, and the texts that
it read.

The corpora `python` and `docs` are read from the running interpreter, so that another Python trains
on other text. A row names its texts by the checksum of their training tokens; one of another text
counts as missing, and so never meets rows of today's in a verdict. A row without checksums is taken
as it is.
"""
import platform
from functools import lru_cache
from pathlib import Path

from data.binfile import DataError
from data.folders import PREPARED, folders_of, inspect_folder, names_in, path_text


def origin(arm):
    """Columns of runs.csv: the version of Python, and the texts of an arm."""
    return dict(python=platform.python_version(), corpus=texts(arm))


def is_of_another_text(arm, recorded):
    """Whether `recorded`, a row's column corpus, names other texts than are prepared today."""
    return bool(recorded and (today := texts(arm)) and recorded != today)


def texts(arm):
    """The texts that an arm and all that it comes from were trained and evaluated on, such as
    "docs:0f3a5b7c9d1e python:1a2b3c4d5e6f"; empty where one of them is not prepared here."""
    found = {}
    family = [arm]
    while family:
        one = family.pop()
        family += one.parents
        # A program that makes an arm reads its parents' texts, so that it has no [data] of its own.
        for names in (one.data.names, one.evaluation["corpora"]) if one.data else ():
            found |= checksums(one.data, tuple(names))
    return "" if None in found.values() else " ".join(f"{k}:{v}" for k, v in sorted(found.items()))


def checksums(data, names):
    """{corpus: 12 digits of its checksum, or None if it is not prepared as a DataConfig asks}."""
    try:
        folder = Path(path_text(data.dir or PREPARED))
        called = names_in(folder, names)
        folders = folders_of(called, data.tokenizer, data.vocab_size, folder)
    except (DataError, OSError):
        return dict.fromkeys(names)
    return {name: checksum(one, data.max_tokens, changed(one / "train.bin"))
            for name, one in zip(called, folders)}


def changed(path):
    """When a file was written, in ns; None without one."""
    return path.stat().st_mtime_ns if path.exists() else None


@lru_cache(maxsize=None)
def checksum(folder, max_tokens, written):
    """12 digits of the checksum of a prepared folder's training tokens; None if it is not whole, or
    was made with another limit. written: makes a new entry of the cache where the file is new."""
    try:
        header = inspect_folder(folder)
    except (DataError, OSError):
        return None
    if not header or max_tokens not in (0, header["settings"]["max_tokens"]):
        return None
    return header["sha256"][:12]
