"""The figure of ancestry: the runs that a model comes from, oldest on the left, one box for each run."""
from pathlib import Path

from runtime.checkpoint import BEST, LAST, load
from lab.plots import BLUE, GREY, PALETTE, new_figure

KINDS = {"train": BLUE, "upcycle": PALETTE[2], "mix": PALETTE[1], "merge": PALETTE[3], "expand": PALETTE[4]}


def family(ancestry):
    """({run: kind}, {run: its parents' names}) of an ancestry {kind, run, parents: [ancestry, ...]}. A run
    that several others come from, such as the seed of all branches, is one entry."""
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
    """{run: (column, row)}: a column for each generation, its runs evenly spread about the middle."""
    column = generations(parents)
    rows = {c: [run for run in parents if column[run] == c] for c in set(column.values())}
    return {run: (c, i - (len(rows[c]) - 1) / 2) for c in rows for i, run in enumerate(reversed(rows[c]))}


def ancestry_figure(folder):
    """The family of a run folder's model, or None for a model that began with random numbers. Raises
    CheckpointError."""
    folder = Path(folder)
    header = load(folder / (BEST if (folder / BEST).exists() else LAST)).header
    kinds, parents = family(header["ancestry"])
    if len(kinds) == 1:
        return None
    at = places(parents)
    wide, high = max(x for x, _ in at.values()), max(y for _, y in at.values())
    figure = new_figure(3.5 + 3 * wide, 2 + 1.6 * high + 0.8, f"{folder.resolve().name}: where it comes from")
    ax = figure.subplots()
    boxes = {run: ax.text(x, y, f"{Path(run).name}\n{kinds[run]}", ha="center", va="center", bbox=dict(
        boxstyle="round,pad=0.5", facecolor="white", edgecolor=KINDS.get(kinds[run], GREY), linewidth=2.2))
        for run, (x, y) in at.items()}
    for parent, child in ((p, run) for run in at for p in parents[run]):
        far = at[child][0] - at[parent][0]
        detour = -(1.6 * high + 0.6) / (1.5 * far) if far > 1 else 0        # above the boxes in between
        ax.annotate("", at[child], at[parent], arrowprops=dict(
            arrowstyle="-|>", color=GREY, linewidth=1.5, connectionstyle=f"arc3,rad={detour}", shrinkA=3,
            shrinkB=3, patchA=boxes[parent].get_bbox_patch(), patchB=boxes[child].get_bbox_patch()))
    ax.set(xlim=(-0.6, wide + 0.6), ylim=(-high - 0.7, high + 0.9))
    ax.axis("off")
    return figure
