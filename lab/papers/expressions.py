"""Arithmetic in claims and metrics: + - * / and numbers, over names that stand for measured values.

    val_loss[peer-16] - 2 * val_loss[dense]   column[arm] of runs.csv, for one seed at a time
    mean(val_loss[a], val_loss[b])            also min, max, abs, log; val_loss[peer-*] is several,
                                              the same ones in every seed
    reach(switch, dense)                      the share of the steps of `switch` after which its
                                              curve is at or below the final val_loss of `dense`
    val_loss[a] < val_loss[b] + margin        margin: 0.01 nats, the one margin of all claims
    held_out < 0.3 * held_out_without         names alone, of a fitted law (lab/papers/verdict.py)

The text is parsed by Python's own parser and only these parts of its tree are accepted: nothing in
it is run.
"""
import ast
import copy
import math
import operator
import re

from lab.papers.spec import fill, fits, wildcard
from runtime.config import nearest
from settings import ConfigError

CELL = re.compile(r"([A-Za-z_]\w*(?:-\w+)*)\[([^\[\]]+)\]|reach\(([^(),]+),([^(),]+)\)")
SIGNS = {ast.Lt: "<", ast.LtE: "<", ast.Gt: ">", ast.GtE: ">", ast.Eq: "=="}
BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
          ast.Div: operator.truediv}
# Losses that lie closer together than this, in nats per token, count as equal. One number for the
# whole repository, so that no claim has a margin of its own.
MARGIN = 0.01
CALLS = {"mean": lambda *v: sum(v) / len(v), "min": lambda *v: min(v),
         "max": lambda *v: max(v), "abs": abs, "log": math.log}
PARTS = (ast.Compare, ast.BinOp, ast.UnaryOp, ast.USub, ast.Load, *BINARY, *SIGNS)


class Missing(Exception):
    """A value that the table does not have: the arm has not run, or the column is empty."""


# --- parsing ---

def parse_cells(text, where):
    """(tree, cells): the Python syntax tree, in which name _i stands for cells[i] = (column, arm
    pattern) or ("reach", arm, arm). Raises ConfigError for anything but arithmetic."""
    cells = []

    def name(match):
        column, arm, one, other = match.groups()
        cells.append((column, arm.strip()) if column else ("reach", one.strip(), other.strip()))
        return f" _{len(cells) - 1} "

    # Python cannot parse peer-16 as a name, so every cell becomes a short name before it is parsed.
    tree = parse_tree(CELL.sub(name, text), text, where)
    for node in ast.walk(tree):
        if not is_allowed(node):
            raise ConfigError(f"{where}: {text}: {ast.unparse(node)} is neither column[arm], a "
                              f"number, + - * / nor one of {', '.join(CALLS)}, reach, "
                              "margin")
    for node in ast.walk(tree):
        names = [child.id for child in ast.iter_child_nodes(node) if isinstance(child, ast.Name)]
        several = [name for name in names
                   if name not in CALLS and name != "margin" and "*" in cells[int(name[1:])][1]]
        if several and not isinstance(node, ast.Call):
            raise ConfigError(f"{where}: {text}: a * stands for several arms; put it into mean, "
                              "min or max")
    return tree, cells


def parse_names(text, known, where):
    """(tree, names that it holds) of arithmetic over known names alone. Raises ConfigError."""
    tree = parse_tree(text, text, where)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name in sorted(names - set(known)):
        raise ConfigError(f"{where}: {text}: unknown {name}{nearest(name, known)}; known are "
                          f"{', '.join(known)}")
    for node in ast.walk(tree):
        if not isinstance(node, (*PARTS, ast.Name, ast.Constant)):
            raise ConfigError(f"{where}: {text}: only names, numbers and + - * / may stand there")
    return tree, names


def parse_tree(source, text, where):
    """The syntax tree of source; text is what errors quote. Raises ConfigError."""
    try:
        return ast.parse(source.strip(), mode="eval").body
    except SyntaxError:
        raise ConfigError(f"{where}: {text} is no inequality and no arithmetic") from None


def is_allowed(node):
    """Whether a node is a number, a cell, arithmetic, or a call with as many values as it takes."""
    if isinstance(node, ast.Call):
        known = isinstance(node.func, ast.Name) and node.func.id in CALLS and not node.keywords
        if known and node.func.id in ("abs", "log"):
            return len(node.args) == 1
        return known and len(node.args) > 0
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.Name):
        return node.id in (*CALLS, "margin") or re.fullmatch(r"_\d+", node.id) is not None
    return isinstance(node, PARTS)


