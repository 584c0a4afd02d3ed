"""verdict.md: the claims of an experiment, what was measured, and the commands that measured it."""
import math
import statistics

from lab.laws.fit_runs import FitError
from lab.papers.arms import shown
from lab.papers.spec import fits
from lab.papers.verdict import HELD, NOT, UNDECIDED, judge, judge_fit
from lab.scaling import fit_texts

RUNS = {"val_loss": "val loss (nats)", "active_params": "active", "total_params": "total",
        "flops_per_token": "FLOP/token", "tokens_total": "tokens, parents' included",
        "tokens_per_second": "tokens/s", "peak_mib": "peak MiB",
        "max_expert_share": "busiest expert",
        "dropped": "dropped"}


def verdict_page(title, spec, claims, rows, table, arms, failed):
    """The page as text. rows: those of runs.csv; table: an expressions.Table of them; failed:
    {label: why}."""
    # What was claimed, and what the figure shows.
    lines = [f"# {title}", "", spec.get("paper", ""), "", spec.get("caption", ""), ""]
    lines += ["![figure](figure.png)", ""] if spec.get("panel") else []
    # The verdicts at a glance, then the evidence for each.
    judged = {key: (claim, *evidence(claim, rows, table)) for key, claim in claims.items()}
    if judged:
        lines += ["| claim | | verdict |", "|---|---|---|"]
        lines += [f"| {key} | {claim['says']} | {verdict_of(claim, verdict)} |"
                  for key, (claim, _, verdict) in judged.items()]
    for key, (claim, found, verdict) in judged.items():
        lines += ["", f"## {key}: {verdict_of(claim, verdict)}", "",
                  f"- The paper: {claim['says']} ({claim['source']}).", *found]
        if verdict != HELD:
            lines.append(f"- Why: {reason(claim, table)}")
    # The fits, the runs, the machine, the commands.
    lines += fitted_laws(spec.get("panel", []), rows)
    lines += ["", "## Runs", "", *runs_table(rows)]
    lines += [f"- {label}: {why}" for label, why in failed.items()]
    lines += ["", hardware(rows), "", "## Commands", "",
              f"Of seed {arms[0].seed}; other seeds differ in `--train.seed`, `--data.seed` and "
              "the folders.",
              "", "```", *(shown(arm.arguments()) for arm in arms if arm.seed == arms[0].seed),
              "```", ""]
    return "\n".join(lines)


def evidence(claim, rows, table):
    """(lines of what was measured, verdict) of a claim."""
    if "fit" in claim:
        return judge_fit(claim, rows)
    pairs, verdict = judge(claim["test"], table)
    return [measured(pair) for pair in pairs], verdict


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


def verdict_of(claim, verdict):
    return f"**{verdict}**, reported only" if claim.get("report", False) else f"**{verdict}**"


def measured(pair):
    """A line on one inequality."""
    if not pair.n:
        return f"- Measured: `{pair.text}`: {pair.verdict}."
    count = f"{pair.n} seeds" if " == " in pair.text else f"right in {pair.right} of {pair.n} seeds"
    return (f"- Measured: `{pair.text}`: difference {pair.mean:+.4g}, standard error "
            f"{pair.error:.2g}, {count}: {pair.verdict}.")


def reason(claim, table):
    """The reason given, with the verdict of the runs that test it."""
    if "reason" not in claim:
        return "not investigated."
    pairs, verdict = judge(claim["reason_test"], table)
    told = {HELD: "the runs bear it out", NOT: "the runs contradict it"}.get(verdict, UNDECIDED)
    return "\n".join([f"{claim['reason']}: {told}."] + ["  " + measured(pair) for pair in pairs])


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
            f"took {minutes:.1f} minutes, added up. ± is the standard error over the seeds.")
