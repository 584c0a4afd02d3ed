"""From a name to its corpus: the ones that are known by name, or a path."""
import difflib
import re
from pathlib import Path

from data.corpora import arithmetic, downloads, markov, stdlib, textfiles
from data.binfile import DataError

NAMES = {
    "python": "source of Python's standard library without tests and docstrings, 8 MB",
    "docs": "its docstrings, and the language reference behind help(), 2.4 MB",
    "math": "generated word problems and arithmetic with worked answers, 4 MB or --max_tokens",
    "markov": "hashed order-2 Markov source of known entropy, 8M tokens or --max_tokens",
    "markov-0": "a domain of it, as are markov-1, markov-2, ...: half of the table shared",
    "markov1024": "the same with 1024 symbols and 2^18 contexts, for a GPU; domains markov1024-0, ...",
    **{name: named.about for name, named in downloads.NAMED.items()},
}


def is_known(name):
    return name in NAMES or markov.NAME.fullmatch(name) is not None


def corpus_name(name):
    """What a corpus is called: a known name is itself, a path its last part without the ending.

    Names become folders, so other characters turn into _; a file called like a known corpus keeps its ending.
    """
    if is_known(name):
        return name
    path = Path(name).resolve()
    plain = re.sub(r"[^\w.+-]", "_", path.stem) if path.exists() else name
    return re.sub(r"\W", "_", path.name) + "_" if is_known(plain) else plain


def symbols_tokenizer(name):
    """The tokenizer that a source of symbols brings along; None for the corpora of text."""
    return markov.tokenizer_of(name)


def takes_source(name):
    """Whether --from can concern this name: a download, or a new name for a text."""
    return name in downloads.NAMED or not is_known(name) and not Path(name).exists()


def resolve(name, source=None, raw=Path("raw"), quiet=False):
    """The Corpus of a known name, or of a file or folder. Nothing is read or downloaded yet.

    source: for a corpus that would be downloaded, a local copy instead; for a name that is a file's, that
    file. Raises DataError, with the nearest names, for what is neither known nor a path.
    """
    if name in downloads.NAMED:
        return downloads.corpus(name, source, raw, quiet)
    if name == "math":
        return arithmetic.corpus()
    if name in ("python", "docs"):
        return stdlib.corpus(name)
    if is_known(name):
        return markov.corpus(name)
    path = Path(name) if Path(name).exists() else source
    if path is not None and Path(path).exists():
        return textfiles.corpus(corpus_name(name), path)
    near = difflib.get_close_matches(name, NAMES, 3, 0.5)
    raise DataError(f"{name}: is neither a prepared corpus, nor a file or folder, nor a known corpus"
                    + (f" (nearest: {', '.join(near)})" if near else f" ({', '.join(NAMES)})")
                    + "; `python data/prepare.py --help` lists them")
