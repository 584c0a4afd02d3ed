"""Claims about a scaling law that is fitted to an experiment's runs (lab/scaling.py), not about arms.

    [claims.K4]
    fit = "krajewski"               or "clark": then every router's fit must pass
    arms = ["moe-*"]                which runs (default: all)
    floor = 1.036                   krajewski: entropy of the data, if it is known
    test = ["gamma > 0", "held_out < 0.03"]

A test is an inequality of the law's coefficients (lab/laws.py) and of the errors rmse, held_out and
held_out_without (lab/fit.py). Of coefficients the 95 % interval of the bootstrap must lie on the claimed
side, and the runs must have identified each; errors are compared as they are.
"""
import ast

import numpy as np

from runtime.config import ConfigError, nearest
from lab.papers.expressions import BINARY, PARTS, SIGNS
from lab.laws.laws import Clark, Krajewski
from lab.papers.spec import fits

LAWS = {"clark": Clark, "krajewski": Krajewski}
ERRORS = ("rmse", "held_out", "held_out_without")


def fit_runs(law, rows, arms=("*",), floor=0.0):
    """{router: Fit of its runs}; the router is "" for Krajewski's law. Raises scaling.FitError."""
    from lab import scaling  # most experiments need no law
    own = [row for row in rows if fits(row["arm"], arms)]
    if law == "krajewski":
        return {"": scaling.fit_krajewski(own, floor)}
    return {router: scaling.fit_clark(its) for router, its in scaling.by_router(own).items()}


def parse_test(text, law, where):
    """(left, "<" or ">", right, coefficients that it names). Raises ConfigError."""
    known = (*LAWS[law]._fields, *ERRORS)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        tree = None
    if not isinstance(tree, ast.Compare) or len(tree.ops) > 1 or type(tree.ops[0]) not in SIGNS or isinstance(
            tree.ops[0], ast.Eq):
        raise ConfigError(f"{where}: {text} is no inequality left < right or left > right")
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name in names - set(known):
        raise ConfigError(f"{where}: {text}: unknown {name}{nearest(name, known)}; known are "
                          f"{', '.join(known)}")
    for node in ast.walk(tree):
        if not isinstance(node, (*PARTS, ast.Name, ast.Constant)):
            raise ConfigError(f"{where}: {text}: only names, numbers and + - * / may stand there")
    return tree.left, SIGNS[type(tree.ops[0])], tree.comparators[0], names - set(ERRORS)


def number(node, values):
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp):
        return -number(node.operand, values)
    return BINARY[type(node.op)](number(node.left, values), number(node.right, values))


def judge_test(text, law, fit):
    """(low, high) of left - right over the bootstrap, and "held", "did not hold" or "undecided"."""
    left, sign, right, coefficients = parse_test(text, law, "")
    values = {name: np.ravel(getattr(fit.bootstrap, name)) for name in fit.law._fields}
    values |= {name: getattr(fit, name) for name in ERRORS}
    difference = (number(left, values) - number(right, values)) * (1 if sign == ">" else -1)
    low, high = np.percentile(difference, [2.5, 97.5])
    if vague := [name for name in sorted(coefficients) if not fit.identified[name]]:
        return low, high, f"undecided (these runs do not identify {', '.join(vague)})"
    return low, high, "held" if low > 0 else "did not hold" if high < 0 else "undecided"


def judge_fit(claim, rows):
    """(lines of what was measured, verdict) of a claim about a fit."""
    from lab import scaling
    try:
        fits = fit_runs(claim["fit"], rows, claim.get("arms", ["*"]), claim.get("floor", 0.0))
    except scaling.FitError as e:
        return [f"- Measured: no fit: {e}."], "undecided (no fit)"
    tests = claim["test"] if isinstance(claim["test"], list) else [claim["test"]]
    lines, verdicts = [], []
    for router, fit in fits.items():
        for text in tests:
            low, high, verdict = judge_test(text, claim["fit"], fit)
            by = f"by {low:.4g}" if low == high else f"by {low:.4g} to {high:.4g} (95 % of the bootstrap)"
            lines.append(f"- Measured{f', {router}' if router else ''}: `{text}` {by}: {verdict}.")
            verdicts.append(verdict)
    if "did not hold" in verdicts:
        return lines, "did not hold"
    return lines, next((v for v in verdicts if v != "held"), "held")
