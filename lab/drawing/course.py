"""The drawings of the lectures, one function each:

    python -m lab.drawing.course [--out course/drawings]

Each example is small enough to follow by hand, and its numbers are computed, not written down. The
colours of experts and the squares of tokens are those of lab/drawing/block.py.
"""
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from lab.drawing.block import (CAPACITY, CHOSEN, EXPERTS, INK, PALE, SIDE, arrow, box, plus, token,
                               write)
from lab.drawing.style import BLUE, GREY, RED, save
from peer import cartesian_candidates
from runtime.config import Parser, parse
from runtime.ending import Ending

WIDTH = 12                              # inches, and the unit of all places below
LEFT = dict(ha="left")


def canvas(height, title, beside=""):
    """(Figure, axes) with a title and, right of it, the sizes of the example."""
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.add_axes([0, 0, 1, 1])
    ax.set(xlim=(0, WIDTH), ylim=(0, height))
    ax.axis("off")
    write(ax, 0.3, height - 0.45, title, 22, weight="bold", **LEFT)
    write(ax, WIDTH - 0.3, height - 0.45, beside, 15, ha="right", color=GREY)
    return figure, ax


def slot(ax, x, y, colour):
    """A place for a token, empty, its lower left corner at (x, y)."""
    ax.add_patch(Rectangle((x + 0.02, y + 0.02), SIDE - 0.04, SIDE - 0.04, facecolor="white",
                           edgecolor=colour, linewidth=1.8))


def queues(chosen):
    """The tokens (from 1) of each expert, in order, of the expert of each token."""
    return [[t + 1 for t, e in enumerate(chosen) if e == expert] for expert in range(len(EXPERTS))]


# --- lecture 1 ---

FOLLOWED = 2                            # the second token of block.CHOSEN
SCORES = [1.9, -0.3, 1.1, 0.2]          # its z
MIDDLE = 3.47                           # the height at which it comes and goes


def token_figure():
    """A token's way through the five steps of MoE.forward: a row for each expert."""
    figure, ax = canvas(6.9, "One token's way", f"E = 4, k = 2, C = {CAPACITY} places each")
    chosen = CHOSEN[FOLLOWED - 1]
    total = sum(math.exp(SCORES[e]) for e in chosen)
    for x, number, name in ((2.6, 1, "choose"), (5.05, 2, "count"), (6.75, 3, "places"),
                            (8.8, 4, "there and back"), (11.1, 5, "shared")):
        ax.add_patch(Circle((x, 5.9), 0.21, facecolor=RED, edgecolor="none"))
        write(ax, x, 5.89, number, 16, color="white", weight="bold")
        write(ax, x, 5.5, name, 17, weight="bold")
    for e in range(len(EXPERTS)):
        follow_row(ax, e, 4.75 - 0.85 * e, math.exp(SCORES[e]) / total if e in chosen else None)
    write(ax, 2.6, 1.5, "gates: softmax over\nthe chosen scores", 14, color=GREY)
    write(ax, 6.75, 1.5, "token 4 finds no\nplace with E0", 14, color=RED)
    token(ax, 0.45, MIDDLE - SIDE / 2, FOLLOWED)
    write(ax, 0.62, 2.95, "x  (d)", 15)
    # what every token visits, and both sums
    ax.plot([0.62, 0.62, 8.2], [2.75, 0.6, 0.6], color=GREY, linewidth=2)
    box(ax, 8.9, 0.6, 1.4, 0.55, "shared", fill=PALE, colour=GREY)
    ax.plot([9.6, 11.1], [0.6, 0.6], color=GREY, linewidth=2)
    arrow(ax, (11.1, 0.6), (11.1, MIDDLE - 0.2), GREY)
    for x, end in ((10.35, 10.9), (11.1, 11.75)):
        plus(ax, x, MIDDLE)
        arrow(ax, (x + 0.2, MIDDLE), (end, MIDDLE))
    write(ax, 11.55, 3.8, "y", 18)
    return figure


