"""Clark's and Krajewski's laws fitted to the rows of a runs.csv.

Columns that a fit reads, as text or numbers; arm and seed name a run in errors, and runs without a
finite val_loss are left out.
    both       val_loss (nats per token), active_params, total_params; n_embd, n_layer if they vary
    clark      n_expert; one expert per token. A run with active_params = total_params has E = 1
    krajewski  tokens, granularity; embedding_params, if there, are subtracted from total_params
N is that of the smallest of the runs that share n_embd and n_layer, so that routers do not count:
of active_params for Clark, of total_params for Krajewski. Settings without a term in the law must
not vary: size, name (of the data), top_k, router, and tokens (Clark) or n_expert and output_norm
(Krajewski).
"""
import math

import numpy as np

from lab.laws.fit import Problem, groups, solve
from lab.laws.laws import Clark, Krajewski, clark_loss, krajewski_loss

SHAPE = ("n_embd", "n_layer")


class FitError(ValueError):
    """Runs that cannot be fitted; the message says which, why, and what to do."""
    status = 2


# ---- fits ----

def fit_clark(rows):
    """Fit of Clark's law to runs of one router, one number of tokens, and dense ones. Priors: a as
    published; slope over experts and c about 0, for their signs are claims; saturation about the
    published one.

    Held out is one model size at a time if there are three or more, else one cell (size, experts).
    Raises FitError.
    """
    # The runs: N and E of each, and its loss.
    rows, left_out = usable(rows)
    check_same(rows, ("size", "tokens", "name"))
    check_same([row for row in rows if not is_dense(row)], ("router", "top_k"))
    E = np.array([1.0 if is_dense(row) else number(row, "n_expert") for row in rows])
    N = base_size(rows, "active_params")
    loss = np.array([number(row, "val_loss") for row in rows])
    check_enough(E, "n_expert")
    # The minimiser moves the law's values at the middle of the sizes, n0: there they are nearly
    # independent.
    n0 = np.log10(N).mean()

    def to_law(theta):
        level, a, slope, c, start, rest = np.moveaxis(theta[..., None], -2, 0)
        return Clark(a, slope - c * n0, c, level - a * n0, np.exp(start),
                     np.exp(start) + np.exp(rest))

    prior = {"level": (np.log10(loss).mean(), 1), "a": (-.083, .1), "slope": (0, .1), "c": (0, .03),
             "log E_start": (math.log(2.2), .5), "log (E_max - E_start)": (math.log(400), 1)}
    by_size = len(set(N)) >= 3
    if by_size:
        folds, how = groups(N), "one model size"
    else:
        folds, how = groups(N, E), "one cell (size, experts)"
    problem = Problem({"N": N, "E": E}, loss, to_law, clark_loss, prior, "log10 L")
    fit = solve(problem, {"slope": (0, 1e-6), "c": (0, 1e-6)}, folds, how, left_out)
    # Two sizes cannot tell a trend over N from what is odd about one of them.
    return fit if by_size else fit._replace(identified=fit.identified | {"b": False, "c": False})


def fit_krajewski(rows, floor=0.0):
    """Fit of Krajewski's law to runs of one number of experts; dense ones are passed over. Priors:
    exponents as published; the loss at the grid's centre is split among the terms in about the
    published proportions, to a factor of e each. c is at least `floor`, the entropy of the data in
    nats per token if it is known.

    Held out is a fifth of the cells (size, tokens, granularity) at a time. Raises FitError.
    """
    # The runs: N, D and G of each, and its loss.
    rows, left_out = usable(rows)
    rows = [row for row in rows if not is_dense(row)]
    check_same(rows, ("size", "n_expert", "top_k", "router", "output_norm", "name"))
    G, D, loss = (np.array([number(row, name) for row in rows])
                  for name in ("granularity", "tokens", "val_loss"))
    N = base_size(rows, "total_params")
    check_enough(G, "granularity")
    if loss.min() <= floor:
        raise FitError(f"the floor {floor:g} is not below the best val_loss, {loss.min():.4g}; "
                       "lower it")
    # The minimiser moves the logarithm of each term at the middle of the runs, (n0, d0): a term
    # stays positive, and its prior says which part of the loss above the floor it is.
    n0, d0 = np.log(N).mean(), np.log(D).mean()
    excess = loss.mean() - floor

    def to_law(theta):
        c, a, alpha, b, beta, g, gamma = np.moveaxis(theta[..., None], -2, 0)
        alpha, beta = np.exp(alpha), np.exp(beta)
        return Krajewski(np.exp(a + alpha * n0), alpha, np.exp(b + beta * d0), beta,
                         np.exp(g + alpha * n0), gamma, floor + np.exp(c))

    prior = {"c": (math.log(.15 * excess), 1), "a": (math.log(.45 * excess), 1),
             "alpha": (math.log(.115), .5), "b": (math.log(.4 * excess), 1),
             "beta": (math.log(.147), .5),
             "g": (math.log(.05 * excess), 1.5), "gamma": (.58, 1)}
    # Runs of one cell differ in the seed alone, so they are held out together.
    cells = groups(N, D, G)
    folds = groups(np.random.default_rng(0).permutation(cells.max() + 1)[cells] % 5)
    problem = Problem({"N": N, "D": D, "G": G}, loss, to_law, krajewski_loss, prior, "nats")
    return solve(problem, {"gamma": (0, 1e-6)}, folds,
                 "a fifth of the cells (size, tokens, granularity)",
                 left_out)


