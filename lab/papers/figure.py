"""The figure of an experiment: its [[panel]]s side by side, the paper's claim below.

    kind      needs                 draws
    lines     x, y [by, reference]  a column over another, e.g. loss over the number of experts
    bars      y [columns]           a column, a mark per arm; or several columns, whose axis is y
    curves    y [x]                 training over tokens, flops (active ones), seconds or steps
    matrix    columns               arms by columns, e.g. the loss on each corpus
    routing   arm [layer]           which share of each corpus goes to each expert
    scatter   x, y                  one column over another, one mark per arm
    fit       law [floor]           a scaling law fitted to the runs, with its 95 % band

Marks are means over the seeds, bars their standard errors, faint dots the seeds themselves. Every
panel takes arms (names, * for anything), title, xlabel, ylabel, xscale, yscale (linear, log, log2)
and labels (arm -> text).
"""
import math
import textwrap

import numpy as np

from lab.drawing.style import AMOUNTS, GREY, PALETTE, new_figure
from lab.laws.fit import curves as curves_of
from lab.laws.fit_runs import FitError, fits_of
from lab.papers.page import mean_and_error, numbers
from lab.papers.spec import check_words, fits
from lab.scaling import amount
from runtime.config import nearest
from settings import ConfigError

PANEL = {"kind": str, "arms": list, "title": str, "xlabel": str, "ylabel": str, "xscale": str,
         "yscale": str,
         "labels": dict, "x": str, "y": str, "by": str, "reference": list, "columns": list,
         "arm": str,
         "layer": int, "law": str, "floor": (int, float)}
NEEDS = {"lines": ("x", "y"), "bars": ("y",), "curves": ("y",), "matrix": ("columns",),
         "routing": ("arm",),
         "scatter": ("x", "y"), "fit": ("law",)}
AXES = {"val_loss": "validation loss (nats per token)", "loss": "training loss (nats per token)",
        "train_loss": "training loss (nats per token)",
        "val_bpb": "validation loss (bits per byte)",
        "tokens": "training tokens (millions)",
        "tokens_total": "training tokens, parents' included (millions)",
        "flops": "training FLOPs (active)", "seconds": "training time (seconds)",
        "step": "optimizer step",
        "active_params": "active parameters", "total_params": "parameters",
        "flops_per_token": "forward FLOPs per token",
        "tokens_per_second": "tokens per second", "peak_mib": "peak memory (MiB)",
        "max_expert_share": "share of the busiest expert",
        "min_expert_share": "share of the idlest expert",
        "dropped": "share of pairs dropped", "experts_used": "share of experts used",
        "unevenness": "unevenness of expert use (nats, 0: even)",
        "n_keys": "sub-keys √N (N experts)",
        "n_expert": "experts", "granularity": "granularity G",
        "specialisation": "what the expert tells of the corpus (nats)"}
MILLIONS = ("tokens", "tokens_total")


# --- the whole figure ---

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
        for pattern in [*panel.get("arms", []), *panel.get("reference", []), panel.get("arm", "*")]:
            if not any(fits(name, [pattern]) for name in names):
                raise ConfigError(f"{where}: there is no arm {pattern}{nearest(pattern, names)}")


def experiment_figure(panels, title, caption, rows, curves, routing):
    """The Figure of an experiment's tables; None without panels."""
    if not panels:
        return None
    # At most three panels side by side; four stand two by two.
    across = 2 if len(panels) == 4 else min(3, len(panels))
    down = math.ceil(len(panels) / across)
    wide = max(9, 7.2 * across)                         # inches
    figure = new_figure(wide, 0.8 + 5.6 * down, title)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for ax in axes[len(panels):]:
        ax.set_visible(False)
    # Each panel draws the arms that it names, and has the last word on its labels.
    for ax, panel in zip(axes, panels):
        patterns = panel.get("arms", ["*"])
        ax.set_title(panel.get("title", ""), loc="left")
        own_rows, own_curves = ([row for row in table if fits(row["arm"], patterns)]
                                for table in (rows, curves))
        DRAW[panel["kind"]](ax, panel, own_rows, own_curves, routing)
        for axis in "xy":
            if label := panel.get(f"{axis}label"):
                ax.set(**{f"{axis}label": label})
    if caption:
        figure.supxlabel("\n".join(textwrap.wrap(caption, int(10 * wide))), x=0.01, ha="left",
                         fontsize=13,
                         color=GREY)
    return figure


