"""data/: the .bin files, every source of text, preparing, and batches."""
import ast
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import binfile, building, console
from data.batches import BLOCK, Batches, EvalBatches, quotas_of
from data.binfile import DataError, open_bin, read_header, write_bin
from data.corpora import (arithmetic, downloads, markov, sources, stdlib,
                          textfiles)
from data.corpora.corpus import split_of
from data.folders import folders_of, inspect_folder, names_in
from data.prepare import main, prepare, prepared
from data.tokenizers import Tokenizer
from settings import DataConfig

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the repository")
quiet_prepare = partial(prepare, quiet=True)


def message(call, *arguments, **options):
    """The one line that a call refuses its input with."""
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tokens_in(folder, split="train"):
    return np.array(open_bin(folder / f"{split}.bin", verify=True)[0])


def folder_of(name, tokenizer="byte", dir=None):
    return folders_of(names_in(dir, [str(name)]), tokenizer, dir=dir)[0]


def tokenizer_in(folder):
    return Tokenizer.load(folder / "tokenizer.json")


def open_text(names, tokenizer="byte", vocab_size=4096, dir=None, max_tokens=0, quiet=True, **options):
    """prepared(), its settings one by one."""
    settings = DataConfig(name=names, tokenizer=tokenizer, vocab_size=vocab_size, dir=str(dir),
                          max_tokens=max_tokens)
    return prepared(settings, quiet=quiet, **options)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- .bin files ---


META = {"vocab_size": 256, "corpus": "x", "fingerprint": "f", "tokenizer": "byte"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**31), max_size=20), min_size=1),
       st.sampled_from([256, 257, 2**16, 2**16 + 1, 2**31]))
def test_bin_round_trip(tmp_path_factory, chunks, vocab_size):
    path = tmp_path_factory.mktemp("bin") / "a.bin"
    chunks = [np.array(chunk, np.int64) % vocab_size for chunk in chunks] + [np.array([vocab_size - 1])]
    written = write_bin(path, iter(chunks), {**META, "vocab_size": vocab_size})
    tokens, meta = open_bin(path, verify=True)
    assert meta == written and meta["count"] == len(tokens)
    assert tokens.tolist() == np.concatenate(chunks).tolist()
    assert path.stat().st_size == binfile.HEADER + len(tokens) * tokens.dtype.itemsize


def test_bin_uses_the_smallest_type():
    names = [binfile.dtype_for(size) for size in (2, 256, 257, 65536, 65537)]
    assert names == ["uint8", "uint8", "uint16", "uint16", "uint32"]


@pytest.mark.parametrize("damage", ["header", "magic", "version", "short", "long", "empty", "foreign"])
def test_damaged_bin_is_one_line(tmp_path, damage):
    path = tmp_path / "train.bin"
    write_bin(path, [np.arange(1000) % 256], META)
    raw = bytearray(path.read_bytes())
    if damage in ("header", "magic", "version"):
        raw[{"header": 60, "magic": 2, "version": 8}[damage]] ^= 1
    raw = {"short": raw[:-1], "long": raw + b"x", "empty": b"", "foreign": b"hello"}.get(damage, raw)
    path.write_bytes(raw)
    reason = message(open_bin, path)
    assert str(path) in reason and "python data/prepare.py" in reason


def test_damaged_tokens_are_found_by_their_checksum(tmp_path):
    path = tmp_path / "train.bin"
    write_bin(path, [np.arange(1000) % 256], META)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    open_bin(path)
    assert str(path) in message(open_bin, path, verify=True)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    for bad in (256, -1):
        assert "vocabulary" in message(write_bin, tmp_path / "a.bin", [np.array([1, bad])], META)
    assert list(tmp_path.iterdir()) == []


class FullDisk(io.FileIO):
    """A file on a disk that takes 10,000 bytes more."""

    def write(self, data):
        if self.tell() + len(data) > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "train.bin"
    write_bin(path, [np.arange(100)], META)
    before = path.read_bytes()
    monkeypatch.setattr(binfile, "open", lambda name, mode: FullDisk(name, mode), raising=False)
    chunks = (np.zeros(5000, np.int64) for _ in range(10))
    reason = message(write_bin, path, chunks, META, expected=54_000_000)
    assert "disk is full" in reason and "54.0 MB" in reason and str(path) in reason
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["train.bin"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_noticed_only_when_flushed(tmp_path):
    (tmp_path / ".a.json.tmp").symlink_to("/dev/full")
    with pytest.raises(DataError, match="disk is full"), binfile.replacing(tmp_path / "a.json") as file:
        file.write(b"small enough to stay in the buffer")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "train.bin"
    write_bin(path, [np.arange(100)], META)
    before = path.read_bytes()

    def chunks():
        yield np.arange(100)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bin(path, chunks(), META)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- text files ---


def test_a_file_is_split_90_to_10_by_characters_and_kept_as_it_is(tmp_path):
    text = "Grüße 😀\r\nand\ttabs\r\n\r\n" * 40 + "\r"
    path = write_text(tmp_path / "my text.txt", text)
    folder, = quiet_prepare([path], out=tmp_path / "out")
    border = int(0.9 * len(text))
    assert folder.name == "my_text-byte"
    assert tokens_in(folder).tobytes().decode() == text[:border]
    assert tokens_in(folder, "val").tobytes().decode() == text[border:]


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_blocks_leave_no_seams(tmp_path, monkeypatch, kind):
    """Texts longer than the blocks they are read, cut and encoded in give the tokens of the
    whole."""
    text = "one two, three 😀\r\n  four\n\n\nfive é\t six." * 30
    path = write_text(tmp_path / "a.txt", text)
    whole, = quiet_prepare([path], kind, 300, out=tmp_path / "whole")
    monkeypatch.setattr(textfiles, "BLOCK", 7)
    monkeypatch.setattr(building, "BLOCK", 50)
    textfiles._count_chars.cache_clear()
    pieces, = quiet_prepare([path], kind, 300, out=tmp_path / "pieces")
    for split in ("train", "val"):
        assert tokens_in(whole, split).tolist() == tokens_in(pieces, split).tolist()
    tokenizer = Tokenizer.load(pieces / "tokenizer.json")
    assert tokenizer.decode(tokens_in(pieces)) + tokenizer.decode(tokens_in(pieces, "val")) == text


def test_bytes_that_are_no_utf8_are_replaced_and_reported(tmp_path, capsys):
    path = write_text(tmp_path / "a.txt", b"good text " * 100 + b"\xff\xc3 and more " + b"good text " * 100)
    folder, = quiet_prepare([path], out=tmp_path)
    both = tokens_in(folder).tobytes() + tokens_in(folder, "val").tobytes()
    assert both.decode() == "good text " * 100 + "\ufffd\ufffd and more " + "good text " * 100
    assert capsys.readouterr().err.count("2 of 2012 bytes are not UTF-8") == 1


@pytest.mark.parametrize("content, hint", [
    (b"", "too short"), (b"x", "too short"), (b"\n", "too short"), (b"\xff", "too short"),
    (b"abcdefghij", "too short"), ("dürftiger Grüße wegen übel".encode("latin-1") * 9, "UTF-8"),
    ("text".encode("utf-16") * 9, "zero bytes"),
    (b"\x7fELF\0\0\1" * 50, "zero bytes")])
@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_what_is_no_usable_text_is_one_line(tmp_path, content, hint, kind):
    path = write_text(tmp_path / "bad.txt", content)
    reason = message(quiet_prepare, [path], kind, out=tmp_path / "out")
    assert hint in reason and "bad" in reason
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_a_folder_is_split_by_files(tmp_path, capsys):
    for i in range(30):
        write_text(tmp_path / f"texts/{'ab'[i % 2]}/{i}.txt", f"this is text {i}\r\n" * 3)
    write_text(tmp_path / "texts/image.png", b"\x89PNG\0\0" * 9)
    write_text(tmp_path / "texts/empty.txt", b"")
    write_text(tmp_path / "texts/.git/config", "hidden")
    folder, = quiet_prepare([tmp_path / "texts"], out=tmp_path / "out")
    train, val = (tokens_in(folder, split).tobytes().decode() for split in ("train", "val"))
    in_train, in_val = (set(re.findall(r"# ([ab]/\d+\.txt)\n", text)) for text in (train, val))
    assert len(in_train) + len(in_val) == 30 and not in_train & in_val
    assert in_val == {name for name in in_train | in_val if split_of(name) == "val"}
    assert "# a/0.txt\nthis is text 0\r\n" in train + val and "hidden" not in train + val
    error = capsys.readouterr().err
    assert "skipped 2 of 32" in error and "image.png" in error


def test_a_small_folder_still_has_both_splits(tmp_path):
    for name in ("a", "b"):
        write_text(tmp_path / "few" / name, f"the text of {name}\n")
    folder, = quiet_prepare([tmp_path / "few"], out=tmp_path)
    assert {read_header(folder / f"{split}.bin")["texts"] for split in ("train", "val")} == {1}
    os.remove(tmp_path / "few/b")
    assert "holds 1 text file" in message(quiet_prepare, [tmp_path / "few"], out=tmp_path)


@needs_shared
def test_shakespeare_is_split_as_in_nanogpt(tmp_path):
    folder, = quiet_prepare([SHARED / "tinyshakespeare.txt"], "char", out=tmp_path)
    assert read_header(folder / "train.bin")["count"] == 1_003_854
    assert read_header(folder / "val.bin")["count"] == 111_540
    assert Tokenizer.load(folder / "tokenizer.json").vocab_size == 65


# --- the standard library ---


ODD = b'''# -*- coding: latin-1 -*-
"""Module."""   # a comment behind it
import os
class A:
    """Only this."""
def f(x): "short"; return x
def g():
    # before
    \'\'\'Caf\xe9, in
    several lines\'\'\'
    # after
    return """no docstring"""
async def h():
    """doc"""
    def inner():
        "inner"
    if 1:
        def deep(): "deep"
    return inner
'''


def normal_form(tree):
    """A syntax tree without docstrings and pass, to compare."""
    for node in ast.walk(tree):
        if isinstance(node, stdlib.SCOPES) and node.body and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        for field in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, field, None), list):
                kept = [child for child in getattr(node, field) if not isinstance(child, ast.Pass)]
                setattr(node, field, kept)
    return ast.dump(tree)


