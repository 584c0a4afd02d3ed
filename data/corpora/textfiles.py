"""Any text: a file, of which the last tenth is validation, or a folder, split by files.

Text is UTF-8 and kept as it is, line ends included. Each byte that is not UTF-8 becomes U+FFFD;
such bytes are counted and reported. A file with more than one of them in a hundred, or with a zero
byte near its beginning, is no text: alone it is refused, in a folder it is skipped. Only regular
files are read: a pipe would be waited for without end.
"""
import codecs
import functools
import re
import zipfile
import zlib
from pathlib import Path

from data.binfile import DataError, explain, explained
from data.console import note
from data.corpora.corpus import Corpus, short_hash, split_of, titled, walk

BLOCK = 1 << 20                                 # bytes read at a time
MOST_FILES, MOST_BYTES = 200_000, 100e9         # of a folder; more is a mistake, such as `..`
UNDECODED = re.compile("[\udc80-\udcff]")       # from surrogateescape: a byte that is no UTF-8


def open_raw(path):
    """A file opened for its bytes; a zip with a single file in it, for the bytes of that one."""
    file = open(path, "rb")
    if file.read(4) != b"PK\3\4":
        file.seek(0)
        return file
    file.close()
    archive = zipfile.ZipFile(path)
    if len(archive.namelist()) != 1:
        count = len(archive.namelist())
        raise DataError(f"{path}: is an archive of {count} files; unpack it first")
    return archive.open(archive.namelist()[0])


def decode_blocks(path):
    """(text, undecoded bytes) per megabyte of a file. Raises DataError: it cannot be read, or is no
    text."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    size = bad = 0
    raw = b"-"
    try:
        with open_raw(path) as file:
            while raw:
                raw = file.read(BLOCK)
                if size == 0 and b"\0" in raw[:8192]:
                    raise DataError(f"{path}: holds zero bytes, so it is no UTF-8 text; convert it "
                                    "first")
                # the decoder keeps the first bytes of a character that ends in the next block
                text, here = UNDECODED.subn("\ufffd", decoder.decode(raw, final=not raw))
                size, bad = size + len(raw), bad + here
                if 100 * bad > max(size, 100):
                    raise DataError(f"{path}: {bad} of the first {size} bytes are not UTF-8; "
                                    "convert it, for example: "
                                    f"iconv -f latin1 -t utf-8 {path} > utf8.txt")
                yield text, here
    except OSError as error:
        raise DataError(explain(error, path, done="read", remedy="check the file")) from error
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        # a RuntimeError: it has a password
        raise DataError(f"{path}: is an archive that cannot be unpacked: {error}") from error


def read_blocks(path):
    """The text of a file in blocks of about a megabyte; the whole of it is never in memory."""
    return (text for text, _ in decode_blocks(path) if text)


def count_chars(path):
    """Characters in a text file; counted, and its undecoded bytes reported, once for each state of
    it."""
    return _count_chars(path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.cache
def _count_chars(path, size, modified):
    chars, bad = map(sum, zip(*((len(text), here) for text, here in decode_blocks(path))))
    if bad:
        note(f"{path}: {bad} of {size} bytes are not UTF-8; each became U+FFFD")
    return chars


def slice_blocks(path, start, stop):
    """Characters start .. stop of a file, in blocks."""
    at = 0
    for text in read_blocks(path):
        if piece := text[max(0, start - at):max(0, stop - at)]:
            yield piece
        at += len(text)
        if at >= stop:
            return


def file_documents(path, split):
    """nanoGPT's split of a single text: the first int(0.9 n) of n characters train, the others
    validate."""
    chars = count_chars(path)
    border = int(0.9 * chars)
    return slice_blocks(path, 0, border) if split == "train" else slice_blocks(path, border, chars)


def list_files(folder):
    """(relative name, path) of all files below a folder, sorted; hidden ones and linked folders
    left out.

    Raises DataError for a subfolder that cannot be read, and above MOST_FILES files or MOST_BYTES
    bytes.
    """
    found, size = [], 0
    with explained(folder, done="read"):
        for where, subfolders, files in walk(folder):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            paths = [Path(where, name) for name in files if not name.startswith(".")]
            found += paths
            size += sum(path.lstat().st_size for path in paths)
            # stop at once: a parent of everything takes hours to walk
            if len(found) > MOST_FILES or size > MOST_BYTES:
                raise DataError(f"{folder}: holds more than {MOST_FILES:,} files or "
                                f"{MOST_BYTES / 1e9:.0f} GB; give the folder of your texts alone, "
                                "or one large file by its own path")
    return sorted((path.relative_to(folder).as_posix(), path) for path in found)


def is_text(path):
    """Whether this is a regular file that holds text. Raises DataError if it cannot be read."""
    try:
        return path.is_file() and count_chars(path) > 0
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return False


@functools.cache
def split_folder(folder, state):
    """{"train": [(name, path)], "val": [...]}, by a hash of the relative name. `state` (see
    identity) is a key of the cache. Raises DataError for fewer than two text files."""
    # the text files, and what is none
    files = list_files(folder)
    texts = [(name, path) for name, path in files if is_text(path)]
    skipped = sorted({name for name, _ in files} - {name for name, _ in texts})
    if skipped:
        note(f"{folder}: skipped {len(skipped)} of {len(files)} files that are empty or no text in "
             f"UTF-8: {', '.join(skipped[:3])}{', ...' if skipped[3:] else ''}")
    if len(texts) < 2:
        raise DataError(f"{folder}: holds {len(texts)} text file(s); a folder is split into "
                        "training and validation by files, so it needs two (a single file is given "
                        "by its own path)")
    # a side that the hash leaves empty gets the first file of the other side
    sides = {"train": [], "val": []}
    for name, path in texts:
        sides[split_of(name)].append((name, path))
    for empty, other in (("train", "val"), ("val", "train")):
        if not sides[empty]:
            sides[empty] = [sides[other].pop(0)]
    return sides


def folder_documents(folder, split):
    for name, path in split_folder(folder, identity(folder))[split]:
        yield titled(name, "".join(read_blocks(path)))


def identity(path):
    """A short text that changes when a file changes its name, size or time: the file, or any in the
    folder."""
    files = [path] if path.is_file() else [file for _, file in list_files(path)]
    facts = [(str(file), file.lstat().st_size, file.lstat().st_mtime_ns) for file in files]
    return f"{path.resolve()}, state {short_hash(*facts)}"


def corpus(name, path):
    """The Corpus of a text file or of a folder of them. The texts are read when they are asked for.
    Raises DataError for a pipe, a socket or a device."""
    path = Path(path).resolve()
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{path}: is a pipe, a socket or a device; save the text as a file and "
                        "give that")
    source = identity(path)
    if path.is_file():
        texts = lambda split: file_documents(path, split)
        return Corpus(name, texts, source, path.stat().st_size, path=path)
    texts = lambda split: folder_documents(path, split)
    size = sum(file.lstat().st_size for _, file in list_files(path))
    return Corpus(name, texts, source, size, "files", path=path)