def follow_row(ax, e, y, gate):
    """What one expert has to do with the token: score, gate, load, place, work."""
    colour = EXPERTS[e] if gate else "#bbbbbb"
    arrow(ax, (0.82, MIDDLE), (1.3, y), colour, 2.2 if gate else 1.2, "-")
    # 1. its score, as a bar from zero, and its gate if it is chosen
    low = 1.85
    ax.add_patch(Rectangle((low, y - 0.16), 0.55 * SCORES[e], 0.32, facecolor=colour))
    ax.plot([low, low], [y - 0.25, y + 0.25], color=INK, linewidth=1.2)
    score = f"{SCORES[e]:.1f}".replace("-", "−")
    write(ax, 1.6 if SCORES[e] > 0 else 2.2, y, score, 14, color=GREY)
    weight = "bold" if gate else "normal"
    write(ax, 3.65, y, f"{gate:.2f}" if gate else "–", 16, weight=weight)
    # 2. its load; 3. its places, filled in order of position, this token's in full colour
    queue = [t + 1 for t, chosen in enumerate(CHOSEN) if e in chosen]
    write(ax, 5.05, y, len(queue), 18, weight=weight)
    for place in range(CAPACITY):
        slot(ax, 6.2 + SIDE * place, y - SIDE / 2, EXPERTS[e])
    for place, number in enumerate(queue):
        low = y - SIDE / 2 - 0.46 * (place >= CAPACITY)
        token(ax, 6.2 + SIDE * place, low, number, EXPERTS[e] if number == FOLLOWED else PALE)
    # 4. its work, weighted by the gate, and home
    box(ax, 8.5, y, 0.9, 0.5, f"E{e}", colour=colour, fill="white" if gate else PALE)
    if gate:
        arrow(ax, (6.3 + SIDE * CAPACITY, y), (8.05, y), colour)
        write(ax, 9.45, y + 0.22, f"× {gate:.2f}", 15)
        ax.plot([8.95, 9.95], [y, y], color=colour, linewidth=2)
        arrow(ax, (9.95, y), (10.23, MIDDLE + math.copysign(0.16, y - MIDDLE)), colour)


# --- lectures 2 and 3 ---

CHOICES = [0, 1, 0, 0, 2, 0, 3, 1]      # the expert of each of 8 tokens


def capacity_figure():
    """The same 8 tokens with a limit on the places of an expert, and without one."""
    N, E = len(CHOICES), len(EXPERTS)
    figure, ax = canvas(6.3, "Room for how many?", "N = 8 tokens, E = 4, k = 1")
    write(ax, 0.3, 5.15, "by position", 16, color=GREY, **LEFT)
    for t, e in enumerate(CHOICES):
        token(ax, 1.9 + SIDE * t, 5.15 - SIDE / 2, t + 1, EXPERTS[e])
    for i, factor in enumerate((1.0, 1.5, 2.0)):
        x, slots = 0.45 + 2.95 * i, math.ceil(factor * N / E)
        write(ax, x, 4.3, f"factor {factor:g}: C = {slots}", 17, weight="bold", **LEFT)
        lost = capacity_panel(ax, x, slots)
        write(ax, x, 1.55, f"{lost} dropped", 16, color=RED if lost else INK, **LEFT)
        write(ax, x, 1.15, f"{E * slots - N + lost} empty", 16, **LEFT)
        write(ax, x, 0.75, f"{E * slots} rows computed", 16, **LEFT)
    grouped_panel(ax, 9.3)
    write(ax, 0.3, 0.25, "C = factor × N k / E. Fixed places cost tokens or empty rows; sorted "
          "groups cost neither.", 15, color=GREY, **LEFT)
    return figure


