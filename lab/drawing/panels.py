"""The panels of an experiment's figure (lab/papers/figure.py): draw_KIND(ax, panel, data)."""
import math
import re
import textwrap

import numpy as np
from matplotlib.ticker import LogLocator

from lab.drawing.measured import COLOURS
from lab.drawing.style import AMOUNTS, GREEN, GREY, RED
from lab.laws.fit import curves as curves_of
from lab.laws.fit_runs import FitError, fits_of
from lab.papers.expressions import MARGIN
from lab.papers.page import mean_and_error
from lab.papers.spec import fits
from lab.papers.student import paired
from lab.papers.verdict import AGAINST, FOR, HELD, NOT, UNDECIDED, plain_verdict
from lab.scaling import amount

VERDICT = {HELD: GREEN, FOR: "#4f9e86", UNDECIDED: "#777777", AGAINST: "#cf8350", NOT: RED}
AXES = {"val_loss": "validation loss (nats per token)", "loss": "training loss (nats per token)",
        "tokens": "training tokens (millions)", "flops": "training FLOPs (active, 10¹²)",
        "seconds": "training time (seconds)", "step": "optimizer step",
        "flops_per_token": "forward FLOPs per token",
        "max_expert_share": "share of the busiest expert",
        "min_expert_share": "share of the idlest expert", "dropped": "share of pairs dropped",
        "unevenness": "unevenness of use (nats, 0: even)", "n_expert": "experts",
        "granularity": "granularity G", "specialisation": "what it tells of the corpus (nats)"}


def axis_label(name, minus=None):
    """Of a column; minus: the name of the arm that is taken away."""
    if minus:
        text = f"loss minus that of {minus} (nats)" if name == "val_loss" else f"minus {minus}"
        return textwrap.fill(text, 40)
    if name.startswith("val_loss_"):
        return f"validation loss on {name.removeprefix('val_loss_')} (nats per token)"
    return AXES.get(name, name.replace("_", " "))


def extent(values, minus):
    """(mean, low, high): the standard error, of paired differences the 95 % interval."""
    values = list(values)
    mean, error = mean_and_error(values)
    if minus and len(values) > 1:
        return paired(values)[0], *paired(values)[2:4]
    return mean, mean - np.nan_to_num(error), mean + np.nan_to_num(error)


def whiskers(extents):
    """(means, [below, above]) for errorbar."""
    mean, low, high = np.array(extents).T
    return mean, [mean - low, high - mean]


def scale(ax, axis, kind, values=()):
    """Sets a scale; log2 axes get a tick at each value."""
    line, set_scale = (ax.xaxis, ax.set_xscale) if axis == "x" else (ax.yaxis, ax.set_yscale)
    if kind == "log":
        set_scale("log", base=10)
        line.set_major_locator(LogLocator(subs=(1, 2, 5)))
        line.set_major_formatter("{x:g}")
        line.set_minor_formatter("")
    elif kind == "log2":
        set_scale("log", base=2)
        if len(values):
            ticks = sorted(set(values))
            line.set_ticks(ticks, [f"{v:,g}" for v in ticks])
        line.minorticks_off()


# --- one column over another ---

def draw_lines(ax, panel, data):
    """A column over another, a line for each value of `by`; arms in `reference` as horizontal lines
    with their standard errors."""
    x, y, minus = panel["x"], panel["y"], panel.get("minus")
    places, series = [], data.series(panel)
    for i, arms in enumerate(series):
        colour, marker, line = data.look(arms[0])
        at = {arm: np.mean(list(data.values(arm, x).values())) for arm in arms}
        arms = sorted(arms, key=at.get)
        places += at.values()
        if panel.get("xscale") == "log2":       # side by side, so that no mark hides another
            at = {arm: v * 2 ** (0.06 * (i - (len(series) - 1) / 2)) for arm, v in at.items()}
        mean, error = whiskers([extent(data.values(arm, y, minus).values(), minus)
                                for arm in arms])
        group = next(row for row in data.rows if row["arm"] == arms[0]).get(panel.get("by"))
        if group is not None and not isinstance(group, str):
            group = f"{panel['by'].replace('_', ' ')} {group}"
        ax.errorbar([at[arm] for arm in arms], mean, error, color=colour, marker=marker,
                    linestyle=line, capsize=4, label=data.name(group) if group else None)
        for arm in arms:
            seeds = data.values(arm, y, minus).values()
            ax.plot([at[arm]] * len(seeds), seeds, ".", color=colour, alpha=0.4)
    for i, arm in enumerate(panel.get("reference", [])):
        if seeds := data.values(arm, y, minus):
            mean, low, high = extent(seeds.values(), minus)
            ax.axhline(mean, color=data.own_colour(arm) or GREY,
                       linestyle=["--", ":", "-."][i % 3], label=data.name(arm))
            ax.axhspan(low, high, color=GREY, alpha=0.2, linewidth=0)
    if "xscale" not in panel and all(place == int(place) for place in places):
        ax.xaxis.get_major_locator().set_params(integer=True)
    scale(ax, "x", panel.get("xscale"), places)
    scale(ax, "y", panel.get("yscale"))
    ax.set(xlabel=axis_label(x), ylabel=axis_label(y, minus and data.name(minus)))
    ax.margins(x=0.04)


