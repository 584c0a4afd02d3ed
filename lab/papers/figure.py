"""The figure of an experiment: its [[panel]]s, two side by side, the paper's claim and what was
found here below.

    kind         needs                 draws
    lines        x, y [by, reference]  a column over another, e.g. loss over the number of experts
    bars         y [columns, sort]     a column, a mark per arm; or several columns, whose axis is y
    curves       y [x]                 training over tokens, flops (active ones), seconds or steps
    matrix       columns [sort, most]  arms by columns, e.g. the loss on each corpus
    routing      arm [layer, experts]  which share of each corpus goes to each expert
    scatter      x, y                  one column over another, one mark per arm
    fit          law [floor]           a scaling law fitted to the runs, with its 95 % band
    differences  claims [most]         a row per claim: the difference that its verdict is about

Every panel takes arms (names, * for anything), title, xlabel, ylabel, xscale, yscale (linear, log,
log2), wide (a row of its own) and marks (text -> a number or [low, high]: lines, such as the
paper's value). lines, bars and curves take minus, an arm: then differences to it are drawn, paired
by seed. [panel.claims] has the words of each claim, "" for those of its test.

The file's [labels] say what people call an arm, a column or a group (pattern -> text, in which {m}
is what {m} of the pattern stands for); [colours] give arms a colour of lab/drawing/measured.py,
else each gets its own. An arm looks the same in all panels. What has no rows is left out.
"""
import re
import textwrap
from collections import Counter

from lab.drawing.measured import COLOURS, Data
from lab.drawing.panels import DRAW, bars_of
from lab.drawing.style import BLUE, GREY, new_figure
from lab.papers.expressions import MARGIN
from lab.papers.page import measured
from lab.papers.spec import check_words, fits
from lab.papers.verdict import NOTHING, plain_verdict
from runtime.config import nearest
from settings import ConfigError

PANEL = {"kind": str, "arms": list, "title": str, "xlabel": str, "ylabel": str, "xscale": str,
         "yscale": str, "wide": bool, "marks": dict, "minus": str, "x": str, "y": str, "by": str,
         "reference": list, "columns": list, "sort": (bool, str), "most": (int, float), "arm": str,
         "layer": int, "experts": list, "law": str, "floor": (int, float), "claims": dict}
NEEDS = {"lines": ("x", "y"), "bars": ("y",), "curves": ("y",), "matrix": ("columns",),
         "routing": ("arm",), "scatter": ("x", "y"), "fit": ("law",), "differences": ("claims",)}
WIDTH = 14                              # inches; at 1,000 pixels a letter of 12 points is 12 high
MOST = 6                                # lines in a panel that can be told apart
LINE = 150                              # letters in a line of the caption


def check_panels(spec, names, path):
    """Raises ConfigError for a panel that cannot be drawn; names are the arms at any size."""
    for i, panel in enumerate(spec.get("panel", [])):
        where = f"{path}: [[panel]] {i + 1}"
        check_words(panel, PANEL, where)
        if panel.get("kind") not in NEEDS:
            raise ConfigError(f"{where}: kind = \"{panel.get('kind', '')}\" is not one of "
                              f"{', '.join(NEEDS)}{nearest(str(panel.get('kind', '')), NEEDS)}")
        for word in NEEDS[panel["kind"]]:
            if word not in panel:
                raise ConfigError(f"{where}: {panel['kind']} needs {word}")
        for pattern in [*panel.get("arms", []), *panel.get("reference", []),
                        panel.get("arm", "*"), panel.get("minus", "*")]:
            if not any(fits(name, [pattern]) for name in names):
                raise ConfigError(f"{where}: there is no arm {pattern}{nearest(pattern, names)}")
        for key in panel.get("claims", {}):
            if key not in spec.get("claims", {}):
                raise ConfigError(f"{where}: there is no claim {key}"
                                  f"{nearest(key, spec.get('claims', {}))}")
    for pattern, colour in spec.get("colours", {}).items():
        if colour not in COLOURS:
            raise ConfigError(f"{path}: [colours]: {pattern} = {colour} is not one of "
                              f"{', '.join(COLOURS)}")


def experiment_figure(spec, claims, rows, curves, routing):
    """The Figure of an experiment's tables; None without a panel that has data."""
    data = Data(spec, claims, rows, curves, routing)
    counts = [(panel, things(panel, data)) for panel in spec.get("panel", [])]
    lines = in_rows([(panel, count) for panel, count in counts if count])
    if not lines:
        return None
    # Room for each row of panels, for the title and for the text below.
    heights = [max(height(panel, count) for panel, count in line) for line in lines]
    text = caption(spec, data, [panel for line in lines for panel, _ in line])
    below = 0.3 + 0.25 * (text.count("\n") + 1)
    figure = new_figure(WIDTH, 0.5 + sum(heights) + below, spec.get("title", ""))
    figure.supxlabel(text, x=0.01, ha="left", fontsize=12.5, color="#444444", linespacing=1.3)
    parts = figure.subfigures(len(lines), 1, squeeze=False, height_ratios=heights).flatten()
    for part, line in zip(parts, lines):
        for ax, (panel, _) in zip(part.subplots(1, len(line), squeeze=False)[0], line):
            DRAW[panel["kind"]](ax, panel, data)
            finish(ax, panel)
    return figure


