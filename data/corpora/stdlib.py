"""Two corpora that every Python brings along: `python`, the source of its standard library without
docstrings, and `docs`, those docstrings and the language reference that help() prints. They need no
network, and code and prose are two clear domains. Both differ from one version of Python to the
next.

A file is validation or training by its name, in both corpora: a docstring is held out together with
its code.
"""
import ast
import inspect
import platform
import pydoc_data.topics
import sysconfig
import tokenize
import warnings
from pathlib import Path

from data.binfile import DataError, explained
from data.corpora.corpus import Corpus, split_of, titled, walk

# Left out are the tests; pydoc_data, which is prose written as code and belongs to `docs` alone;
# and encodings, which are mostly generated tables of code pages: they are near copies of one
# another, so a model would know a held-out table by heart.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
           "pydoc_data", "encodings"}
SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def source_files(root):
    """(relative name, path) of each module below `root`, sorted by name: the same order on every
    machine."""
    found = []
    with explained(root, done="read"):
        for folder, subfolders, files in walk(root):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED]
            # _sysconfigdata holds the paths and flags of the machine that this Python was built on
            found += [Path(folder, name) for name in files
                      if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def read_source(path):
    """(text, syntax tree) of a source file; None where it is no valid Python, or not in its
    encoding."""
    try:
        with explained(path, done="read"), tokenize.open(path) as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # the library's own invalid escapes
            return text, ast.parse(text)
    except DataError:
        raise
    except (SyntaxError, ValueError):       # UnicodeDecodeError is a ValueError
        return None


def docstrings(node, name=""):
    """(scope, node of its docstring, qualified name) of a syntax tree, in the order of the
    source."""
    if isinstance(node, SCOPES):
        name = f"{name}.{node.name}".lstrip(".") if hasattr(node, "name") else ""
        if ast.get_docstring(node, clean=False) is not None:
            yield node, node.body[0], name
    # statements lie only in these fields; to skip all expressions is what makes this quick
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, field, None) or ():
            if isinstance(child, ast.AST) and not isinstance(child, ast.expr):
                yield from docstrings(child, name)


def without_docstrings(text, tree):
    """The source without its docstrings. Comments and layout stay."""
    lines = [line.encode() for line in text.split("\n")]      # ast counts columns in bytes
    # from the end, so that the positions of earlier docstrings stay true
    for scope, doc, _ in reversed(list(docstrings(tree))):
        first, last = doc.lineno - 1, doc.end_lineno - 1
        before = lines[first][:doc.col_offset]
        after = lines[last][doc.end_col_offset:]
        if len(scope.body) > 1 and not before.strip() and not after.strip():
            # it stands on lines of its own: they go
            lines[first:last + 1] = []
        else:
            # it is the whole body, or shares a line: it becomes `pass`, unless only a comment
            # follows
            whole = len(scope.body) == 1
            comment = not before.strip() and after.lstrip().startswith(b"#")
            optional = isinstance(scope, ast.Module) if whole else comment
            keep = b"" if optional else b"pass"
            lines[first:last + 1] = [before + keep + after]
    return b"\n".join(lines).decode()


def prose(tree):
    """The docstrings of one module, each below the qualified name of what it describes."""
    entries = [(name, inspect.cleandoc(doc.value.value)) for _, doc, name in docstrings(tree)]
    return "\n".join(f"{name}\n{doc}\n" if name else f"{doc}\n" for name, doc in entries if doc)


def python_documents(split, root):
    for name, path in source_files(root):
        if split_of(name) == split and (parsed := read_source(path)):
            yield titled(name, without_docstrings(*parsed))


def docs_documents(split, root):
    """The texts of `docs`: topics of the language reference, then the docstrings of each file."""
    # topics repeat whole sections of one another, so all of them are training text
    if split == "train":
        for name, text in sorted(pydoc_data.topics.topics.items()):
            yield titled(name, text)
    for name, path in source_files(root):
        if split_of(name) == split and (parsed := read_source(path)) and (text := prose(parsed[1])):
            yield titled(name, text)


def corpus(name):
    """The Corpus `python` or `docs`. Raises DataError where this Python came without its source."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "ast.py").exists():
        raise DataError(f"{root}: this Python came without the source of its standard library; "
                        "use another installation, or a corpus of text files: python "
                        "data/prepare.py FOLDER")
    documents, size = python_documents, 7_900_000
    if name == "docs":
        documents, size = docs_documents, 2_400_000
    version = f"Python {platform.python_version()}"
    return Corpus(name, lambda split: documents(split, root), version, size, "files")