# --- panels: draw_KIND(ax, panel, rows, curves, routing), tables as lists of dicts ---

def label(panel, arm):
    return panel.get("labels", {}).get(arm, arm)


def axis_label(name):
    if name.startswith("val_loss_"):
        return f"validation loss on {name.removeprefix('val_loss_')} (nats per token)"
    return AXES.get(name, name.replace("_", " "))


def arms_of(rows, *columns):
    """Arms, in order, that have a number in each of the columns."""
    names = dict.fromkeys(row["arm"] for row in rows)
    return [name for name in names if all(numbers(rows, name, column) for column in columns)]


def scale(ax, axis, kind, values=()):
    """Sets a scale; log2 axes get a tick at each value."""
    if kind == "linear":
        return
    line, set_scale = (ax.xaxis, ax.set_xscale) if axis == "x" else (ax.yaxis, ax.set_yscale)
    if kind == "log":
        set_scale("log", base=10)
        return
    set_scale("log", base=2)
    if len(values):
        ticks = sorted(set(values))
        line.set_ticks(ticks, [f"{v:,g}" for v in ticks])
    line.minorticks_off()


def draw_lines(ax, panel, rows, curves, routing):
    """A column over another, a line for each value of `by`; arms in `reference` as horizontal
    lines."""
    x, y, by = panel["x"], panel["y"], panel.get("by")
    reference = panel.get("reference", [])
    rows_x = [row for row in rows if isinstance(row.get(x), (int, float))
              and row["arm"] not in reference]
    groups = dict.fromkeys(row.get(by) for row in rows_x) if by else [None]
    for i, group in enumerate(groups):
        # A point for each arm of the group: where it stands, mean, error.
        own = [row for row in rows_x if not by or row.get(by) == group]
        points = sorted((np.mean(numbers(own, arm, x)), *mean_and_error(numbers(own, arm, y)), arm)
                        for arm in arms_of(own, x, y))
        if not points:
            continue
        at, mean, error, names = zip(*points)
        colour = PALETTE[i % len(PALETTE)]
        if isinstance(group, str):
            name = group
        else:
            name = f"{by} {group}" if group is not None else ""
        ax.errorbar(at, mean, np.nan_to_num(error), color=colour, marker="osD^v"[i % 5], capsize=4,
                    label=label(panel, name))
        # The seeds themselves, faint.
        for place, arm in zip(at, names):
            seeds = numbers(own, arm, y)
            ax.plot([place] * len(seeds), seeds, ".", color=colour, alpha=0.35)
    for i, arm in enumerate(reference):
        if values := numbers(rows, arm, y):
            ax.axhline(np.mean(values), color=GREY, linestyle=["--", ":", "-."][i % 3],
                       label=label(panel, arm))
    scale(ax, "x", panel.get("xscale", "linear"), [row[x] for row in rows_x])
    scale(ax, "y", panel.get("yscale", "linear"))
    ax.set(xlabel=axis_label(x), ylabel=axis_label(y))
    ax.margins(x=0.04)
    if by or reference:
        ax.legend(title=by and by.replace("_", " "), alignment="left")


