"""Turns texts into the .bin files that training reads: a folder per corpus, made once (see
folders.py).

    python data/prepare.py my.txt, or python -m data.prepare my.txt
"""
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: the root takes the place of data/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time

from data.binfile import DataError, explained
from data.building import FILES, build, train_tokenizer
from data.console import note, plain, working
from data.corpora.corpus import short_hash
from data.corpora.sources import NAMES, is_known, resolve, takes_source
from data.folders import (KINDS, PREPARED, check_tokenizer, folder_with, folders_of, inspect_folder,
                          made_from, names_in, one_at_a_time, path_text)
from data.tokenizers import Tokenizer

MOST_TOKENS = 10**12
ELSEWHERE = "choose another folder: --out, data.dir in a config"


def prepare(names, tokenizer="byte", vocab_size=4096, source=None, out=None, max_tokens=0,
            quiet=False, force=False):
    """Prepares corpora and returns their folders, list[Path]; those that are prepared already are
    left alone.

    names: known names, text files or folders. tokenizer: one of KINDS or the path of a
    tokenizer.json; bpe and char are trained on all the corpora together. source: a local copy of a
    corpus that would be downloaded. out: the folder that the corpora's folders are made in.
    max_tokens: training tokens of each, 0 for all. Tokens that are replaced by others are kept
    beside them. Raises DataError.
    """
    names, tokenizer, out = checked(names, tokenizer, vocab_size, out, max_tokens)
    source = source and path_text(source)
    check_source(names, source)
    with explained(out, remedy=ELSEWHERE), one_at_a_time(out):
        return prepare_locked(names, tokenizer, vocab_size, source, out, max_tokens, quiet, force)


def checked(names, tokenizer, vocab_size, out, max_tokens):
    """(names, tokenizer, out) as list of str, str and Path, ~ expanded. Raises DataError for what
    no corpus, tokenizer or number of tokens can be."""
    names = as_list(names)
    if not names or not all(names):
        raise DataError("an empty name: give one or more corpora, by name or path")
    names = [name if is_known(name) else path_text(name) for name in names]
    tokenizer = str(tokenizer) if str(tokenizer) in KINDS else path_text(tokenizer)
    check_tokenizer(tokenizer, vocab_size)
    if not 0 <= max_tokens <= MOST_TOKENS:
        raise DataError(f"max_tokens {max_tokens}: give a number up to 10^12, or 0 for all")
    return names, tokenizer, Path(path_text(out or PREPARED))


def as_list(names):
    """One name or several, text or Path, as a list of str."""
    return [str(name) for name in ([names] if isinstance(names, (str, Path)) else names)]


def check_source(names, source):
    """Raises DataError unless --from can concern one of these corpora."""
    readers = [name for name in names if takes_source(name)]
    if source and (not readers or len(readers) > 1 and Path(source).is_file()):
        raise DataError(f"--from {source}: is for a corpus that would be downloaded (for several, "
                        f"a folder), not for {', '.join(names)}")


def prepare_locked(names, tokenizer, vocab_size, source, out, max_tokens, quiet, force):
    """The work of prepare, while no other process prepares in `out`."""
    say = (lambda text: None) if quiet else print
    # what is there, and what is asked for
    called = names_in(out, names)
    folders = folders_of(called, tokenizer, vocab_size, out)
    with working("comparing the checksums of what is prepared", quiet):
        earlier = [sound_header(folder) for folder in folders]
    with working(f"looking through {', '.join(names)}", quiet):
        corpora = [resolve(name, source or remembered(name, out), out / "raw", quiet, mine)
                   for name, mine in zip(names, called)]
    text_corpora = [corpus for corpus in corpora if corpus.tokenizer is None]
    trains = tokenizer in ("bpe", "char")
    trained_on = short_hash(*sorted((c.name, c.source) for c in text_corpora)) if trains else None
    # each corpus unless it is prepared so already; all texts share one tokenizer, made for the
    # first of them
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
        headers, kept = build(folder, corpus, corpus.tokenizer or shared, settings, max_tokens,
                              quiet, replaces=header is not None)
        if kept:
            tell_of_kept(corpus.name, header["settings"], settings, kept)
        say(summary(corpus.name, headers, time.perf_counter() - start, folder))
    return folders


def tell_of_kept(name, old, new, kept):
    """Says what was replaced, why, and what to do with it."""
    words = {"source": f"its source ({old['source']}, now {new['source']})",
             "max_tokens": f"max_tokens ({old['max_tokens']}, now {new['max_tokens']})",
             "trained_on": "what its tokenizer was trained on"}
    changed = [text for key, text in words.items() if old[key] != new[key]]
    note(f"{name}: {' and '.join(changed) or 'its text'} changed; the tokens of before are kept in "
         f"{shown(kept)} for the runs that began with them: remove that folder when none goes on")