def comments(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def check_stripping(path):
    text, tree = stdlib.read_source(path)
    stripped = stdlib.without_docstrings(text, tree)
    assert comments(stripped) == comments(text)
    assert normal_form(ast.parse(stripped)) == normal_form(tree)
    assert not list(stdlib.docstrings(ast.parse(stripped)))


def test_stripping_takes_docstrings_and_nothing_else(tmp_path):
    check_stripping(write_text(tmp_path / "odd.py", ODD))
    for _, path in stdlib.source_files(Path(os.__file__).parent)[::25]:
        check_stripping(path)
    names = [name for _, _, name in stdlib.docstrings(stdlib.read_source(tmp_path / "odd.py")[1])]
    assert names == ["", "A", "f", "g", "h", "h.inner", "h.deep"]
    assert "Café, in\nseveral lines" in stdlib.prose(stdlib.read_source(tmp_path / "odd.py")[1])


def test_files_that_are_no_python_are_left_out(tmp_path):
    for content in (b"def", b"# -*- coding: nonsense -*-\n", b"x = '\xff'\n", b"\0"):
        assert stdlib.read_source(write_text(tmp_path / "a.py", content)) is None


def titles(texts):
    return {text.partition("\n")[0] for text in texts}


def test_python_and_docs_hold_out_the_same_files_and_leak_nothing(monkeypatch):
    every_third = stdlib.source_files(stdlib.Path(os.__file__).parent)[::3]
    monkeypatch.setattr(stdlib, "source_files", lambda root: every_third)
    python, docs = stdlib.corpus("python"), stdlib.corpus("docs")
    train, val = list(python.documents("train")), list(python.documents("val"))
    assert not titles(train) & titles(val) and not set(train) & set(val)
    assert {split_of(title[2:]) for title in titles(val)} == {"val"}
    size = {"train": sum(map(len, train)), "val": sum(map(len, val))}
    assert size["train"] > 1e6 and 0.03 < size["val"] / size["train"] < 0.2
    assert not [name for name in titles(train + val) if re.search("/tests?/|site-packages|pydoc_data", name)]
    doc_train, doc_val = list(docs.documents("train")), list(docs.documents("val"))
    assert titles(doc_val) <= titles(val) and not titles(doc_train) & titles(val)
    assert sum(map(len, doc_train)) > 0.8e6 and sum(map(len, doc_val)) > 10_000
    assert any(text.startswith("# lambda\n") for text in doc_train)       # a topic of the language reference
    assert list(docs.documents("val")) == doc_val


# --- generated problems ---


STEP = re.compile(r"(-?\d+) ([-+*/]) (-?\d+) = (-?\d+)")

# What each kind of question asks, worked out from its words alone, independently of the generator.
SOLUTIONS = {
    r"has (\d+) \w+ and buys (\d+) \w+ of (\d+) ": lambda a, b, c: a + b * c,
    r"has (\d+) \w+, gives (\d+) to \w+ and loses (\d+)": lambda a, b, c: a - b - c,
    r"has (\d+) \w+, finds (\d+) and shares all equally among (\d+)": lambda a, b, c: (a + b) / c,
    r"has (\d+) \w+, keeps (\d+) and shares the others equally among (\d+)": lambda a, b, c: (a - b) / c,
    r"buys (\d+) \w+ at \$(\d+) each and (\d+) \w+ at \$(\d+) each, and pays with \$(\d+)":
        lambda a, b, c, d, e: e - a * b - c * d,
    r"drives (\d+) hours at (\d+) km per hour and then (\d+) km": lambda a, b, c: a * b + c,
    r"is (\d+) years old and \w+ is (\d+) times as old.* in (\d+) years": lambda a, b, c: a * b + c,
    r"sells (\d+) \w+ on the first day and (\d+) more .* in (\d+) days":
        lambda a, b, c: sum(a + b * i for i in range(c)),
    r"is (\d+) m long and (\d+) m wide. What is its area": lambda a, b: a * b,
    r"is (\d+) m long and (\d+) m wide. How long is the fence": lambda a, b: 2 * (a + b),
    r"^What is (\d+) \* (\d+)": lambda a, b: a * b,
    r"remainder of (\d+) divided by (\d+)": lambda a, b: a % b,
    r"Solve (\d+) \* \w \+ (\d+) = (\d+)": lambda a, b, c: (c - b) / a,
}


def solve(question):
    for pattern, formula in SOLUTIONS.items():
        if found := re.search(pattern, question):
            return pattern, formula(*map(int, found.groups()))
    if question.startswith("What is "):
        return "sum", eval(question[8:-1])
    terms = [int(term) for term in re.findall(r"\d+", question)]
    assert question.startswith("What comes next") and len(set(np.diff(terms))) == 1
    return "sequence", 2 * terms[-1] - terms[-2]


def test_every_worked_answer_is_right():
    kinds = set()
    for question, worked, answer in itertools.islice(arithmetic.problems(7), 3000):
        kind, value = solve(question)
        kinds.add(kind)
        assert float(answer) == value, question
        for line in worked.split("\n"):
            left, sign, right, result = STEP.fullmatch(line).groups()
            assert eval(f"{left} {sign} {right}") == int(result), line
        assert worked.split("\n")[-1].endswith(f"= {answer}")
        assert arithmetic.final_answer(worked + f"\n#### {answer}\n\nQ: another?\nA: 1\n#### 1") == answer
    assert len(kinds) == len(SOLUTIONS) + 2


def test_problems_repeat_by_seed_and_no_question_is_in_both_splits():
    first, again, other = (list(itertools.islice(arithmetic.problems(seed), 50)) for seed in (3, 3, 4))
    assert first == again != other
    # the same seed on purpose: the splits differ because the questions do
    train, val = ({problem[0] for problem in itertools.islice(arithmetic.problems(0, split), 2000)}
                  for split in ("train", "val"))
    assert len(train) > 1800 and len(val) > 1800 and not train & val


@pytest.mark.parametrize("text, answer", [
    (" 3 + 4 = 7\n#### 7\n\n", "7"), ("#### 1,234", "1234"), ("#### $-5.50 ", "-5.50"),
    (" 3 + 4 = 7", None), ("", None),
    (" 1 + 1 = 2\n\nQ: What is 2 + 2?\nA: 2 + 2 = 4\n#### 4\n\n", None), ("#### seven", None)])
def test_final_answer(text, answer):
    assert arithmetic.final_answer(text) == answer


# --- the Markov source ---


def test_markov_entropy_floor_is_the_loss_of_who_knows_the_source():
    source = markov.MarkovSource()
    floor = source.entropy_floor()
    assert floor == pytest.approx(1.036, abs=0.002)
    losses = []
    for key in (0, 2, 4):
        x = source.generate(key)
        hit = source.table[source.context(x[:, :-2], x[:, 1:-1])] == x[:, 2:]
        losses.append(-np.log((1 - source.p) * source.unigram[x[:, 2:]] + source.p * hit).mean())
    assert np.mean(losses) == pytest.approx(floor, abs=0.006)
    # and in the long run symbols are as frequent as the stationary distribution says
    counts = np.bincount(x.ravel(), minlength=256) / x.size
    assert np.abs(counts - source.symbol_frequencies()).sum() < 0.05


def test_markov_floor_of_a_source_small_enough_to_work_out():
    source = markov.MarkovSource(vocab_size=2, n_context=1, p=0.4)      # one row: each step draws alike
    q = 0.4 + 0.6 * source.unigram[source.table[0]]
    assert source.entropy_floor() == pytest.approx(-q * np.log(q) - (1 - q) * np.log(1 - q))


def test_markov_domains_share_half_of_the_table():
    base, zero, one = (sources.markov.source_of(name) for name in ("markov", "markov-0", "markov-1"))
    half = base.n_context // 2
    for other in (zero, one):
        assert (other.table[:half] == base.table[:half]).all()
        assert (other.table[half:] == base.table[half:]).mean() < 0.1       # equal only by chance
    assert (zero.table[half:] == one.table[half:]).mean() < 0.1
    # a random half of the contexts, not a half of the symbols
    rows = base.context(*np.divmod(np.arange(2**16), 256)).reshape(256, 256) < half
    assert abs(rows.mean() - 0.5) < 0.02 and 0.3 < rows.mean(0).min() and rows.mean(1).max() < 0.7


def test_markov_streams_differ_and_repeat_exactly():
    a, b = markov.source_of("markov"), markov.source_of("markov-0")
    x = a.generate(0, n=2, length=300)
    assert (x == markov.source_of("markov").generate(0, n=2, length=300)).all()
    for other in (a.generate(1, n=2, length=300), b.generate(0, n=2, length=300), x[::-1]):
        assert (x == other).mean() < 0.3


def test_markov_corpora_bring_their_tokenizer(tmp_path, monkeypatch):
    floor = markov.MarkovSource.entropy_floor               # takes 2 s with 1024 symbols
    monkeypatch.setattr(markov.MarkovSource, "entropy_floor",
                        lambda self: floor(self) if self.vocab_size < 1024 else 1.17)
    first, second = quiet_prepare(["markov-0", "markov1024-1"], "bpe", out=tmp_path, max_tokens=5000)
    assert (first.name, second.name) == ("markov-0-byte", "markov1024-1-char")
    header = read_header(first / "train.bin")
    assert header["count"] == 5000 and header["entropy_floor"] == pytest.approx(1.0377, abs=1e-3)
    assert (tokens_in(first) == markov.source_of("markov-0").generate(0).ravel()[:5000]).all()
    assert (tokens_in(first, "val") == markov.source_of("markov-0").generate(1).ravel()[:10_000]).all()
    assert read_header(second / "val.bin")["vocab_size"] == 1024
    assert not sources.is_known("markov-x") and not sources.is_known("markov512")


# --- downloads ---


class Server(BaseHTTPRequestHandler):
    """Serves `content`, in ranges where `ranges`, and breaks off after `limit` bytes of an
    answer."""
    content, ranges, limit, asked = b"", True, None, []

    def do_GET(self):
        asked = self.headers.get("Range")
        self.asked.append(asked)
        start = int(asked[6:-1]) if asked and self.ranges else 0
        if "missing" in self.path or start >= len(self.content):
            self.send_error(404 if "missing" in self.path else 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:][:self.limit])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    handler = type("Fresh", (Server,), {"content": os.urandom(50_000), "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        handler.address = f"http://127.0.0.1:{server.server_port}"
        yield handler
        server.shutdown()


def test_a_broken_download_continues_where_it_stopped(server, tmp_path):
    target = tmp_path / "raw" / "file.txt"
    server.limit = 20_000
    reason = message(downloads.fetch, server.address + "/file.txt", target)
    assert "20000 of 50000" in reason and server.address in reason and str(target) in reason
    assert not target.exists()
    server.limit = None
    downloads.fetch(server.address + "/file.txt", target)
    assert server.asked == [None, "bytes=20000-"] and target.read_bytes() == server.content
    assert [file.name for file in target.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("ranges, left", [(False, 20_000), (True, 60_000)])
def test_a_part_that_cannot_be_continued_is_fetched_anew(server, tmp_path, ranges, left):
    server.ranges = ranges
    write_text(tmp_path / "file.txt.part", b"x" * left)
    downloads.fetch(server.address + "/file.txt", tmp_path / "file.txt")
    assert (tmp_path / "file.txt").read_bytes() == server.content


def test_failed_downloads_say_what_to_do(server, tmp_path):
    target = tmp_path / "file.txt"
    missing, nobody = server.address + "/missing.txt", "http://127.0.0.1:9/x.txt"
    for address, hint in ((missing, "Not Found"), (nobody, "refused")):
        reason = message(downloads.fetch, address, target)
        assert address in reason and hint in reason and str(target) in reason and "--from" in reason
    assert "checksum" in message(downloads.fetch, server.address + "/file.txt", target, "0" * 64)
    assert not target.exists() and not (tmp_path / "file.txt.part").exists()


def test_a_named_corpus_is_downloaded_once(server, tmp_path, monkeypatch):
    server.content = b"A story.\nIts end.\n<|endoftext|>\nAnother one.\n" * 20
    named = downloads.NAMED["tinystories"]
    local = {key: f"{server.address}/{Path(url).name}" for key, url in named.files.items()}
    served = downloads.Named("", local, named.patterns, 1000, {}, named.parse)
    monkeypatch.setitem(downloads.NAMED, "tinystories", served)
    for kind in ("byte", "char"):
        folder, = quiet_prepare(["tinystories"], kind, out=tmp_path)
        text = Tokenizer.load(folder / "tokenizer.json").decode(tokens_in(folder))
        first, second = "A story.\nIts end.\n\n", "Another one.\n"      # no mark between a second and a first
        assert text == first + (second + first) * 19 + second + "\n"
    assert len(server.asked) == 2


def gsm_lines(n):
    problems = [{"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}
                for i in range(n)]
    return "".join(json.dumps(problem) + "\n" for problem in problems)


def test_gsm8k_from_files_of_the_user(tmp_path):
    write_text(tmp_path / "copy/train.jsonl", gsm_lines(20))
    write_text(tmp_path / "copy/test.jsonl", gsm_lines(3))
    folder, = quiet_prepare(["gsm8k"], out=tmp_path / "out", source=tmp_path / "copy")
    text = tokens_in(folder).tobytes().decode()
    assert text.startswith("Q: What is 0 + 1?\nA: It is 1.\n#### 1\n\n") and text.count("Q: ") == 20
    assert tokens_in(folder, "val").tobytes().decode().count("Q: ") == 3
    folder, = quiet_prepare(["gsm8k"], out=tmp_path / "out", source=tmp_path / "copy/train.jsonl")
    assert [read_header(folder / f"{split}.bin")["texts"] for split in ("train", "val")] == [18, 2]
    write_text(tmp_path / "copy/train.jsonl", gsm_lines(5) + "{broken\n")
    assert "line 6" in message(quiet_prepare, ["gsm8k"], out=tmp_path / "out", source=tmp_path / "copy")


def test_zip_with_one_file_is_read_and_others_are_refused(tmp_path):
    import zipfile
    text = "<page> a line of wiki text </page>\n" * 50
    for name, members in (("enwik8.zip", ["enwik8"]), ("two.zip", ["a", "b"])):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in members:
                archive.writestr(member, text)
    folder, = quiet_prepare(["enwik8"], out=tmp_path / "out", source=tmp_path / "enwik8.zip")
    assert (tokens_in(folder).tobytes() + tokens_in(folder, "val").tobytes()).decode() == text
    assert "2 files" in message(quiet_prepare, [tmp_path / "two.zip"], out=tmp_path / "out")


def test_from_must_fit(tmp_path):
    copy = write_text(tmp_path / "copy/other.txt", "hello " * 20)
    for names, source, hint in (
            (["enwik8"], tmp_path / "nowhere", "no such file"), (["enwik8"], copy.parent, "no file named"),
            (["math"], copy, "--from"), (["gsm8k", "enwik8"], copy, "--from")):
        assert hint in message(quiet_prepare, names, out=tmp_path, source=source)


@needs_shared
def test_named_corpora_from_local_copies(tmp_path):
    got = quiet_prepare(["shakespeare", "gsm8k", "wikitext2"], out=tmp_path, source=SHARED)
    headers = [[read_header(folder / f"{split}.bin") for split in ("train", "val")] for folder in got]
    assert [header["texts"] for header in headers[1]] == [7473, 1319]
    assert sum(header["count"] for header in headers[0]) == 1_115_394
    answers = re.findall(r"#### (.*)\n", tokens_in(got[1], "val").tobytes().decode())
    assert len(answers) == 1319
    assert all(arithmetic.final_answer(f"#### {answer}") == answer.replace(",", "") for answer in answers)


# --- preparing ---


def book(tmp_path, name="book.txt", text="a little book of words and of numbers 12 34\n"):
    return write_text(tmp_path / name, text * 60)


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_prepared_once_and_again_only_when_something_changed(tmp_path, capsys):
    path, out = book(tmp_path), tmp_path / "out"
    folder, = prepare([path], out=out)
    assert "book" in capsys.readouterr().out
    first = stamps(folder)
    assert prepare([path], out=out) == [folder] and stamps(folder) == first
    assert "already prepared" in capsys.readouterr().out
    prepare([path], out=out, max_tokens=500)
    assert read_header(folder / "train.bin")["count"] == 500 and stamps(folder) != first
    write_text(path, "another text altogether, longer than before\n" * 90)
    quiet_prepare([path], out=out, max_tokens=500)
    assert tokens_in(folder).tobytes().startswith(b"another text")
    before = stamps(folder)
    quiet_prepare([path], out=out, max_tokens=500, force=True)
    assert stamps(folder) != before
    assert {file.name for file in folder.iterdir()} == {"train.bin", "val.bin", "tokenizer.json"}


def test_a_failed_preparation_leaves_the_one_before(tmp_path, monkeypatch):
    path, out = book(tmp_path), tmp_path / "out"
    folder, = quiet_prepare([path], out=out)
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    write_text(path, "short")
    message(quiet_prepare, [path], out=out)
    book(tmp_path)
    monkeypatch.setattr(binfile, "open", lambda name, mode: FullDisk(name, mode), raising=False)
    assert "disk is full" in message(quiet_prepare, ["math"], out=out)
    assert "disk is full" in message(quiet_prepare, [write_text(path, "long text " * 3000)], out=out)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == good
    assert sorted(file.name for file in out.iterdir()) == [".lock", "book-byte"]


def test_a_mixture_of_two_preparations_is_never_taken_for_good(tmp_path):
    path = book(tmp_path)
    folder, = quiet_prepare([path], out=tmp_path / "out")
    other, = quiet_prepare([path], out=tmp_path / "other", max_tokens=700)
    os.replace(other / "train.bin", folder / "train.bin")         # as if killed between the two files
    assert inspect_folder(folder) is None
    quiet_prepare([path], out=tmp_path / "out")
    assert inspect_folder(folder)["settings"]["max_tokens"] == 0


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_refused_by_training_and_mended_by_preparing(tmp_path, capsys, name, damage):
    path, out = book(tmp_path), tmp_path / "out"
    folder, = quiet_prepare([path], "bpe", 300, out=out)
    good, victim = {file.name: file.read_bytes() for file in folder.iterdir()}, folder / name
    raw = bytearray(victim.read_bytes())
    raw[len(raw) - 30 if name == "tokenizer.json" else -3] ^= 1
    victim.write_bytes(raw if damage == "flip" else raw[:-9])
    if damage == "remove":
        victim.unlink()
    else:
        reason = message(open_text, str(path), "bpe", 300, out)
        assert str(victim) in reason and "python data/prepare.py" in reason
    quiet_prepare([path], "bpe", 300, out=out)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == good


def test_one_tokenizer_for_corpora_prepared_together(tmp_path):
    first, second = book(tmp_path), book(tmp_path, "song.txt", "la la la, an entirely different song é\n")
    out = tmp_path / "out"
    together = quiet_prepare([first, second], "bpe", 300, out=out)
    tokenizer = tokenizer_in(together[0])
    assert tokenizer_in(together[1]).fingerprint == tokenizer.fingerprint
    assert quiet_prepare([second, first], "bpe", 300, out=out) == together[::-1]
    alone, = quiet_prepare([first], "bpe", 300, out=out)
    assert alone.name == "book-bpe300" and alone not in together
    assert tokenizer_in(alone).fingerprint != tokenizer.fingerprint
    # a char tokenizer of the two knows the characters of both
    one, other = map(tokenizer_in, quiet_prepare([first, second], "char", out=out))
    assert one.fingerprint == other.fingerprint and one.encode("é1")
    # and a corpus can be given the tokenizer of another
    given, = quiet_prepare([second], together[0] / "tokenizer.json", out=out)
    assert tokenizer_in(given).fingerprint == tokenizer.fingerprint


def test_bpe_learns_from_training_text_alone(tmp_path):
    path = write_text(tmp_path / "a.txt", "alpha beta gamma " * 90 + "zzyzx " * 20)
    folder, = quiet_prepare([path], "bpe", 280, out=tmp_path)
    assert not [token for token in Tokenizer.load(folder / "tokenizer.json").tokens[256:] if b"z" in token]


def test_prepared_opens_what_is_there_and_makes_what_is_missing(tmp_path, capsys):
    path, out = book(tmp_path), tmp_path / "out"
    found, tokenizer = open_text(str(path), "char", dir=out, quiet=False)
    assert "preparing" in capsys.readouterr().out and tokenizer.kind == "char"
    assert open_text("book", "char", dir=out, quiet=False)[0] == found == [folder_of("book", "char", dir=out)]
    assert capsys.readouterr().out == ""                    # by its name, from now on, and nothing to say
    before = stamps(found[0])
    open_text("book", "char", dir=out, max_tokens=300)
    assert stamps(found[0]) != before and read_header(found[0] / "train.bin")["count"] == 300
    open_text("book", "char", dir=out)
    assert "--max_tokens 300" in capsys.readouterr().err    # what is there is used; that it is a part is said
    open_text("book", "byte", dir=out)                      # another tokenizer: the path is remembered
    write_text(path, "it has changed " * 50)
    open_text(str(path), "byte", dir=out)
    assert tokens_in(folder_of(path, dir=out)).tobytes().startswith(b"it has changed")
    (folder_of("book", dir=out) / "val.bin").unlink()      # a part is gone, and so is what it was made from
    path.rename(tmp_path / "elsewhere.txt")
    assert "val.bin: is missing" in message(open_text, "book", "byte", dir=out)
    (tmp_path / "elsewhere.txt").rename(path)
    both = [str(path), "markov"]
    found, _ = open_text(both, "byte", 0, out, 3000, True)
    assert [folder.name for folder in found] == ["book-byte", "markov-byte"]
    assert "different tokenizers" in message(open_text, both, "char", 0, out, 3000, True)


@pytest.mark.parametrize("arguments, hint", [
    (["pyton"], "nearest: python"), (["no/such/file.txt"], "neither"),
    (["math", "--tokenizer", "bype"], "byte"), (["math", "--tokenizer", "bpe", "--vocab_size", "100"], "257"),
    (["math", "math"], "one corpus")])
def test_the_program_refuses_in_one_line(tmp_path, capsys, arguments, hint):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and hint in error


def test_names_of_files_do_not_take_those_of_known_corpora(tmp_path):
    path = write_text(tmp_path / "python.txt", "not python at all " * 30)
    folder, = quiet_prepare([path], out=tmp_path)
    assert folder.name == "python_txt_-byte"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    write_text(tmp_path / "file", "x")
    assert "--out" in message(quiet_prepare, ["math"], out=tmp_path / "file" / "out")


def run_program(*arguments, python=(), how=(ROOT / "data" / "prepare.py",), **options):
    command = [sys.executable, *python, *how, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_the_program_runs_from_anywhere_and_a_file_gets_no_control_characters(tmp_path):
    path = book(tmp_path)
    options = "--tokenizer bpe --vocab_size 270 --out out".split()
    program = run_program("book.txt", *options, cwd=tmp_path)
    out, error = program.communicate()
    assert program.returncode == 0 and "book" in out and not re.search(r"[\r\x1b]", out + error)
    assert inspect_folder(tmp_path / "out" / "book-bpe270", verify=True) and path.exists()


def test_killed_preparations_leave_nothing_that_counts(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "out" / "markov-byte"
    quiet_prepare(["markov"], out=out, max_tokens=2000)
    good = {name: (folder / name).read_bytes() for name in building.FILES}
    program = run_program("markov", "--max_tokens", 10**9, "--out", out)
    temporary = out / ".markov-byte.tmp" / ".train.bin.tmp"
    while program.poll() is None and not (temporary.exists() and temporary.stat().st_size > 10**6):
        time.sleep(0.02)
    os.kill(program.pid, signal.SIGKILL)
    program.communicate()
    assert temporary.exists()                               # it was in the middle of it
    assert {name: (folder / name).read_bytes() for name in building.FILES} == good
    assert inspect_folder(folder, verify=True)
    quiet_prepare(["markov"], out=out, max_tokens=3000)     # the lock died with its owner
    assert read_header(folder / "train.bin")["count"] == 3000
    names = sorted(path.name for path in out.iterdir())
    assert names[:2] == [".lock", "markov-byte"] and re.fullmatch("markov-byte-old-[0-9a-f]{8}", names[2])
    assert len(names) == 3 and {name: (out / names[2] / name).read_bytes() for name in building.FILES} == good


def test_interrupted_by_the_user(tmp_path):
    program = run_program("markov", "--max_tokens", 10**9, "--out", tmp_path)
    temporary = tmp_path / ".markov-byte.tmp" / ".train.bin.tmp"
    while program.poll() is None and not temporary.exists():        # it would go on for an hour
        time.sleep(0.02)
    program.send_signal(signal.SIGINT)
    _, error = program.communicate()
    assert program.returncode == 130 and "Traceback" not in error and not temporary.exists()


# --- a run's tokens outlive its text ---


def sums(folders):
    return [read_header(folder / "train.bin")["sha256"] for folder in folders]


def edited(path):
    write_text(path, "something else altogether, and longer " * 90)


CHANGES = {
    "deleted": (os.remove, "is gone"),
    "moved": (lambda path: path.rename(path.with_name("moved.txt")), "is gone"),
    "edited": (edited, "has changed"),
    "a folder now": (lambda path: (path.unlink(), path.mkdir()), "has changed"),
    "a pipe now": (lambda path: (path.unlink(), os.mkfifo(path)), "cannot be read")}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_run_goes_on_with_its_tokens_whatever_became_of_the_text(tmp_path, capsys, kind, change):
    path, out = book(tmp_path), tmp_path / "out"
    (folder,), tokenizer = open_text(str(path), kind, 300, out)
    began, before = sums([folder]), stamps(folder)
    act, told = CHANGES[change]
    act(path)
    capsys.readouterr()
    (again,), same = open_text(str(path), kind, 300, out, checksums=began)
    assert again == folder and stamps(folder) == before and same.fingerprint == tokenizer.fingerprint
    error = capsys.readouterr().err
    assert told in error and str(folder) in error and error.count("\n") == 1


def test_a_path_whose_text_is_gone_still_names_what_was_prepared(tmp_path, monkeypatch):
    path, out = book(tmp_path / "texts"), tmp_path / "out"
    found, _ = open_text(str(path), dir=out)
    path.unlink()
    monkeypatch.chdir(path.parent)
    for name in (str(path), "book.txt", "../texts/book.txt", "book"):
        assert open_text(name, dir=out)[0] == found
    assert "neither" in message(open_text, str(tmp_path / "other/book.txt"), dir=out)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokens_that_are_replaced_are_kept_for_the_runs_that_need_them(tmp_path, capsys, kind):
    path, other, out = book(tmp_path), book(tmp_path, "other.txt", "one other text\n"), tmp_path / "out"
    both = [str(path), str(other)]
    folders, tokenizer = open_text(both, kind, 300, out)
    began, old = sums(folders), tokens_in(folders[0]).tolist()
    edited(path)
    new, _ = open_text(both, kind, 300, out)
    assert new == folders and sums(new)[0] != began[0]
    error = capsys.readouterr().err
    assert "its source" in error and "kept in" in error and "-old-" in error
    again, same = open_text(both, kind, 300, out, checksums=began)
    assert sums(again) == began and tokens_in(again[0]).tolist() == old
    assert same.fingerprint == tokenizer.fingerprint and again[0] != folders[0]
    assert "prepared anew" in capsys.readouterr().err
    quiet_prepare(both, kind, 300, out=out, force=True)             # the same tokens: nothing to keep
    assert len(list(out.glob("book-*-old-*"))) == 1


def test_a_limit_or_a_part_that_is_edited_costs_no_run_its_tokens(tmp_path):
    path, out = book(tmp_path), tmp_path / "out"
    began = sums(open_text(str(path), dir=out)[0])
    open_text(str(path), dir=out, max_tokens=300)
    (kept,), _ = open_text(str(path), dir=out, checksums=began)
    val = tokens_in(kept, "val").tolist()
    quiet_prepare([path], out=out)
    text = path.read_bytes()
    write_text(path, text[:-5] + b"12345")                          # the last tenth: training stays the same
    quiet_prepare([path], out=out)
    kept = [tokens_in(folder, "val").tolist() for folder in out.glob("book-byte-old-*")]
    assert val in kept and tokens_in(out / "book-byte", "val").tobytes().endswith(b"12345")


def test_a_run_whose_tokens_are_lost_makes_them_again_or_is_refused(tmp_path):
    path, out = book(tmp_path), tmp_path / "out"
    (folder,), _ = open_text(str(path), dir=out)
    began = sums([folder])
    shutil.rmtree(folder)
    assert sums(open_text(str(path), dir=out, checksums=began)[0]) == began
    shutil.rmtree(folder)
    edited(path)
    reason = message(open_text, str(path), dir=out, checksums=began)
    assert str(path) in reason and "other text" in reason and "train.init_from" in reason


# --- texts of one name ---


def test_texts_of_one_stem_each_have_a_folder(tmp_path, capsys):
    out, paths = tmp_path / "out", [book(tmp_path / place, "my.txt", place) for place in ("one ", "two ")]
    first, = quiet_prepare([paths[0]], out=out)
    before = stamps(first)
    second, = quiet_prepare([paths[1]], out=out)
    assert first.name == "my-byte" and re.fullmatch("my-[0-9a-f]{6}-byte", second.name)
    for path, folder in zip(paths, (first, second)):
        assert quiet_prepare([path], out=out) == [folder] == open_text(str(path), dir=out)[0]
        assert tokens_in(folder).tobytes().startswith(path.read_bytes()[:100])
    assert stamps(first) == before and open_text("my", dir=out)[0] == [first]
    assert capsys.readouterr().err == ""
    assert [folder.name[:2] for folder in quiet_prepare(paths[::-1], "char", out=out)] == ["my", "my"]


def test_two_texts_of_one_stem_in_one_call(tmp_path):
    out, paths = tmp_path / "out", [book(tmp_path / place, "my.txt", place) for place in ("one ", "two ")]
    folders = quiet_prepare(paths, "bpe", 260, out=out)
    assert len(set(folders)) == 2 and quiet_prepare(paths[::-1], "bpe", 260, out=out) == folders[::-1]
    assert open_text([str(path) for path in paths], "bpe", 260, out)[0] == folders


def test_one_corpus_by_two_names_is_said(tmp_path, monkeypatch):
    path = book(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.txt").symlink_to(path)
    quiet_prepare([path], out="out")
    for names in (["book.txt", "./book.txt"], ["book.txt", "link.txt"], ["book", str(path)], ["math", "math"]):
        for call in (partial(quiet_prepare, out="out"), partial(open_text, dir="out")):
            reason = message(call, names)
            assert "one corpus" in reason and all(name in reason for name in names)


def test_a_folder_prepared_before_is_used_as_it_is(tmp_path):
    """The header of a prepared folder, key by key: with other keys, every corpus would be prepared
    again."""
    path = book(tmp_path)
    folder, = quiet_prepare([path], out=tmp_path)
    header = read_header(folder / "train.bin")
    assert sorted(header["settings"]) == ["label", "max_tokens", "source", "trained_on"]
    assert header["settings"]["label"] == "book-byte" and header["path"] == str(path)
    assert re.fullmatch(re.escape(str(path)) + ", state [0-9a-f]{12}", header["settings"]["source"])


# --- what could be waited for without end ---


def make_special(path, kind):
    path.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_pipes_and_sockets_are_not_waited_for(kind):
    with tempfile.TemporaryDirectory() as place:                # the path of a socket must be short
        place = Path(place)
        for name in "abc":
            write_text(place / "texts" / name, f"the text of {name}\n" * 9)
        make_special(place / "texts" / "special", kind)
        for name, status, said in (("texts", 0, "skipped 1 of 4"), ("texts/special", 2, "is a pipe, a socket")):
            program = run_program(name, "--out", "out", cwd=place)
            try:
                _, error = program.communicate(timeout=100)
            finally:
                program.kill()
            assert program.returncode == status and said in error


def test_a_device_is_refused(tmp_path):
    assert "device" in message(quiet_prepare, ["/dev/zero"], out=tmp_path)


def test_a_folder_above_everything_is_refused(tmp_path, monkeypatch):
    for i in range(9):
        write_text(tmp_path / f"texts/{i % 3}/{i}.txt", "text " * 20)
    monkeypatch.setattr(textfiles, "MOST_FILES", 8)
    assert "more than 8 files" in message(quiet_prepare, [tmp_path / "texts"], out=tmp_path / "out")
    assert "more than 8 files" in message(open_text, str(tmp_path / "texts"), dir=tmp_path / "out")
    assert "more than 8 files" in message(quiet_prepare, ["gsm8k"], source=tmp_path, out=tmp_path / "out")
    monkeypatch.setattr(textfiles, "MOST_FILES", 9)
    monkeypatch.setattr(textfiles, "MOST_BYTES", 899)
    assert "give the folder of your texts" in message(quiet_prepare, [tmp_path / "texts"], out=tmp_path / "out")


def test_long_work_says_what_it_is(tmp_path, capsys, monkeypatch):
    with console.working("nothing yet", False):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "working", partial(console.working, first=0, every=60))
    path = write_text(tmp_path / "a.txt", "a" * 50_000)
    prepare([path], "bpe", 1 << 20, out=tmp_path)
    error = capsys.readouterr().err
    for what in ("bpe: counting words: ", "bpe: merging to 1048576 tokens: ", "preparing a, train: "):
        assert what in error
    prepare([path], "bpe", 1 << 20, out=tmp_path, quiet=True, force=True)
    assert "so far" not in capsys.readouterr().err


# --- which text it was ---


def test_what_was_prepared_is_told_by_version_and_checksum(tmp_path, capsys):
    folder, = prepare(["docs"], out=tmp_path, max_tokens=1000)
    header, said = read_header(folder / "train.bin"), capsys.readouterr().out
    assert header["settings"]["source"] == f"Python {'.'.join(map(str, sys.version_info[:3]))}"
    assert header["settings"]["source"] in said and header["sha256"][:12] in said


def test_no_text_is_read_in_the_encoding_of_the_machine(tmp_path):
    path = book(tmp_path, text="naïve café\n")
    code = ("import sys, warnings; from data.prepare import main; "
            "warnings.filterwarnings('error', '', EncodingWarning, 'data'); "
            "sys.exit(main(sys.argv[1:]))")
    strict = dict(python=("-X", "warn_default_encoding"), how=("-c", code), cwd=ROOT)
    for tokenizer in ("byte", "bpe"):
        program = run_program(path, "--tokenizer", tokenizer, "--vocab_size", 260, "--out", tmp_path, "--quiet",
                              **strict)
        assert program.communicate() and program.returncode == 0


# --- odd values ---


@pytest.mark.parametrize("arguments, hint", [
    (["a\0b"], "null byte"), (["x" * 5000], "name too long"), ([""], "empty name"),
    (["math", "--out", "x" * 300], "name too long"), (["math", "--out", "a\0b"], "null byte"),
    (["math", "--tokenizer", "x" * 5000], "name too long"), (["enwik8", "--from", "a\0b"], "null byte")])
def test_odd_paths_are_one_line(tmp_path, monkeypatch, capsys, arguments, hint):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and hint in error and len(error) < 400


@pytest.mark.parametrize("option", ["--vocab_size", "--max_tokens"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1", "9" * 400, "1e300", "0.5"])
def test_odd_numbers_are_refused(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as caught:
        main(["math", option, value, "--out", str(tmp_path)])
    assert caught.value.code == 2 and option in capsys.readouterr().err


def test_numbers_too_large_for_a_corpus_are_refused(tmp_path):
    assert "max_tokens" in message(open_text, "math", dir=tmp_path, max_tokens=10**300)
    assert "vocab_size" in message(open_text, "math", "bpe", 10**300, tmp_path)


def test_home_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    book(tmp_path)
    folder, = quiet_prepare(["~/book.txt"], out="~/out")
    assert folder == tmp_path / "out/book-byte"
    shutil.copy(folder / "tokenizer.json", tmp_path / "own.json")
    assert open_text("~/book.txt", "~/own.json", dir="~/out", checksums=sums([folder]))[0] == [folder]
    assert open_text("~/book.txt", "~/own.json", dir="~/out")[0] == [folder]
    write_text(tmp_path / "copy.jsonl", gsm_lines(20))
    assert quiet_prepare(["gsm8k"], source="~/copy.jsonl", out="~/out")[0].parent == tmp_path / "out"


def test_no_control_character_of_a_name_reaches_the_terminal(tmp_path, capsys):
    odd = "a\x1b[31m\n\u202e\x9bb"
    good, bad = book(tmp_path / odd, odd + ".txt"), write_text(tmp_path / odd / "bad", b"\0" * 99)
    for i in range(3):
        write_text(tmp_path / odd / f"more/{i}", "text " * 9)
    write_text(tmp_path / odd / "more" / (odd + ".png"), b"\0")
    arguments = [str(good), str(tmp_path / odd / "more"), "--out", str(tmp_path / odd / "out")]
    assert main(arguments) == main(arguments) == 0 and main([str(bad), *arguments[-2:]]) == 2
    said = "".join(capsys.readouterr())
    assert "\\x1b" in said and "already prepared" in said and "skipped" in said
    assert all(char.isprintable() or char == "\n" for char in said)


def test_weights_without_a_sum_are_refused(corpora):
    assert "weights" in message(Batches, corpora, [1e308, 1e308, 1.0], 16, 4, 0)


# --- permissions ---


AS_NOBODY = "\n".join([
    f"import os, sys; sys.path.insert(0, {str(ROOT)!r})",
    "from data.prepare import main, prepared; from settings import DataConfig",
    "if os.getuid() == 0: os.setgroups([]); os.setuid(65534)", ""])


@pytest.fixture
def place():
    """A folder that every user may enter and write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)
        for path in Path(folder).rglob("*"):                # else an ordinary user could not remove it
            path.chmod(0o700)


def as_nobody(*arguments, cwd, code="sys.exit(main(sys.argv[1:]))"):
    """(status, stderr) of the program, or of other code, run by a user without special rights."""
    program = run_program(*arguments, how=("-c", AS_NOBODY + code), cwd=cwd)
    _, error = program.communicate()
    return program.returncode, error


@pytest.mark.parametrize("closed, hint", [
    ("texts", "texts: cannot be read: Permission denied; change its permissions"),
    ("texts/sub", "texts/sub: cannot be read: Permission denied; change its permissions"),
    ("texts/sub/0.txt", "texts/sub/0.txt: cannot be read: Permission denied; change its permissions"),
    ("out", "out/.lock: cannot be written: Permission denied; choose another folder: --out, data.dir")])
def test_what_may_not_be_read_or_written_is_named(place, closed, hint):
    for i in range(9):
        write_text(place / f"texts/{'sub' if i % 2 == 0 else 'open'}/{i}.txt", f"text {i} " * 30)
    (place / "out").mkdir()
    (place / "out").chmod(0o777)
    (place / closed).chmod(0o555 if closed == "out" else 0)
    status, error = as_nobody("texts", "--out", place / "out", cwd=place)
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1 and hint in error
    assert not list((place / "out").rglob("*.bin"))


def test_what_is_prepared_can_be_used_where_nothing_may_be_written(place):
    path, out = book(place), place / "out"
    open_text(str(path), dir=out)
    out.chmod(0o555)
    assert as_nobody(cwd=place, code="prepared(DataConfig(name='book.txt', dir='out'))") == (0, "")


def test_one_sentence_for_each_error_of_a_file():
    for code, done, hint in ((errno.EACCES, "read", "chmod"), (errno.EACCES, "written", "another folder"),
                             (errno.EROFS, "written", "another folder"), (errno.ENAMETOOLONG, "read", "name"),
                             (errno.ELOOP, "read", "link")):
        text = binfile.explain(OSError(code, os.strerror(code)), "/some/file", done=done)
        assert text.startswith(f"/some/file: cannot be {done}: {os.strerror(code)}; ") and hint in text


def test_the_program_is_a_module_too(tmp_path):
    program = run_program(book(tmp_path), "--out", tmp_path / "out", how=("-m", "data.prepare"), cwd=ROOT)
    out, error = program.communicate()
    assert program.returncode == 0 and "book" in out, error


# --- batches ---


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Three corpora of 600, 1000 and 333 training tokens; token i of each is i mod 256, so a window
    tells where it begins."""
    made = []
    for name, count in (("a", 600), ("b", 1000), ("c", 333)):
        folder = tmp_path_factory.mktemp(name)
        for split, n in (("train", count), ("val", 100)):
            write_bin(folder / f"{split}.bin", [np.arange(n)], {**META, "vocab_size": 2000})
        made.append(folder)
    return made


def rows(batches, steps, **cut):
    parts = [batches.batch(step, **cut) for step in steps]
    return [torch.cat(columns) for columns in zip(*parts)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 5), st.integers(0, 4))
def test_every_window_is_seen_once_per_epoch(corpora, block_size, seed, epoch):
    batches = Batches(corpora[:1], None, block_size, 1, seed)
    count = batches.corpora[0].per_epoch
    x, y, _ = rows(batches, range(epoch * count, (epoch + 1) * count))
    starts = sorted(x[:, 0].tolist())
    assert starts == list(range(starts[0], starts[0] + count * block_size, block_size))
    assert (x == x[:, :1] + torch.arange(block_size)).all()
    assert (y == x + 1).all() and y.max() < 600
    assert starts[0] == 0 or epoch > 0
    assert batches.epochs((epoch + 1) * count) == [epoch + 1.0]


def test_epochs_differ_in_order_and_in_grid(corpora):
    batches = Batches(corpora[:1], None, 10, 59, 0)
    first, second = (batches.batch(step)[0][:, 0].tolist() for step in (0, 1))
    assert first != second and sorted(first) == list(range(0, 590, 10))
    assert len({batches.corpora[0].order(epoch)[0] for epoch in range(30)}) > 5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 2), (2, 3), (12, 1), (1, 12)]),
       st.integers(1, 3))
def test_all_cuts_of_a_step_are_the_same_sequences(corpora, step, cut, n_corpora):
    grad_accum, world = cut
    whole = Batches(corpora[:n_corpora], None, 16, 12, 3).batch(step)
    fresh = Batches(corpora[:n_corpora], None, 16, 12, 3)       # asked in another order, as processes would
    parts = {(micro, rank): fresh.batch(step, micro, grad_accum, rank, world)
             for rank in range(world) for micro in reversed(range(grad_accum))}
    for i in range(3):
        joined = torch.cat([parts[micro, rank][i] for micro in range(grad_accum) for rank in range(world)])
        assert joined.dtype == torch.int64 and torch.equal(joined, whole[i])


def test_batches_depend_on_the_seed_and_on_nothing_else(corpora):
    one = Batches(corpora, [1, 2, 1], 16, 8, 7)
    steps = [one.batch(step) for step in range(250)]
    torch.manual_seed(1), np.random.seed(1)
    again = Batches(corpora, [1, 2, 1], 16, 8, 7)
    for step in (249, 3, 124, 125, 0):                  # in any order, across blocks: resuming is arithmetic
        assert all(torch.equal(a, b) for a, b in zip(again.batch(step), steps[step]))
    assert not torch.equal(Batches(corpora, [1, 2, 1], 16, 8, 8).batch(0)[0], steps[0][0])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=3))
def test_weights_hold_exactly_in_every_block(corpora, weights):
    batches = Batches(corpora, weights, 16, 100, 0)
    for block in (0, 3):
        domain = rows(batches, range(block * 10, block * 10 + 10))[2]
        assert np.bincount(domain, minlength=3).tolist() == batches.quotas.tolist()
    assert np.abs(batches.quotas / BLOCK - np.array(weights) / sum(weights)).max() < 1 / BLOCK


def test_corpora_of_a_mixture_each_go_through_their_epochs(corpora):
    batches = Batches(corpora, None, 16, 50, 0)
    x, _, domain = rows(batches, range(20))
    assert batches.quotas.tolist() == [334, 333, 333]
    for j, windows in enumerate(batches.corpora):
        firsts = x[domain == j][:, 0]
        assert len(set(firsts[:windows.per_epoch].tolist())) == windows.per_epoch
        assert batches.epochs(20)[j] == pytest.approx(len(firsts) / windows.per_epoch)
        assert batches.epochs(7)[j] == pytest.approx((domain[:350] == j).sum().item() / windows.per_epoch)


def test_quotas():
    assert quotas_of([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert quotas_of([0, 3, 1], 1000).tolist() == [0, 750, 250]


def test_batches_refuse_in_one_line(corpora, tmp_path):
    foreign = {**META, "vocab_size": 2000, "fingerprint": "another"}
    write_bin(tmp_path / "train.bin", [np.arange(100)], foreign)
    for hint, bad_folders, weights, block_size, seed in (
            ("block_size", corpora, None, 333, 0), ("weights", corpora, [1, 2], 16, 0),
            ("weights", corpora, [1, -1, 1], 16, 0), ("weight", corpora, [1, 1, 1e-9], 16, 0),
            ("different tokenizers", [corpora[0], tmp_path], None, 16, 0),
            ("none", [tmp_path / "none"], None, 16, 0),
            ("seed", corpora, None, 16, -1)):
        assert hint in message(Batches, bad_folders, weights, block_size, 4, seed)
    assert "grad_accum" in message(Batches(corpora, None, 16, 4, 0).batch, 0, grad_accum=3)
    assert "val.bin" in message(EvalBatches, corpora, 100, 4, 1, np.ones(2000))
    Batches(corpora, None, 332, 4, 0).batch(5)          # exactly one window is enough


def test_evaluation_windows_are_fixed_and_evenly_spaced(corpora):
    lengths = np.arange(2000)
    evaluation = EvalBatches(corpora[:2], 9, 4, 2, lengths)
    assert len(evaluation) == 4
    for index, (x, y, domain, size) in enumerate(evaluation):
        assert domain.tolist() == [index // 2] * 4 and torch.equal(y, x + 1)
        assert size == y.sum().item()
    firsts = torch.cat([x[:, 0] for x, *_ in evaluation[:2]])
    assert firsts.tolist() == [0, 9, 18, 36, 45, 54, 72, 81]            # 8 of the 11 windows
    everything = EvalBatches(corpora[:1], 9, 4, 1000, lengths)          # more than there is: each window once
    assert torch.cat([x[:, 0] for x, *_ in everything]).tolist() == list(range(0, 99, 9))
    shared = [batch for rank in range(2) for batch in everything[rank::2]]
    assert sum(len(batch[0]) for batch in shared) == 11


def test_reading_batches_does_not_map_the_corpus_into_memory(tmp_path):
    write_bin(tmp_path / "train.bin", (np.zeros(10**6, np.uint8) for _ in range(16)), META)
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    batches = Batches([tmp_path], None, 1000, 100, 0)
    batches.batch(0)
    before = resident()
    for step in range(1, 160):
        batches.batch(step)
    assert resident() - before < 5e6                    # of the 16 MB that were read
