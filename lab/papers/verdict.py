"""Claims: inequalities that are judged on what was measured (arithmetic:
lab/papers/expressions.py).

About arms, over paired seeds:

    test = "val_loss[peer-128] < val_loss[peer-16]"     also >, chains a < b < c, a list of tests
    test = "val_loss: peer-128 < peer-64 < peer-16"     the same, one column for all
    test = "val_loss[a] < val_loss[b] + margin"         a is not worse than b
    test = "val_loss[a] == val_loss[b]"                 a is about as good as b

Both sides are computed for each seed on its own, so that what a seed does to all arms cancels. A
seed that lacks an arm of the claim has no difference.

The rule. Of three seeds or more, Student's t test of the mean difference against zero (p is
two-sided, lab/papers/student.py) decides an inequality:

    held                    p < .05, the difference has the claimed sign
    suggestive              .05 <= p < .2, the claimed sign
    undecided               p >= .2
    suggestive against      .05 <= p < .2, the other sign
    did not hold            p < .05, the other sign

Two standard errors instead would be met by chance in 18 % of all cases of three seeds, not in 5 %.

"About as good as" is an equivalence test (two one-sided tests). It is held if both show, each at p
< .05, that the difference lies within the margin, 0.01 nats; suggestive if both have p < .2. It did
not hold if the difference is shown to lie beyond the margin, two-sided p < .05; suggestive against
if p < .2. "Not worse than" has the same margin. The margin is one for all claims and in nats, so
that == and margin take losses alone: of another unit it would have to be chosen claim by claim.

A difference that is the same in every seed (FLOPs, counts that hold by construction) has no spread
to test with. It is compared as it is and has no p; of zero an inequality is undecided.

What has not run yet is not measured. A claim of several inequalities has the verdict of its worst
one: all must hold. Its p is the largest of theirs, which needs no correction (all must be small);
if one did not hold, the smallest of those times the number of inequalities (Bonferroni).

About a scaling law that is fitted to the runs:

    fit = "krajewski"               or "clark": then every router's fit must pass
    arms = ["moe-*"]                which runs (default: all)
    floor = 1.036                   krajewski: entropy of the data, if it is known
    test = ["gamma > 0", "held_out < 0.03"]

The names are the law's coefficients (lab/laws/laws.py) and the errors rmse, held_out and
held_out_without (lab/laws/fit.py). Of coefficients the 95 % interval of the bootstrap must lie on
the claimed side, and the runs must have identified each; errors are compared as they are.

A claim is registered by being in its file before its runs. One that is added or changed after them
says so, and its page shows the original beside it, judged by the same rule:

    added = "why, in a sentence"
    original = { says = "...", test = "..." }       or a list of such; also fit, arms, floor, and
                                                    seeds = 3 (by the first three alone)
    original = { says = "...", verdict = "held", commit = "1234567" }       where its rows are not
                                                    kept: what verdict.md said at that commit

Also: report = true (not expected to hold at this size), note (what the test does not compare),
reason and reason_test (why it came out as it did, and the inequality that tests that), sizes.
seeds = 5 gives the arms that the claim names, those behind a computed column, and the parents of
all of them, as many: it stands where three seeds left a verdict suggestive.
"""
import ast
import math
import re
from typing import NamedTuple

import numpy as np

from lab.laws.fit_runs import FitError, fits_of
from lab.laws.laws import Clark, Krajewski
from lab.papers.expressions import (MARGIN, SIGNS, Missing, formulas, parse_cells, parse_names,
                                    value, written)
from lab.papers.spec import check_words, fits
from lab.papers.student import above, is_constant, paired, t_of, two_sided
from runtime.config import nearest
from settings import ConfigError

# from the best to the worst
HELD, FOR, UNDECIDED, NOTHING, AGAINST, NOT = VERDICTS = (
    "held", "suggestive", "undecided", "not measured", "suggestive against", "did not hold")
LEVEL, WEAK = 0.05, 0.2             # below these p a verdict is a verdict, or suggestive
SEEDS = 3                           # fewer are undecided
TEST = {"test": (str, list), "fit": str, "arms": list, "floor": (int, float)}
CLAIM = TEST | {"says": str, "source": str, "report": bool, "note": str, "reason": str,
                "reason_test": (str, list), "sizes": list, "added": str, "original": (dict, list),
                "seeds": int}
ORIGINAL = TEST | {"says": str, "seeds": int, "verdict": str, "commit": str}
LAWS = {"clark": Clark, "krajewski": Krajewski}
ERRORS = ("rmse", "held_out", "held_out_without")


class Pair(NamedTuple):
    """One inequality, measured. Of == t and p are those of the test that decides: t is by how many
    standard errors the difference exceeds the margin, p the larger of the two one-sided ones."""
    text: str                           # "a < b"
    verdict: str
    mean: float                         # of left - right over the seeds
    error: float                        # its standard error
    low: float                          # its 95 % interval
    high: float
    t: float
    p: float                            # NaN if nothing was tested
    n: int                              # seeds
    differences: dict                   # {seed: left - right}


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
    check_tests(claim, names, where)
    check_tests(dict(test=claim.get("reason_test", [])), names, where)
    if "original" in claim and "added" not in claim:
        raise ConfigError(f"{where}: an original needs added, a sentence on why the claim changed")
    for original in originals(claim):
        check_words(original, ORIGINAL, f"{where}: original")
        if "says" not in original or ("test" in original) == ("verdict" in original):
            raise ConfigError(f"{where}: an original has says, and either a test or the verdict "
                              "that it had")
        check_tests(original, names, f"{where}: original")


