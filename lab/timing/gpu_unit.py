"""What the parts of lab/gpu.py share: a unit of work, where it was measured, and how two results
are compared."""
import functools
import os
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from kernels.common import HAS_TRITON, triton
from lab.papers.jobs import commit
from lab.timing.measure import device_name

# Relative errors that a path may have. One expert sums up to 38,000 pairs in float32. The bfloat16
# of Triton's interpreter cuts bits off.
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class Unit(NamedTuple):
    """A piece of a part that succeeds or fails by itself. run(end) returns its rows, dicts; end is
    the time.time() at which it must be over. A row whose `held` is False failed; one whose `held`
    is None is not finished."""
    name: str
    run: Callable
    least: float = 5        # seconds that must be left, or it is not begun
    limit: float = 90       # seconds after which it is stopped and counts as failed


class Place(NamedTuple):
    """Folders of a call: what comes home, and what stays behind."""
    out: Path
    scratch: Path


@functools.cache
def where():
    """The columns of every row that say where it was measured. Outside git the commit is the
    environment variable COMMIT."""
    return dict(card=device_name(DEVICE), torch=torch.__version__,
                triton=triton.__version__ if HAS_TRITON else "none",
                commit=commit() or os.environ.get("COMMIT", "unknown"))


def error_rows(names, got, want, limit, more=None):
    """A row for each pair of tensors: the norm of the difference over the norm of the twin."""
    rows = []
    for name, a, b in zip(names, got, want, strict=True):
        a, b = a.detach().double(), b.detach().double()
        size = b.norm().item()
        error = (a - b).norm().item() / (size or 1.0) if a.shape == b.shape else float("inf")
        # NaN fails too
        rows.append((more or {}) | dict(quantity=name, error=error, limit=limit,
                                        held=error <= limit))
    return rows


def poison():
    """Fills memory with NaN and gives it back, so that a result of which a path forgets a part
    shows NaN there."""
    blocks = [torch.full((2 ** size,), torch.nan, device=DEVICE)
              for size in range(6, 26 if CUDA else 16) for _ in range(4)]
    del blocks
