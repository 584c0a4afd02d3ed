"""Where a prepared corpus is, and whether it is there, whole and sound.

Each corpus becomes a folder <corpus>-<tokenizer> with train.bin, val.bin and tokenizer.json. All
three name the settings that they were made with, and a folder counts as prepared only where they
agree: after a preparation that died, the next one starts again, and a reader meanwhile has the old
files.

    my-byte                     the first my.txt (or folder my) that was prepared here
    my-3fa2b1-byte              a my.txt of another path, by a hash of that path
    my-byte-old-1a2b3c4d        what my-byte held before its text changed, for runs that need it
"""
import difflib
import glob
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from data.binfile import DataError, explain, read_header, verify_payload
from data.building import FILES
from data.console import note
from data.corpora.corpus import short_hash
from data.corpora.sources import is_known, stem_of, symbols_tokenizer
from data.tokenizers import Tokenizer

try:
    import fcntl
except ImportError:             # Windows: two preparations at once do the work twice, no harm
    fcntl = None

PREPARED = Path(__file__).resolve().parent / "prepared"
KINDS = ("byte", "bpe", "gpt2", "char")


def check_tokenizer(tokenizer, vocab_size):
    """Raises DataError unless `tokenizer` is a kind or a tokenizer.json, and the size of a bpe
    possible."""
    if tokenizer not in KINDS and not Path(tokenizer).is_file():
        near = difflib.get_close_matches(tokenizer, KINDS, 1)
        raise DataError(f"tokenizer {tokenizer!r}: is neither {', '.join(KINDS)} nor a "
                        "tokenizer.json" + (f"; did you mean {near[0]}?" if near else ""))
    if tokenizer == "bpe" and not 257 <= vocab_size <= 1 << 20:
        raise DataError(f"vocab_size {vocab_size}: a bpe vocabulary has 257 to {1 << 20} tokens")


def path_text(path):
    """A path that a user gave, as text, with ~ expanded. Raises DataError for what cannot be a path
    here (a NUL byte, a name too long) or cannot be reached; a path where nothing is may be
    given."""
    path = os.path.expanduser(str(path))
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise DataError(explain(error, path, done="read", remedy="give another path")) from error
    return path


def made_from(called, dir):
    """The paths of the texts that the prepared folders of a corpus were made from: a sorted list of
    str."""
    found = set()
    for path in dir.glob(f"{glob.escape(called)}-*/train.bin"):
        with suppress(DataError, OSError):
            header = read_header(path)
            if header["corpus"] == called and header["path"]:
                found.add(header["path"])
    return sorted(found)


def names_in(dir, names):
    """What corpora are called in the folder `dir`: known names are themselves, paths see the module
    text. Raises DataError for a corpus that is given twice."""
    called = {}
    for name in names:
        path = Path(name).resolve()
        hashed = f"{stem_of(path)}-{short_hash(str(path), digits=6)}"
        mine = called_in(dir, name, path, hashed)
        if mine in called:
            other = called[mine]
            both = Path(name).exists() and Path(other).exists() and not is_known(name)
            if not both or Path(other).resolve() == path:
                raise DataError(f"{other} and {name} are one corpus: give it once, and its share "
                                "by data.weights")
            mine = hashed                       # two new texts of one stem
        called[mine] = name
    return list(called)


def called_in(dir, name, path, hashed):
    """What one corpus is called in `dir`: `hashed` where a text at another path has the short
    name."""
    if is_known(name):
        return name
    taken = made_from(stem_of(path), dir)
    # a bare name of no file: the name of a corpus that was prepared, or that --from gives a text
    if Path(name).name == name and str(path) not in taken and not path.exists():
        return name
    return stem_of(path) if not taken or str(path) in taken else hashed


def label_of(called, tokenizer="byte", vocab_size=4096, group=()):
    """The part of a folder's name after the corpus: byte, gpt2, char, bpe4096.

    A tokenizer that is trained on several corpora (`group`) adds a short hash of their names; one
    that is given as a file adds one of itself. Sources of symbols have their own tokenizer.
    """
    if own := symbols_tokenizer(called):
        return own.name
    if tokenizer not in KINDS:
        given = Tokenizer.load(tokenizer)
        known = given.kind in ("byte", "gpt2")
        return given.name if known else f"{given.name}-{given.fingerprint[:6]}"
    label = f"bpe{vocab_size}" if tokenizer == "bpe" else tokenizer
    members = sorted(member for member in group if not symbols_tokenizer(member))
    if tokenizer in ("byte", "gpt2") or len(members) < 2:
        return label
    return f"{label}-{short_hash(*members, digits=6)}"


def folders_of(called, tokenizer="byte", vocab_size=4096, dir=None):
    """Where corpora that are used together are, or would be. called: their names (see names_in)."""
    dir = Path(dir or PREPARED)
    return [dir / f"{name}-{label_of(name, tokenizer, vocab_size, called)}" for name in called]


def folder_with(dir, checksum, name):
    """The prepared folder whose training tokens have this checksum, or None. Of several, the one
    that was made from the path `name`, and one that still has its first name."""
    found = []
    for path in dir.glob("[!.]*/train.bin"):
        with suppress(DataError, OSError):
            header = inspect_folder(path.parent)
            if header and header["sha256"] == checksum:
                foreign = header["path"] != str(Path(name).resolve())
                kept = header["settings"]["label"] != path.parent.name
                found.append((foreign, kept, path.parent))
    return min(found)[-1] if found else None


def inspect_folder(folder, verify=False):
    """The header of a prepared folder's train.bin; None where nothing, or not all of it, was
    prepared.

    verify: also compares the checksums of all tokens. Raises DataError for a damaged file.
    """
    paths = [folder / name for name in FILES]
    if not all(path.exists() for path in paths):
        return None
    train, val = (read_header(path) for path in paths[:2])
    prints = {train["fingerprint"], val["fingerprint"], Tokenizer.load(paths[2]).fingerprint}
    if train["settings"] != val["settings"] or len(prints) > 1:     # one died between two files
        return None
    if verify:
        verify_payload(paths[0], train)
        verify_payload(paths[1], val)
    return train


@contextmanager
def one_at_a_time(folder):
    """Lets one process at a time prepare data in `folder`. The lock dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "wb") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note(f"another process is preparing data in {folder}; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