def fits_of(law, rows, floor=0.0):
    """{router: Fit of its runs} by the law clark or krajewski; Krajewski's has one router, "".
    Raises FitError."""
    if law == "krajewski":
        return {"": fit_krajewski(rows, floor)}
    routed = by_router(rows)
    if not routed:
        raise FitError("no run has experts")
    return {router: fit_clark(own) for router, own in routed.items()}


def by_router(rows):
    """{router: its rows and all dense ones}, for a grid of several routers: each has a law of its
    own. A router is one of the column router; rows without it are one router, ""."""
    names = sorted({row.get("router") or "" for row in rows if not is_dense(row)})
    return {name: [row for row in rows if is_dense(row) or (row.get("router") or "") == name]
            for name in names}


# ---- rows ----

def usable(rows):
    """(rows with a finite val_loss, how many have none)."""
    good = [row for row in rows if row.get("val_loss") not in (None, "")
            and math.isfinite(number(row, "val_loss"))]
    for row in good:
        if number(row, "val_loss") <= 0:
            raise FitError(f"run {name_of(row)}: val_loss is {row['val_loss']}, but a law needs it "
                           "above 0")
    return good, len(rows) - len(good)


def number(row, column):
    """A cell as a number. Raises FitError."""
    try:
        return float(row.get(column))
    except (TypeError, ValueError):
        raise FitError(f"run {name_of(row)}: {column} is {row.get(column) or 'missing'}, but the "
                       f"fit needs a number there; lab/laws/fit_runs.py lists the "
                       "columns") from None


def is_dense(row):
    return number(row, "active_params") == number(row, "total_params")


def name_of(row):
    return f"{row.get('arm')}-{row.get('seed')}"


def check_same(rows, columns):
    """Raises FitError if one of the columns holds several values; an empty cell is one of them."""
    for column in columns:
        values = sorted({"" if row.get(column) is None else str(row[column]) for row in rows})
        if len(values) > 1:
            shown = ", ".join(value or "empty" for value in values[:4])
            raise FitError(f"the runs differ in {column} ({shown}), for which the law has no term; "
                           f"fit them apart, on the command line with --only {column}={values[0]}")


def check_enough(x, column):
    if len(set(x)) < 2 or len(x) < 4:
        raise FitError(f"{len(x)} runs with {len(set(x))} value(s) of {column} are too few: the "
                       f"fit needs at least 4 runs and 2 values")


def base_size(rows, column):
    """(n,) N of each run: the smallest value of the column among the runs of its n_embd and
    n_layer."""
    shapes = [tuple(row.get(name) for name in SHAPE) for row in rows]
    # Sizes, embeddings left out of total ones.
    size = [number(row, column) for row in rows]
    if column == "total_params":
        size = [n - number({"embedding_params": 0} | row, "embedding_params")
                for n, row in zip(size, rows)]
    # The smallest of each shape stands for all, so that the parameters of routers do not count.
    least = {shape: min(n for n, s in zip(size, shapes) if s == shape) for shape in shapes}
    for row, n, shape in zip(rows, size, shapes):
        if not 0 < n <= 1.5 * least[shape]:
            raise FitError(f"run {name_of(row)}: {column} is {n:,.0f}, but {least[shape]:,.0f} in "
                           f"a run of the same {' and '.join(SHAPE)}; the law compares runs that "
                           f"share it: fit them apart, or give what differs its column")
    return np.array([least[shape] for shape in shapes])
