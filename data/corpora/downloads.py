"""Five well-known corpora, from their public address or, with --from, from a copy that you already
have.

None of the addresses could be tried where this was written: the tests read local copies, and
download from a server of their own. Each corpus is a file and a parser of a few lines.
"""
import hashlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from data.binfile import DataError, explain
from data.console import progress
from data.corpora.arithmetic import as_text
from data.corpora.corpus import Corpus
from data.corpora.textfiles import BLOCK, file_documents, identity, list_files, read_blocks

GITHUB, HUGGINGFACE = "https://raw.githubusercontent.com", "https://huggingface.co/datasets"


# --- parsers: (path, split, own) -> texts. `own`: the file holds that split alone; else it is split
# here ---


def parse_plain(path, split, own):
    return read_blocks(path) if own else file_documents(path, split)


def parse_tinystories(path, split, own):
    """Stories with <|endoftext|> between them; here a blank line, so that all tokenizers read one
    text."""
    tail = ""
    for block in parse_plain(path, split, own):
        *stories, tail = (tail + block).split("<|endoftext|>")
        yield from (story.strip() + "\n\n" for story in stories)
    if tail.strip():
        yield tail.strip() + "\n\n"


def parse_gsm8k(path, split, own):
    """One JSON object per line: question and answer, which loses its calculator marks,
    <<48/2=24>>."""
    lines = "".join(read_blocks(path)).strip().split("\n")          # 4 MB at most
    border = int(0.9 * len(lines))
    first = border if split == "val" and not own else 0
    last = border if split == "train" and not own else len(lines)
    for number in range(first, last):
        try:
            problem = json.loads(lines[number])
            worked, marker, answer = re.sub(r"<<.*?>>", "", problem["answer"]).rpartition("\n#### ")
            if not marker:
                raise ValueError("no #### in its answer")
            yield as_text(problem["question"], worked, answer.strip())
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: line {number + 1} is no GSM8K problem ({error})") from error


@dataclass(frozen=True)
class Named:
    """A corpus with a public address. `files` has the keys "train" and "val", or "all"."""
    about: str
    files: dict[str, str]               # address of each file
    patterns: dict[str, str]            # regular expressions: names that a local copy may have
    size: int                           # bytes of training text, roughly
    sha256: dict[str, str]              # of the files, where it is known
    parse: Callable = parse_plain
    unit: str = ""                      # what one text of the parser is


NAMED = {
    "shakespeare": Named(
        "tiny Shakespeare, 1.1 MB: 40,000 lines of his plays",
        {"all": f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"},
        {"all": r"(tiny)?shakespeare.*\.txt|input\.txt"}, 1_000_000,
        {"all": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}),
    "gsm8k": Named(
        "GSM8K, 4.5 MB: 8,792 school problems with worked answers (train and test files)",
        {"train": f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/train.jsonl",
         "val": f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/test.jsonl"},
        {"train": r"(gsm8k.*)?train\.jsonl", "val": r"(gsm8k.*)?test\.jsonl"}, 3_900_000,
        {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
         "val": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"},
        parse_gsm8k, "problems"),
    "wikitext2": Named(
        "WikiText-2, 12 MB: good Wikipedia articles, tokenised, rare words as <unk>",
        {"train": f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2/train.txt",
         "val": f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2/valid.txt"},
        {"train": r"(wiki.*)?train\.(txt|tokens|raw)",
         "val": r"(wiki.*)?valid.*\.(txt|tokens|raw)"},
        10_800_000, {}),
    "tinystories": Named(
        "TinyStories V2, 2.2 GB: short stories in a small child's words, written by GPT-4; try "
        "--max_tokens",
        {"train": f"{HUGGINGFACE}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
         "val": f"{HUGGINGFACE}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt"},
        {"train": r"tinystories.*train\.txt", "val": r"tinystories.*valid\.txt"}, 2_200_000_000, {},
        parse_tinystories, "stories"),
    "enwik8": Named(
        "enwik8, 100 MB: the first hundred million bytes of an English Wikipedia of 2006, markup "
        "included",
        {"all": "http://mattmahoney.net/dc/enwik8.zip"}, {"all": r"enwik8(\.zip|\.txt)?"},
        90_000_000, {}),
}


# --- fetching ---


def fetch(url, path, sha256=None, quiet=False, timeout=30):
    """Downloads to `path`, by way of `path`.part, which a later call continues. Raises
    DataError."""
    part = path.with_name(path.name + ".part")
    hand = f"fetch it by hand and put it at {path}, or give a copy that you have with --from PATH"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted = receive(url, part, quiet, timeout)
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"could not download {url} ({reason}); {hand}") from error
    except OSError as error:
        raise DataError(explain(error, path)) from error
    if wanted is not None and part.stat().st_size != wanted:
        raise DataError(f"the download of {url} broke off at {part.stat().st_size} of {wanted} "
                        f"bytes: run the same command again to continue, or {hand}")
    if sha256 and file_sha256(part) != sha256:
        part.unlink()
        raise DataError(f"what came from {url} is not the file expected (its checksum differs); "
                        f"{hand}")
    part.replace(path)


def receive(url, part, quiet, timeout):
    """Downloads what the file `part` lacks, or all of it where the server sends no ranges. Returns
    the full size in bytes, None where the server does not tell."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}           # a server may ignore it
    try:
        request = urllib.request.Request(url, headers=headers)
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:       # 416: the file ends before, `part` is of another
            raise
        part.unlink()
        return receive(url, part, quiet, timeout)
    with answer:
        # 206: the server sends the rest; any other status: the whole file
        have = have if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        wanted = have + int(length) if length else None
        bar = progress(wanted, f"downloading {Path(url).name}", quiet, initial=have, unit="B")
        with open(part, "ab" if have else "wb") as file, bar as bar:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    return wanted


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- from files to a corpus ---


def local_files(named, path):
    """{"train": path, "val": path} or {"all": path}: the user's file, or what a folder has of known
    names."""
    if path.is_file():
        return {"all": path}
    inside = [file for _, file in list_files(path)
              if file.is_file() and not file.name.endswith(".part")]
    found = {}
    for key, pattern in named.patterns.items():
        matches = [file for file in inside if re.fullmatch(pattern, file.name, re.IGNORECASE)]
        if len(matches) > 1:
            raise DataError(f"{path}: {matches[0].name} or {matches[1].name}? give the one that is "
                            "meant")
        if matches:
            found[key] = matches[0]
    if not found:
        raise DataError(f"{path}: holds no file named like {' or '.join(named.patterns.values())}")
    return found if len(found) == len(named.files) else {"all": next(iter(found.values()))}


def documents(name, split, path, raw, quiet):
    """The texts of one split, from `path`, or from the folder `raw`/name."""
    named = NAMED[name]
    # without a copy of the user's: download what is missing
    if path is None:
        path = raw / name
        for key, url in named.files.items():
            target = path / Path(url).name
            if not target.exists():
                fetch(url, target, named.sha256.get(key), quiet)
    files = local_files(named, path)
    own = "all" not in files
    return named.parse(files[split if own else "all"], split, own)


def corpus(name, path, raw, quiet=False):
    """The Corpus of one of NAMED. path: the user's copy or None; raw: the folder to download
    into."""
    if path is not None and not Path(path).exists():
        raise DataError(f"--from {path}: there is no such file or folder")
    path = Path(path) if path is not None else None
    source = identity(path) if path else "downloaded from " + ", ".join(NAMED[name].files.values())
    named = NAMED[name]
    texts = lambda split: documents(name, split, path, raw, quiet)
    return Corpus(name, texts, source, named.size, named.unit, path=path)
