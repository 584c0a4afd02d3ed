"""The figure of an experiment: its [[panel]]s side by side, the paper's claim below.

    kind      needs                 draws
    lines     x, y [by, reference]  a column over another, e.g. loss over the number of experts
    bars      y [columns]           a column, one mark per arm; or several columns of one arm, whose axis is y
    curves    y [x]                 the course of training over tokens, flops (active ones), seconds or steps
    matrix    columns               arms by columns, e.g. the loss on each corpus
    routing   arm [layer]           which share of each corpus goes to each expert
    scatter   x, y                  one column over another, one mark per arm
    fit       law [floor]           a scaling law fitted to the runs (lab/scaling.py), with its 95 % band

Marks are means over the seeds, bars their standard errors, faint dots the seeds themselves. Every panel takes
arms (names, * for anything), title, xlabel, ylabel, xscale, yscale (linear, log, log2) and labels (arm ->
text).
"""
import math
import textwrap

from runtime.config import ConfigError, nearest
from lab.papers.figure import DRAW
from lab.plots import GREY, new_figure
from lab.papers.spec import check_words, fits

PANEL = {"kind": str, "arms": list, "title": str, "xlabel": str, "ylabel": str, "xscale": str, "yscale": str,
         "labels": dict, "x": str, "y": str, "by": str, "reference": list, "columns": list, "arm": str,
         "layer": int,
         "law": str, "floor": (int, float)}
NEEDS = {"lines": ("x", "y"), "bars": ("y",), "curves": ("y",), "matrix": ("columns",), "routing": ("arm",),
         "scatter": ("x", "y"), "fit": ("law",)}


def check_panels(spec, names, path):
    """Raises ConfigError for a panel that cannot be drawn; names are the arms at any size."""
    for i, panel in enumerate(spec.get("panel", [])):
        where = f"{path}: [[panel]] {i + 1}"
        check_words(panel, PANEL, where)
        if panel.get("kind") not in NEEDS:
            raise ConfigError(f"{where}: kind = \"{panel.get('kind', '')}\" is not one of {', '.join(NEEDS)}"
                              f"{nearest(str(panel.get('kind', '')), NEEDS)}")
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
    across = 2 if len(panels) == 4 else min(3, len(panels))
    down, wide = math.ceil(len(panels) / across), max(9, 7.2 * across)
    figure = new_figure(wide, 0.8 + 5.6 * down, title)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for ax in axes[len(panels):]:
        ax.set_visible(False)
    for ax, panel in zip(axes, panels):
        patterns = panel.get("arms", ["*"])
        ax.set_title(panel.get("title", ""), loc="left")
        DRAW[panel["kind"]](ax, panel, *([row for row in table if fits(row["arm"], patterns)]
                                         for table in (rows, curves)), routing)
        for axis in "xy":
            if label := panel.get(f"{axis}label"):
                ax.set(**{f"{axis}label": label})
    if caption:
        figure.supxlabel("\n".join(textwrap.wrap(caption, int(10 * wide))), x=0.01, ha="left", fontsize=13,
                         color=GREY)
    return figure
