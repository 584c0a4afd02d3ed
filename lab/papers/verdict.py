"""Claims: inequalities between columns of runs.csv (lab/expressions.py), judged over paired seeds.

    test = "val_loss[peer-128] < val_loss[peer-16]"         also >, chains a < b < c, and a list of tests
    test = "val_loss: peer-128 < peer-64 < peer-16"         the same, one column for all
    test = "val_loss[a] < val_loss[b] - 0.02"               with a margin
    test = "val_loss[a] == val_loss[b]"                     no difference beyond two standard errors

Both sides are computed for each seed on its own, so that what a seed does to all arms cancels. A claim holds
if there are at least three seeds, the difference has the claimed sign in all of them and its mean is more
than two standard errors from zero; it does not hold if the same is true of the other sign; else it is
undecided. Claims about a fitted law: lab/fit_claims.py.
"""
import ast
import math
import re
import statistics
from typing import NamedTuple

from runtime.config import ConfigError, nearest
from lab.papers.expressions import SIGNS, Missing, formulas, parse_expression, value, written
from lab.papers.fit_claims import LAWS, parse_test
from lab.papers.spec import check_words, fits

HELD, NOT, UNDECIDED = "held", "did not hold", "undecided"
CLAIM = {"says": str, "source": str, "test": (str, list), "report": bool, "reason": str,
         "reason_test": (str, list), "sizes": list, "fit": str, "arms": list, "floor": (int, float)}


class Pair(NamedTuple):
    """One inequality, measured."""
    text: str                           # "a < b"
    verdict: str
    mean: float                         # of left - right over the seeds
    error: float                        # its standard error
    right: int                          # seeds with the claimed sign; means nothing for ==
    n: int


def read_claims(spec, names, path):
    """{id: claim} of an experiment file; names are its arms at any size. Raises ConfigError."""
    for key, claim in spec.get("claims", {}).items():
        where = f"{path}: [claims.{key}]"
        if not isinstance(claim, dict):
            raise ConfigError(f"{where}: a claim is a table with says, source and test")
        check_words(claim, CLAIM, where)
        for word in ("says", "source", "test"):
            if word not in claim:
                raise ConfigError(f"{where}: {word} is missing")
        if ("reason" in claim) != ("reason_test" in claim):
            raise ConfigError(f"{where}: a reason needs a reason_test, the inequality that tests it, and the "
                              "other way round")
        if claim.get("fit", "clark") not in LAWS:
            raise ConfigError(f"{where}: fit = \"{claim['fit']}\" is not one of {', '.join(LAWS)}")
        for word in ("test", "reason_test"):
            for text in as_list(claim.get(word, [])):
                if word == "test" and "fit" in claim:
                    parse_test(text, claim["fit"], where)
                else:
                    check_arms(inequality(text, where)[1], names, where)
    for pattern, columns in spec.get("metrics", {}).items():
        for name, column, text in formulas(pattern, columns, names, path):
            where = f"{path}: {column} of {name}"
            check_arms(parse_expression(text, where)[1], names, where)
    return spec.get("claims", {})


def concerns(claim, size, names):
    """Whether a claim is about this size: it says so, or does not say and all its arms are there."""
    if "sizes" in claim or "fit" in claim:
        return size in claim.get("sizes", [size])
    cells = [cell for text in as_list(claim["test"]) for cell in inequality(text, "")[1]]
    return all(any(fits(name, [pattern]) for name in names) for cell in cells for pattern in cell[1:])


def as_list(test):
    return test if isinstance(test, list) else [test]


def check_arms(cells, names, where):
    for cell in cells:
        for pattern in cell[1:]:
            if not any(fits(name, [pattern]) for name in names):
                raise ConfigError(f"{where}: there is no arm {pattern}{nearest(pattern, names)}")


def inequality(text, where):
    """(Compare tree, cells) of a test. Raises ConfigError if it is none."""
    if not isinstance(text, str):
        raise ConfigError(f"{where}: a test is a text like \"val_loss[a] < val_loss[b]\", not {text}")
    if one_column := re.fullmatch(r"\s*([A-Za-z_][\w-]*):(.+)", text):
        text = re.sub(r"\s*([^<>=]+?)\s*(<=?|>=?|==|$)", rf" {one_column[1]}[\1] \2", one_column[2].strip())
    tree, cells = parse_expression(text, where)
    if not isinstance(tree, ast.Compare):
        raise ConfigError(f"{where}: {text} compares nothing; write left < right")
    return tree, cells


def judge(test, table):
    """The Pairs of an inequality, a chain or a list of them, and one verdict: held if every pair holds."""
    pairs = []
    for text in as_list(test):
        tree, cells = inequality(text, "")
        sides = [tree.left, *tree.comparators]
        pairs += [judge_pair(left, SIGNS[type(op)], right, cells, table)
                  for left, op, right in zip(sides, tree.ops, sides[1:])]
    verdicts = [pair.verdict for pair in pairs]
    if NOT in verdicts:
        return pairs, NOT
    return pairs, next((v for v in verdicts if v != HELD), HELD)


def judge_pair(left, sign, right, cells, table):
    differences, problem = [], ""
    for seed in table.seeds:
        try:
            differences.append(value(left, cells, table, seed) - value(right, cells, table, seed))
        except (Missing, ZeroDivisionError, ValueError) as e:
            problem = str(e)
    n, text = len(differences), f"{written(left, cells)} {sign} {written(right, cells)}"
    if not n:
        return Pair(text, f"{UNDECIDED} ({problem})", math.nan, math.nan, 0, 0)
    mean, error = statistics.fmean(differences), standard_error(differences)
    signs = [(d > 0) - (d < 0) for d in differences]
    want = {"<": -1, ">": 1}.get(sign, 0)
    if n < 3:
        verdict = f"{UNDECIDED} ({n} seed{'s' * (n > 1)})"
    elif len(set(signs)) == 1 and abs(mean) > 2 * error:        # one sign in all, and far enough from zero
        verdict = HELD if signs[0] == want else NOT
    else:
        verdict = HELD if sign == "==" and abs(mean) <= 2 * error else UNDECIDED
    return Pair(text, verdict, mean, error, signs.count(want), n)


def standard_error(values):
    """Of their mean; 0 if all are the same, infinite ones too."""
    if len(set(values)) == 1:
        return 0.0
    return statistics.stdev(values) / math.sqrt(len(values)) if all(map(math.isfinite, values)) else math.inf
