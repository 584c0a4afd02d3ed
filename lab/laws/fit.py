"""Fitting a curve to few points honestly: robust, with priors, with intervals that show what is not
known.

What is minimised: the Huber loss of ln(predicted / measured), quadratic up to twice NOISE, plus a
Gaussian prior on each number. Twelve runs do not determine seven coefficients: one about which they
say nothing stays at its prior, and its interval shows it, because a bootstrap replicate resamples
the runs *and* draws the centres of the priors anew. Where the runs do not at least halve the
interval that the prior alone gives, a coefficient counts as not identified: claim nothing about it.

The minimiser is Levenberg and Marquardt's, on a batch: all starts and all replicates are solved at
once. What is fitted to which columns is in lab/laws/fit_runs.py.
"""
import math
from typing import Callable, NamedTuple

import numpy as np

# spread of ln L among runs that differ in the seed alone; weighs runs against priors
NOISE = 0.01
# a run further off than this many NOISE pulls no harder: one bad run does not decide
HUBER = 2.0
STARTS, REPLICATES, STEPS = 64, 300, 200


class Problem(NamedTuple):
    """What a law needs to be fitted; theta (..., p) are the numbers that the minimiser moves,
    scaled so that they are of order one and nearly independent."""
    inputs: dict                # variable of the law -> (n,)
    loss: np.ndarray            # (n,) measured, nats
    to_law: Callable            # theta (..., p) -> law, a NamedTuple of coefficients (..., 1)
    predict: Callable           # (law, **inputs) -> losses (..., n)
    prior: dict                 # name of a theta -> (centre, standard deviation)
    unit: str                   # of errors: "nats" or "log10 L"


class Fit(NamedTuple):
    """A law fitted to runs."""
    law: NamedTuple             # coefficients
    interval: dict              # coefficient -> (low, high), 95 % of the bootstrap
    # coefficient -> whether the runs at least halve the interval of the prior
    identified: dict
    # of the three root mean square errors: "log10 L" (Clark), "nats" (Krajewski)
    unit: str
    rmse: float                 # over the runs that were fitted
    held_out: float             # over runs that were held out, NaN if there are too few
    held_out_without: float     # the same without the law's term in E or G: what the law must beat
    folds: str                  # what was held out at a time
    left_out: int               # rows without a finite val_loss
    predict: Callable           # (law, **inputs) -> losses, nats
    inputs: dict                # variable of the law -> (n,)
    loss: np.ndarray            # (n,) measured, nats
    bootstrap: NamedTuple       # the law with coefficients (REPLICATES, 1)


class Curve(NamedTuple):
    """The fitted law over its last variable, E or G, at one value of the others; losses in nats."""
    fixed: dict                 # {"N": ...} or {"N": ..., "D": ...}
    x: np.ndarray               # (points,) E or G, even in the logarithm, as far as the runs reach
    loss: np.ndarray            # (points,)
    low: np.ndarray             # (points,) and high: 95 % of the bootstrap
    high: np.ndarray
    run_x: np.ndarray           # (runs,) the measured runs of this curve
    run_loss: np.ndarray        # (runs,)


# ---- the minimiser ----

def residuals(problem, theta):
    """ln(predicted / measured) in units of NOISE, (..., n)."""
    return np.log(problem.predict(problem.to_law(theta), **problem.inputs) / problem.loss) / NOISE


def objective(problem, theta, weights, centre, sd):
    """Weighted Huber loss and prior (M,), and the residuals (M, n)."""
    r = residuals(problem, theta)
    size = np.abs(r)
    huber = np.where(size < HUBER, r ** 2, HUBER * (2 * size - HUBER))
    return (weights * huber).sum(-1) + (((theta - centre) / sd) ** 2).sum(-1), r


def jacobian(problem, theta, shift=1e-5):
    """Of the residuals, by central differences: (M, n, p)."""
    return np.stack([(residuals(problem, theta + s) - residuals(problem, theta - s)) / (2 * shift)
                     for s in shift * np.eye(theta.shape[-1])], -1)


# a wild step overflows, gives NaN, and is not taken
@np.errstate(all="ignore")
def minimise(problem, starts, weights, centre, sd):
    """The best theta (B, p) of each of B problems, from starts (S, B, p); weights (B, n) of the
    runs, centres (B, p) and standard deviations (p,) of the priors."""
    # Every start of every problem is one row of one batch.
    S, B, p = starts.shape
    theta = starts.reshape(-1, p)                       # (S B, p)
    weights = np.tile(weights, (S, 1))
    centre = np.tile(centre, (S, 1))
    cost, r = objective(problem, theta, weights, centre, sd)
    damping = np.full(S * B, 1e-2)
    todo = np.arange(S * B)                             # rows that still move
    for _ in range(STEPS):
        # The Huber loss as weighted squares: a run further off than HUBER counts less.
        x = theta[todo]
        w = weights[todo] / np.maximum(1, np.abs(r[todo]) / HUBER)
        # One damped step: (A + damping diag A) step = slope.
        J = jacobian(problem, x)                        # (todo, n, p)
        JtW = np.swapaxes(J * w[..., None], 1, 2)
        A = JtW @ J + np.diag(sd ** -2)                 # Gauss and Newton's matrix, (todo, p, p)
        slope = (JtW @ r[todo][..., None])[..., 0] + (x - centre[todo]) / sd ** 2
        ridge = damping[todo][:, None, None] * A * np.eye(p)
        new = x - np.linalg.solve(A + ridge, slope[..., None])[..., 0]
        # A step that lowers the cost is taken and the damping falls; else it rises.
        new_cost, new_r = objective(problem, new, weights[todo], centre[todo], sd)
        gain = cost[todo] - new_cost
        good = todo[gain > 0]
        theta[good], cost[good], r[good] = new[gain > 0], new_cost[gain > 0], new_r[gain > 0]
        damping[todo] *= np.where(gain > 0, 1 / 3, 4)
        # A row is done once its gain is small, or once no step however short gains anything.
        # 1: a run off by one NOISE
        settled = np.where(gain > 0, gain < 1e-5, damping[todo] > 1e6)
        todo = todo[~settled]
        if not len(todo):
            break
    # Of each problem the best of its starts.
    best = cost.reshape(S, B).argmin(0)
    return theta.reshape(S, B, p)[best, np.arange(B)]


