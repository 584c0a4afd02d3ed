"""Files that strangers wrote: of one folder alone, plain ones, JSON with each key once. Whatever is
odd about them is a DataError of one line."""
import json
import stat
from pathlib import Path

from data.binfile import DataError, explain

MEGABYTE = 1 << 20


def inside(folder, name):
    """The path of a plain file of a folder. Raises DataError for a name that leads out of it."""
    plain = isinstance(name, str) and name.isprintable() and "\\" not in name
    if not plain or Path(name).name != name:
        raise DataError(f"{folder}: {str(name)[:80]!r} is not the name of a file in this folder")
    path = Path(folder) / name
    try:
        if path.resolve(strict=True).parent != Path(folder).resolve():
            raise DataError(f"{path}: is a link to another folder, which is not read; copy the "
                            "file here")
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: is no file; download the folder again")
    except (OSError, RuntimeError) as e:                        # RuntimeError: links in a circle
        e = e if isinstance(e, OSError) else OSError(str(e))
        remedy = "download the folder again"
        raise DataError(explain(e, path, done="read", remedy=remedy)) from None
    return path


def parsed(raw, where):
    """The JSON object in some bytes. Raises DataError unless it is one, each key once, without
    NaN."""
    def once(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} occurs twice")
        return dict(pairs)

    def refuse(word):
        raise ValueError(f"{word} is no number in JSON")

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as e:           # bytes that are no UTF-8 are a ValueError
        why = str(e)[:200]
        raise DataError(f"{where}: not valid JSON ({why}); download it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: holds no JSON object; download it again")
    return found


def read_json(folder, name, most=16 * MEGABYTE):
    """A JSON object of the folder, of at most `most` bytes."""
    path = inside(folder, name)
    if path.stat().st_size > most:
        raise DataError(f"{path}: has more than {most // MEGABYTE} MB, too much for this file")
    return parsed(path.read_bytes(), path)