def things(panel, data):
    """How many rows, arms or lines a panel draws: 0 if nothing of it was measured."""
    kind = panel["kind"]
    if kind == "differences":
        return len(data.contrasts(panel))
    if kind == "routing":
        return sum(row["arm"] == panel["arm"] for row in data.routing)
    if kind in ("matrix", "bars"):
        return len(bars_of(panel, data) if kind == "bars" else
                   data.arms(panel, *panel["columns"]))
    if kind == "fit":
        return len(data.arms(panel))
    # One point is no line.
    series = data.series(panel)
    return len(series) if kind != "lines" or max(map(len, series), default=0) > 1 else 0


def height(panel, count):
    """In inches."""
    if panel["kind"] == "differences":
        return 1.3 + 0.42 * count
    rows = {"matrix": 1.9 + 0.47 * count, "bars": 1.7 + 0.42 * count, "fit": 5.2, "routing": 0}
    legend = 0.14 * (count + len(panel.get("marks", {})))
    return max(4.4, rows.get(panel["kind"], 4.2 + legend))


def in_rows(panels):
    """Lists of one panel or two; differences and wide panels have a row of their own."""
    lines = []
    for panel, count in panels:
        alone = panel.get("wide", panel["kind"] == "differences")
        if alone or not lines or len(lines[-1]) == 2 or is_alone(lines[-1]):
            lines.append([])
        lines[-1].append((panel, count))
    return lines


def is_alone(line):
    return line[0][0].get("wide", line[0][0]["kind"] == "differences")


def finish(ax, panel):
    """Lines for the marks, the title and the legend above the panel, where it hides nothing, and
    the panel's own words."""
    if panel["kind"] != "fit":
        for i, (text, at) in enumerate(panel.get("marks", {}).items()):
            low, high = at if isinstance(at, list) else (at, at)
            line, span = (ax.axvline, ax.axvspan) if panel["kind"] == "bars" else (ax.axhline,
                                                                                  ax.axhspan)
            if low < high:
                span(low, high, color=(GREY, BLUE)[i % 2], alpha=0.25, linewidth=0, label=text)
            else:
                line(low, color=GREY, linestyle=["--", ":", "-."][i % 3], label=text)
    if "minus" in panel:
        (ax.axvline if panel["kind"] == "bars" else ax.axhline)(0, color="k", linewidth=1.2)
    title = panel.get("title", "")
    handles, texts = ax.get_legend_handles_labels()
    if handles:
        legend = ax.legend(handles, texts, title=title, alignment="left", loc="lower left",
                           bbox_to_anchor=(0, 1), borderaxespad=0.2, borderpad=0.2, frameon=False,
                           ncols=2 if max(map(len, texts)) < 26 and len(texts) > 1 else 1)
        legend.get_title().set_weight("bold")
    else:
        ax.set_title(title, loc="left", weight="bold")
    for axis in "xy":
        if label := panel.get(f"{axis}label"):
            ax.set(**{f"{axis}label": label})


# --- words ---

def caption(spec, data, panels):
    """What the paper says, what was found, and what marks and bands are."""
    seeds = Counter(row["arm"] for row in data.rows).values()
    n = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
    found = [f"{head}: {verdict}" for head, verdict in findings(data)]
    lines = [spec.get("caption", ""), f"Here: {'; '.join(found)}." if found else "",
             f"n = {n} seed{'s' * (n != '1')}. " + " ".join(meanings(panels))]
    return "\n".join(textwrap.fill(line, LINE) for line in lines if line)


def findings(data):
    """(what a claim says, its verdict) of each claim that was measured: the words before its
    numbers, with the remark on what is compared here if others say the same."""
    seen = {}
    for claim in data.claims.values():
        verdict = plain_verdict(measured(claim, data.rows, data.table)[1])
        if verdict == NOTHING:
            continue
        head = re.split(r": | \(|; ", claim["says"])[0]
        if head in seen and (remark := re.search(r"\(here: (.+?)\)", claim["says"])):
            head += f", {remark[1]}"
        seen[head] = f"{seen[head]}, {verdict}" if head in seen else verdict
    return seen.items()


def meanings(panels):
    """A sentence on each kind of mark that the panels have."""
    kinds = {(panel["kind"], "minus" in panel) for panel in panels}
    levels = {kind for kind, minus in kinds if not minus}
    if levels & {"lines", "bars", "scatter"}:
        yield "Marks and bars are means over the seeds with their standard errors, dots the seeds."
    if "curves" in levels:
        yield "Curves are means, their bands reach from the lowest to the highest seed."
    if any(minus for _, minus in kinds):
        yield ("Differences to another arm are paired by seed, with 95 % intervals of the mean "
               "(of curves: at the end).")
    if levels & {"matrix", "routing"}:
        yield "Tables: mean ± standard error."
    if "fit" in levels:
        yield "Bands of a law: 95 % of its bootstrap."
    if "differences" in levels:
        yield ("Rows of differences: mean, 95 % interval and the seeds (ticks), paired by seed; "
               f"grey: the margin of {MARGIN} nats; p: t test.")
