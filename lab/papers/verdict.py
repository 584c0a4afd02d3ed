"""Claims: inequalities that are judged on what was measured (arithmetic:
lab/papers/expressions.py).

About arms, over paired seeds:

    test = "val_loss[peer-128] < val_loss[peer-16]"     also >, chains a < b < c, a list of tests
    test = "val_loss: peer-128 < peer-64 < peer-16"     the same, one column for all
    test = "val_loss[a] < val_loss[b] - 0.02"           with a margin
    test = "val_loss[a] == val_loss[b]"                 no difference beyond two standard errors

Both sides are computed for each seed on its own, so that what a seed does to all arms cancels. A
claim holds if there are at least three seeds, the difference has the claimed sign in all of them
and its mean is more than two standard errors from zero; it does not hold if the same is true of the
other sign; else it is undecided.

About a scaling law that is fitted to the runs:

    fit = "krajewski"               or "clark": then every router's fit must pass
    arms = ["moe-*"]                which runs (default: all)
    floor = 1.036                   krajewski: entropy of the data, if it is known
    test = ["gamma > 0", "held_out < 0.03"]

The names are the law's coefficients (lab/laws/laws.py) and the errors rmse, held_out and
held_out_without (lab/laws/fit.py). Of coefficients the 95 % interval of the bootstrap must lie on
the claimed side, and the runs must have identified each; errors are compared as they are.
"""
import ast
import math
import re
import statistics
from typing import NamedTuple

import numpy as np

from lab.laws.fit_runs import FitError, fits_of
from lab.laws.laws import Clark, Krajewski
from lab.papers.expressions import (SIGNS, Missing, formulas, parse_cells, parse_names, value,
                                    written)
from lab.papers.spec import check_words, fits
from runtime.config import nearest
from settings import ConfigError

HELD, NOT, UNDECIDED = "held", "did not hold", "undecided"
CLAIM = {"says": str, "source": str, "test": (str, list), "report": bool, "reason": str,
         "reason_test": (str, list), "sizes": list, "fit": str, "arms": list, "floor": (int, float)}
LAWS = {"clark": Clark, "krajewski": Krajewski}
ERRORS = ("rmse", "held_out", "held_out_without")


class Pair(NamedTuple):
    """One inequality, measured."""
    text: str                           # "a < b"
    verdict: str
    mean: float                         # of left - right over the seeds
    error: float                        # its standard error
    right: int                          # seeds with the claimed sign; means nothing for ==
    n: int


# --- reading ---

def read_claims(spec, names, path):
    """{id: claim} of an experiment file; names are its arms at any size. Raises ConfigError."""
    for key, claim in spec.get("claims", {}).items():
        where = f"{path}: [claims.{key}]"
        if not isinstance(claim, dict):
            raise ConfigError(f"{where}: a claim is a table with says, source and test")
        check_claim(claim, names, where)
    for pattern, columns in spec.get("metrics", {}).items():
        for name, column, text in formulas(pattern, columns, names, path):
            where = f"{path}: {column} of {name}"
            check_arms(parse_cells(text, where)[1], names, where)
    return spec.get("claims", {})


def check_claim(claim, names, where):
    """Raises ConfigError for a word, a test or an arm that a claim cannot have."""
    check_words(claim, CLAIM, where)
    for word in ("says", "source", "test"):
        if word not in claim:
            raise ConfigError(f"{where}: {word} is missing")
    if ("reason" in claim) != ("reason_test" in claim):
        raise ConfigError(f"{where}: a reason needs a reason_test, the inequality that tests it, "
                          "and the other way round")
    if claim.get("fit", "clark") not in LAWS:
        raise ConfigError(f"{where}: fit = \"{claim['fit']}\" is not one of {', '.join(LAWS)}")
    # Every test parses, and names arms that exist.
    for text in as_list(claim["test"]):
        if "fit" in claim:
            law_inequality(text, claim["fit"], where)
        else:
            check_arms(inequality(text, where)[1], names, where)
    for text in as_list(claim.get("reason_test", [])):
        check_arms(inequality(text, where)[1], names, where)


def as_list(test):
    return test if isinstance(test, list) else [test]


def check_arms(cells, names, where):
    for cell in cells:
        for pattern in cell[1:]:
            if not any(fits(name, [pattern]) for name in names):
                raise ConfigError(f"{where}: there is no arm {pattern}{nearest(pattern, names)}")


def concerns(claim, size, names):
    """Whether a claim is about this size: it says so, or does not say and all its arms are
    there."""
    if "sizes" in claim or "fit" in claim:
        return size in claim.get("sizes", [size])
    cells = [cell for text in as_list(claim["test"]) for cell in inequality(text, "")[1]]
    return all(any(fits(name, [pattern]) for name in names) for cell in cells
               for pattern in cell[1:])


