"""What an experiment's figure draws: the numbers of its arms, and what an arm is called and looks
like."""
import math
import re

import numpy as np

from lab.drawing.style import BLUE, GREEN, PALETTE, RED
from lab.papers.expressions import MARGIN, Table
from lab.papers.spec import fits, wildcard
from lab.papers.verdict import VERDICTS, judge, plain_verdict

# Of arms, in the order in which they are given; dense models are black in every figure.
COLOURS = {"blue": BLUE, "orange": PALETTE[4], "pink": PALETTE[3], "sky": PALETTE[5],
           "green": GREEN, "red": RED, "black": "#000000"}
OTHERS = "#4a6484"                      # bars of arms that no other panel draws


class Data:
    """What the panels of one figure draw: its tables, and what an arm is called and looks like."""

    def __init__(self, spec, claims, rows, curves=(), routing=()):
        self.claims, self.rows, self.curves, self.routing = claims, rows, curves, routing
        self.table = Table(rows, curves)
        self.labels, self.colours = spec.get("labels", {}), spec.get("colours", {})
        self.looks = {}                 # {arm: (colour, marker, line)}
        for panel in spec.get("panel", []):
            if panel["kind"] in ("lines", "curves", "scatter"):
                self.give_looks(self.series(panel))

    # --- words and looks ---

    def name(self, text):
        """What people call an arm, a column or a group."""
        for pattern, words in self.labels.items():
            if match := re.fullmatch(wildcard(pattern), str(text)):
                return words.format(**match.groupdict())
        return str(text)

    def in_words(self, inequality):
        """A test with names for people: "val_loss[a] < val_loss[b] + margin" as "a < b + 0.01"."""
        text = re.sub(r"[\w-]+\[([^\[\]]+)\]", lambda cell: self.name(cell[1]), inequality)
        return text.replace("margin", str(MARGIN))

    def give_looks(self, series):
        """A colour for each line that has none yet, which no other of these has; lines of one
        colour differ in mark and dashes."""
        for arms in series:
            if arms[0] not in self.looks:
                taken = [self.looks[other[0]][0] for other in series if other[0] in self.looks]
                free = [c for c in [*COLOURS.values()][:6] if c not in taken]
                colour = self.own_colour(arms[0]) or (free or [OTHERS])[0]
                same = len({look for look in self.looks.values() if look[0] == colour})
                look = colour, "osD^vPX"[same % 7], ["-", "--", ":", "-."][same % 4]
                self.looks = dict.fromkeys(arms, look) | self.looks

    def own_colour(self, arm):
        """The colour that the file gives to an arm; None without."""
        given = {"dense*": "black"} | self.colours
        return next((COLOURS[c] for p, c in reversed(given.items()) if fits(arm, [p])), None)

    def look(self, arm):
        return self.looks.get(arm, (self.own_colour(arm) or OTHERS, "o", "-"))

    # --- numbers ---

    def arms(self, panel, *columns):
        """A panel's arms, in the order of its patterns, that have a number in each column."""
        names = dict.fromkeys(row["arm"] for row in self.rows)
        found = [name for pattern in panel.get("arms", ["*"]) for name in names
                 if fits(name, [pattern])]
        return [name for name in dict.fromkeys(found)
                if name != panel.get("minus") and all(self.values(name, c) for c in columns)]

    def values(self, arm, column, minus=None):
        """{seed: value} of an arm's column, minus that of another arm."""
        found = {row["seed"]: row[column] for row in self.rows if row["arm"] == arm
                 and isinstance(row.get(column), (int, float)) and math.isfinite(row[column])}
        if minus:
            base = self.values(minus, column)
            return {seed: v - base[seed] for seed, v in found.items() if seed in base}
        return found

    def series(self, panel):
        """The lines of a panel as lists of arms: those of one group, or one arm each."""
        if panel["kind"] == "lines":
            groups = {}
            for arm in self.arms(panel, panel["x"], panel["y"]):
                if arm not in panel.get("reference", []):
                    group = next(row for row in self.rows if row["arm"] == arm).get(panel.get("by"))
                    groups.setdefault(group, []).append(arm)
            return list(groups.values())
        if panel["kind"] == "scatter":
            return [[arm] for arm in self.arms(panel, panel["x"], panel["y"])]
        return [[arm] for arm in self.arms(panel) if self.points(arm, panel)]

    def curve(self, arm, panel):
        """{seed: [(step, x, y)]} of an arm's training."""
        x, y, found = panel.get("x", "tokens"), panel["y"], {}
        for row in self.curves:
            if row["arm"] == arm and row["step"] > 0 and isinstance(row.get(y), (int, float)):
                at = row.get(x)
                if x == "flops":        # forward and backward: three times the forward pass
                    per_token = self.values(arm, "flops_per_token").get(row["seed"], math.nan)
                    at = 3e-12 * per_token * row["tokens"]
                elif x == "tokens":
                    at = row["tokens"] / 1e6
                if at is not None:
                    found.setdefault(row["seed"], []).append((row["step"], at, row[y]))
        return found

    def points(self, arm, panel):
        """[(x, y of each seed)] of an arm's curve, minus that of another arm at the same x."""
        base = self.curve(panel["minus"], panel) if "minus" in panel else None
        steps = {}
        for seed, points in self.curve(arm, panel).items():
            for step, x, y in points:
                if base is not None:
                    if seed not in base or not base[seed][0][1] <= x <= base[seed][-1][1] * 1.001:
                        continue
                    y -= np.interp(x, *np.array(base[seed])[:, 1:].T)
                steps.setdefault(step, []).append((x, y))
        return [(np.mean([x for x, _ in own]), [y for _, y in own])
                for _, own in sorted(steps.items())]

    def contrasts(self, panel):
        """[(words, Pair)] of a panel of differences: a row for each claim that was measured, that
        of its worst inequality; without words of its own a row for each inequality."""
        found = []
        for key, words in panel["claims"].items():
            if key not in self.claims:          # of another size
                continue
            pairs, _ = judge(self.claims[key]["test"], self.table)
            rows = [(self.in_words(pair.text), pair) for pair in pairs]
            if words:
                n = f" (worst of {len(pairs)})" if len(pairs) > 1 else ""
                rows = [(words + n, max(pairs, key=badness))]
            found += [(text, pair) for text, pair in rows if pair.n]
        return found


def badness(pair):
    return VERDICTS.index(plain_verdict(pair.verdict)), np.nan_to_num(pair.p)
