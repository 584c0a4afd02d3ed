"""Student's t distribution, and what it says of differences that are paired by seed.

With df degrees of freedom the chance of a |t| at least as large, if the true mean is zero, is the
regularised incomplete beta function I_x(df / 2, 1 / 2) at x = df / (df + t^2).
"""
import functools
import math
import statistics
from typing import NamedTuple


class Paired(NamedTuple):
    """A mean difference over n seeds and how sure it is. All but mean and n are NaN if there are
    fewer than two seeds or a difference is not finite."""
    mean: float
    error: float                # the standard error of the mean
    low: float                  # the 95 % interval of the mean
    high: float
    t: float                    # mean / standard error; infinite if all differences are the same
    p: float                    # two-sided: the chance of such a |t| if the true mean is zero
    n: int


def is_constant(values):
    """Whether all are the same, but for what arithmetic rounds."""
    same = 1e-9 * max(1.0, *map(abs, values))
    return len(set(values)) == 1 or max(values) - min(values) <= same < math.inf


def paired(differences):
    """The Paired of a list of differences, one a seed. If all are the same the interval is a point,
    and p is 0; of zeros t is 0 and p is 1."""
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2 or not all(map(math.isfinite, differences)):
        return Paired(mean, *[math.nan] * 5, n)
    error = 0.0 if is_constant(differences) else statistics.stdev(differences) / math.sqrt(n)
    t = t_of(mean, error)
    half = critical(0.05, n - 1) * error
    return Paired(mean, error, mean - half, mean + half, t, two_sided(t, n - 1), n)


def t_of(distance, error):
    """A distance in standard errors; infinite without an error, 0 of no distance."""
    if error == 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / error


def two_sided(t, df):
    """The chance of a value at least as far from zero as t."""
    if math.isinf(t):
        return 0.0
    total = df + t * t
    return incomplete_beta(df / 2, 0.5, df / total, t * t / total)


def above(t, df):
    """The chance of a value above t."""
    half = two_sided(t, df) / 2
    return half if t > 0 else 1 - half


@functools.cache
def critical(p, df):
    """The t whose two-sided chance is p: 4.303 for p = .05 and df = 2. By bisection."""
    low, high = 0.0, 1.0
    while two_sided(high, df) > p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if two_sided(middle, df) > p:
            low = middle
        else:
            high = middle
    return high


def incomplete_beta(a, b, x, rest):
    """I_x(a, b), the regularised incomplete beta function; rest is 1 - x, so that it keeps its
    digits near x = 1."""
    if x == 0 or rest == 0:
        return float(rest == 0)
    # The fraction converges fast below the mean of the distribution; above it I_x(a, b) is
    # 1 - I_{1 - x}(b, a).
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, rest, x)
    size = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x)
    return math.exp(size + b * math.log(rest)) / a * beta_fraction(a, b, x)


def beta_fraction(a, b, x):
    """1 / (1 + d_1 / (1 + d_2 / (1 + ...))), evaluated from the front: every step multiplies the
    value by the ratio of two successive convergents (Lentz's method)."""
    value, upper, lower = 1.0, 1.0, 0.0
    for i in range(1000):
        m = i // 2
        if i == 0:
            d = 1.0
        elif i % 2 == 0:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        lower = 1 / (1 + d * lower or 1e-300)
        upper = 1 + d / upper or 1e-300
        value *= upper * lower
        if abs(upper * lower - 1) < 1e-15:
            break
    return value - 1
