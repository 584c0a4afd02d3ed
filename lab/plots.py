"""Pictures of runs: python -m lab.plots RUN_DIR [RUN_DIR ...] writes PNGs into the run folders.

    loss.png     one run: training and validation loss
    compare.png  several runs, in the folder of the first: the validation loss of each
    load.png     several experts: each one's share of the work over training, layer by layer
    usage.png    very many, as in PEER: experts used, unevenness, and all experts sorted by use
    ancestry.png models made from others, or trained on: the runs that they come from

Each figure is a function that returns a Figure; colours and type are those of lab/drawing/style.py.
"""
import argparse
import math
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from data.batches import EvalBatches
from data.prepare import prepared
from lab.drawing.ancestry import ancestry_figure
from lab.drawing.logs import (LogError, column, describe, differences, open_run, ratio,
                              smooth)
from lab.drawing.style import AMOUNTS, BLUE, GREY, PALETTE, RED, frame, new_figure, save
from model import load_model
from runtime.checkpoint import has_run
from runtime.config import Parser, parse
from runtime.ending import Ending

# --- figures ---

def loss_figure(run):
    """Training loss, each step and smoothed, and validation loss; bits per byte right, tokens
    above."""
    log, curves = run.log, []
    figure = new_figure(11, 6.5, run.name, describe(run))
    ax = figure.subplots()
    # Training loss: each logged step faint, the moving average on top; of a long log the least and
    # the largest loss of each group of rows, between which its steps lie.
    step, loss = column(log, "loss")
    if len(step):
        curves.append((step, smooth(loss)))
        low, high = (column(log, name)[1] for name in ("loss_low", "loss_high"))
        if np.array_equal(low, high):
            ax.plot(step, loss, color=BLUE, alpha=0.25, linewidth=0.8)
        else:
            ax.fill_between(step, low, high, color=BLUE, alpha=0.25, linewidth=0,
                            label="training, least to largest")
        ax.plot(*curves[0], color=BLUE, label=f"training, smoothed (last {curves[0][1][-1]:.3f})")
    # Validation loss: over all corpora, and dashed on each, if there are several.
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
    # The same curves in other units: tokens along the top, bits per byte on the right.
    if million := ratio(log, "tokens", "step") / 1e6:
        top = ax.secondary_xaxis("top", functions=(lambda step: step * million,
                                                   lambda n: n / million))
        top.set_xlabel("training tokens (millions)")
    # of one text, so one factor for the whole axis
    if bits := ratio(log, "val_bpb", "val_loss"):
        right = ax.secondary_yaxis("right", functions=(lambda nats: nats * bits,
                                                       lambda bpb: bpb / bits))
        right.set_ylabel("validation bits per byte")
    return figure