def capacity_panel(ax, x, slots):
    """The places of all experts, filled in order; returns how many tokens find none."""
    lost = 0
    for e, (colour, queue) in enumerate(zip(EXPERTS, queues(CHOICES))):
        y = 3.55 - 0.46 * e
        for place in range(slots):
            slot(ax, x + SIDE * place, y, colour)
        for place, number in enumerate(queue):
            fits = place < slots
            token(ax, x + SIDE * place + 0.14 * (not fits), y, number, colour if fits else PALE)
        lost += max(len(queue) - slots, 0)
    return lost


def grouped_panel(ax, x):
    """The tokens sorted by expert, one array without gaps."""
    write(ax, x, 4.3, "no limit: sorted", 17, weight="bold", **LEFT)
    ordered = [(number, e) for e, queue in enumerate(queues(CHOICES)) for number in queue]
    for i, (number, e) in enumerate(ordered):
        token(ax, x + SIDE * (i % 4), 3.55 - 0.46 * (i // 4), number, EXPERTS[e])
    ends, total = [], 0
    for queue in queues(CHOICES):
        total += len(queue)
        ends.append(total)
    write(ax, x, 2.6, f"groups end at\n{', '.join(map(str, ends))}", 15, color=GREY, **LEFT)
    for y, text in ((1.55, "0 dropped"), (1.15, "0 empty"), (0.75, f"{total} rows computed")):
        write(ax, x, y, text, 16, **LEFT)


# --- lecture 3 ---

HERE = [[0, 2, 1], [2, 0, 3, 2]]        # the expert of each token of two processes
HELD = 2                                # experts of a process
LOWS = (3.45, 0.65)                     # of the drawing of each process
STEP = SIDE + 0.03                      # from row to row


def journeys():
    """[(number of a token, its process, its expert)], sorted by process and expert."""
    tokens = [(p, e) for p, own in enumerate(HERE) for e in own]
    return sorted(((n + 1, p, e) for n, (p, e) in enumerate(tokens)), key=lambda row: row[1:])


def exchange_figure():
    """All-to-all between two processes: sort, send, compute, send home."""
    figure, ax = canvas(7.1, "Experts on two processes", "E = 4, two on each; k = 1")
    for x, text in ((1.55, "own tokens,\nsorted by expert"), (5.2, "rows that came,\nby process"),
                    (7.6, "experts\nheld here"), (10.55, "home again,\nin their order")):
        write(ax, x, 5.85, text, 16, color=GREY)
    for p, low in enumerate(LOWS):
        ax.add_patch(Rectangle((0.15, low - 0.45), WIDTH - 0.3, 2.3, facecolor="#f2f2f2",
                               edgecolor="none", zorder=0))
        write(ax, 0.45, low + 0.7, f"process {p}", 16, weight="bold", rotation=90)
        for i in range(HELD):
            e = HELD * p + i
            box(ax, 7.6, low + 1.1 - 0.8 * i, 1.3, 0.5, f"E{e}", colour=EXPERTS[e], linewidth=3)
        # how many rows go to each process, and come from each
        sent = [sum(q == p and e // HELD == r for _, q, e in journeys()) for r in (0, 1)]
        came = [sum(q == r and e // HELD == p for _, q, e in journeys()) for r in (0, 1)]
        write(ax, 1.55, low - 0.2, f"sent {tuple(sent)}", 15)
        write(ax, 5.2, low - 0.2, f"came {tuple(came)}", 15)
    for x in (1.55, 10.55):
        write(ax, x, 2.75, "all-to-all", 16, weight="bold")
    for row in journeys():
        travel(ax, *row)
    return figure


def travel(ax, number, p, e):
    """One row: sorted, sent to the process q of its expert, through it, and home."""
    q, colour, rows = e // HELD, EXPERTS[e], journeys()
    # its place among its process's rows, among those that come to q, and at home
    places = ([row for row in rows if row[1] == p], [row for row in rows if row[2] // HELD == q],
              sorted(row for row in rows if row[1] == p))
    low, there, back = (LOWS[r] + 1.35 - STEP * found.index((number, p, e))
                        for r, found in zip((p, q, p), places))
    expert = LOWS[q] + 1.1 - 0.8 * (e % HELD)
    for x, y in ((1.38, low), (5.03, there), (10.38, back)):
        token(ax, x, y, number, colour)
    half = SIDE / 2
    arrow(ax, (1.38 + SIDE, low + half), (5.0, there + half), colour)
    arrow(ax, (5.03 + SIDE, there + half), (6.93, expert), colour, 1.6)
    arrow(ax, (8.27, expert), (10.35, back + half), colour, 1.6)


# --- lecture 4 ---

KEPT, EXAMPLE = 16, (3, 6)              # k, and the ranks of a pair that cannot be among the best


LEFT_EDGE, TOP, CELL = 1.35, 5.95, 0.34


def square(ax, i, j, colour, rows=1, columns=1, **more):
    """A rectangle of cells, its upper left one that of the ranks (i, j), from 0."""
    look = dict(facecolor=colour, edgecolor="white", linewidth=1.5) | more
    ax.add_patch(Rectangle((LEFT_EDGE + CELL * j, TOP - CELL * (i + rows)), CELL * columns,
                           CELL * rows, **look))


def staircase_figure():
    """Which pairs of ranks can be among the k best sums of two descending lists."""
    figure, ax = canvas(7.4, "The staircase of candidates", f"k = {KEPT}")
    rows, columns = (part.tolist() for part in cartesian_candidates(KEPT))
    inside = set(zip(rows, columns))
    for i in range(KEPT):
        for j in range(KEPT):
            square(ax, i, j, BLUE if (i, j) in inside else PALE)
    for rank in (1, 4, 8, 12, 16):
        write(ax, LEFT_EDGE + CELL * (rank - 0.5), TOP + 0.18, rank, 14, color=GREY)
        write(ax, LEFT_EDGE - 0.22, TOP - CELL * (rank - 0.5), rank, 14, color=GREY)
    middle = CELL * KEPT / 2
    write(ax, LEFT_EDGE + middle, TOP + 0.5, "rank j of the second half's sub-key", 15)
    write(ax, LEFT_EDGE - 0.75, TOP - middle, "rank i of the first half's sub-key", 15, rotation=90)
    # a pair outside, and all pairs that are at least as good
    i, j = EXAMPLE
    square(ax, i - 1, j - 1, RED)
    square(ax, 0, 0, "none", i, j, edgecolor=RED, linewidth=3, zorder=4)
    staircase_words(ax, len(rows))
    return figure


def staircase_words(ax, found):
    """What the picture says, in words, right of it."""
    (i, j), m = EXAMPLE, 1024
    words = [("A score is a sum",
              "s = first half + second half. Both\nlists of k are sorted, best first."),
             (f"Red: pair ({i}, {j})", "No pair in its frame is worse. They are\n"
              f"{i} × {j} = {i * j}, more than k = {KEPT}: it can go."),
             ("Blue: pairs with i j ≤ k",
              f"{found} of {KEPT * KEPT} can be among the k best.\nNo other pair is needed."),
             ("What it saves", f"m = {m:,} sub-keys a half: {2 * m:,} dot\n"
              f"products and {found} sums, in place of\nm² = {m * m:,} scores.")]
    for n, (head, text) in enumerate(words):
        y = 5.75 - 1.42 * n
        write(ax, 7.3, y, head, 17, weight="bold", color=(INK, RED, BLUE, INK)[n], **LEFT)
        write(ax, 7.3, y - 0.28, text, 15, va="top", **LEFT)


# --- lecture 5 ---

BRANCHES = {"code": EXPERTS[0], "prose": EXPERTS[2], "math": EXPERTS[3]}
SEED, WIDE, DEEP = "#9a9a9a", 0.9, 0.36         # a colour; the width and height of half a model


def halves(ax, x, y, shared, *experts):
    """A model about (x, y): what all tokens share, and below it its feed-forward layer, or experts.
    A half is a colour, or a list of those whose average it is, drawn as stripes."""
    cells = [(x - WIDE / 2, y, shared)]
    cells += [(x + WIDE * (i - len(experts) / 2), y - DEEP, part) for i, part in enumerate(experts)]
    for left, low, colour in cells:
        stripes = colour * 3 if isinstance(colour, list) else [colour]
        for i, stripe in enumerate(stripes):
            ax.add_patch(Rectangle((left + WIDE * i / len(stripes), low), WIDE / len(stripes), DEEP,
                                   facecolor=stripe, edgecolor="none"))
        ax.add_patch(Rectangle((left, low), WIDE, DEEP, facecolor="none", edgecolor="white",
                               linewidth=3))


def family_figure():
    """A seed, its branches, and four ways to one predictor: which weights are averaged, and which
    become experts."""
    figure, ax = canvas(6.9, "One seed, three branches, one model", "J = 3")
    colours = list(BRANCHES.values())
    halves(ax, 1.2, 3.75, SEED, SEED)
    write(ax, 1.2, 4.4, "seed", 17, weight="bold")
    write(ax, 1.2, 2.85, "above: what all\ntokens share\nbelow: feed-forward", 14, color=GREY)
    for (name, colour), y in zip(BRANCHES.items(), (5.15, 3.75, 2.35)):
        halves(ax, 3.3, y, colour, colour)
        write(ax, 3.3, y + 0.6, f"branch: {name}", 16)
        arrow(ax, (1.75, 3.75), (2.75, y), colour)
        arrow(ax, (3.85, y), (4.4, y), colour, style="-")
    ax.plot([4.4, 4.4], [2.35, 5.15], color=GREY, linewidth=2)
    for y, name in ((5.15, "merge"), (3.75, "mix (BTX)"), (2.35, "ensemble (BTM)")):
        arrow(ax, (4.4, y), (4.8, y), GREY)
        write(ax, 4.95, y + 0.6, name, 16, weight="bold", **LEFT)
    halves(ax, 6.3, 5.15, colours, colours)
    halves(ax, 6.3, 3.75, colours, *colours)
    for i, colour in enumerate(colours):
        halves(ax, 5.4 + 0.9 * i, 2.35, colour, colour)
    # from the seed alone
    ax.plot([1.2, 1.2], [2.3, 0.95], color=GREY, linewidth=2)
    arrow(ax, (1.2, 0.95), (4.8, 0.95), GREY)
    write(ax, 4.95, 1.55, "upcycle", 16, weight="bold", **LEFT)
    halves(ax, 6.3, 0.95, SEED, SEED, SEED, SEED)
    family_words(ax)
    return figure


def family_words(ax):
    """What each way does and costs, right of its picture."""
    for y, text in ((5.15, "all weights averaged (stripes):\none dense model at its own cost"),
                    (3.75, "feed-forward layers as experts, the\nrest averaged; a router to train"),
                    (2.35, "predictions are averaged, not weights:\nJ models run for each token"),
                    (0.95, "copies as experts, which then part;\nat first the seed's function")):
        write(ax, 7.85, y, text, 14, **LEFT)


DRAWINGS = dict(token=token_figure, capacity=capacity_figure, all_to_all=exchange_figure,
                staircase=staircase_figure, family=family_figure)


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(prog="python -m lab.drawing.course", description=__doc__.split("\n")[0])
    parser.add_argument("--out", metavar="DIR", default="course/drawings",
                        help="default: %(default)s")
    with Ending() as end:
        options, _ = parse(parser, argv)
        Path(options.out).mkdir(parents=True, exist_ok=True)
        for name, draw in DRAWINGS.items():
            print(save(draw(), Path(options.out) / f"{name}.png"))
    return end.status


if __name__ == "__main__":
    sys.exit(main())
