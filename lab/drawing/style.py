"""How every figure of the lab looks.

Colours are Okabe and Ito's and the viridis scale, which colour-blind readers can tell apart. Type
is large enough for a lecture hall. A figure is a matplotlib Figure: no pyplot, no display.
"""
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
BLUE = PALETTE[0]
RED = PALETTE[1]
GREEN = PALETTE[2]
GREY = "#666666"
# Amounts, in every map of them: dark is little, yellow is much, and white, which masked cells get,
# is none. The scale's lightest end is cut off, so that no amount looks like white.
AMOUNTS = ListedColormap(
    matplotlib.colormaps["viridis"](np.linspace(0, 0.95, 256))).with_extremes(bad="white")
matplotlib.rcParams.update({
    "font.size": 14, "axes.titlesize": 14, "figure.titlesize": 16, "legend.fontsize": 13,
    "savefig.dpi": 150,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True, "axes.xmargin": 0.01, "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "lines.linewidth": 2.2, "lines.markersize": 6})


def new_figure(width, height, title, subtitle=""):
    """An empty Figure; width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    lines = [title, *textwrap.wrap(subtitle, int(8 * width))]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", linespacing=1.4)
    return figure


def frame(ax, curves):
    """Limits of a loss axis for curves [(x, y), ...]. The steep fall of the first 15 % of training
    leaves the picture at the top: it would flatten everything after it."""
    end = max(x[-1] for x, _ in curves)
    late = np.concatenate([y[x >= min(0.15 * end, x[-1])] for x, y in curves])
    pad = 0.1 * (late.max() - late.min()) or 0.1
    ax.set(xlim=(0, 1.01 * end or 1), ylim=(late.min() - pad, late.max() + pad))


class DrawingError(ValueError):
    """A figure that cannot be written."""
    status = 2


def save(figure, path):
    """Writes the figure and returns its path; one without an ending gets .png. Raises
    DrawingError."""
    path = Path(path)
    if not path.suffix:
        path = path.with_name(path.name + ".png")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as e:              # ValueError: no writer for such an ending
        raise DrawingError(f"{path}: the figure cannot be written: {e}") from None
    return path
