"""Pictures of runs: python -m lab.plots RUN_DIR [RUN_DIR ...] writes PNGs into the run folders.

    loss.png     one run: training and validation loss; several runs: the validation loss of each over tokens
    load.png     each sparse layer: every expert's share of the work over training, and the busiest one's
    usage.png    PEER and PKM: experts used and unevenness over training, and all experts sorted by use
    ancestry.png models made from others, or trained on: the runs that they come from

Colours are Okabe and Ito's and the purple-orange scale, which colour-blind readers can tell apart; type is
large enough for a lecture hall. Each figure is a function that returns a Figure: no pyplot, no display.
"""
import argparse
import math
import sys
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from runtime.checkpoint import CheckpointError, has_run, load_model
from runtime.config import ConfigError, Parser, fail, parse
from data.batches import EvalBatches
from data.binfile import DataError
from data.prepare import find_or_prepare
from lab.drawing.logs import LogError, column, describe, differences, open_run, ratio, smooth

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
BLUE, RED, GREY = PALETTE[0], PALETTE[1], "#666666"
# White is even. The darkest ends are cut off: black, an expert without a token, must look like nothing else.
LOADS = ListedColormap(matplotlib.colormaps["PuOr_r"](np.linspace(0.08, 0.92, 256))).with_extremes(bad="k")
matplotlib.rcParams.update({
    "font.size": 14, "axes.titlesize": 14, "figure.titlesize": 16, "legend.fontsize": 13, "savefig.dpi": 150,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "axes.axisbelow": True, "axes.xmargin": 0.01, "legend.edgecolor": "none", "legend.framealpha": 0.9,
    "lines.linewidth": 2.2, "lines.markersize": 6})


# --- figures ---

def new_figure(width, height, title, subtitle=""):
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}".rstrip(), x=0.01, ha="left", linespacing=1.4)
    return figure


def frame(ax, curves):
    """Limits of a loss axis: the plunge of the first steps leaves at the top, or it would flatten all."""
    end = max(x[-1] for x, _ in curves)
    late = np.concatenate([y[x >= min(0.15 * end, x[-1])] for x, y in curves])
    pad = 0.1 * (late.max() - late.min()) or 0.1
    ax.set(xlim=(0, 1.01 * end or 1), ylim=(late.min() - pad, late.max() + pad))


def loss_figure(run):
    """Training loss, each step and smoothed, and validation loss; bits per byte right, tokens above."""
    log, curves = run.log, []
    figure = new_figure(11, 6.5, run.name, describe(run))
    ax = figure.subplots()
    step, loss = column(log, "loss")
    if len(step):
        curves.append((step, smooth(loss)))
        ax.plot(step, loss, color=BLUE, alpha=0.25, linewidth=0.8)
        ax.plot(*curves[0], color=BLUE, label=f"training, smoothed (last {curves[0][1][-1]:.3f})")
    for i, name in enumerate(["val_loss"] + [name for name in log if name.startswith("val_loss_")]):
        step, loss = column(log, name)
        if len(step):
            curves.append((step, loss))
            label = f"validation {name.removeprefix('val_loss').lstrip('_')}".rstrip()
            ax.plot(step, loss, "s--" if i else "o-", color=PALETTE[1:][i % 6],
                    label=f"{label} (best {loss.min():.3f})")
    ax.set(xlabel="optimizer step", ylabel="cross-entropy (nats per token)")
    if curves:
        frame(ax, curves)
        ax.legend()
    if million := ratio(log, "tokens", "step") / 1e6:
        top = ax.secondary_xaxis("top", functions=(lambda step: step * million, lambda n: n / million))
        top.set_xlabel("training tokens (millions)")
    if bits := ratio(log, "val_bpb", "val_loss"):       # of one text, so one factor for the whole axis
        right = ax.secondary_yaxis("right", functions=(lambda nats: nats * bits, lambda bpb: bpb / bits))
        right.set_ylabel("validation bits per byte")
    return figure