def draw_curves(ax, panel, data):
    """One line per arm: the mean over the seeds, the range of the seeds behind it; of differences
    the 95 % interval at the end."""
    late, y, minus = [0.0] * ("minus" in panel), panel["y"], panel.get("minus")
    for i, (arm,) in enumerate(data.series(panel)):
        colour, _, line = data.look(arm)
        points = data.points(arm, panel)
        at = np.array([x for x, _ in points])
        mean, low, high = np.array([(np.mean(ys), min(ys), max(ys)) for _, ys in points]).T
        ax.plot(at, mean, line, color=colour, label=data.name(arm))
        if minus:
            (end,), error = whiskers([extent(points[-1][1], minus)])
            ax.errorbar(at[-1] * (1.01 + 0.015 * i), end, error, fmt="o", color=colour, capsize=4)
            late += [end - error[0][0], end + error[1][0]]
        else:
            ax.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        for values in (mean, mean) if minus else (low, high):
            late += list(values[at >= 0.15 * at.max()])
    # the plunge of the first steps leaves at the top
    if late and "loss" in y:
        pad = 0.08 * (max(late) - min(late)) or 0.1
        ax.set_ylim(min(late) - pad, max(late) + pad)
    scale(ax, "x", panel.get("xscale"))
    scale(ax, "y", panel.get("yscale"))
    ax.set(xlabel=axis_label(panel.get("x", "tokens")),
           ylabel=axis_label(y, minus and data.name(minus)))


def draw_scatter(ax, panel, data):
    """One column over another, a mark for each arm, with the standard errors of both."""
    for (arm,) in data.series(panel):
        colour, marker, _ = data.look(arm)
        (x, across), (y, error) = (whiskers([extent(data.values(arm, panel[c]).values(), None)])
                                   for c in "xy")
        ax.errorbar(x, y, error, across, capsize=3, markersize=10, fmt=marker, color=colour,
                    markerfacecolor="none", markeredgewidth=2, label=data.name(arm))
    scale(ax, "x", panel.get("xscale"))
    scale(ax, "y", panel.get("yscale"))
    ax.set(xlabel=axis_label(panel["x"]), ylabel=axis_label(panel["y"]))
    ax.margins(0.1)


def draw_bars(ax, panel, data):
    """Bars from zero; where all values are close, marks on a zoomed axis: cut-off bars would
    mislead."""
    minus, shown = panel.get("minus"), bars_of(panel, data)
    values = [list(data.values(arm, c, minus).values()) for arm, c in shown]
    if panel.get("sort"):
        order = sorted(range(len(shown)), key=lambda i: np.mean(values[i]))
        shown, values = [shown[i] for i in order], [values[i] for i in order]
    mean, error = whiskers([extent(seeds, minus) for seeds in values])
    # Marks if the smallest mean is more than half the largest, else bars.
    marks = minus or mean.min() > 0.5 * mean.max() > 0
    for i, ((arm, _), seeds) in enumerate(zip(shown, values)):
        colour = data.look(arm)[0]
        if not marks:
            ax.barh(i, mean[i], color=colour, height=0.6, alpha=0.8)
        ax.errorbar(mean[i], i, xerr=np.array(error)[:, i:i + 1], fmt="o" if marks else "",
                    color=colour if marks else "k", capsize=4, markersize=9)
        ax.plot(seeds, [i] * len(seeds), ".", color="k", alpha=0.4)
    one = len({arm for arm, _ in shown}) == 1
    names = [data.name(c) if one and "columns" in panel else
             ": ".join(map(data.name, (arm, c)[:1 + ("columns" in panel)])) for arm, c in shown]
    ax.set_yticks(range(len(shown)), [textwrap.fill(name, 26) for name in names])
    ax.set(xlabel=axis_label(panel["y"], minus and data.name(minus)),
           ylim=(len(shown) - 0.4, -0.6))
    ax.margins(x=0.08)
    scale(ax, "x", panel.get("xscale"))
    if "xscale" not in panel:
        ax.locator_params(axis="x", nbins=5)            # tokens per second are long numbers


