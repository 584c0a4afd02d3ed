"""Arithmetic over the columns of runs.csv: column[arm], for one seed at a time.

    val_loss[peer-16] - 2 * val_loss[dense]     + - * / and numbers
    mean(val_loss[a], val_loss[b])              also min, max, abs, log; inside, val_loss[peer-*] is several
    reach(switch, dense)                        the share of the steps of `switch` after which its validation
                                                curve is at or below the final val_loss of `dense`

The text is parsed by Python's own parser and only these parts of its tree are accepted: nothing in it is run.
"""
import ast
import math
import operator
import re

from runtime.config import ConfigError, nearest
from lab.papers.spec import fill, fits, wildcard

CELL = re.compile(r"([A-Za-z_]\w*(?:-\w+)*)\[([^\[\]]+)\]|reach\(([^(),]+),([^(),]+)\)")
SIGNS = {ast.Lt: "<", ast.LtE: "<", ast.Gt: ">", ast.GtE: ">", ast.Eq: "=="}
BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
CALLS = {"mean": lambda *v: sum(v) / len(v), "min": min, "max": max, "abs": abs, "log": math.log}
PARTS = (ast.Compare, ast.BinOp, ast.UnaryOp, ast.USub, ast.Load, *BINARY, *SIGNS)


class Missing(Exception):
    """A value that the table does not have: the arm has not run, or the column is empty."""


def parse_expression(text, where):
    """(tree, cells): the Python syntax tree, in which name _i stands for cells[i] = (column, arm pattern) or
    ("reach", arm, arm). Raises ConfigError for anything but arithmetic."""
    cells = []

    def name(match):
        column, arm, one, other = match.groups()
        cells.append((column, arm.strip()) if column else ("reach", one.strip(), other.strip()))
        return f" _{len(cells) - 1} "

    try:
        tree = ast.parse(CELL.sub(name, text).strip(), mode="eval").body
    except SyntaxError:
        raise ConfigError(f"{where}: {text} is no inequality or arithmetic of column[arm]") from None
    for node in ast.walk(tree):
        if not is_allowed(node):
            raise ConfigError(f"{where}: {text}: {ast.unparse(node)} is neither column[arm], a number, "
                              f"+ - * / nor one of {', '.join(CALLS)}, reach")
        names = [child.id for child in ast.iter_child_nodes(node) if isinstance(child, ast.Name)]
        several = [name for name in names if name not in CALLS and "*" in cells[int(name[1:])][1]]
        if several and not isinstance(node, ast.Call):
            raise ConfigError(f"{where}: {text}: a * stands for several arms; put it into mean, min or max")
    return tree, cells


def is_allowed(node):
    """Whether a node is a number, a cell, arithmetic, or a call with as many values as it takes."""
    if isinstance(node, ast.Call):
        return (isinstance(node.func, ast.Name) and node.func.id in CALLS and not node.keywords
                and (len(node.args) == 1 if node.func.id in ("abs", "log") else bool(node.args)))
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.Name):
        return node.id in CALLS or re.fullmatch(r"_\d+", node.id) is not None
    return isinstance(node, PARTS)


def value(node, cells, table, seed):
    """An expression for one seed: a number; a list for a pattern that stands for several arms. Raises
    Missing."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return table.cell(cells[int(node.id[1:])], seed)
    if isinstance(node, ast.UnaryOp):
        return -value(node.operand, cells, table, seed)
    if isinstance(node, ast.Call):
        arguments = [value(a, cells, table, seed) for a in node.args]
        flat = [v for a in arguments for v in (a if isinstance(a, list) else [a])]
        return CALLS[node.func.id](*flat)
    left, right = value(node.left, cells, table, seed), value(node.right, cells, table, seed)
    return BINARY[type(node.op)](left, right)


class Table:
    """runs.csv and curves.csv for looking up: rows are lists of dicts of numbers and texts."""

    def __init__(self, rows, curves=()):
        self.rows = {(row["arm"], row["seed"]): row for row in rows}
        self.seeds = sorted({seed for _, seed in self.rows})
        self.curves = {}
        for row in curves:
            self.curves.setdefault((row["arm"], row["seed"]), []).append(row)

    def cell(self, cell, seed):
        if cell[0] == "reach":
            return self.reach(cell[1], cell[2], seed)
        column, pattern = cell
        if "*" not in pattern:
            return self.number(column, pattern, seed)
        names = [name for name, s in self.rows if s == seed and fits(name, [pattern])]
        if not names:
            raise Missing(f"no arm fits {pattern}")
        return [self.number(column, name, seed) for name in names]

    def number(self, column, arm, seed):
        got = self.rows.get((arm, seed), {}).get(column)
        if not isinstance(got, (int, float)) or math.isnan(got):
            known = {c for row in self.rows.values() for c in row}
            raise Missing(f"{arm} has no {column}" + (nearest(column, known) if column not in known else ""))
        return got

    def reach(self, arm, target, seed):
        goal = self.number("val_loss", target, seed)
        points = [(row["step"], row["val_loss"]) for row in self.curves.get((arm, seed), [])
                  if isinstance(row.get("val_loss"), (int, float))]
        if not points:
            raise Missing(f"{arm} has no validation curve; set train.eval_every")
        for (step, loss), (after, lower) in zip(points, points[1:]):
            if lower <= goal:
                share = min(1, max(0, (loss - goal) / (loss - lower))) if loss > lower else 0
                return (step + (after - step) * share) / points[-1][0]
        return math.inf


def written(node, cells):
    """An expression as it was written."""
    def cell(match):
        what = cells[int(match[1])]
        return f"reach({what[1]}, {what[2]})" if what[0] == "reach" else f"{what[0]}[{what[1]}]"
    return re.sub(r"\b_(\d+)\b", cell, ast.unparse(node))


def derive(metrics, rows, curves, path):
    """Adds the columns of [metrics."pattern"] to the rows whose arm fits. Raises ConfigError."""
    table = Table(rows, curves)
    for pattern, columns in metrics.items():
        for name, column, text in formulas(pattern, columns, {row["arm"] for row in rows}, path):
            tree, cells = parse_expression(text, path)
            for row in (row for row in rows if row["arm"] == name):
                try:
                    row[column] = value(tree, cells, table, row["seed"])
                except (Missing, ZeroDivisionError, ValueError):
                    row[column] = None


def formulas(pattern, columns, names, path):
    """(arm, column, expression) of one table of [metrics], for every arm whose name fits."""
    where = f"{path}: [metrics.\"{pattern}\"]"
    if not isinstance(columns, dict):
        raise ConfigError(f"{where}: is no table; write column = \"expression\" below it")
    found = {name: match for name in sorted(names) if (match := re.fullmatch(wildcard(pattern), name))}
    return [(name, column, fill(text, match.groupdict(), f"{where} {column}"))
            for name, match in found.items() for column, text in columns.items()]
