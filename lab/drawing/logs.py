"""A run folder's log and settings, read for drawing."""
import csv
import math
import operator
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from runtime.config import Config, all_fields, load_config
from model import GPT

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


def read_log(path, points=4000):
    """A log.csv as {column: (rows,) floats}, NaN where a row lacks it; "expert_load" is {layer: (rows, E)}.

    Of a longer log each row here is a group of rows, averaged (loads: summed) over the values that are there:
    memory is bounded, and no evaluation is lost. A line that a crash cut off is left out. Raises LogError.
    """
    table, loads = [], []
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            group = math.ceil(sum(1 for _ in file) / points)
            file.seek(0)
            lines = csv.reader(line for line in file if line.endswith("\n"))
            names = next(lines, [])
            whole = (dict(zip(names, row)) for row in lines if len(row) == len(names) and row[0].isdigit())
            while rows := list(islice(whole, group)):
                table.append(average(np.array([[number(row[name]) for name in names] for row in rows])))
                loads.append(sum_loads(row.get("expert_load") for row in rows))
    except OSError as e:
        raise LogError(f"{path}: no log to draw ({e.strerror}); `python train.py` writes one") from None
    if not table or names[0] != "step":
        raise LogError(f"{path}: holds no step yet; let the run go on, then draw it again")
    loads = of_usual_shape(loads)
    known = next((row for row in loads if row), [])
    layers = {i: np.array([row[i] if row else np.full(load.shape, np.nan) for row in loads])
              for i, load in enumerate(known) if load.size}
    return dict(zip(names, np.array(table).T)) | {"expert_load": layers}


def number(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


def average(rows):
    """Mean of each column over the values that are there; NaN where there are none."""
    there = ~np.isnan(rows)
    with np.errstate(invalid="ignore"):
        return np.where(there, rows, 0).sum(0) / there.sum(0)


def sum_loads(texts):
    """Fields like "12 4;;9 7" summed: an (E,) array per layer, empty for dense ones; [] if no row has any."""
    rows = of_usual_shape([[read_load(layer) for layer in text.split(";")] for text in texts if text])
    return [sum(layer) for layer in zip(*(row for row in rows if row))]


def read_load(text):
    return np.array([number(value) for value in text.split()])


def of_usual_shape(rows):
    """Rows of loads; one whose layers are not as long as those of most rows, such as that of a damaged line,
    becomes []."""
    sizes = [tuple(load.size for load in row) for row in rows]
    usual = Counter(filter(None, sizes)).most_common(1)
    return [row if [size] == [key for key, _ in usual] else [] for row, size in zip(rows, sizes)]


def open_run(folder):
    """The Run in a folder. Raises LogError, ConfigError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LogError(f"{folder}: no such run folder; `python train.py` makes one")
    settings = folder / "config.toml"
    return Run(folder, read_log(folder / "log.csv"), load_config(settings) if settings.exists() else None)


def column(log, name):
    """(steps, values) of the rows where a column has a finite value; none if the log lacks the column."""
    values = log.get(name, np.full(log["step"].shape, np.nan))
    return log["step"][np.isfinite(values)], values[np.isfinite(values)]


def ratio(log, above, below):
    """Median of one column over another; 0 where they have no row in common."""
    if above not in log or below not in log:
        return 0.0
    there = (log[above] > 0) & (log[below] > 0)
    return float(np.median(log[above][there] / log[below][there])) if there.any() else 0.0


def smooth(y):
    """Moving average over a fiftieth of the points, centred: it does not lag as an exponential one does."""
    total, half, i = np.concatenate([[0], np.cumsum(y)]), len(y) // 100, np.arange(len(y))
    start, end = np.maximum(i - half, 0), np.minimum(i + half + 1, len(y))
    return (total[end] - total[start]) / (end - start)


def describe(run):
    """A line on what the model is, as far as the folder's config tells."""
    if run.config is None:
        return ""
    m, f = run.config.model, run.config.ffn
    retrieval = f"{f.n_keys ** 2:,} experts, {f.peer_heads} heads × {f.peer_top_k}"
    text = f"{m.n_layer} layers, {m.n_embd} wide, " + {
        "dense": "dense", "moe": f"{f.experts} experts, top-{f.active}, router {f.router}",
        "peer": f"PEER, {retrieval}", "pkm": f"PKM, {retrieval}"}[f.kind]
    if m.vocab_size:
        with torch.device("meta"):                      # shapes without memory
            params = GPT(run.config).num_params()
        text += f"; {params.active / 1e6:.3g} M of {params.total / 1e6:.3g} M parameters active"
    return text


def differences(runs, most=4):
    """The settings in which runs differ, by name."""
    if any(run.config is None for run in runs):
        return ""
    keys = [key for key, _ in all_fields()
            if len({repr(operator.attrgetter(key)(run.config)) for run in runs}) > 1]
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"runs differ in {', '.join(keys[:most])}{more}" if keys else "runs of one config"