def compare_figure(runs):
    """Validation loss over tokens, one curve per run, the best first in the legend; in bits per
    byte where the runs' tokenizers differ. A run without evaluations shows its training loss,
    smoothed and dotted; one without any loss yet is named in the legend."""
    factors = [ratio(run.log, "val_bpb", "val_loss") for run in runs if len(run.log["step"])]
    bits = min(factors) > 0 and max(factors) > 1.005 * min(factors)
    figure = new_figure(11, 6.5, "Validation loss", differences(runs))
    ax, curves, lines = figure.subplots(), [], []
    for i, run in enumerate(runs):
        step, loss, note = compared(run, bits)
        style = ["-", "--", "-."][i // len(PALETTE) % 3]        # more runs than colours
        if note:
            style = ":"
        tokens = step * ratio(run.log, "tokens", "step") / 1e6
        best = f"{loss.min():.3f}{note}" if len(loss) else "no row yet"
        line, = ax.plot(tokens, loss, style, marker="o" if 0 < len(loss) < 40 else "",
                        color=PALETTE[i % len(PALETTE)], label=f"{run.name} ({best})")
        lines.append((loss.min() if len(loss) else math.inf, line))
        if len(loss):
            curves.append((tokens, loss))
    ax.set(xlabel="training tokens (millions)",
           ylabel="bits per byte" if bits else "cross-entropy (nats per token)")
    if curves:
        frame(ax, curves)
    best_first = [line for _, line in sorted(lines, key=lambda pair: pair[0])]
    ax.legend(handles=best_first, title="run (best)", alignment="left")
    return figure


def compared(run, bits):
    """(steps, loss, note) of a run beside others: its validation loss, in bits per byte or in nats,
    or else its training loss."""
    step, loss = column(run.log, "val_bpb" if bits else "val_loss")
    if len(loss):
        return step, loss, ""
    step, loss = column(run.log, "loss")
    return step, smooth(loss), ", training" if len(loss) else ""


def load_figure(run):
    """Maps of the experts' load over training, one per sparse layer, then the load of each layer's
    busiest expert, then the share of pairs dropped, if any was. None where the log knows of no
    layer with several experts."""
    log = run.log
    layers = {i: load for i, load in log["expert_load"].items() if load.shape[1] > 1}
    step, share = column(log, "max_expert_share")
    step_dropped, dropped = column(log, "dropped")
    if not len(share) or log["expert_load"] and not layers:
        return None
    # Maps six to a column, below them one or two panels over the whole width.
    wide = math.ceil(len(layers) / 6) or 1
    tall = math.ceil(len(layers) / wide)
    panels = tall + 1 + int(dropped.any())
    figure = new_figure(5 + 6 * wide, 1.8 + 2 * panels, f"{run.name}: load of the experts",
                        describe(run))
    grid = figure.add_gridspec(panels, wide)
    below = [figure.add_subplot(grid[row, :]) for row in range(tall, panels)]
    maps = [figure.add_subplot(grid[n % tall, n // tall], sharex=below[0])
            for n in range(len(layers))]
    # A map for each layer, and its busiest expert as a line below.
    many = AMOUNTS(np.linspace(0, 0.9, len(layers)))
    depth = PALETTE if len(layers) <= len(PALETTE) else many
    for ax, (i, load), colour in zip(maps, layers.items(), depth):
        image, middle, relative = load_map(ax, log["step"], load)
        ax.set_title(f"layer {i}", loc="left")
        below[0].plot(middle, relative.max(1), color=colour, label=f"layer {i}")
    if maps:
        bar = figure.colorbar(image, ax=maps, extend="both", ticks=[1 / 4, 1 / 2, 1, 2, 4],
                              aspect=10 * tall)
        bar.minorticks_off()
        bar.ax.set_yticklabels(["¼", "½", "even", "2", "4"])
        bar.set_label("load: share × E (white: no token)")
        below[0].axhline(1, color=GREY, linestyle=":")
        below[0].set(ylabel="busiest\n(share × E)", ylim=(0, None))
        below[0].legend(ncols=6, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    # too many experts for the log to hold them one by one
    else:
        below[0].plot(step, 100 * share, color=BLUE)
        below[0].set(ylabel="busiest expert\n(% of pairs)", ylim=(0, None))
    if dropped.any():
        below[1].plot(step_dropped, 100 * smooth(dropped), color=RED)
        below[1].set(ylabel="dropped\n(% of pairs)", ylim=(0, None), xlim=below[0].get_xlim())
    below[-1].set_xlabel("optimizer step")
    return figure


def load_map(ax, step, load, columns=200):
    """One layer's loads (rows, E) as a picture of at most `columns` sums over time; colour: share
    of the pairs times E. Returns (image, steps (n,) in the middle of each column, share × E (n,
    E))."""
    # Sum the rows that have loads into groups, and turn sums into shares of the mean.
    rows = np.flatnonzero(~np.isnan(load).any(1))
    groups = np.array_split(rows, min(columns, len(rows)))
    total = np.array([load[group].sum(0) for group in groups])
    relative = total / total.sum(1, keepdims=True) * load.shape[1]
    edges = np.append([step[group[0]] for group in groups], step[rows[-1]] + 1)
    # Draw them on a logarithmic scale; an expert without a token is masked, which shows it white.
    image = ax.pcolormesh(edges, np.arange(load.shape[1] + 1) - 0.5,
                          np.ma.masked_equal(relative, 0).T,
                          norm=LogNorm(1 / 4, 4), cmap=AMOUNTS)
    ax.set_ylabel("expert")
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.grid(False)
    ax.tick_params(labelbottom=False)
    return image, (edges[:-1] + edges[1:]) / 2, relative


def usage_figure(run, loads, source):
    """Very many experts: share of them used in a step, unevenness, and all experts sorted by use
    from loads {layer: (E,)}, counted over `source`; without loads only the first two."""
    figure = new_figure(13 if loads else 11, 6.5, f"{run.name}: use of the experts", describe(run))
    grid = figure.add_gridspec(2, 2 if loads else 1)
    for i, (name, scale, label) in enumerate([("experts_used", 100, "experts used\nin a step (%)"),
                                              ("unevenness", 1,
                                               "unevenness of a\nstep (nats, 0: even)")]):
        ax = figure.add_subplot(grid[i, 0])
        step, value = column(run.log, name)
        ax.plot(step, scale * value, color=PALETTE[i], alpha=0.25, linewidth=0.8)
        ax.plot(step, scale * smooth(value), color=PALETTE[i])
        ax.set(ylabel=label, ylim=(0, None))
    ax.set_xlabel("optimizer step")
    # Right: every layer's experts, most used first.
    if loads:
        ax = figure.add_subplot(grid[:, 1], title=f"counted over {source}")
        for (i, load), colour in zip(loads.items(), PALETTE * len(loads)):
            usage_histogram(ax, load, f"layer {i}: ", colour)
        ax.legend(loc="upper right")
    return figure


def usage_histogram(ax, load, label="", color=BLUE):
    """All E experts sorted by use: load (E,), accumulated router weight, as a multiple of its mean,
    over the experts in percent. Accumulate over a whole validation set: few tokens cannot reach a
    million experts."""
    # Shares z of the weight; unevenness is log E + sum z log z (PEER 2407.04153, sec. 3.3).
    z = np.sort(np.asarray(load, float))[::-1] / np.sum(load)
    used = (z > 0).mean()
    uneven = math.log(len(z)) + (z[z > 0] * np.log(z[z > 0])).sum()
    # 2,000 of the ranks are enough for a line.
    rank = np.unique(np.linspace(0, len(z) - 1, 2000).astype(int))
    ax.plot(100 * (rank + 1) / len(z), np.where(z > 0, z * len(z), np.nan)[rank], color=color,
            label=f"{label}{used:.1%} used, unevenness {uneven:.2f}")
    ax.axhline(1, color=GREY, linestyle=":")
    ax.set(yscale="log", xlim=(0, 100), xlabel="experts, most used first (%)",
           ylabel="weight (mean: 1)")
    ax.set_ylim(min(ax.get_ylim()[0], 0.1), max(ax.get_ylim()[1], 10))
    ax.yaxis.set_major_formatter("{x:g}")


def validation_loads(run):
    """{layer: (E,)} router weight of each expert over the run's validation batches, by its best
    checkpoint: the log does not hold a million loads a row. Raises CheckpointError, DataError."""
    model, config, tokenizer, _ = load_model(run.folder)
    loads = {}
    folders, _ = prepared(config.data)
    batches = EvalBatches(folders, config.model.block_size, config.train.batch_size,
                          config.train.eval_batches, tokenizer.token_lengths())
    with torch.no_grad():
        for x, _, domain, _ in batches:
            for i, stats in enumerate(model(x, domain=domain).stats):
                if stats.load.numel() > 1:              # a dense layer counts as one expert
                    loads[i] = loads.get(i, 0) + stats.load.double().numpy()
    return loads


# --- the program ---

def draw(runs, out=None):
    """Writes the figures of these runs; yields each path once it is written. out: where the figure
    of the loss goes, a file or a folder. Raises what its parts raise."""
    if len(runs) == 1:
        name, figure = "loss.png", loss_figure(runs[0])
    else:                                   # no run's own picture is written over
        name, figure = "compare.png", compare_figure(runs)
    place = Path(out or runs[0].folder)
    yield save(figure, place / name if place.is_dir() else place)
    for run in runs:
        if any(layer.many for layer in run.layers) and len(run.log["step"]):
            source = "the last tenth of training"
            late = len(run.log["step"]) * 9 // 10
            loads = {i: np.nansum(load[late:], 0) for i, load in run.log["expert_load"].items()}
            if not loads and has_run(run.folder):
                source = "the validation batches"
                loads = validation_loads(run)
            yield save(usage_figure(run, loads, source), run.folder / "usage.png")
        elif figure := load_figure(run):
            yield save(figure, run.folder / "load.png")
        yield from draw_ancestry(run.folder)


def draw_ancestry(folder):
    """Writes the figure of ancestry, if the folder's model has one; yields its path."""
    if has_run(folder) and (figure := ancestry_figure(folder)):
        yield save(figure, Path(folder) / "ancestry.png")


def is_made(folder):
    """True for a model that grow.btx or grow.lifelong made and nobody trained yet: it has no log to
    draw."""
    return has_run(folder) and not (Path(folder) / "log.csv").exists()


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(prog="python -m lab.plots", description=__doc__.split("\n\nEach")[0],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR",
                        help="run folders; several are compared")
    parser.add_argument("--out", metavar="FILE", help="the figure of the loss, or a folder for it "
                        "(default: the first RUN_DIR)")
    with Ending() as end:
        options, _ = parse(parser, argv)
        made = [folder for folder in options.runs if is_made(folder)]
        left = [folder for folder in options.runs if folder not in made]
        runs = [open_run(folder, begun=len(left) == 1) for folder in left]
        if runs and not any(len(run.log["step"]) for run in runs):
            raise LogError("none of these runs has logged a step yet; let them go on, then draw "
                           "them again")
        paths = [*chain(draw(runs, options.out) if runs else [], *map(draw_ancestry, made))]
        print(*paths or ["nothing to draw: not trained here, and not made from other runs"], sep="\n")
    return end.status


if __name__ == "__main__":
    sys.exit(main())
