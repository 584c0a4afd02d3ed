"""A run folder's log.csv: read whole for drawing (read_log), or some columns of it, thinned for the
tables of an experiment (read_columns, thin)."""
import csv
import math
import operator
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import GPT, load_config, sparse_layers
from runtime.config import all_fields
from settings import Config

CURVE = ["step", "tokens", "seconds", "loss", "val_loss", "max_expert_share", "dropped",
         "unevenness"]
POINTS = 50                             # of a curve that is kept; evaluations are kept beside them
# characters of a field: the loads of many layers are one long field
csv.field_size_limit(2**24)


class LogError(ValueError):
    """A run that cannot be drawn; the message names the file and what to do."""
    status = 2


class Run(NamedTuple):
    """What is drawn of a run folder."""
    folder: Path
    log: dict                           # see read_log
    config: Config | None               # None without a config.toml

    @property
    def name(self):
        return self.folder.resolve().name


def open_run(folder):
    """The Run in a folder. Raises LogError, ConfigError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LogError(f"{folder}: no such run folder; `python train.py` makes one")
    settings = folder / "config.toml"
    return Run(folder, read_log(folder / "log.csv"), load_config(settings) if settings.exists()
               else None)


# --- reading ---

def whole_rows(file):
    """(header, iterator over the rows) of an open log.csv, rows as lists of texts. A row that a
    crash cut off is left out: its line has no end, or it has too few cells."""
    lines = csv.reader(line for line in file if line.endswith("\n"))
    header = next(lines, [])
    return header, (row for row in lines if row and len(row) == len(header) and row[0].isdigit())


def number(text):
    """A cell as a float, NaN where it is empty or no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_log(path, points=4000):
    """A log.csv as {column: (rows,) floats}, NaN where a row lacks it; "expert_load" is {layer:
    (rows, E)}.

    A log of more than `points` rows is read in groups of rows, each averaged (loads: summed) over
    the values that are there: memory is bounded, and no evaluation is lost. Raises LogError.
    """
    table, loads = [], []
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            # First pass: the length of the log gives the size of a group.
            group = math.ceil(sum(1 for _ in file) / points)
            file.seek(0)
            # Second pass: one row of the table for each group.
            names, lines = whole_rows(file)
            while rows := [dict(zip(names, line)) for line in islice(lines, group)]:
                table.append(average(np.array([[number(row[name]) for name in names]
                                               for row in rows])))
                loads.append(sum_loads(row.get("expert_load") for row in rows))
    except OSError as e:
        raise LogError(f"{path}: no log to draw ({e.strerror}); "
                       "`python train.py` writes one") from None
    if not table or names[0] != "step":
        raise LogError(f"{path}: holds no step yet; let the run go on, then draw it again")
    return dict(zip(names, np.array(table).T)) | {"expert_load": by_layer(loads)}


