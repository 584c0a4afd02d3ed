"""verdict.md: the claims of an experiment, what was measured, and the commands that measured it."""
import math
import statistics

from lab.laws.fit_runs import FitError
from lab.papers.arms import shown
from lab.papers.expressions import MARGIN
from lab.papers.spec import fits
from lab.papers.student import is_constant
from lab.papers.verdict import (AGAINST, HELD, NOT, NOTHING, joined_p, judge, judge_fit,
                                originals, plain_verdict)
from lab.scaling import fit_texts

RUNS = {"val_loss": "val loss (nats)", "active_params": "active", "total_params": "total",
        "flops_per_token": "FLOP/token", "tokens_total": "tokens, parents' included",
        "tokens_per_second": "tokens/s", "peak_mib": "peak MiB",
        "max_expert_share": "busiest expert",
        "dropped": "dropped"}


RULE = ("Differences are left minus right, paired by seed; p is that of a two-sided t test: "
        "held or did not hold below .05, suggestive below .2. `==` is two one-sided tests against "
        f"the margin, {MARGIN} nats. How: lab/papers/verdict.py.")


def verdict_page(title, spec, claims, rows, table, arms, failed, more=()):
    """The page as text. rows: those of runs.csv; table: an expressions.Table of them; failed:
    {label: why}; more: lines on how the settings of the runs were chosen."""
    # What was claimed, and what the figure shows.
    lines = [f"# {title}", "", spec.get("paper", ""), "", spec.get("caption", ""), ""]
    lines += ["![figure](figure.png)", ""] if spec.get("panel") else []
    # The verdicts at a glance, then the evidence for each.
    judged = {key: (claim, *evidence(claim, rows, table)) for key, claim in claims.items()}
    if judged:
        lines += ["| claim | | verdict | p |", "|---|---|---|---|"]
        lines += [f"| {key} | {claim['says']} | {words} | {p_text(p)} |"
                  for key, (claim, _, words, p) in judged.items()]
    for key, (claim, found, words, _) in judged.items():
        lines += ["", f"## {key}", "", words, "",
                  f"- The paper: {claim['says']} ({claim['source']}).", *found]
    if judged:
        lines += ["", RULE]
    # The fits, the runs, the machine, the commands.
    lines += fitted_laws(spec.get("panel", []), rows)
    lines += ["", "## Runs", "", *runs_table(rows)]
    lines += [f"- {label}: {why}" for label, why in failed.items()]
    lines += ["", hardware(rows), "", *more, "", "## Commands", "",
              f"Of seed {arms[0].seed}; other seeds differ in `--train.seed`, `--data.seed` and "
              "the folders.",
              "", "```", *(shown(arm.arguments()) for arm in arms if arm.seed == arms[0].seed),
              "```", ""]
    return "\n".join(lines)


def evidence(claim, rows, table):
    """(lines of what was measured, the verdict in words, its p) of a claim."""
    lines, verdict, p = measured(claim, rows, table)
    words = f"**{verdict}**"
    if claim.get("report", False):
        words += ", reported only"
    if "note" in claim:
        lines.append(f"- Note: {claim['note']}.")
    # Why: a reason that runs have tested; of what is undecided none is due.
    if plain_verdict(verdict) not in (HELD, NOTHING) and "reason" in claim:
        lines.append(f"- Why: {reason(claim, table)}")
    elif verdict in (AGAINST, NOT):
        lines.append("- Why: not investigated.")
    # What was claimed before the runs, judged by the same rule.
    if "added" in claim:
        how = "changed" if originals(claim) else "added"
        lines.append(f"- {how.capitalize()} after the runs: {claim['added']}.")
        words += f", {how} after the runs"
    before = []
    for original in originals(claim):
        found, was = original_of(original, rows, table)
        lines += [f"- The original claim: {original['says']}: **{was}**."]
        lines += ["  " + line for line in found]
        before.append(f"**{was}**")
    if before:
        words += f" (the original{'s' * (len(before) > 1)}: {', '.join(before)})"
    return lines, words, p