def draw_bars(ax, panel, rows, curves, routing):
    """Bars from zero; where all values are close, marks on a zoomed axis: cut-off bars would
    mislead."""
    # several of one arm instead of one of several
    columns = panel.get("columns", [])
    shown = [(arm, c, label(panel, c if columns else arm))
             for c in columns or [panel["y"]] for arm in arms_of(rows, c)]
    pairs = [mean_and_error(numbers(rows, arm, c)) for arm, c, _ in shown]
    mean, error = np.array(pairs).reshape(-1, 2).T
    at = np.arange(len(shown))
    # Marks if the smallest mean is more than half the largest, else bars.
    if len(mean) and mean.min() > 0.5 * mean.max() > 0:
        ax.errorbar(mean, at, xerr=np.nan_to_num(error), fmt="o", color=PALETTE[0], capsize=4,
                    markersize=9)
    else:
        ax.barh(at, mean, xerr=np.nan_to_num(error), color=PALETTE[0], capsize=4, height=0.6)
    for place, (arm, c, _) in zip(at, shown):
        seeds = numbers(rows, arm, c)
        ax.plot(seeds, [place] * len(seeds), ".", color="k", alpha=0.35)
    ax.set_yticks(at, [name for *_, name in shown])
    ax.set(xlabel=axis_label(panel["y"]), ylim=(len(shown) - 0.4, -0.6))
    ax.margins(x=0.08)
    scale(ax, "x", panel.get("xscale", "linear"))
    if "xscale" not in panel:
        ax.locator_params(axis="x", nbins=5)            # tokens per second are long numbers