def read_columns(path, names):
    """{name: (rows,) float64 array} of a log.csv, NaN where a row or the whole log lacks a
    value."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        header, lines = whole_rows(file)
        places = [header.index(name) if name in header else None for name in names]
        rows = [[math.nan if i is None else number(row[i]) for i in places] for row in lines]
    return dict(zip(names, np.array(rows, float).reshape(-1, len(names)).T))


def average(rows):
    """Mean of each column over the values that are there; NaN where there are none."""
    there = ~np.isnan(rows)
    with np.errstate(invalid="ignore"):
        return np.where(there, rows, 0).sum(0) / there.sum(0)


def sum_loads(texts):
    """Fields like "12 4;;9 7" summed: an (E,) array per layer, empty for dense ones; [] if no row
    has any."""
    rows = of_usual_shape([[read_load(layer) for layer in text.split(";")]
                           for text in texts if text])
    return [sum(layer) for layer in zip(*(row for row in rows if row))]


def read_load(text):
    return np.array([number(value) for value in text.split()])


def of_usual_shape(rows):
    """Rows of loads, in which a row becomes [] if its layers are not as long as those of most rows,
    as in a damaged line."""
    sizes = [tuple(load.size for load in row) for row in rows]
    usual = Counter(filter(None, sizes)).most_common(1)
    return [row if [size] == [key for key, _ in usual] else [] for row, size in zip(rows, sizes)]


def by_layer(rows):
    """{layer: (rows, E)} of rows of loads, one (E,) array per layer; NaN where a row has none.
    Dense layers, whose array is empty, are left out."""
    rows = of_usual_shape(rows)
    known = next((row for row in rows if row), [])
    return {i: np.array([row[i] if row else np.full(load.shape, np.nan) for row in rows])
            for i, load in enumerate(known) if load.size}


# --- thinning ---

def thin(path, points=POINTS):
    """At most `points` rows of a log.csv, evenly spaced, and at most as many with evaluations: a
    list of dicts of CURVE. What is logged every step is the mean over the steps around."""
    log = read_columns(path, CURVE)
    n = len(log["step"])
    if not n:
        return []
    # The rows to keep: evenly spaced ones, and the evaluated ones.
    evaluated = np.flatnonzero(~np.isnan(log["val_loss"]))
    kept = {int(i) for i in np.linspace(0, n - 1, min(n, points))}
    kept |= {int(evaluated[int(j)]) for j in np.linspace(0, len(evaluated) - 1,
                                                         min(len(evaluated), points))}
    half = max(0, n // (2 * points))
    rows = []
    for i in sorted(kept):
        # Where the run stood is exact; what one batch decides is a mean over the steps between two
        # rows.
        row = {name: log[name][i] for name in ("step", "tokens", "seconds", "val_loss")}
        for name in ("loss", "max_expert_share", "dropped", "unevenness"):
            around = log[name][max(0, i - half):i + half + 1]
            known = around[~np.isnan(around)]
            row[name] = known.mean() if len(known) else math.nan
        rows.append({name: None if math.isnan(row[name]) else float(row[name]) for name in CURVE})
    return rows


# --- what figures ask of a log ---

def column(log, name):
    """(steps, values) of the rows where a column has a finite value; none if the log lacks the
    column."""
    values = log.get(name, np.full(log["step"].shape, np.nan))
    there = np.isfinite(values)
    return log["step"][there], values[there]


def ratio(log, above, below):
    """Median of one column over another; 0 where they have no row in common."""
    if above not in log or below not in log:
        return 0.0
    there = (log[above] > 0) & (log[below] > 0)
    return float(np.median(log[above][there] / log[below][there])) if there.any() else 0.0


def smooth(y):
    """Moving average over a fiftieth of the points, centred: it does not lag as an exponential one
    does."""
    total = np.concatenate([[0], np.cumsum(y)])             # total[j] - total[i]: the sum of y[i:j]
    half = len(y) // 100
    i = np.arange(len(y))
    start = np.maximum(i - half, 0)
    end = np.minimum(i + half + 1, len(y))
    return (total[end] - total[start]) / (end - start)


def describe(run):
    """A line on what the model is, as far as the folder's config tells."""
    if run.config is None:
        return ""
    with torch.device("meta"):                          # shapes without memory
        model = GPT(run.config)
    sizes, ffn = run.config.model, run.config.ffn
    text = f"{sizes.n_layer} layers, {sizes.n_embd} wide, {ffn.kind}"
    for i in sparse_layers(run.config)[:1]:             # all sparse layers are alike
        layer = model.blocks[i].ffn
        text += f", {layer.n_expert:,} experts, {layer.n_active} for each token"
        if "router" in layer.columns:
            text += f", router {ffn.router}"
    if sizes.vocab_size:
        params = model.num_params()
        text += f"; {params.active / 1e6:.3g} M of {params.total / 1e6:.3g} M parameters active"
    return text


def differences(runs, most=4):
    """The settings in which runs differ, by name."""
    if any(run.config is None for run in runs):
        return ""
    keys = [key for key, _ in all_fields()
            if len({repr(operator.attrgetter(key)(run.config)) for run in runs}) > 1]
    if not keys:
        return "runs of one config"
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"runs differ in {', '.join(keys[:most])}{more}"