# ---- the fit ----

def solve(problem, without, folds, how, left_out=0, seed=0):
    """The Fit. `without` are the priors that switch the law's term in E or G off; folds (n,) number
    the group with which a run is held out, and `how` says what a group is."""
    rng, n = np.random.default_rng(seed), len(problem.loss)
    centre, sd = prior_of(problem)
    # The fit to the runs themselves.
    # (1, p)
    best = minimise(problem, draw(problem, rng, STARTS, 1), np.ones((1, n)), centre[None], sd)
    # The bootstrap: each replicate draws the runs with repetition and the centres of its priors
    # anew.
    centres = draw(problem, rng, REPLICATES)
    counts = rng.multinomial(n, np.full(n, 1 / n), REPLICATES)
    starts = np.stack([np.broadcast_to(best, centres.shape), centres])
    bootstrap = problem.to_law(minimise(problem, starts, counts, centres, sd))
    prior, law = problem.to_law(centres), problem.to_law(best[0])
    # What the runs say of each coefficient, beside what the prior alone says.
    interval, identified = {}, {}
    for name in law._fields:
        values, alone = getattr(bootstrap, name), getattr(prior, name)
        interval[name] = tuple(float(v) for v in np.percentile(values, [2.5, 97.5]))
        identified[name] = bool(spread(values, alone) < spread(alone, alone) / 2)
    # The same law without its term in E or G, for comparison on held-out runs.
    simple = problem._replace(prior=problem.prior | without)
    return Fit(type(law)(*(float(v.item()) for v in law)), interval, identified, problem.unit,
               rms(errors(problem, law)), held_out(problem, folds, rng),
               held_out(simple, folds, rng), how,
               left_out, problem.predict, problem.inputs, problem.loss, bootstrap)


def prior_of(problem):
    """Centres (p,) and standard deviations (p,) of the priors."""
    return np.array(list(problem.prior.values()), float).T


def draw(problem, rng, *shape):
    """Thetas drawn from the prior, (*shape, p)."""
    centre, sd = prior_of(problem)
    return centre + sd * rng.standard_normal((*shape, len(sd)))


def spread(values, prior):
    """Width of the middle 95 %; in logarithms for a coefficient that is always positive."""
    low, high = np.percentile(np.log(values) if prior.min() > 0 else values, [2.5, 97.5])
    return high - low


def errors(problem, law):
    """Predicted less measured loss in the unit of the law's paper, (..., n)."""
    predicted = problem.predict(law, **problem.inputs)
    if problem.unit == "nats":
        return predicted - problem.loss
    return np.log10(predicted / problem.loss)


def rms(x):
    return float(np.sqrt(np.mean(x ** 2)))


def held_out(problem, folds, rng):
    """Root mean square error of every run by the fit to the other folds; NaN with fewer than 2
    folds."""
    number = np.arange(folds.max() + 1)[:, None]
    if len(number) < 2:
        return math.nan
    centre, sd = prior_of(problem)
    centres = np.broadcast_to(centre, (len(number), len(sd)))
    starts = draw(problem, rng, STARTS // 4, len(number))
    theta = minimise(problem, starts, (folds != number).astype(float), centres, sd)     # (folds, p)
    return rms(errors(problem, problem.to_law(theta))[folds == number])


# ---- curves ----

def groups(*columns):
    """(n,) the number of each run's combination of values, from 0."""
    return np.unique(np.stack(columns, 1), axis=0, return_inverse=True)[1].reshape(-1)


def curves(fit, points=60):
    """[Curve], by rising N (and D): Clark's over E for each size, Krajewski's over G for each size
    and number of tokens; none where all runs have the same E or G."""
    *names, variable = fit.inputs
    cells = groups(*(fit.inputs[name] for name in names))
    found = []
    for cell in range(cells.max() + 1):
        # The runs of one size (and number of tokens), and the law over what varies among them.
        mine = cells == cell
        run_x = fit.inputs[variable][mine]
        fixed = {name: fit.inputs[name][mine][0] for name in names}
        if run_x.min() < run_x.max():
            x = np.geomspace(run_x.min(), run_x.max(), points)
            at = fixed | {variable: x}
            band = np.percentile(fit.predict(fit.bootstrap, **at), [2.5, 97.5], axis=0)
            found.append(Curve(fixed, x, fit.predict(fit.law, **at), *band, run_x, fit.loss[mine]))
    return found