def written(node, cells):
    """An expression as it was written."""
    def cell(match):
        what = cells[int(match[1])]
        return f"reach({what[1]}, {what[2]})" if what[0] == "reach" else f"{what[0]}[{what[1]}]"
    return re.sub(r"\b_(\d+)\b", cell, ast.unparse(node))


# --- values ---

def value(node, look_up):
    """The value of an expression. look_up(name) says what a name stands for: a number or an array;
    in a call also a list, of a pattern that stands for several arms. Raises what look_up raises."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return look_up(node.id)
    if isinstance(node, ast.UnaryOp):
        return -value(node.operand, look_up)
    if isinstance(node, ast.Call):
        arguments = [value(argument, look_up) for argument in node.args]
        flat = [v for a in arguments for v in (a if isinstance(a, list) else [a])]
        return CALLS[node.func.id](*flat)
    return BINARY[type(node.op)](value(node.left, look_up), value(node.right, look_up))


class Table:
    """runs.csv and curves.csv for looking up: rows are lists of dicts of numbers and texts."""

    def __init__(self, rows, curves=()):
        self.rows = {(row["arm"], row["seed"]): row for row in rows}
        self.seeds = sorted({seed for _, seed in self.rows})
        self.curves = {}
        for row in curves:
            self.curves.setdefault((row["arm"], row["seed"]), []).append(row)

    def value(self, node, cells, seed):
        """An expression for one seed. Raises Missing, ZeroDivisionError, ValueError."""
        def look_up(name):
            return MARGIN if name == "margin" else self.cell(cells[int(name[1:])], seed)
        return value(node, look_up)

    def first(self, n):
        """The table of the first n seeds alone."""
        shorter = copy.copy(self)
        shorter.seeds = self.seeds[:n]
        return shorter

    def cell(self, cell, seed):
        if cell[0] == "reach":
            return self.reach(cell[1], cell[2], seed)
        column, pattern = cell
        if "*" not in pattern:
            return self.number(column, pattern, seed)
        # The same arms in every seed, so that a seed that lacks one of them has no value.
        names = dict.fromkeys(name for name, _ in self.rows if fits(name, [pattern]))
        if not names:
            raise Missing(f"no arm fits {pattern}")
        return [self.number(column, name, seed) for name in names]

    def number(self, column, arm, seed):
        got = self.rows.get((arm, seed), {}).get(column)
        if not isinstance(got, (int, float)) or math.isnan(got):
            known = {c for row in self.rows.values() for c in row}
            hint = "" if column in known else nearest(column, known)
            raise Missing(f"{arm} has no {column}{hint}")
        return got

    def reach(self, arm, target, seed):
        goal = self.number("val_loss", target, seed)
        points = [(row["step"], row["val_loss"]) for row in self.curves.get((arm, seed), [])
                  if isinstance(row.get("val_loss"), (int, float))]
        if not points:
            raise Missing(f"{arm} has no validation curve; set train.eval_every")
        # The first evaluation at or below the goal, and a straight line from the one before it.
        for (step, loss), (after, lower) in zip(points, points[1:]):
            if lower <= goal:
                share = 0
                if loss > lower:
                    share = min(1, max(0, (loss - goal) / (loss - lower)))
                return (step + (after - step) * share) / points[-1][0]
        return math.inf


# --- columns that are computed ---

def derive(metrics, rows, curves, path):
    """Adds the columns of [metrics."pattern"] to the rows whose arm fits. Raises ConfigError."""
    table = Table(rows, curves)
    for pattern, columns in metrics.items():
        for name, column, text in formulas(pattern, columns, {row["arm"] for row in rows}, path):
            tree, cells = parse_cells(text, path)
            for row in (row for row in rows if row["arm"] == name):
                try:
                    row[column] = table.value(tree, cells, row["seed"])
                except (Missing, ZeroDivisionError, ValueError):
                    row[column] = None


def formulas(pattern, columns, names, path):
    """(arm, column, expression) of one table of [metrics], for every arm whose name fits."""
    where = f"{path}: [metrics.\"{pattern}\"]"
    if not isinstance(columns, dict):
        raise ConfigError(f"{where}: is no table; write column = \"expression\" below it")
    found = {name: match for name in sorted(names)
             if (match := re.fullmatch(wildcard(pattern), name))}
    return [(name, column, fill(text, match.groupdict(), f"{where} {column}"))
            for name, match in found.items() for column, text in columns.items()]
