"""What a program does before its other imports, which take seconds: it names the Python that it needs, opens
streams that are closed, and ends in one line at Ctrl-C. Only for `if __name__ == "__main__"`."""
import signal
import sys

if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer is needed; this is Python %d.%d" % tuple(sys.version_info[:2]))

from runtime.streams import interrupted, open_streams

open_streams()
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:       # else somebody wants it ignored
    signal.signal(signal.SIGINT, interrupted)
