"""The standard streams of a program. What it says on stderr may be lost, and the program goes on."""
import contextlib
import os
import sys


class Stream:
    """A standard stream that remembers its first failure (failed, else None). Of words (may_fail=False) writing
    never fails: a terminal that is gone, a reader that left and a full disk cost the words alone."""

    def __init__(self, stream, may_fail=False):
        self.stream, self.may_fail, self.failed = stream, may_fail, None

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, do, *text):
        try:
            return do(*text)
        except (OSError, ValueError) as e:                      # ValueError: the stream was closed
            self.failed = self.failed or e
            if self.may_fail:
                raise
            give_up(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def give_up(stream):
    """Lets a stream that cannot be written lead nowhere. What waits in its buffer would else fail once more
    when Python ends, which makes the exit status 120."""
    with contextlib.suppress(OSError, ValueError):              # it is closed, or a file in memory
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_streams():
    """Opens those of the streams 0 to 2 that the program was started without (`2>&-`), so that no other file
    gets their number. Writing to them fails, as it should."""
    while (number := os.open(os.devnull, os.O_RDONLY)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", errors="replace", closefd=False))


def interrupted(number, frame):
    """Ends a program by Ctrl-C while it is still importing: one line and status 130."""
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    os._exit(130)
