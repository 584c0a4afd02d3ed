"""Which settings an arm gets: the best of a small grid, on a seed that no verdict uses.

    tune = { train.lr = [3e-3, 8e-3] }      for every arm, for one size ([cpu]), or in one arm

Each arm that tunes is trained once with each combination on SEED, before the seeds of the verdict;
the one of the lowest validation loss gives the arm its settings. The rows of these runs stand in
tuning.csv, never in runs.csv. An arm opts out with tune = {}; one that comes from others is not
tuned.
"""
import itertools
import math

from lab.papers.arms import Arm, build_arm, drafts_of, runs_folder, with_settings
from lab.papers.spec import plain

SEED, TABLE = 1000, "tuning.csv"


def candidates(spec, path, size):
    """The arms that are trained to choose settings; `chooses` says for whom and what. Raises
    ConfigError."""
    found = []
    folder = runs_folder(spec, path, size) / "tuning"
    for name, draft in drafts_of(spec, path, size).items():
        for values in itertools.product(*draft.tune.values()) if draft.tune else ():
            settings = dict(zip(draft.tune, values))
            columns = {key.rpartition(".")[2]: value for key, value in settings.items()}
            # peer@lr=0.008
            called = name + "@" + ",".join(f"{key}={plain(v)}" for key, v in columns.items())
            arm = Arm(called, SEED, folder / f"{called}-{SEED}", [], chooses=(name, settings))
            arm = build_arm(spec, path, size, arm, with_settings(draft, settings))
            arm.columns |= dict(tuned=name) | columns
            found.append(arm)
    return found


def choose(arms, rows):
    """{name: settings} of the tuned arms all of whose candidates have a row. arms: candidates;
    rows: those of tuning.csv, a run that diverged without val_loss."""
    loss = {(row["arm"], row["key"]): row.get("val_loss", math.inf) for row in rows}
    chosen = {}
    for name, own in by_name(arms).items():
        known = [loss.get((arm.name, arm.key)) for arm in own]
        if None not in known:
            chosen[name] = own[known.index(min(known))].chooses[1]
    return chosen


def by_name(arms):
    """{name of the tuned arm: its candidates}."""
    groups = {}
    for arm in arms:
        groups.setdefault(arm.chooses[0], []).append(arm)
    return groups


def tuning_lines(arms, tried, rows):
    """What verdict.md says of the learning rates, lines of markdown. arms: those of the verdict;
    tried: the candidates; rows: those of tuning.csv."""
    return [rates(arms, bool(tried)), *table(tried, rows)]


def rates(arms, some):
    """A sentence on the learning rates that were not tuned; some: others were."""
    found = sorted({arm.lr for arm in arms if not arm.make and not arm.tuned})
    rest = "the other arms" if some else "all arms"
    if not found:
        return "Every arm that is trained has the best learning rate of a small grid."
    if len(found) == 1:
        return f"One learning rate, {found[0]:g}, serves {rest}; it was not tuned for each."
    listed = ", ".join(f"{lr:g}" for lr in found)
    return f"The learning rates of {rest} ({listed}) are those of the file; none was tuned."


def table(tried, rows):
    """A table of the candidates and their losses, the chosen ones in bold."""
    if not tried:
        return []
    loss = {(row["arm"], row["key"]): row.get("val_loss", math.inf) for row in rows}
    chosen = choose(tried, rows)
    lines = ["", f"Tuned on seed {SEED}, which no verdict uses; the lowest validation loss wins:",
             "", "| arm | settings: val loss |", "|---|---|"]
    for name, own in by_name(tried).items():
        cells = []
        for arm in own:
            settings = ", ".join(f"{key} {plain(value)}" for key, value in arm.chooses[1].items())
            found = loss.get((arm.name, arm.key))
            text = f"{settings}: " + ("not run" if found is None else f"{found:.4f}")
            cells.append(f"**{text}**" if chosen.get(name) == arm.chooses[1] else text)
        lines.append(f"| {name} | {'; '.join(cells)} |")
    ends = [name for name, own in by_name(tried).items() if at_an_end(chosen.get(name, {}), own)]
    if ends:
        lines += ["", f"At an end of its grid, so that a value beyond may be better: {', '.join(ends)}."]
    return lines


def at_an_end(settings, tried):
    """Whether a chosen float, a rate, is the smallest or largest that was tried."""
    return any(isinstance(value, float) and value in (min(values), max(values))
               for key, value in settings.items() if (values := [a.chooses[1][key] for a in tried]))
