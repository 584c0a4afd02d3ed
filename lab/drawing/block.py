"""A picture of one transformer block and of its mixture-of-experts layer, for a wall:

    python -m lab.drawing.block [--out results/block.png]

The example is small enough to follow by hand: N = B T = 4 tokens, E = 4 experts, k = 2 of them for
each token, room for C = 3 pairs at each expert. The five steps are those of MoE.forward in moe.py.
"""
import sys

from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

from lab.drawing.style import BLUE, GREEN, GREY, PALETTE, RED, save
from runtime.config import Parser, parse
from runtime.ending import Ending

WIDTH, HEIGHT = 16, 9                   # inches, and the units of all places below
EXPERTS = [BLUE, PALETTE[4], GREEN, PALETTE[3]]         # a colour for each expert
CHOSEN = [(0, 1), (0, 2), (0, 3), (0, 1)]               # the experts of each token
CAPACITY = 3
INK, PALE = "#222222", "#e8e8e8"
SIDE = 0.34                             # of a token's square
LEFT, RIGHT = 9.55, 13.0                # of the drawings


# --- parts ---

def write(ax, x, y, text, size=16, **more):
    ax.text(x, y, text, **dict(fontsize=size, color=INK, ha="center", va="center",
                               linespacing=1.35) | more)


def box(ax, x, y, width, height, text="", colour=INK, fill="white", **more):
    """A rounded box about (x, y)."""
    look = dict(facecolor=fill, edgecolor=colour, linewidth=2.2) | more
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height,
                                boxstyle="round,pad=0,rounding_size=0.12", zorder=3, **look))
    write(ax, x, y, text, zorder=4)


def on(colour):
    """The colour of letters on a colour: dark on the two light experts and on pale grey."""
    return INK if colour in (EXPERTS[1], EXPERTS[3], PALE) else "white"


def token(ax, x, y, number, colour=GREY):
    """The square of a token, its lower left corner at (x, y)."""
    ax.add_patch(Rectangle((x, y), SIDE, SIDE, facecolor=colour, edgecolor="white", linewidth=1.5,
                           zorder=3))
    write(ax, x + SIDE / 2, y + SIDE / 2, number, 15, color=on(colour), weight="bold", zorder=4)


def arrow(ax, start, end, colour=INK, width=2.0, style="-|>"):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle=style, color=colour, linewidth=width,
                                 zorder=2,
                                 mutation_scale=16, shrinkA=0, shrinkB=0))


def plus(ax, x, y):
    ax.add_patch(Circle((x, y), 0.2, facecolor="white", edgecolor=INK, linewidth=2.2, zorder=3))
    write(ax, x, y - 0.01, "+", 20, zorder=4)


# --- the block ---

def draw_block(ax):
    """The block from below to above, the slot of its feed-forward layer open to the right."""
    x = 2.75
    write(ax, 0.45, 8.45, "One block", 24, ha="left", va="baseline", weight="bold")
    # The stream from x to x, under everything else.
    arrow(ax, (x, 0.95), (x, 7.65))
    write(ax, x, 0.65, "x  (B, T, d)", 18)
    write(ax, x, 7.95, "x  (B, T, d)", 18)
    # Two halves, each beside a way past it: x + attention(norm(x)), then x + ffn(norm(x)).
    box(ax, x, 1.75, 1.9, 0.5, "norm")
    box(ax, x, 2.65, 2.5, 0.75, "attention", fill="#dcebf5", colour=BLUE)
    box(ax, x, 4.35, 1.9, 0.5, "norm")
    box(ax, x, 5.65, 3.0, 1.35, colour=RED, fill="#fdf1e9", linestyle=(0, (4, 2)), linewidth=3)
    write(ax, x, 5.9, "feed-forward slot", 18, weight="bold", color=RED, zorder=4)
    write(ax, x, 5.4, "dense, MoE or PEER", 16, zorder=4)
    for low, high in ((1.2, 3.45), (3.8, 6.85)):
        ax.plot([x, 0.75, 0.75], [low, low, high], color=INK, linewidth=2, zorder=1)
        arrow(ax, (0.75, high), (x - 0.2, high))
        plus(ax, x, high)
    # The slot, seen large.
    corners = [(x + 1.5, 6.32), (5.15, 8.25), (5.15, 0.25), (x + 1.5, 4.98)]
    ax.add_patch(Polygon(corners, facecolor=RED, alpha=0.12, edgecolor="none", zorder=0))


# --- the five steps ---

def draw_choose(ax, y):
    """The scores (N, E) with the chosen ones in colour, then the pairs (N, k)."""
    for t, chosen in enumerate(CHOSEN):
        for e, colour in enumerate(EXPERTS):
            ax.add_patch(Rectangle((LEFT + SIDE * e, y + SIDE * (1 - t)), SIDE, SIDE,
                                   edgecolor="white",
                                   facecolor=colour if e in chosen else PALE, linewidth=1.5))
        write(ax, LEFT - 0.2, y + SIDE * (1.5 - t), t + 1, 15, weight="bold", color=GREY)
    arrow(ax, (11.2, y), (11.8, y))
    for t, chosen in enumerate(CHOSEN):
        for j, e in enumerate(chosen):
            token(ax, 12.05 + SIDE * j, y + SIDE * (1 - t), t + 1, EXPERTS[e])