def check_tests(claim, names, where):
    """Raises ConfigError for a test that is none or names an arm that there is not."""
    for text in as_list(claim.get("test", [])):
        if "fit" in claim:
            law_inequality(text, claim["fit"], where)
        else:
            check_arms(inequality(text, where)[1], names, where)


def originals(claim):
    """The claims that this one was before it was changed, first to last; a fit's words come from
    the claim where an original has none."""
    shared = {word: claim[word] for word in ("fit", "arms", "floor") if word in claim}
    found = claim.get("original", [])
    return [shared | one for one in (found if isinstance(found, list) else [found])]


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
    # The margin is in nats.
    nats = all(cell[0].startswith(("val_loss", "train_loss")) for cell in cells)
    if ("==" in text or re.search(r"\bmargin\b", text)) and not nats:
        raise ConfigError(f"{where}: {text}: == and margin are for losses; the margin is {MARGIN} "
                          "nats")
    return tree, cells


def law_inequality(text, law, where):
    """(Compare tree, coefficients that it names) of a test about a law. Raises ConfigError if it is
    none."""
    tree, names = parse_names(text, (*LAWS[law]._fields, *ERRORS), where)
    one = isinstance(tree, ast.Compare) and len(tree.ops) == 1
    if not one or SIGNS.get(type(tree.ops[0])) not in ("<", ">"):
        raise ConfigError(f"{where}: {text} is no inequality left < right or left > right")
    return tree, names - set(ERRORS)


def more_seeds(spec, parents, path):
    """{arm: seeds} of the arms that claims with `seeds` name, those in the formula of a computed
    column among them, and of those they come from. parents: {arm: names} of one size. Raises
    ConfigError."""
    wanted, seen = {}, set()
    computed = {(name, column): text for pattern, columns in spec.get("metrics", {}).items()
                for name, column, text in formulas(pattern, columns, parents, path)}
    # What is no claim is refused by read_claims, which needs the arms.
    claims = {key: claim for key, claim in spec.get("claims", {}).items()
              if isinstance(claim, dict) and "seeds" in claim}
    for key, claim in claims.items():
        texts = [*as_list(claim.get("test", [])), *as_list(claim.get("reason_test", []))]
        todo = [cell for text in texts for cell in inequality(text, key)[1]]
        while todo:
            column, *patterns = todo.pop()
            for name in (name for name in parents if fits(name, patterns)):
                wanted[name] = max(claim["seeds"], wanted.get(name, 0))
                if (key, name, column) not in seen:
                    seen.add((key, name, column))
                    todo += [("", parent) for parent in parents[name]]
                    todo += parse_cells(computed.get((name, column), "0"), path)[1]
    return wanted


# --- judging ---

def plain_verdict(verdict):
    """One of VERDICTS, without the remark in brackets."""
    return verdict.partition(" (")[0]


def joined(verdicts):
    """The verdict on several inequalities: the worst."""
    return max(verdicts, key=lambda verdict: VERDICTS.index(plain_verdict(verdict)))


def joined_p(pairs):
    """p of several inequalities that must all hold; NaN if none was tested or too few seeds ran."""
    if any(pair.n < SEEDS for pair in pairs):
        return math.nan
    verdict = joined([pair.verdict for pair in pairs])
    tested = [pair.p for pair in pairs if not math.isnan(pair.p)]
    if verdict in (NOT, AGAINST):
        worst = [pair.p for pair in pairs if pair.verdict == verdict]
        return math.nan if any(map(math.isnan, worst)) else min(1.0, len(tested) * min(worst))
    return max(tested, default=math.nan)


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
    found, problem = {}, ""
    for seed in table.seeds:
        try:
            found[seed] = table.value(left, cells, seed) - table.value(right, cells, seed)
        except (Missing, ZeroDivisionError, ValueError) as e:
            problem = str(e)
    text = f"{written(left, cells)} {sign} {written(right, cells)}"
    if not found:
        return Pair(text, f"{NOTHING} ({problem})", *[math.nan] * 6, 0, {})
    return Pair(text, *decide(list(found.values()), sign), found)


def decide(differences, sign):
    """The rule: (verdict, *Paired) of the differences left - right, one a seed, if left < right,
    left > right or left == right is claimed."""
    found = paired(differences)
    mean, error, _, _, t, p, n = found
    if n < SEEDS:
        return f"{UNDECIDED} ({n} seed{'s' if n > 1 else ''})", *found._replace(p=math.nan)
    # The same in every seed: compared as it is.
    if is_constant(differences):
        return same_in_all(mean, sign), *found._replace(t=math.nan, p=math.nan)
    if math.isnan(p):
        return f"{UNDECIDED} (infinite in some seeds)", *found
    if sign == "==":
        # By how many standard errors |mean| exceeds the margin: the nearer of the two bounds
        # decides.
        t = t_of(abs(mean) - MARGIN, error)
        p = above(-t, n - 1)
        right, other = p, (two_sided(t, n - 1) if t > 0 else 1.0)
    else:
        claimed = (mean < 0) == (sign == "<")
        right, other = (p, 1.0) if claimed else (1.0, p)
    return by_level(right, other), *found._replace(t=t, p=p)


def by_level(right, other):
    """The verdict by the p for a claim and the p against it."""
    for limit, for_it, against_it in ((LEVEL, HELD, NOT), (WEAK, FOR, AGAINST)):
        if right < limit:
            return for_it
        if other < limit:
            return against_it
    return UNDECIDED


def same_in_all(difference, sign):
    """The verdict on a difference without spread."""
    if sign == "==":
        return HELD if abs(difference) <= MARGIN else NOT
    if is_constant([difference, 0.0]):
        return UNDECIDED
    return HELD if (difference < 0) == (sign == "<") else NOT


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