def compare_figure(runs):
    """Validation loss over tokens, one curve per run, the best first in the legend; in bits per byte where
    the runs' tokenizers differ. A run without evaluations shows its training loss, smoothed and dotted."""
    factors = [ratio(run.log, "val_bpb", "val_loss") for run in runs]
    bits = min(factors) > 0 and max(factors) > 1.005 * min(factors)
    figure = new_figure(11, 6.5, "Validation loss", differences(runs))
    ax, curves = figure.subplots(), []
    for i, run in enumerate(runs):
        step, loss = column(run.log, "val_bpb" if bits else "val_loss")
        note, style = "", ["-", "--", "-."][i // len(PALETTE) % 3]
        if not len(step):
            step, loss = column(run.log, "loss")
            loss, note, style = smooth(loss), ", training", ":"
        if len(step):
            curves.append((step * ratio(run.log, "tokens", "step") / 1e6, loss))
            ax.plot(*curves[-1], style, marker="o" if len(step) < 40 else "",
                    color=PALETTE[i % len(PALETTE)], label=f"{run.name} ({loss.min():.3f}{note})")
    ax.set(xlabel="training tokens (millions)",
           ylabel="bits per byte" if bits else "cross-entropy (nats per token)")
    if curves:
        frame(ax, curves)
        best_first = np.array(ax.lines)[np.argsort([loss.min() for _, loss in curves], kind="stable")]
        ax.legend(handles=list(best_first), title="run (best)", alignment="left")
    return figure


def load_figure(run):
    """Maps of the experts' load over training, one per sparse layer, then the load of each layer's busiest
    expert, then the share of pairs dropped, if any was. None where the log knows of no experts."""
    log, layers = run.log, run.log["expert_load"]
    (step, share), (step_dropped, dropped) = column(log, "max_expert_share"), column(log, "dropped")
    if not len(share):
        return None
    wide = math.ceil(len(layers) / 6) or 1
    tall = math.ceil(len(layers) / wide)
    panels = tall + 1 + int(dropped.any())
    figure = new_figure(5 + 6 * wide, 1.8 + 2 * panels, f"{run.name}: load of the experts", describe(run))
    grid = figure.add_gridspec(panels, wide)
    below = [figure.add_subplot(grid[row, :]) for row in range(tall, panels)]
    maps = [figure.add_subplot(grid[n % tall, n // tall], sharex=below[0]) for n in range(len(layers))]
    many = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    depth = PALETTE if len(layers) <= len(PALETTE) else many
    for ax, (i, load), colour in zip(maps, layers.items(), depth):
        image, middle, relative = load_map(ax, log["step"], load)
        ax.set_title(f"layer {i}", loc="left")
        below[0].plot(middle, relative.max(1), color=colour, label=f"layer {i}")
    if maps:
        bar = figure.colorbar(image, ax=maps, extend="both", ticks=[1 / 4, 1 / 2, 1, 2, 4], aspect=10 * tall)
        bar.minorticks_off()
        bar.ax.set_yticklabels(["¼", "½", "even", "2", "4"])
        bar.set_label("load: share × E (black: no token)")
        below[0].axhline(1, color=GREY, linestyle=":")
        below[0].set(ylabel="busiest\n(share × E)", ylim=(0, None))
        below[0].legend(ncols=6, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    else:                                               # too many experts for the log to hold them one by one
        below[0].plot(step, 100 * share, color=BLUE)
        below[0].set(ylabel="busiest expert\n(% of pairs)", ylim=(0, None))
    if dropped.any():
        below[1].plot(step_dropped, 100 * smooth(dropped), color=RED)
        below[1].set(ylabel="dropped\n(% of pairs)", ylim=(0, None), xlim=below[0].get_xlim())
    below[-1].set_xlabel("optimizer step")
    return figure


def load_map(ax, step, load, columns=200):
    """One layer's loads (rows, E) as a picture of at most `columns` sums over time; colour: share of the
    pairs times E. Returns (image, steps (n,) in the middle of each column, share × E (n, E))."""
    rows = np.flatnonzero(~np.isnan(load).any(1))
    groups = np.array_split(rows, min(columns, len(rows)))
    total = np.array([load[group].sum(0) for group in groups])
    relative = total / total.sum(1, keepdims=True) * load.shape[1]
    edges = np.append([step[group[0]] for group in groups], step[rows[-1]] + 1)
    image = ax.pcolormesh(edges, np.arange(load.shape[1] + 1) - 0.5, np.ma.masked_equal(relative, 0).T,
                          norm=LogNorm(1 / 4, 4), cmap=LOADS)
    ax.set_ylabel("expert")
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.grid(False)
    ax.tick_params(labelbottom=False)
    return image, (edges[:-1] + edges[1:]) / 2, relative


def usage_figure(run, loads, source):
    """PEER and PKM: share of experts used in a step, unevenness, and all experts sorted by use from loads
    {layer: (N,)}, counted over `source`; without loads only the first two."""
    figure = new_figure(13 if loads else 11, 6.5, f"{run.name}: use of the experts", describe(run))
    grid = figure.add_gridspec(2, 2 if loads else 1)
    for i, (name, scale, label) in enumerate([("experts_used", 100, "experts used\nin a step (%)"),
                                              ("unevenness", 1, "unevenness of a\nstep (nats, 0: even)")]):
        ax, (step, value) = figure.add_subplot(grid[i, 0]), column(run.log, name)
        ax.plot(step, scale * value, color=PALETTE[i], alpha=0.25, linewidth=0.8)
        ax.plot(step, scale * smooth(value), color=PALETTE[i])
        ax.set(ylabel=label, ylim=(0, None), xlabel="optimizer step" * i)
    if loads:
        ax = figure.add_subplot(grid[:, 1], title=f"counted over {source}")
        for (i, load), colour in zip(loads.items(), PALETTE * len(loads)):
            usage_histogram(ax, load, f"layer {i}: ", colour)
        ax.legend(loc="upper right")
    return figure


def usage_histogram(ax, load, label="", color=BLUE):
    """All N experts sorted by use: load (N,), accumulated router weight, as a multiple of its mean, over the
    experts in percent. Accumulate over a whole validation set: few tokens cannot reach a million experts."""
    z = np.sort(np.asarray(load, float))[::-1] / np.sum(load)
    used, uneven = (z > 0).mean(), math.log(len(z)) + (z[z > 0] * np.log(z[z > 0])).sum()
    rank = np.unique(np.linspace(0, len(z) - 1, 2000).astype(int))        # enough for a line
    ax.plot(100 * (rank + 1) / len(z), np.where(z > 0, z * len(z), np.nan)[rank], color=color,
            label=f"{label}{used:.1%} used, unevenness {uneven:.2f}")
    ax.axhline(1, color=GREY, linestyle=":")
    ax.set(yscale="log", xlim=(0, 100), xlabel="experts, most used first (%)", ylabel="weight (mean: 1)")
    ax.set_ylim(min(ax.get_ylim()[0], 0.1), max(ax.get_ylim()[1], 10))
    ax.yaxis.set_major_formatter("{x:g}")


def validation_loads(run):
    """{layer: (N,)} router weight of each expert over the run's validation batches, by its best checkpoint:
    the log does not hold a million loads a row. Raises CheckpointError, DataError."""
    model, config, tokenizer, _ = load_model(run.folder)
    d, t, loads = config.data, config.train, {}
    folders, _ = find_or_prepare(d.name, d.tokenizer, d.vocab_size, d.dir or None, d.max_tokens, quiet=True)
    batches = EvalBatches(folders, config.model.block_size, t.batch_size, t.eval_batches,
                          tokenizer.token_lengths())
    with torch.no_grad():
        for x, _, domain, _ in batches:
            for i, stats in enumerate(model(x, domain=domain).stats):
                if stats.load.numel() > 1:              # a dense layer counts as one expert
                    loads[i] = loads.get(i, 0) + stats.load.double().numpy()
    return loads


# --- the program ---

def draw(runs, out=None):
    """Writes the figures of these runs; yields each path once it is written. Raises what its parts raise."""
    figure = loss_figure(runs[0]) if len(runs) == 1 else compare_figure(runs)
    yield save(figure, Path(out) if out else runs[0].folder / "loss.png")
    for run in runs:
        if run.config and run.config.ffn.kind in ("peer", "pkm"):
            source, late = "the last tenth of training", len(run.log["step"]) * 9 // 10
            loads = {i: np.nansum(load[late:], 0) for i, load in run.log["expert_load"].items()}
            if not loads and has_run(run.folder):
                source, loads = "the validation batches", validation_loads(run)
            yield save(usage_figure(run, loads, source), run.folder / "usage.png")
        elif figure := load_figure(run):
            yield save(figure, run.folder / "load.png")
        yield from draw_ancestry(run.folder)


def draw_ancestry(folder):
    """Writes the figure of ancestry, if the folder's model has one; yields its path."""
    from lab.drawing.ancestry import ancestry_figure                # which draws with this file's frame and colours
    if has_run(folder) and (figure := ancestry_figure(folder)):
        yield save(figure, Path(folder) / "ancestry.png")


def is_made(folder):
    """True for a model that grow.btx or grow.lifelong made and nobody trained yet: it has no log to draw."""
    return has_run(folder) and not (Path(folder) / "log.csv").exists()


def save(figure, path):
    try:
        figure.savefig(path)
    except (OSError, ValueError) as e:              # ValueError: no writer for such an ending
        raise LogError(f"{path}: the figure cannot be written: {e}") from None
    return path


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(prog="python -m lab.plots", description=__doc__.split("\n\nColours")[0],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run folders; several are compared")
    parser.add_argument("--out", metavar="FILE", help="the loss figure (default: RUN_DIR/loss.png)")
    try:
        options, _ = parse(parser, argv)
        made = [folder for folder in options.runs if is_made(folder)]
        runs = [open_run(folder) for folder in options.runs if folder not in made]
        for path in chain(draw(runs, options.out) if runs else [], *map(draw_ancestry, made)):
            print(path)
    except (LogError, ConfigError, CheckpointError, DataError, KeyboardInterrupt) as e:
        return fail(e)
    return 0


if __name__ == "__main__":
    sys.exit(main())