def original_of(original, rows, table):
    """(lines of what was measured, verdict) of a claim as it was before it was changed."""
    if "verdict" in original:
        return [f"- As published in results/ at commit {original['commit']}."], original["verdict"]
    n = original.get("seeds", len(table.seeds))
    few = [row for row in rows if row["seed"] in table.seeds[:n]]
    return measured(original, few, table.first(n))[:2]


def measured(claim, rows, table):
    """(a line for each inequality, verdict, p) of a claim's test."""
    if "fit" in claim:
        return *judge_fit(claim, rows), math.nan
    pairs, verdict = judge(claim["test"], table)
    return [pair_line(pair) for pair in pairs], verdict, joined_p(pairs)


def fitted_laws(panels, rows):
    """What the fits that the figure shows came to."""
    lines = []
    for panel in (panel for panel in panels if panel["kind"] == "fit"):
        own = [row for row in rows if fits(row["arm"], panel.get("arms", ["*"]))]
        try:
            texts = list(fit_texts(own, panel["law"], panel.get("floor", 0.0)))
        except FitError as e:
            texts = [f"no fit: {e}"]
        lines += ["", f"## {panel.get('title', 'The fitted law')}", "", "```", *texts, "```"]
    return lines


def pair_line(pair):
    """A line on one inequality."""
    if not pair.n:
        return f"- Measured: `{pair.text}`: {pair.verdict}."
    line = f"- Measured: `{pair.text}`: difference {pair.mean:+.4g}"
    if is_constant(pair.differences.values()):
        return f"{line} in all of {pair.n} seeds: {pair.verdict}."
    if math.isnan(pair.t):
        return f"{line}, {pair.n} seeds: {pair.verdict}."
    line += f", 95 % interval {pair.low:+.4g} to {pair.high:+.4g},"
    if " == " in pair.text:
        line += f" beyond the margin of {MARGIN} by"
    return f"{line} t = {pair.t:.3g}, p = {p_text(pair.p)}, {pair.n} seeds: {pair.verdict}."


def p_text(p):
    """Three digits; a hyphen if nothing was tested."""
    return "-" if math.isnan(p) else f"{p:.3g}"


def reason(claim, table):
    """The reason given, which stands only if the runs that test it bear it out."""
    pairs, verdict = judge(claim["reason_test"], table)
    if verdict == HELD:
        text = f"{claim['reason']}: the runs bear it out."
    else:
        text = f"not known. Tested was: {claim['reason']}: {verdict}."
    return "\n".join([text] + ["  " + pair_line(pair) for pair in pairs])


def mean_and_error(values):
    """(mean, standard error over the seeds; NaN of one)."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def numbers(rows, arm, column):
    """The values of a column over an arm's seeds."""
    got = (row.get(column) for row in rows if row["arm"] == arm)
    return [v for v in got if isinstance(v, (int, float)) and math.isfinite(v)]


def runs_table(rows):
    """Means over the seeds, one line per arm."""
    columns = {column: title for column, title in RUNS.items()
               if any(column in row for row in rows)}
    lines = ["| arm | seeds | " + " | ".join(columns.values()) + " |",
             "|---" * (2 + len(columns)) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [cell(column, numbers(rows, arm, column)) for column in columns]
        lines.append(f"| {arm} | {sum(row['arm'] == arm for row in rows)} | "
                     + " | ".join(cells) + " |")
    return lines


def cell(column, values):
    if not values:
        return ""
    mean, error = mean_and_error(values)
    if column == "val_loss":
        return f"{mean:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
    return f"{100 * mean:.1f} %" if column in ("max_expert_share", "dropped") else f"{mean:,.0f}"


def hardware(rows):
    """A line on what the numbers were measured with."""
    def all_of(column):
        return ", ".join(dict.fromkeys(str(row[column]) for row in rows if row.get(column)))
    minutes = sum(row.get("seconds") or 0 for row in rows) / 60
    return (f"Measured on {all_of('device')}, {all_of('threads')} threads a run, torch "
            f"{all_of('torch')}, commit {all_of('commit')} (+: with changes); {len(rows)} runs "
            f"took {minutes:.1f} minutes, added up. Means and ±, the standard error, are over an "
            "arm's own seeds; differences pair the seeds that both sides have.")
