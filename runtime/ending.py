"""How a program begins, what it says, and how it ends."""
import contextlib
import shlex
import signal
import sys
from pathlib import Path

from data.binfile import DataError, explain
from data.console import plain
from runtime import memory
from runtime.streams import Stream, give_up, interrupted, open_streams
from runtime.terminal import PLAIN

ROOT = Path(__file__).parents[1]


def tell(text, file=None):
    """Prints a line on stderr (or `file`), control characters made visible. What a program does matters more
    than what it says: where it cannot be written it is lost."""
    with contextlib.suppress(OSError, ValueError):
        print(text.translate(PLAIN), file=file or sys.stderr, flush=True)


def quoted(path):
    """A path as a word of a command line."""
    text = str(path)
    return shlex.quote("./" + text if text.startswith("-") else text)


def typed():
    """The folder of this repository as the user typed it to start the program; the current one where that is
    not known."""
    path = Path(sys.argv[0])
    return path.parent if path.suffix == ".py" and path.resolve().parent == ROOT else Path()


def program(name):
    """How to call a program of this repository from here: "train.py", "lab.plots"."""
    folder = typed()
    if name.endswith(".py"):
        return f"python {quoted(folder / name)}"
    return f"python -m {name}" if folder == Path() else f"PYTHONPATH={quoted(folder)} python -m {name}"


class Ending:
    """How a program begins and ends: `with Ending() as end: ...` and then `return end.status`. A mistake or
    failure that is meant for people (an exception with a `status`, DataError, a file that cannot be opened,
    too little memory, Ctrl-C) ends in one line, not a traceback. Status: 0 done, 1 a failure, 2 a mistake in
    what was asked for, 130 Ctrl-C, 141 the reader left.

    speak(): whether this process may tell an error. output: whether what goes to stdout is what the program is
    for, so that it fails where that cannot be written; else it may be lost like what goes to stderr.
    """

    def __init__(self, speak=lambda: True, output=True):
        self.status, self.speak, self.output = 0, speak, output

    def __enter__(self):
        open_streams()
        self.streams = sys.stdout, sys.stderr
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")    # a terminal that is not UTF-8 gets question marks
        sys.stdout, sys.stderr = Stream(sys.stdout, may_fail=self.output), Stream(sys.stderr)
        self.stdout = sys.stdout
        # the imports are over: from here on Ctrl-C is an exception
        self.alone = signal.getsignal(signal.SIGINT) is interrupted
        if self.alone:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(self, kind, error, trace):
        lost = self.lost_output(kind)
        if lost and kind in (None, SystemExit):
            error = lost
        told = self.judge(error, lost)
        if told and self.speak():
            fail(told)
        sys.stderr.flush()
        sys.stdout, sys.stderr = self.streams
        if self.alone:                                  # what is left to do is Python's own
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return bool(self.status)

    def lost_output(self, kind):
        """The error of what could not be written to stdout, or None."""
        with contextlib.suppress(OSError, ValueError):
            self.stdout.flush()
        if self.stdout.failed:
            give_up(self.stdout.stream)
        # words alone may be lost, but not the text of --help
        return self.stdout.failed if self.output or kind is SystemExit else None

    def judge(self, error, lost):
        """Sets the status of an error; returns what to tell, or None. The status stays 0 for an error that is
        none of these."""
        if isinstance(error, KeyboardInterrupt):
            self.status = 130
        elif isinstance(error, BrokenPipeError):        # such as `head`, which has what it wants
            self.status = 141
            return None
        elif isinstance(error, DataError):
            self.status = 2
        elif isinstance(getattr(error, "status", None), int):
            self.status = error.status
        elif error and (text := memory.shortage(error)):
            self.status, error = 1, text
        elif error and error is lost:
            self.status, error = 1, f"standard output cannot be written: {error}"
        elif isinstance(error, OSError) and error.filename is not None:
            self.status, error = 1, explain(error, error.filename, done="opened", remedy="give another path")
        return error if self.status else None


def fail(message):
    """Says `error: message` on stderr, or `interrupted` of a KeyboardInterrupt; returns the exit status, 2 or
    130, as shells report what Ctrl-C ended."""
    stopped = isinstance(message, KeyboardInterrupt)
    tell("\ninterrupted" if stopped else f"error: {plain(message)}")
    return 130 if stopped else 2
