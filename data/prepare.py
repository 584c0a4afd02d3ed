"""Turns texts into the .bin files that training reads: a folder per corpus, made once (see folders.py)."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":      # a script's own folder comes first on the path: put the root there instead
    sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "data"]

import argparse
import glob
import time
from contextlib import suppress

from data.binfile import DataError, read_header
from data.building import FILES, build, train_tokenizer
from data.corpora.corpus import note, short_hash
from data.folders import KINDS, PREPARED, check_tokenizer, folder_of, inspect_folder, one_at_a_time
from data.corpora.sources import NAMES, corpus_name, is_known, resolve, takes_source
from data.tokenizers import Tokenizer


def prepare(names, tokenizer="byte", vocab_size=4096, source=None, out=None, max_tokens=0, quiet=False,
            force=False):
    """Prepares corpora and returns their folders, list[Path]; those that are prepared already are left alone.

    names: known names, text files or folders. tokenizer: one of KINDS or the path of a tokenizer.json; bpe
    and char are trained on all the corpora together. source: a local copy for a corpus that would be
    downloaded. out: the folder that the corpora's folders are made in. max_tokens: training tokens of each, 0
    for all. Raises DataError.
    """
    names = [names] if isinstance(names, (str, Path)) else names
    names, out = [str(name) for name in names], Path(out or PREPARED)
    tokenizer = str(tokenizer)
    check_tokenizer(tokenizer, vocab_size)
    folders = [folder_of(name, tokenizer, vocab_size, out, names) for name in names]
    check_request(names, folders, source, max_tokens)
    try:
        with one_at_a_time(out):
            prepare_locked(names, folders, tokenizer, vocab_size, source, out, max_tokens, quiet, force)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror}; choose another --out") from error
    return folders


def check_request(names, folders, source, max_tokens):
    if not names or len(set(folders)) < len(folders):
        raise DataError(f"{', '.join(names) or 'no names'}: give one or more, each of a name of its own")
    if max_tokens < 0:
        raise DataError(f"max_tokens {max_tokens}: give a number of tokens, or 0 for all there are")
    readers = [name for name in names if takes_source(name)]
    if source and (not readers or len(readers) > 1 and Path(source).is_file()):
        raise DataError(f"--from {source}: is for a corpus that would be downloaded (for several, a folder), "
                        f"not for {', '.join(names)}")


def prepare_locked(names, folders, tokenizer, vocab_size, source, out, max_tokens, quiet, force):
    say = (lambda text: None) if quiet else print
    earlier = [sound_header(folder) for folder in folders]
    corpora = [resolve(name, source or remembered(name, out), out / "raw", quiet) for name in names]
    text_corpora = [corpus for corpus in corpora if corpus.tokenizer is None]
    trains = tokenizer in ("bpe", "char")
    trained_on = short_hash(*sorted((c.name, c.source) for c in text_corpora)) if trains else None
    shared = None
    for corpus, folder, header in zip(corpora, folders, earlier):
        settings = {"label": folder.name, "source": corpus.source, "max_tokens": max_tokens,
                    "trained_on": None if corpus.tokenizer else trained_on}
        if header and header["settings"] == settings and not force:
            say(f"{corpus.name}: already prepared in {shown(folder)}")
            continue
        if corpus.tokenizer is None and shared is None:
            shared = make_tokenizer(tokenizer, vocab_size, text_corpora, max_tokens, quiet)
        start = time.perf_counter()
        headers = build(folder, corpus, corpus.tokenizer or shared, settings, max_tokens, quiet)
        say(summary(corpus.name, headers, time.perf_counter() - start, folder))


def sound_header(folder):
    """What is prepared in a folder, if whole and sound; damage is reported, and mended by preparing again."""
    try:
        return inspect_folder(folder, verify=True)
    except DataError as error:
        note(str(error).partition(";")[0] + "; preparing again")
        return None


def remembered(name, out):
    """The local copy that a corpus was made from before, with any tokenizer, if that still exists."""
    name = corpus_name(name)
    if Path(name).name != name:                         # the path of something that is not there
        return None
    for path in sorted(out.glob(f"{glob.escape(name)}-*/train.bin")):
        with suppress(DataError):
            header = read_header(path)
            if header["corpus"] == name and header["path"] and Path(header["path"]).exists():
                return header["path"]
    return None


def make_tokenizer(tokenizer, vocab_size, corpora, max_tokens, quiet):
    if tokenizer == "byte":
        return Tokenizer.byte()
    if tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if tokenizer in KINDS:
        return train_tokenizer(tokenizer, vocab_size, corpora, max_tokens, quiet)
    return Tokenizer.load(tokenizer)


def shown(folder):
    """A path as the user would write it: relative where it lies below the current folder."""
    folder = Path(folder).resolve()
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def summary(name, headers, seconds, folder):
    train, val = headers
    parts = []
    for title, meta in (("training", train), ("validation", val)):
        texts = f"{meta['texts']:,} {meta['unit']}, " if meta["unit"] else ""
        parts.append(f"{title} {texts}{meta['bytes'] / 1e6:.2f} MB, {meta['count']:,} tokens")
    lines = [f"{name}: {'; '.join(parts)}",
             f"  {train['tokenizer']} tokenizer, {train['vocab_size']} tokens, "
             f"{train['bytes'] / train['count']:.2f} bytes per token; {seconds:.1f} s; in {shown(folder)}"]
    if train["entropy_floor"] is not None:
        lines.append(f"  entropy of its source: {train['entropy_floor']:.4f} nats, the lowest loss")
    return "\n".join(lines)


def find_or_prepare(names, tokenizer="byte", vocab_size=4096, dir=None, max_tokens=0, quiet=False):
    """(folders, Tokenizer) for training on these corpora; what is missing is prepared first.

    max_tokens 0 takes a prepared corpus as it is; another number prepares it again unless it was made with
    that one. All checksums are compared. Raises DataError with the remedy: for damaged files, and for corpora
    of different tokenizers.
    """
    names = [str(name) for name in ([names] if isinstance(names, (str, Path)) else names)]
    tokenizer = str(tokenizer)
    check_tokenizer(tokenizer, vocab_size)
    folders = [folder_of(name, tokenizer, vocab_size, dir, names) for name in names]
    for folder in folders if not max_tokens else ():
        warn_of_limit(folder)
    missing = [name for name, folder in zip(names, folders) if not is_current(name, folder, max_tokens)]
    if missing:
        if not quiet:
            print(f"preparing {', '.join(missing)} first, which happens once")
        together = tokenizer in ("bpe", "char")         # these are trained on all the corpora of a run
        gone = [folder / file for folder in folders if folder.is_dir() for file in FILES
                if not (folder / file).exists()]
        try:
            prepare(names if together else missing, tokenizer, vocab_size, None, dir, max_tokens, quiet)
        except DataError as e:
            raise DataError(f"{gone[0]}: is missing, and to prepare it again: {e}" if gone else e) from None
    found = [inspect_folder(folder, verify=True) for folder in folders]
    if len({header["fingerprint"] for header in found}) > 1:
        raise DataError("these corpora have different tokenizers: "
                        + ", ".join(f"{name} {header['tokenizer']}" for name, header in zip(names, found)))
    return folders, Tokenizer.load(folders[0] / "tokenizer.json")


def warn_of_limit(folder):
    """Says so where a corpus was prepared in part, and a run that asks for all of it will use that part."""
    header = inspect_folder(folder)
    if header and header["settings"]["max_tokens"]:
        limit = header["settings"]["max_tokens"]
        note(f"{shown(folder)} was prepared with --max_tokens {limit} and is used so; "
             "for all of it prepare it again without")


def is_current(name, folder, max_tokens):
    """Whether a corpus is prepared as asked for and, if it is the user's own, since its last change."""
    header = inspect_folder(folder)
    if header is None or max_tokens not in (0, header["settings"]["max_tokens"]):
        return False
    return is_known(name) or not Path(name).exists() or resolve(name).source == header["settings"]["source"]


