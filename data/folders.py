"""Where a prepared corpus is, and whether it is there, whole and sound.

Each corpus becomes a folder <corpus>-<tokenizer> with train.bin, val.bin and tokenizer.json. All three name
the settings that they were made with, and a folder counts as prepared only when they agree: whenever a
preparation dies, the next one simply starts again, and whoever reads meanwhile has the old files.
"""
import difflib
from contextlib import contextmanager
from pathlib import Path

from data.binfile import DataError, read_header, verify_payload
from data.building import FILES
from data.corpora.corpus import note, short_hash
from data.corpora.sources import corpus_name, symbols_tokenizer
from data.tokenizers import Tokenizer

try:
    import fcntl
except ImportError:             # Windows: two preparations at once do the work twice; each file stays whole
    fcntl = None

PREPARED = Path(__file__).resolve().parent / "prepared"
KINDS = ("byte", "bpe", "gpt2", "char")


def check_tokenizer(tokenizer, vocab_size):
    """Raises DataError unless `tokenizer` is a kind or a tokenizer.json, and the size of a bpe possible."""
    if tokenizer not in KINDS and not Path(tokenizer).is_file():
        near = difflib.get_close_matches(tokenizer, KINDS, 1)
        raise DataError(f"tokenizer {tokenizer!r}: is neither {', '.join(KINDS)} nor a tokenizer.json"
                        + (f"; did you mean {near[0]}?" if near else ""))
    if tokenizer == "bpe" and not 257 <= vocab_size <= 1 << 20:
        raise DataError(f"vocab_size {vocab_size}: a bpe vocabulary has 257 to {1 << 20} tokens")


def label_of(name, tokenizer="byte", vocab_size=4096, group=()):
    """The part of a folder's name after the corpus: byte, gpt2, char, bpe4096.

    A tokenizer trained on several corpora (`group`), or given as a file, adds a short hash of those names, or
    of itself. Sources of symbols have one tokenizer, whatever is asked for.
    """
    if own := symbols_tokenizer(name):
        return own.name
    if tokenizer not in KINDS:
        given = Tokenizer.load(tokenizer)
        return given.name if given.kind in ("byte", "gpt2") else f"{given.name}-{given.fingerprint[:6]}"
    label = f"bpe{vocab_size}" if tokenizer == "bpe" else tokenizer
    members = sorted({corpus_name(member) for member in group if not symbols_tokenizer(member)})
    if tokenizer in ("byte", "gpt2") or len(members) < 2:
        return label
    return f"{label}-{short_hash(*members, digits=6)}"


def folder_of(name, tokenizer="byte", vocab_size=4096, dir=None, group=()):
    """Where the corpus is, or would be. group: all the corpora that it is used with."""
    name, tokenizer, group = str(name), str(tokenizer), [str(member) for member in group]
    return Path(dir or PREPARED) / f"{corpus_name(name)}-{label_of(name, tokenizer, vocab_size, group)}"


def inspect_folder(folder, verify=False):
    """The header of a prepared folder's train.bin; None where nothing, or not all of it, was prepared.

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
    with open(folder / ".lock", "w") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note(f"another process is preparing data in {folder}; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
