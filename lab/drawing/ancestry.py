"""The figure of ancestry: the runs that a model comes from, oldest on the left, one box for each
run."""
from pathlib import Path

from lab.drawing.style import BLUE, GREY, PALETTE, new_figure
from runtime.checkpoint import BEST, LAST, load

KINDS = {"train": BLUE, "upcycle": PALETTE[2], "mix": PALETTE[1], "merge": PALETTE[3],
         "expand": PALETTE[4]}


def family(ancestry):
    """({run: kind}, {run: its parents' names}) of an ancestry {kind, run, parents: [ancestry,
    ...]}. A run that several others come from, such as the seed of all branches, is one entry."""
    kinds, parents, waiting = {}, {}, [ancestry]
    while waiting:
        node = waiting.pop()
        if node["run"] not in kinds:
            kinds[node["run"]] = node["kind"]
            parents[node["run"]] = [p["run"] for p in node["parents"]]
            waiting += node["parents"]
    return kinds, parents


def generations(parents):
    """{run: steps from its oldest ancestor}: a run stands right of all its parents."""
    found = {}

    def depth(run):
        if run not in found:
            found[run] = 1 + max((depth(p) for p in parents[run]), default=-1)
        return found[run]

    for run in parents:
        depth(run)
    return found


def places(parents):
    """{run: (column, row)}: a column for each generation, its runs evenly spread about the
    middle."""
    column = generations(parents)
    rows = {c: [run for run in parents if column[run] == c] for c in set(column.values())}
    return {run: (c, i - (len(rows[c]) - 1) / 2) for c in rows
            for i, run in enumerate(reversed(rows[c]))}


def ancestry_figure(folder):
    """The family of a run folder's model, or None for a model that began with random numbers.
    Raises CheckpointError."""
    folder = Path(folder)
    which = BEST if (folder / BEST).exists() else LAST
    kinds, parents = family(load(folder / which).header["ancestry"])
    if len(kinds) == 1:
        return None
    at = places(parents)
    wide = max(x for x, _ in at.values())
    high = max(y for _, y in at.values())
    figure = new_figure(3.5 + 3 * wide, 2 + 1.6 * high + 0.8,
                        f"{folder.resolve().name}: where it comes from")
    ax = figure.subplots()
    # A box for each run, its colour the way the run was made.
    boxes = {run: ax.text(x, y, f"{Path(run).name}\n{kinds[run]}", ha="center", va="center",
                          bbox=dict(
        boxstyle="round,pad=0.5", facecolor="white", edgecolor=KINDS.get(kinds[run], GREY),
                              linewidth=2.2))
        for run, (x, y) in at.items()}
    # An arrow from each parent to its child; one that skips a generation bends around the boxes in
    # between.
    for parent, child in ((p, run) for run in at for p in parents[run]):
        far = at[child][0] - at[parent][0]
        detour = -(1.6 * high + 0.6) / (1.5 * far) if far > 1 else 0
        ax.annotate("", at[child], at[parent], arrowprops=dict(
            arrowstyle="-|>", color=GREY, linewidth=1.5, connectionstyle=f"arc3,rad={detour}",
            shrinkA=3,
            shrinkB=3, patchA=boxes[parent].get_bbox_patch(), patchB=boxes[child].get_bbox_patch()))
    ax.set(xlim=(-0.6, wide + 0.6), ylim=(-high - 0.7, high + 0.9))
    ax.axis("off")
    return figure
