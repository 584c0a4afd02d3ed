"""A run's log.csv, read in one go and thinned for tables and figures."""
import csv
import math

import numpy as np
import torch

CURVE = ["step", "tokens", "seconds", "loss", "val_loss", "max_expert_share", "dropped", "unevenness"]
POINTS = 50                             # of a curve that is kept; evaluations are kept beside them


def read_columns(path, names):
    """{name: (rows,) float64 tensor} of a log.csv, NaN where a row or the whole log lacks a value. A row that
    a crash cut off is left out."""
    csv.field_size_limit(2**24)                         # the loads of many layers are one long field
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        lines = csv.reader(line for line in file if line.endswith("\n"))
        header = next(lines, [])
        places = [header.index(name) if name in header else None for name in names]
        rows = [[number(row[i]) if i is not None else math.nan for i in places]
                for row in lines if len(row) == len(header) and row[0].isdigit()]
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).reshape(-1, len(names)).T))


def number(text):
    return float(text) if text else math.nan


def thin(path, points=POINTS):
    """At most `points` rows of a log.csv, evenly spaced, and at most as many with evaluations: a list of
    dicts of CURVE. What is logged every step is the mean over the steps around."""
    log = {name: column.numpy() for name, column in read_columns(path, CURVE).items()}
    n = len(log["step"])
    if not n:
        return []
    half = max(0, n // (2 * points))
    evaluated = np.flatnonzero(~np.isnan(log["val_loss"]))
    kept = {int(i) for i in np.linspace(0, n - 1, min(n, points))}
    kept |= {int(evaluated[int(j)]) for j in np.linspace(0, len(evaluated) - 1, min(len(evaluated), points))}
    rows = []
    for i in sorted(kept):
        row = {name: log[name][i] for name in ("step", "tokens", "seconds", "val_loss")}
        for name in ("loss", "max_expert_share", "dropped", "unevenness"):
            around = log[name][max(0, i - half):i + half + 1]
            row[name] = around[~np.isnan(around)].mean() if not np.isnan(around).all() else math.nan
        rows.append({name: None if math.isnan(row[name]) else float(row[name]) for name in CURVE})
    return rows