def bars_of(panel, data):
    """[(arm, column)] of the bars: a column of several arms, or several columns."""
    return [(arm, c) for arm in data.arms(panel) for c in panel.get("columns", [panel["y"]])
            if data.values(arm, c, panel.get("minus"))]


# --- tables ---

def draw_matrix(ax, panel, data):
    """Means over the seeds; colour: how far above the best of its column, which is dark."""
    columns = panel["columns"]
    arms = data.arms(panel, *columns)
    pairs = np.array([[mean_and_error(list(data.values(arm, c).values())) for c in columns]
                      for arm in arms])
    if panel.get("sort"):
        order = np.argsort(pairs[:, columns.index(panel["sort"]), 0])
        pairs, arms = pairs[order], [arms[i] for i in order]
    grid = pairs[..., 0]
    texts = [["{:.3f}\n±{:.3f}".format(*cell) for cell in row] for row in np.nan_to_num(pairs)]
    heat(ax, grid - grid.min(0), texts, [data.name(arm) for arm in arms],
         [data.name(c.removeprefix("val_loss_")) for c in columns],
         "above the best of its column", panel.get("most"))
    if all(c.startswith("val_loss") for c in columns):
        ax.set_xlabel(AXES["val_loss"])


def draw_routing(ax, panel, data):
    """The share of each corpus that goes to each expert of a layer (default: the last), in
    percent."""
    own = [row for row in data.routing if row["arm"] == panel["arm"]]
    layers = sorted({row["layer"] for row in own})
    layer = panel.get("layer", -1)
    if layer < 0:
        layer = layers[layer]
    shares = {}
    for row in own:
        if row["layer"] == layer:
            shares.setdefault((row["corpus"], row["expert"]), []).append(100 * row["share"])
    corpora, experts = (list(dict.fromkeys(part)) for part in zip(*sorted_by_place(shares)))
    pairs = np.array([[mean_and_error(shares[c, e]) for e in experts] for c in corpora])
    texts = [["{:.0f} ±{:.0f}".format(*np.nan_to_num(cell)) for cell in row] for row in pairs]
    # An expert that got no token at all is white.
    names = panel.get("experts", experts)
    heat(ax, np.ma.masked_equal(pairs[..., 0], 0), texts, [data.name(c) for c in corpora], names,
         "% of the corpus's tokens", panel.get("most"))
    ax.set_xlabel(f"expert of layer {layer}")


def sorted_by_place(shares):
    """The (corpus, expert) of a table of routing, corpora as they come and experts by number."""
    corpora = list(dict.fromkeys(corpus for corpus, _ in shares))
    return sorted(shares, key=lambda place: (place[1], corpora.index(place[0])))


def heat(ax, shade, texts, down, across, meaning, most=None):
    """A table of texts over colours, from 0 to `most` (None: the largest of this table); meaning:
    of the colour, for its bar."""
    image = ax.imshow(shade, cmap=AMOUNTS, aspect="auto", vmin=0, vmax=most)
    over = "max" if most is not None and shade.max() > most else "neither"
    ax.figure.colorbar(image, ax=ax, label=meaning, fraction=0.05, pad=0.02, extend=over)
    ax.set_xticks(range(len(across)), [textwrap.fill(str(name), 13) for name in across])
    ax.set_yticks(range(len(down)), [textwrap.fill(str(name), 26) for name in down])
    ax.grid(False)
    # Letters are white on what looks dark; a masked cell is white.
    bright = image.cmap(image.norm(shade))[..., :3] @ [0.3, 0.59, 0.11]
    for (i, j), value in np.ndenumerate(bright):
        ax.text(j, i, texts[i][j], ha="center", va="center", color="w" if value < 0.5 else "k",
                fontsize=12, linespacing=0.95)


# --- laws and verdicts ---

