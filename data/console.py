"""What the preparation of data says to a person: plain characters, on stderr."""
import sys
import threading
import time
from contextlib import contextmanager

from tqdm import tqdm


def plain(text):
    """The text with every character that a terminal does not simply print written as an escape:
    \\x1b."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def note(text):
    """Prints one line that stops nothing, whether quiet or not."""
    print(f"note: {plain(text)}", file=sys.stderr)


@contextmanager
def working(what, quiet, first=2.0, every=30.0):
    """Prints `what` while the block runs: after `first` seconds, then every `every` seconds."""
    ended, start = threading.Event(), time.monotonic()

    def tell():
        wait = first
        while not ended.wait(wait):
            seconds = time.monotonic() - start
            print(f"{plain(what)}: {seconds:.0f} s so far", file=sys.stderr, flush=True)
            wait = every

    # A thread speaks also while one long call (a regular expression, tiktoken) runs.
    thread = threading.Thread(target=tell, daemon=True)
    if not quiet:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if not quiet:
            thread.join()


@contextmanager
def progress(total, title, quiet, **options):
    """Yields a tqdm bar. Where stderr is no terminal the bar stays hidden, because its control
    characters would stay in the file, and `working` speaks instead."""
    terminal = sys.stderr.isatty()
    with working(title, quiet or terminal):
        with tqdm(total=total or None, desc=title, disable=quiet or not terminal, leave=False,
                  unit_scale=True, **options) as bar:
            yield bar