# --- the command line ---


def whole_number(text):
    """1000000, 1_000_000 or 1e6."""
    number = float(text)
    if number != int(number) or number < 0:
        raise ValueError(text)
    return int(number)


def list_names(title, chosen):
    lines = [f"  {name:12} {about}" for name, about in NAMES.items() if chosen(name)]
    return "\n".join([title, *lines, "", ""])


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python data/prepare.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prepares corpora: DIR/<corpus>-<tokenizer>/ gets train.bin, val.bin and tokenizer.json.",
        epilog=list_names("made here, no network:", lambda name: not takes_source(name))
        + list_names("downloaded (no address could be tried so far), or read from --from PATH:", takes_source)
        + "A file is split 90 / 10 (the last tenth is validation), a folder by files. A known name goes\n"
          "before a file or folder called the same: write ./docs for yours.")
    parser.add_argument("names", nargs="+", metavar="NAME|FILE|FOLDER",
                        help="a known corpus, a text file or a folder of them")
    parser.add_argument("--tokenizer", default="byte", metavar="KIND",
                        help=f"{', '.join(KINDS)}, or the path of a tokenizer.json; bpe and char are trained "
                             "on the corpora, one for all that are given together (default: %(default)s)")
    parser.add_argument("--vocab_size", type=whole_number, default=4096, metavar="N",
                        help="tokens in a bpe vocabulary (default: %(default)s)")
    parser.add_argument("--from", dest="source", metavar="PATH",
                        help="a file or folder to read instead of downloading (default: download)")
    parser.add_argument("--out", metavar="DIR", help="the folder that the corpora's folders are made in, a "
                        "config's data.dir (default: data/prepared in this repository)")
    parser.add_argument("--max_tokens", type=whole_number, default=0, metavar="N",
                        help="training tokens of each corpus; validation has a tenth (default: 0, all)")
    parser.add_argument("--force", action="store_true", help="prepare again in any case")
    parser.add_argument("--quiet", action="store_true", help="say nothing unless something is wrong")
    return parser


def main(arguments=None):
    """The program; returns its exit status: 0, 2 for an error of the user's, 130 when interrupted."""
    options = vars(build_parser().parse_args(arguments))
    try:
        prepare(**options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing half-finished is left; the same command starts again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