def sound_header(folder):
    """What is prepared in a folder, if whole and sound; damage is reported, and mended by preparing
    again."""
    try:
        return inspect_folder(folder, verify=True)
    except DataError as error:
        note(str(error).partition(";")[0] + "; preparing again")
        return None


def remembered(name, out):
    """The local copy that a corpus was made from before, with any tokenizer, if that still
    exists."""
    if Path(name).name != name:                         # the path of something that is not there
        return None
    return next((path for path in made_from(name, out) if Path(path).exists()), None)


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
    return plain(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def summary(name, headers, seconds, folder):
    """What was prepared, in lines for a person: sizes, tokenizer, place, and what tells this text
    from others."""
    train, val = headers
    parts = []
    for title, meta in (("training", train), ("validation", val)):
        texts = f"{meta['texts']:,} {meta['unit']}, " if meta["unit"] else ""
        parts.append(f"{title} {texts}{meta['bytes'] / 1e6:.2f} MB, {meta['count']:,} tokens")
    per_token = train["bytes"] / train["count"]
    lines = [f"{name}: {'; '.join(parts)}",
             f"  {train['tokenizer']} tokenizer, {train['vocab_size']} tokens, {per_token:.2f} "
             f"bytes per token; {seconds:.1f} s; in {shown(folder)}",
             f"  from {plain(train['settings']['source'])}; sha256 of the training tokens "
             f"{train['sha256'][:12]}"]
    if train["entropy_floor"] is not None:
        lines.append(f"  entropy of its source: {train['entropy_floor']:.4f} nats, the lowest loss")
    return "\n".join(lines)


# --- opening what is prepared ---


def prepared(data, names=None, quiet=True, checksums=None):
    """(folders, Tokenizer) of the corpora of a DataConfig; what is missing is prepared first.

    names: other corpora than data.name. data.max_tokens 0 takes a prepared corpus as it is; another
    number prepares it again unless it was made with that one. checksums: the sha256 of each
    train.bin that a run began with; a folder with these tokens is used, whatever has become of the
    text. The checksums of all files are compared. Raises DataError with the remedy: damaged files,
    corpora of different tokenizers, and texts that are not those of `checksums`.
    """
    names = as_list(data.name if names is None else names)
    # a run that goes on: by its checksums alone, no text is looked at
    if checksums:
        dir = Path(path_text(data.dir or PREPARED))
        with explained(dir, done="read"):
            folders = [folder_with(dir, checksum, name) for checksum, name in zip(checksums, names)]
        if len(checksums) == len(names) and all(folders):
            for name, folder in zip(names, folders):
                tell_what_changed(name, folder)
            return opened(folders, quiet)
    # a new run, or one whose tokens are lost: by names and settings
    size, limit = data.vocab_size, data.max_tokens
    names, tokenizer, dir = checked(names, data.tokenizer, size, data.dir, limit)
    with explained(dir, remedy=ELSEWHERE):
        folders = up_to_date(names, tokenizer, size, dir, limit, quiet)
    if checksums and [inspect_folder(folder)["sha256"] for folder in folders] != list(checksums):
        raise DataError(f"{', '.join(names)}: holds other text than when this run was started, and "
                        f"no folder in {shown(dir)} has its tokens; put the text back as it was, "
                        "or start a new run from these weights with train.init_from")
    return opened(folders, quiet)


def up_to_date(names, tokenizer, vocab_size, dir, max_tokens, quiet):
    """The folders of corpora, each prepared as asked for."""
    folders = folders_of(names_in(dir, names), tokenizer, vocab_size, dir)
    for folder in folders if not max_tokens else ():
        warn_of_limit(folder)
    with working(f"looking through {', '.join(names)}", quiet):
        missing = [name for name, folder in zip(names, folders)
                   if not is_current(name, folder, max_tokens)]
    if not missing:
        return folders
    if not quiet:
        print(plain(f"preparing {', '.join(missing)} first, which happens once"))
    # bpe and char are trained on all the corpora of a run
    together = tokenizer in ("bpe", "char")
    lost = [folder / file for folder in folders if folder.is_dir() for file in FILES
            if not (folder / file).exists()]
    try:
        prepare(names if together else missing, tokenizer, vocab_size, None, dir, max_tokens, quiet)
    except DataError as e:
        why = f"{lost[0]}: is missing, and to prepare it again: {e}" if lost else e
        raise DataError(why) from None
    return folders


def opened(folders, quiet):
    """(folders, Tokenizer), all checksums compared. Raises DataError for damage and different
    tokenizers."""
    with working("comparing the checksums of what is prepared", quiet):
        found = [inspect_folder(folder, verify=True) for folder in folders]
    if len({header["fingerprint"] for header in found}) > 1:
        raise DataError("these corpora have different tokenizers: "
                        + ", ".join(f"{each['corpus']} {each['tokenizer']}" for each in found))
    return folders, Tokenizer.load(folders[0] / "tokenizer.json")


def tell_what_changed(name, folder):
    """Says so where a run goes on with other tokens than its corpus has now."""
    if why := what_changed(name, folder, inspect_folder(folder)):
        note(f"{name} {why}; the run goes on with its own tokens, in {shown(folder)}; a new run "
             "reads the text of now")


def what_changed(name, folder, header):
    """What became of a corpus since the folder was prepared, as text; empty if nothing did."""
    if folder.name != header["settings"]["label"]:
        return "was prepared anew since this run began"
    path = Path(name).expanduser().resolve()
    if is_known(name) or str(path) != header["path"]:
        return ""
    try:
        if not path.exists():
            return "is gone"
        changed = resolve(str(path)).source != header["settings"]["source"]
    except (DataError, OSError):
        return "cannot be read now"
    return "has changed since this run began" if changed else ""


def warn_of_limit(folder):
    """Says so where a corpus was prepared in part and a run that asks for all of it will use that
    part."""
    header = inspect_folder(folder)
    if header and header["settings"]["max_tokens"]:
        limit = header["settings"]["max_tokens"]
        note(f"{shown(folder)} was prepared with --max_tokens {limit} and is used so; "
             "for all of it prepare it again without")


def is_current(name, folder, max_tokens):
    """Whether a corpus is prepared as asked for and, if it is the user's own, since its last
    change."""
    header = inspect_folder(folder)
    if header is None or max_tokens not in (0, header["settings"]["max_tokens"]):
        return False
    if is_known(name) or not Path(name).exists():
        return True
    return resolve(name).source == header["settings"]["source"]


# --- the command line ---


def whole_number(text):
    """1000000, 1_000_000 or 1e6."""
    number = float(text)
    if not 0 <= number <= MOST_TOKENS or number != int(number):     # neither can inf or nan be
        raise argparse.ArgumentTypeError("give a whole number from 0 to 10^12")
    return int(number)


def list_names(title, chosen):
    lines = [f"  {name:12} {about}" for name, about in NAMES.items() if chosen(name)]
    return "\n".join([title, *lines, "", ""])


def build_parser():
    parser = argparse.ArgumentParser(
        prog="python data/prepare.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prepares corpora: DIR/<corpus>-<tokenizer>/ gets train.bin, val.bin and "
                    "tokenizer.json.",
        epilog=list_names("made here, no network:", lambda name: not takes_source(name))
        + list_names("downloaded (no address could be tried so far), or read from --from PATH:",
                     takes_source)
        + "A file is split 90 / 10 (the last tenth is validation), a folder by files. A known\n"
          "name goes before a file or folder called the same: write ./docs for yours. A second\n"
          "my.txt, of another folder, is called my-<hash>. Tokens of before are kept.")
    parser.add_argument("names", nargs="+", metavar="NAME|FILE|FOLDER",
                        help="a known corpus, a text file or a folder of them")
    parser.add_argument("--tokenizer", default="byte", metavar="KIND",
                        help=f"{', '.join(KINDS)}, or the path of a tokenizer.json; bpe and char "
                             "are trained on the corpora, one for all that are given together "
                             "(default: %(default)s)")
    parser.add_argument("--vocab_size", type=whole_number, default=4096, metavar="N",
                        help="tokens in a bpe vocabulary (default: %(default)s)")
    parser.add_argument("--from", dest="source", metavar="PATH",
                        help="a file or folder to read instead of downloading (default: download)")
    parser.add_argument("--out", metavar="DIR",
                        help="the folder that the corpora's folders are made in, a config's "
                             "data.dir (default: data/prepared in this repository)")
    parser.add_argument("--max_tokens", type=whole_number, default=0, metavar="N",
                        help="training tokens of each corpus; validation has a tenth (default: 0, "
                             "all)")
    parser.add_argument("--force", action="store_true", help="prepare again in any case")
    parser.add_argument("--quiet", action="store_true",
                        help="say nothing unless something is wrong")
    return parser


def main(arguments=None):
    """The program; returns its exit status: 0, 2 for an error of the user's, 130 when
    interrupted."""
    options = vars(build_parser().parse_args(arguments))
    try:
        prepare(**options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing half-finished is left; the same command starts again",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
