"""A run folder's log.csv: read whole for drawing (read_log), or some columns of it, thinned for the
tables of an experiment (read_columns, thin).

Columns go by their names, and any but `step` may be missing. A file that an editor, a spreadsheet
or git has touched is the same log: line ends, a byte order mark and quotes do not matter.
"""
import codecs
import copy
import math
import operator
from collections import Counter
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from model import GPT, load_config
from runtime.config import all_fields

CURVE = ["step", "tokens", "seconds", "loss", "val_loss", "max_expert_share", "dropped",
         "unevenness"]
POINTS = 50                             # of a curve that is kept; evaluations are kept beside them
LOADS = 16                              # rows of a group whose loads are read
BLOCK = 1024                            # rows that are turned into numbers together


class LogError(ValueError):
    """A run that cannot be drawn; the message names the file and what to do."""
    status = 2


class EmptyLog(LogError):
    """A log without a row, or none yet."""


class Run:
    """What is drawn of a run folder."""

    def __init__(self, folder, log, config=None):
        self.folder, self.log, self.config = Path(folder), log, config      # see read_log

    @property
    def name(self):
        return self.folder.resolve().name

    @cached_property
    def model(self):
        """The model of its config, shapes without memory; None without a config.toml."""
        if self.config is None:
            return None
        config = copy.deepcopy(self.config)
        config.model.vocab_size = config.model.vocab_size or 1      # no tokenizer has been met yet
        with torch.device("meta"):
            return GPT(config)

    @property
    def layers(self):
        """Its sparse feed-forward layers."""
        return [self.model.blocks[i].ffn for i in self.model.sparse] if self.config else []


def open_run(folder, begun=True):
    """The Run in a folder; begun: whether its log must have a row. Raises LogError, ConfigError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LogError(f"{folder}: no such run folder; `python train.py` makes one")
    try:
        log = read_log(folder / "log.csv")
    except EmptyLog:
        if begun:
            raise
        log = {"step": np.empty(0), "expert_load": {}}
    settings = folder / "config.toml"
    return Run(folder, log, load_config(settings) if settings.exists() else None)


# --- reading ---

def whole_rows(file):
    """(names, iterator over the rows) of an open log.csv, in bytes; a row is a list of cells. A row
    that a crash cut off is left out: it has too few cells. Where rows end as train.py ends them, a
    last one without an end was cut off, too, and its last cell is empty."""
    head = file.readline()
    as_written = head.endswith(b"\r\n") and not head.startswith(codecs.BOM_UTF8)
    names = head.decode("utf-8-sig", "replace").replace('"', "").strip().split(",")
    place = names.index("step") if "step" in names else 0

    def rows():
        for line in file:
            end = line.endswith(b"\n")
            cells = line.replace(b'"', b"").rstrip(b"\r\n").split(b",")
            if len(cells) == len(names) and cells[place].isdigit():
                if as_written and not end:
                    cells[-1] = b""
                yield cells

    return names, rows()


def number(cell):
    """A cell as a float, NaN where it is empty or no number."""
    try:
        return float(cell) if cell else math.nan
    except ValueError:
        return math.nan


def numbers(rows, places):
    """Rows of cells as floats (rows, places); a place that is None gives NaN."""
    table = np.full((len(rows), len(places)), math.nan)
    for column, place in enumerate(places):
        if place is None:
            continue
        cells = [row[place] for row in rows]
        try:
            table[:, column] = np.array([cell or b"nan" for cell in cells], float)
        except ValueError:                              # one of them is no number
            table[:, column] = [number(cell) for cell in cells]
    return table


def read_log(path, points=4000):
    """A log.csv as {column: (rows,) floats}, NaN where a row lacks it; "expert_load" is {layer:
    (rows, E)}; "loss_low" and "loss_high" are the least and the largest loss.

    A log of more than `points` rows is read in groups of rows, each averaged over the values that
    are there; loads are summed over some rows of the group. Memory is bounded, and no evaluation is
    lost. Raises LogError.
    """
    tables, loads = [], []
    try:
        with open(path, "rb") as file:
            # First pass: the length of the log gives the size of a group.
            group = math.ceil(sum(1 for _ in file) / points)
            file.seek(0)
            # Second pass: some whole groups at a time.
            names, lines = whole_rows(file)
            places = [None if name == "expert_load" else i for i, name in enumerate(names)]
            some = group * math.ceil(BLOCK / max(1, group))
            while rows := list(islice(lines, some)):
                starts = range(0, len(rows), group)
                tables.append(averages(numbers(rows, places), starts, names))
                if "expert_load" in names:
                    own = names.index("expert_load")
                    loads += [sum_loads(row[own] for row in spread(rows[i:i + group], LOADS))
                              for i in starts]
    except OSError as e:
        kind = EmptyLog if isinstance(e, FileNotFoundError) else LogError
        raise kind(f"{path}: no log to draw ({e.strerror}); "
                       "`python train.py` writes one") from None
    if not tables or "step" not in names:
        raise EmptyLog(f"{path}: holds no step yet; let the run go on, then draw it again")
    columns = dict(zip([*names, "loss_low", "loss_high"], np.concatenate(tables).T))
    return columns | {"expert_load": by_layer(loads)}


def spread(rows, most):
    """At most so many of the rows, evenly spaced."""
    return rows[::math.ceil(len(rows) / most)]


def averages(table, starts, names):
    """Means of groups of the rows of a table (rows, columns), which begin at `starts`, over the
    values that are there; two more columns, the least and the largest loss."""
    there = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        mean = (np.add.reduceat(np.where(there, table, 0), starts)
                / np.add.reduceat(there, starts, dtype=int))
    loss = table[:, names.index("loss")] if "loss" in names else np.full(len(table), np.nan)
    return np.column_stack([mean, np.fmin.reduceat(loss, starts), np.fmax.reduceat(loss, starts)])


def read_columns(path, names):
    """{name: (rows,) float64 array} of a log.csv, NaN where a row or the whole log lacks a
    value."""
    with open(path, "rb") as file:
        header, lines = whole_rows(file)
        places = [header.index(name) if name in header else None for name in names]
        parts = [np.empty((0, len(names)))]
        while rows := list(islice(lines, BLOCK)):
            parts.append(numbers(rows, places))
    return dict(zip(names, np.concatenate(parts).T))


def sum_loads(cells):
    """Cells like "12 4;;9 7" summed: an (E,) array per layer, empty for dense ones; [] if no row
    has any."""
    rows = of_usual_shape([[read_load(layer) for layer in cell.split(b";")]
                           for cell in cells if cell])
    return [sum(layer) for layer in zip(*(row for row in rows if row))]


def read_load(cell):
    return np.array([number(value) for value in cell.split()])


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
    sizes, ffn = run.config.model, run.config.ffn
    text = f"{sizes.n_layer} layers, {sizes.n_embd} wide, {ffn.kind}"
    for layer in run.layers[:1]:                        # all sparse layers are alike
        if layer.n_expert > 1:
            text += f", {layer.n_expert:,} experts, {layer.n_active} for each token"
        if "router" in layer.columns:
            text += f", router {ffn.router}"
    if sizes.vocab_size:
        params = run.model.num_params()
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