def draw_count(ax, y):
    """A bar for each expert's load, and the even share."""
    low, unit = y - 0.65, 0.28
    for e, colour in enumerate(EXPERTS):
        load = sum(e in chosen for chosen in CHOSEN)
        ax.add_patch(Rectangle((LEFT + 0.75 * e, low), 0.55, unit * load, facecolor=colour))
        write(ax, LEFT + 0.75 * e + 0.275, low + unit * (load - 0.5), load, 15, color=on(colour),
              weight="bold")
    even = low + unit * len(CHOSEN) * len(CHOSEN[0]) / len(EXPERTS)
    ax.plot([LEFT - 0.1, 12.45], [even, even], "--", color=GREY, linewidth=2)
    write(ax, 12.55, even, "even", 15, ha="left", color=GREY)


def queues():
    """The tokens of each expert, in order."""
    return [[t + 1 for t, chosen in enumerate(CHOSEN) if e in chosen] for e in range(len(EXPERTS))]


def draw_capacity(ax, y):
    """C places for each expert, filled from the left; what finds none is dropped."""
    for e, (colour, queue) in enumerate(zip(EXPERTS, queues())):
        low = y + 0.36 * (1 - e)
        for place in range(CAPACITY):
            ax.add_patch(Rectangle((LEFT + SIDE * place + 0.02, low + 0.02), SIDE - 0.04,
                                   SIDE - 0.04,
                                   facecolor="white", edgecolor=colour, linewidth=1.8))
        for place, number in enumerate(queue):
            if place < CAPACITY:
                token(ax, LEFT + SIDE * place, low, number, colour)
            else:
                token(ax, LEFT + SIDE * place + 0.45, low, number, PALE)
                write(ax, LEFT + SIDE * (place + 1) + 0.6, low + SIDE / 2, "dropped", 15, ha="left",
                      color=RED)


def draw_travel(ax, y):
    """The kept pairs sorted by expert, the experts, and the way back to the tokens."""
    for e, (colour, queue) in enumerate(zip(EXPERTS, queues())):
        low = y + 0.36 * (1 - e)
        for place, number in enumerate(queue[:CAPACITY]):
            token(ax, LEFT + SIDE * place, low, number, colour)
        arrow(ax, (LEFT + SIDE * CAPACITY + 0.08, low + SIDE / 2), (10.98, low + SIDE / 2), colour)
        box(ax, 11.4, low + SIDE / 2, 0.8, 0.3, colour=colour, fill=colour)
        for number in queue[:CAPACITY]:
            arrow(ax, (11.8, low + SIDE / 2), (RIGHT - 0.04, y + SIDE * (2.5 - number)), colour,
                  1.6, "-")
    for number in range(1, len(CHOSEN) + 1):
        token(ax, RIGHT, y + SIDE * (2 - number), number)
    write(ax, 11.4, y + 0.36 + SIDE / 2, "expert", 13, color="white", weight="bold", zorder=5)


def draw_shared(ax, y):
    """Every token through the shared expert, and the sum of both ways."""
    for t in range(len(CHOSEN)):
        token(ax, LEFT + SIDE * t, y - SIDE / 2, t + 1)
    x = RIGHT + SIDE / 2
    arrow(ax, (LEFT + SIDE * 4 + 0.08, y), (x - 0.2, y))
    box(ax, 12.0, y, 0.95, 0.55, "shared", fill=PALE, colour=GREY)
    arrow(ax, (x, y + 0.9), (x, y + 0.2))
    plus(ax, x, y)
    arrow(ax, (x + 0.2, y), (x + 0.75, y))


STEPS = [("choose", "score E experts,\ntake the best k", "scores (N, E)\nP = N k pairs",
          draw_choose),
         ("count, balance", "a loss or a bias\nevens out the load", "load (E)", draw_count),
         ("capacity", "C places for each;\nthe rest is dropped", "places (E, C)", draw_capacity),
         ("there and back", "sort, compute,\nadd up by weight", "(P, d)→(P, w)→\n(P, d)→(N, d)",
          draw_travel),
         ("shared experts", "visited by all,\nchosen by none", "y (N, d)", draw_shared)]


def draw_steps(ax):
    write(ax, 5.5, 8.45, "A MoE layer in five steps", 24, ha="left", va="baseline", weight="bold")
    write(ax, 15.75, 8.45, "here N = B T = 4 tokens, E = 4, k = 2, C = 3", 15, ha="right",
          va="baseline",
          color=GREY)
    for i, (name, words, shapes, draw) in enumerate(STEPS):
        y = 7.45 - 1.6 * i
        # A number, the name, few words; the drawing; the shapes.
        ax.add_patch(Circle((5.85, y + 0.34), 0.3, facecolor=RED, edgecolor="none"))
        write(ax, 5.85, y + 0.33, i + 1, 18, color="white", weight="bold")
        write(ax, 6.35, y + 0.24, name, 21, ha="left", va="baseline", weight="bold")
        write(ax, 6.35, y - 0.3, words, 17, ha="left", color=GREY)
        draw(ax, y)
        write(ax, 14.0, y, shapes, 15, ha="left", family="monospace")
        if i:
            ax.plot([5.5, 15.75], [y + 0.8, y + 0.8], color="#dddddd", linewidth=1.5, zorder=0)


def block_figure():
    """The Figure, without any data."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    ax = figure.add_axes([0, 0, 1, 1])
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    draw_block(ax)
    draw_steps(ax)
    return figure


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(prog="python -m lab.drawing.block", description=__doc__.split("\n")[0])
    parser.add_argument("--out", metavar="FILE", default="results/block.png",
                        help="default: %(default)s")
    with Ending() as end:
        options, _ = parse(parser, argv)
        print(save(block_figure(), options.out))
    return end.status


if __name__ == "__main__":
    sys.exit(main())
