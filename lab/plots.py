"""Pictures of runs: python -m lab.plots RUN_DIR [RUN_DIR ...] writes PNGs into the run folders.

    loss.png     one run: training and validation loss; several: their validation losses over tokens, in the first folder
    load.png     every sparse layer: each expert's share of the work over training, and how far the busiest is ahead
    usage.png    PEER and PKM: experts used and unevenness over training, and all experts sorted by use

Colours are Okabe and Ito's and the purple-orange scale, which colour-blind readers can tell apart; type is large enough
for a lecture hall. Every figure is a function that returns a matplotlib Figure: no pyplot, no global state, no display.
"""
import csv
import math
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from checkpoint import CheckpointError, load_model
from config import Config, ConfigError, Parser, fail, load_config, parse, sparse_layers
from data.batches import EvalBatches
from data.binfile import DataError
from data.prepare import find_or_prepare

BLUE, RED, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = [BLUE, RED, GREEN, PINK, ORANGE, SKY, "#000000"]
GREY = "#666666"
matplotlib.rcParams.update({
    "font.size": 14, "axes.titlesize": 15, "figure.titlesize": 16, "legend.fontsize": 13, "lines.linewidth": 2.2,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "axes.axisbelow": True, "legend.frameon": False, "savefig.dpi": 150})
csv.field_size_limit(2**24)                             # the loads of many layers are one long field


class LogError(ValueError):
    """A run that cannot be drawn; the message names the file and what to do."""


class Run(NamedTuple):
    """What is drawn of a run folder."""
    folder: Path
    log: dict                           # see read_log
    config: Config | None               # None without a config.toml

    @property
    def name(self):
        return self.folder.resolve().name


# --- reading ---

def read_log(path, points=4000):
    """A log.csv as {column: (rows,) float array}, NaN where a row has no value; at most about `points` rows: of longer
    logs every few rows are averaged, so that nothing rare, such as an evaluation, is lost. "expert_load" is
    {layer: (rows, E) array}, summed. A last line that was cut off is left out. Raises LogError."""
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            stride = -(-sum(1 for _ in file) // points) or 1
            file.seek(0)
            rows = csv.reader(line for line in file if line.endswith("\n"))
            names = next(rows, [])
            whole = (row for row in rows if len(row) == len(names) and row[0].isdigit())
            chunks = iter(lambda: list(islice(whole, stride)), [])
            table, loads = zip(*((mean_row(chunk), sum_loads(chunk, names)) for chunk in chunks)) or ((), ())
    except OSError as e:
        raise LogError(f"{path}: no log to draw ({e.strerror}); `python train.py` writes one") from None
    except ValueError:                                  # zip had nothing to take apart
        raise LogError(f"{path}: holds no step yet; let the run go on and try again") from None
    log = {name: column for name, column in zip(names, np.array(table).T) if name != "expert_load"}
    return log | {"expert_load": stack_loads(loads)}


def number(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


def mean_row(rows):
    """Mean of each column over some rows, without their empty fields."""
    values = np.array([[number(field) for field in row] for row in rows])
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0).sum(0) / there.sum(0)


def sum_loads(rows, names):
    """Expert loads of some rows summed, a list of one array per layer (dense layers: empty); None if there are none."""
    total = None
    for row in rows:
        text = dict(zip(names, row)).get("expert_load")
        if text:
            loads = [np.array([number(load) for load in layer.split()]) for layer in text.split(";")]
            total = loads if total is None else [a + b for a, b in zip(total, loads)]
    return total


def stack_loads(rows):
    """{layer: (rows, E)} of the sparse layers, NaN where a row has no loads."""
    known = next((row for row in rows if row), [])
    return {i: np.array([row[i] if row else np.full(known[i].shape, np.nan) for row in rows])
            for i in range(len(known)) if known[i].size}


def open_run(folder):
    """The Run in a folder. Raises LogError and ConfigError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LogError(f"{folder}: no such run folder; `python train.py` makes one")
    settings = folder / "config.toml"
    return Run(folder, read_log(folder / "log.csv"), load_config(settings) if settings.exists() else None)
