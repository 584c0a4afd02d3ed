"""From a name to its corpus: the ones that are known by name, or a path."""
import difflib
import re
from pathlib import Path

from data.corpora import arithmetic, downloads, markov, recall, stdlib, textfiles
from data.binfile import DataError
from data.tokenizers import Tokenizer

# A line in each of these two is a corpus known by name: what it is, and the function(name) that
# makes it.
NAMES = {
    "python": "source of Python's standard library without tests and docstrings, 8 MB",
    "docs": "its docstrings, and the language reference behind help(), 2.4 MB",
    "math": "generated word problems and arithmetic with worked answers, 4 MB or --max_tokens",
    "recall": "generated look-ups in a dictionary that each line has for itself, 4M tokens or "
              "--max_tokens",
    "markov": "hashed order-2 Markov source of known entropy, 8M tokens or --max_tokens",
    "markov-0": "a domain of it, as are markov-1, markov-2, ...: half of the table shared",
    "markov1024": "the same, 1024 symbols and 2^18 contexts, for a GPU; domains markov1024-0, ...",
    **{name: named.about for name, named in downloads.NAMED.items()},
}
MADE = {"python": stdlib.corpus, "docs": stdlib.corpus, "math": arithmetic.corpus,
        "recall": recall.corpus}


def is_known(name):
    return name in NAMES or markov.NAME.fullmatch(name) is not None


def stem_of(path):
    """What the corpus of a path is called: its last part without the ending, every odd character as
    _. One called like a known corpus keeps its ending: python.txt is python_txt_."""
    plain = re.sub(r"[^\w.+-]", "_", path.stem)
    return re.sub(r"\W", "_", path.name) + "_" if is_known(plain) else plain


def symbols_tokenizer(name):
    """The tokenizer that a source of symbols brings along; None for the corpora of text."""
    return Tokenizer.byte() if name == "recall" else markov.tokenizer_of(name)


def takes_source(name):
    """Whether --from can concern this name: a download, or a new name for a text."""
    return name in downloads.NAMED or not is_known(name) and not Path(name).exists()


def resolve(name, source=None, raw=Path("raw"), quiet=False, called=""):
    """The Corpus of a known name, or of a file or folder. No text is read or downloaded yet.

    source: a local copy of a corpus that would be downloaded, or the text of a name that is no
    path. called: what the corpus of a path is called. Raises DataError, with the nearest names, for
    what is neither known nor a path.
    """
    if name in downloads.NAMED:
        return downloads.corpus(name, source, raw, quiet)
    if name in MADE:
        return MADE[name](name)
    if is_known(name):
        return markov.corpus(name)
    path = name if Path(name).exists() else source
    if path is not None and Path(path).exists():
        return textfiles.corpus(called or stem_of(Path(path)), path)
    near = difflib.get_close_matches(name, NAMES, 3, 0.5)
    raise DataError(f"{name}: is neither a prepared corpus, nor a file or folder, nor a known "
                    f"corpus ({'nearest: ' if near else ''}{', '.join(near or NAMES)})"
                    "; `python data/prepare.py --help` lists them")