def draw_curves(ax, panel, rows, curves, routing):
    """One line per arm: the mean over the seeds, the range of the seeds behind it."""
    x, y = panel.get("x", "tokens"), panel["y"]
    late = []
    for i, arm in enumerate(dict.fromkeys(row["arm"] for row in curves)):
        # The values of all seeds at each step.
        seeds = {}
        for row in curves:
            if row["arm"] == arm and isinstance(row.get(y), (int, float)) and row["step"] > 0:
                seeds.setdefault(row["step"], []).append((place_on(x, row, rows), row[y]))
        pairs = [np.array(s, float).T for _, s in sorted(seeds.items())
                 if all(a is not None for a, _ in s)]
        if pairs:
            points = [(a.mean(), b.min(), b.max(), b.mean()) for a, b in pairs]
            at, low, high, mean = np.array(points).T
            colour = PALETTE[i % len(PALETTE)]
            style = ["-", "--", ":"][i // len(PALETTE) % 3]
            ax.plot(at, mean, style, color=colour, label=label(panel, arm))
            ax.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            late += list(low[at >= 0.15 * at.max()]) + list(high[at >= 0.15 * at.max()])
    # the plunge of the first steps leaves at the top
    if late and "loss" in y:
        pad = 0.08 * (max(late) - min(late)) or 0.1
        ax.set_ylim(min(late) - pad, max(late) + pad)
    scale(ax, "x", panel.get("xscale", "linear"))
    scale(ax, "y", panel.get("yscale", "linear"))
    ax.set(xlabel=axis_label(x), ylabel=axis_label(y))
    ax.legend()


def place_on(x, row, rows):
    """Where a point of a curve stands on the x axis; None if that is not known."""
    # forward and backward: three times the forward pass
    if x == "flops":
        per_token = numbers(rows, row["arm"], "flops_per_token")
        return 3 * per_token[0] * row["tokens"] if per_token else None
    return row.get(x) / 1e6 if x in MILLIONS else row.get(x)


def draw_matrix(ax, panel, rows, curves, routing):
    """Means over the seeds; colour: how far above the best of its column, which is dark."""
    columns, names = panel["columns"], arms_of(rows, *panel["columns"])
    if not names:
        return ax.set_title("not measured", loc="left")
    grid = np.array([[np.mean(numbers(rows, arm, c)) for c in columns] for arm in names])
    heat(ax, grid, grid - grid.min(0), [label(panel, arm) for arm in names],
         [c.removeprefix("val_loss_") for c in columns], "{:.3f}", "above the best of its column")
    if all(c.startswith("val_loss") for c in columns):
        ax.set_xlabel("validation loss (nats per token)")


def draw_routing(ax, panel, rows, curves, routing):
    """The share of each corpus that goes to each expert of a layer (default: the last), in
    percent."""
    own = [row for row in routing if row["arm"] == panel["arm"]]
    layers = sorted({row["layer"] for row in own})
    if not layers:
        return ax.set_title(f"{panel['arm']}: not measured", loc="left")
    layer = panel.get("layer", -1)
    if layer < 0:
        layer = layers[layer]
    # Means over the seeds, a row for each corpus.
    own = [row for row in own if row["layer"] == layer]
    corpora = list(dict.fromkeys(row["corpus"] for row in own))
    experts = sorted({row["expert"] for row in own})
    grid = np.array([[np.mean([row["share"] for row in own
                               if (row["corpus"], row["expert"]) == (c, e)])
                      for e in experts] for c in corpora])
    # An expert that got no token at all is white.
    share = np.ma.masked_equal(100 * grid, 0)
    heat(ax, 100 * grid, share, corpora, experts, "{:.0f}", "% of the corpus's tokens", 100)
    ax.set_xlabel(f"expert of layer {layer}")
    ax.set_title(panel.get("title", label(panel, panel["arm"])), loc="left")


def heat(ax, grid, shade, down, across, form, meaning, most=None):
    """A table of numbers over colours, from 0 to `most` (None: the largest of this table); meaning:
    of the colour, for its bar."""
    image = ax.imshow(shade, cmap=AMOUNTS, aspect="auto", vmin=0, vmax=most)
    ax.figure.colorbar(image, ax=ax, label=meaning, fraction=0.05, pad=0.02)
    ax.set_xticks(range(len(across)), across)
    ax.set_yticks(range(len(down)), down)
    ax.grid(False)
    # Letters are white on what looks dark; a masked cell is white.
    bright = image.cmap(image.norm(shade))[..., :3] @ [0.3, 0.59, 0.11]
    for (i, j), value in np.ndenumerate(grid):
        ax.text(j, i, form.format(value), ha="center", va="center",
                color="w" if bright[i, j] < 0.5 else "k", fontsize=12 if len(across) < 8 else 10)


def draw_scatter(ax, panel, rows, curves, routing):
    """One column over another, a mark for each arm, with the standard errors of both."""
    x, y = panel["x"], panel["y"]
    for i, arm in enumerate(arms_of(rows, x, y)):
        (at, across), (mean, error) = (mean_and_error(numbers(rows, arm, c)) for c in (x, y))
        ax.errorbar(at, mean, np.nan_to_num(error), np.nan_to_num(across), capsize=3, markersize=9,
                    fmt="osD^v<>"[i // len(PALETTE) % 7], color=PALETTE[i % len(PALETTE)],
                    label=label(panel, arm))
    scale(ax, "x", panel.get("xscale", "linear"))
    scale(ax, "y", panel.get("yscale", "linear"))
    ax.set(xlabel=axis_label(x), ylabel=axis_label(y))
    ax.margins(0.1)
    ax.legend(fontsize=11)


def draw_fit(ax, panel, rows, curves, routing):
    """A law over its runs: one line per model size (and number of tokens), dots for the runs."""
    try:
        fitted = fits_of(panel["law"], rows, panel.get("floor", 0.0))
    except FitError as e:
        return ax.set_title("\n".join(textwrap.wrap(f"no fit: {e}", 60)), loc="left", fontsize=11)
    # A curve for each model size, with its band and its runs.
    drawn = [(name, curve) for name, fit in fitted.items() for curve in curves_of(fit)]
    for i, (name, curve) in enumerate(drawn):
        colour = PALETTE[i % len(PALETTE)]
        what = [f"{k} = {amount(v)}" for k, v in curve.fixed.items()]
        if name:
            what.insert(0, name)
        ax.plot(curve.x, curve.loss, color=colour, label=", ".join(what))
        ax.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(curve.run_x, curve.run_loss, "o", color=colour, alpha=0.6)
    variable = "granularity" if panel["law"] == "krajewski" else "n_expert"
    scale(ax, "x", "log2", [x for _, curve in drawn for x in curve.run_x])
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:.2f}")
    ax.yaxis.set_minor_formatter("{x:.2f}")
    ax.set(xlabel=axis_label(variable), ylabel=axis_label("val_loss"))
    ax.legend(fontsize=12)


DRAW = {"lines": draw_lines, "bars": draw_bars, "curves": draw_curves, "matrix": draw_matrix,
        "routing": draw_routing, "scatter": draw_scatter, "fit": draw_fit}
