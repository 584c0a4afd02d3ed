"""What the torture programs share: a folder with tiny corpora and runs, and a way to call a program as a user
would but within this process, which saves the seconds that importing takes."""
import contextlib
import io
import signal
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

import train
from data.prepare import prepare
from runtime import checkpoint

ROOT = Path(__file__).resolve().parents[2]
LINES = {"one": "def f(x): return x + 1  # emoji \U0001f600\r\n", "two": "all happy families are alike. "}
TINY = {"model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 16, "ffn.d_ff": 16,
        "ffn.n_expert": 4, "data.name": "one", "train.batch_size": 4, "train.max_steps": 2,
        "train.warmup_steps": 1, "train.eval_batches": 1, "train.sample_tokens": 0, "train.device": "cpu"}


class Result(NamedTuple):
    """How a program ended. status: None if it raised."""
    status: int | None
    out: str
    err: str

    def refusal(self):
        """The one line in which it refused; None if it ended otherwise."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        others = [line for line in lines if not line.startswith(("error: ", "note: ", "warning: "))
                  and "going back to" not in line]
        return errors[0] if self.status in (1, 2) and len(errors) == 1 and not others else None


class TooLong(BaseException):
    """Not an Exception: nothing that a program catches may swallow it."""


def too_long(number, frame):
    raise TooLong


def call(main, *argv, seconds=120):
    """The Result of a program's main(argv). A program that takes too long counts as one that raised."""
    out, err = io.StringIO(), io.StringIO()
    old = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(word) for word in argv])
    except SystemExit as e:                                 # argparse
        status = e.code
    except (Exception, TooLong, KeyboardInterrupt):
        status = None
        err.write(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    return Result(status, out.getvalue(), err.getvalue())


def words(settings):
    """Settings by dotted names as a command line."""
    return [f"--{key}={value}" for key, value in settings.items()]


class Home:
    """A folder with prepared corpora (one, two; by byte, char, bpe) and trained runs (moe, dense, peer)."""

    RUNS = {"moe": {}, "dense": {"ffn.kind": "dense"},
            "peer": {"ffn.kind": "peer", "ffn.n_keys": 4, "ffn.peer_heads": 2, "ffn.peer_top_k": 2}}

    def __init__(self, folder):
        self.folder, self.data = Path(folder), Path(folder) / "prepared"
        self.empty = self.folder / "empty.toml"

    def build(self):
        """Makes it all."""
        self.folder.mkdir()
        self.empty.write_text("")
        for name, line in LINES.items():
            (self.folder / f"{name}.txt").write_bytes((line * 120).encode())
        for kind in ("byte", "char", "bpe"):
            texts = [str(self.folder / f"{name}.txt") for name in LINES]
            prepare(texts, kind, 260, out=self.data, quiet=True)
        for name, settings in self.RUNS.items():
            result = self.train(self.folder / name, {"train.max_steps": 4, "train.eval_every": 2} | settings)
            if result.status != 0:
                raise RuntimeError(result.err)
        return 0

    def command(self, out, settings):
        """Arguments of train.py for a tiny run."""
        return [self.empty, "--out", out, "--quiet", *words(TINY | {"data.dir": self.data} | settings)]

    def train(self, out, settings, *more):
        return call(train.main, *self.command(out, settings), *more)


def same_checkpoints(a, b):
    """What differs between two checkpoint files beside times and paths; empty if nothing."""
    a, b = checkpoint.load(a), checkpoint.load(b)
    own = {"seconds", "ancestry", "config"}
    found = [key for key in a.header if key not in own and a.header[key] != b.header[key]]
    for part in ("model", "optimizer"):
        x, y = getattr(a, part), getattr(b, part)
        found += [n for n in x.keys() | y.keys() if n not in x or n not in y or not torch.equal(x[n], y[n])]
    return found