def draw_fit(ax, panel, data):
    """A law over its runs: one line per model size (and number of tokens), dots for the runs; in
    `marks` coefficients with the paper's value, beside which the fitted one is written."""
    rows = [row for row in data.rows if fits(row["arm"], panel.get("arms", ["*"]))]
    try:
        fitted = fits_of(panel["law"], rows, panel.get("floor", 0.0))
    except FitError as e:
        return ax.set_title(textwrap.fill(f"no fit: {e}", 60), loc="left", fontsize=12)
    # A curve for each model size, with its band and its runs.
    drawn = [(name, curve) for name, fit in fitted.items() for curve in curves_of(fit)]
    for colour, (name, curve) in zip([*COLOURS.values()] * len(drawn), drawn):
        what = [data.name(name)] * bool(name)
        what += [f"{k} = {amount(v)}" for k, v in curve.fixed.items()]
        ax.plot(curve.x, curve.loss, color=colour, label=", ".join(what))
        ax.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(curve.run_x, curve.run_loss, "o", color=colour, alpha=0.6)
    # Runs that no curve passes, each with what the law says of it.
    on_curves = {loss for _, curve in drawn for loss in curve.run_loss}
    for fit in fitted.values():
        *_, x = fit.inputs.values()
        left = np.array([loss not in on_curves for loss in fit.loss])
        if left.any() and panel["law"] == "krajewski":
            ax.plot(x[left], fit.loss[left], "x", color=GREY, label="runs of other lengths")
            ax.plot(x[left], fit.predict(fit.law, **fit.inputs)[left], "_", color=RED,
                    markersize=16, markeredgewidth=2.5, label="the law at their length")
        for coefficient, paper in panel.get("marks", {}).items():
            low, high = fit.interval[coefficient]
            ax.plot([], [], " ", label=f"{coefficient} = "
                    f"{float(np.ravel(getattr(fit.law, coefficient))[0]):.3g} ({low:.3g} to "
                    f"{high:.3g}), the paper: {paper}")
    variable = "granularity" if panel["law"] == "krajewski" else "n_expert"
    scale(ax, "x", "log2", [x for fit in fitted.values() for x in [*fit.inputs.values()][-1]])
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:.2f}")
    ax.yaxis.set_minor_formatter("{x:.2f}")
    ax.set(xlabel=axis_label(variable), ylabel="validation loss (nats, log scale)")


def draw_differences(ax, panel, data):
    """A row for each claim: the mean difference over the seeds with its 95 % interval, in the
    colour of the verdict, and what was found in numbers."""
    found, limit = data.contrasts(panel), panel.get("most", math.inf)
    ax.axvline(0, color="k", linewidth=1.2)
    seen = [0.0]
    for i, (_, pair) in enumerate(found):
        # The margin belongs to the claim, not to the difference: it is drawn as a band.
        margin = re.search(r"([+-]) margin", pair.text)
        shift = {"+": MARGIN, "-": -MARGIN}[margin[1]] if margin else 0.0
        if margin or " == " in pair.text:
            ax.barh(i, 2 * MARGIN, left=-MARGIN, height=0.8, color="#dddddd", zorder=0.5)
        colour = VERDICT[plain_verdict(pair.verdict)]
        seeds = np.array(list(pair.differences.values())) + shift
        mean = pair.mean + shift
        if abs(mean) <= limit:
            ax.plot(mean, i, "o", color=colour, markersize=11, zorder=3)
            ax.plot(seeds, [i] * len(seeds), "|", color="k", markersize=12, zorder=4)
            ax.hlines(i, pair.low + shift, pair.high + shift, color=colour, linewidth=3.5)
            reach = 1.5 * abs(seeds).max()      # a wider interval leaves the picture
            seen += [*seeds, *np.clip(np.nan_to_num([pair.low, pair.high]) + shift, -reach, reach)]
        else:                                   # an arrow at the edge
            edge = math.copysign(limit, mean)
            ax.plot(edge, i, ">" if mean > 0 else "<", color=colour, markersize=11)
            seen.append(edge)
        p = f"p = {pair.p:#.2g}" if pair.p >= 0.001 else "p < 0.001"
        if math.isnan(pair.p):
            p = "not tested"
        digits = 3 if abs(mean) >= 0.01 else 4
        beside(ax, i, f"{mean:+.{digits}f}".replace("-", "−"), 8)
        beside(ax, i, p, 76)
        beside(ax, i, f"n = {pair.n}", 162)
        beside(ax, i, plain_verdict(pair.verdict), 210, color=colour, weight="bold")
    pad = 0.04 * (max(seen) - min(seen)) or MARGIN
    ax.set_yticks(range(len(found)), [textwrap.fill(text, 52) for text, _ in found])
    ax.set(xlim=(min(seen) - pad, max(seen) + pad), ylim=(len(found) - 0.4, -0.6),
           xlabel="difference: left minus right (nats per token)")
    ax.locator_params(axis="x", nbins=5)


def beside(ax, row, text, place, **look):
    """A text right of a row, `place` points from the axis."""
    ax.annotate(text, (1, row), (place, 0), ax.get_yaxis_transform(), "offset points", va="center",
                annotation_clip=False, **look)


DRAW = {"lines": draw_lines, "bars": draw_bars, "curves": draw_curves, "matrix": draw_matrix,
        "routing": draw_routing, "scatter": draw_scatter, "fit": draw_fit,
        "differences": draw_differences}