def inequality(text, where):
    """(Compare tree, cells) of a test about arms. Raises ConfigError if it is none."""
    if not isinstance(text, str):
        raise ConfigError(f"{where}: a test is a text like \"val_loss[a] < val_loss[b]\", not "
                          f"{text}")
    # "val_loss: a < b" becomes "val_loss[a] < val_loss[b]".
    if one_column := re.fullmatch(r"\s*([A-Za-z_][\w-]*):(.+)", text):
        text = re.sub(r"\s*([^<>=]+?)\s*(<=?|>=?|==|$)", rf" {one_column[1]}[\1] \2",
                      one_column[2].strip())
    tree, cells = parse_cells(text, where)
    if not isinstance(tree, ast.Compare):
        raise ConfigError(f"{where}: {text} compares nothing; write left < right")
    return tree, cells


def law_inequality(text, law, where):
    """(Compare tree, coefficients that it names) of a test about a law. Raises ConfigError if it is
    none."""
    tree, names = parse_names(text, (*LAWS[law]._fields, *ERRORS), where)
    one = isinstance(tree, ast.Compare) and len(tree.ops) == 1
    if not one or SIGNS.get(type(tree.ops[0])) not in ("<", ">"):
        raise ConfigError(f"{where}: {text} is no inequality left < right or left > right")
    return tree, names - set(ERRORS)


# --- judging ---

def joined(verdicts):
    """The verdict on several inequalities: held if every one holds, not held if one does not
    hold."""
    if NOT in verdicts:
        return NOT
    return next((v for v in verdicts if v != HELD), HELD)


def judge(test, table):
    """The Pairs of an inequality about arms, a chain or a list of them, and one verdict."""
    pairs = []
    for text in as_list(test):
        tree, cells = inequality(text, "")
        sides = [tree.left, *tree.comparators]
        pairs += [judge_pair(left, SIGNS[type(op)], right, cells, table)
                  for left, op, right in zip(sides, tree.ops, sides[1:])]
    return pairs, joined([pair.verdict for pair in pairs])


def judge_pair(left, sign, right, cells, table):
    """The Pair of one inequality."""
    # One difference for each seed that has both sides.
    differences, problem = [], ""
    for seed in table.seeds:
        try:
            differences.append(table.value(left, cells, seed) - table.value(right, cells, seed))
        except (Missing, ZeroDivisionError, ValueError) as e:
            problem = str(e)
    n = len(differences)
    text = f"{written(left, cells)} {sign} {written(right, cells)}"
    if not n:
        return Pair(text, f"{UNDECIDED} ({problem})", math.nan, math.nan, 0, 0)
    mean = statistics.fmean(differences)
    error = standard_error(differences)
    signs = [(d > 0) - (d < 0) for d in differences]
    claimed = {"<": -1, ">": 1, "==": 0}[sign]
    return Pair(text, verdict_on(signs, claimed, mean, error), mean, error, signs.count(claimed), n)


def verdict_on(signs, claimed, mean, error):
    """The verdict on differences with these signs, one a seed, if `claimed` (-1, 1, or 0 for ==) is
    claimed."""
    if len(signs) < 3:
        return f"{UNDECIDED} ({len(signs)} seed{'s' if len(signs) > 1 else ''})"
    # one sign in all, and far enough from zero
    if len(set(signs)) == 1 and abs(mean) > 2 * error:
        return HELD if signs[0] == claimed else NOT
    if claimed == 0 and abs(mean) <= 2 * error:
        return HELD
    return UNDECIDED


def standard_error(values):
    """Of their mean; 0 if all are the same, infinite ones too."""
    if len(set(values)) == 1:
        return 0.0
    if not all(map(math.isfinite, values)):
        return math.inf
    return statistics.stdev(values) / math.sqrt(len(values))


def judge_law(text, law, fit):
    """(low, high, verdict) of a test about a fitted law: the 95 % interval over the bootstrap of by
    how much the inequality is met."""
    tree, coefficients = law_inequality(text, law, "")
    values = {name: np.ravel(getattr(fit.bootstrap, name)) for name in fit.law._fields}
    values |= {name: getattr(fit, name) for name in ERRORS}
    met = value(tree.left, values.get) - value(tree.comparators[0], values.get)
    if SIGNS[type(tree.ops[0])] == "<":
        met = -met
    low, high = np.percentile(met, [2.5, 97.5])
    vague = [name for name in sorted(coefficients) if not fit.identified[name]]
    if vague:
        return low, high, f"{UNDECIDED} (these runs do not identify {', '.join(vague)})"
    if low > 0:
        return low, high, HELD
    return low, high, NOT if high < 0 else UNDECIDED


def judge_fit(claim, rows):
    """(lines of what was measured, verdict) of a claim about a fit."""
    own = [row for row in rows if fits(row["arm"], claim.get("arms", ["*"]))]
    try:
        fitted = fits_of(claim["fit"], own, claim.get("floor", 0.0))
    except FitError as e:
        return [f"- Measured: no fit: {e}."], f"{UNDECIDED} (no fit)"
    # Every test on every router's fit.
    lines, verdicts = [], []
    for router, fit in fitted.items():
        for text in as_list(claim["test"]):
            low, high, verdict = judge_law(text, claim["fit"], fit)
            by = f"by {low:.4g}"
            if low != high:
                by += f" to {high:.4g} (95 % of the bootstrap)"
            which = f", {router}" if router else ""
            lines.append(f"- Measured{which}: `{text}` {by}: {verdict}.")
            verdicts.append(verdict)
    return lines, joined(verdicts)
