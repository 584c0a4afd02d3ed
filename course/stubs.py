"""The files of the course, and how a learner's is made from our solution.

A file of course/solutions holds what to do (its docstring, with a line of facts), our solution, and
below the line CHECK its check. The learner gets what stands above that line, but what is theirs to
write: so the two cannot drift apart.
"""
import ast
import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

from settings import ConfigError

COURSE = Path(__file__).parent
SOLUTIONS, EXERCISES = COURSE / "solutions", COURSE / "exercises"
CHECK = "# ---- the check ----"
YOURS = "raise NotImplementedError(\"yours\")"
FACTS = re.compile(r"lecture (\d) · difficulty (\d) of 5 · importance (\d) of 5 · (\d+) minutes"
                   r" · (\d+) points?")


class Exercise(NamedTuple):
    name: str
    title: str
    lecture: int
    difficulty: int
    importance: int
    minutes: int
    points: int


def exercises():
    """{name: Exercise}, by lecture and difficulty. ConfigError for a solution without the facts."""
    found = []
    for path in SOLUTIONS.glob("*.py"):
        doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        facts = FACTS.search(doc)
        if not facts:
            raise ConfigError(f"course/solutions/{path.name}: its docstring must hold a line such as "
                              "\"lecture 2 · difficulty 3 of 5 · importance 4 of 5 · 20 minutes · "
                              "4 points\"")
        found.append(Exercise(path.stem, doc.split("\n")[0].rstrip("."), *map(int, facts.groups())))
    return {e.name: e for e in sorted(found, key=lambda e: (e.lecture, e.difficulty, e.name))}


def solution(name):
    """The text of our solution: what stands above the line CHECK."""
    text, line, _ = (SOLUTIONS / f"{name}.py").read_text("utf-8").partition(CHECK)
    if not line:
        raise ConfigError(f"course/solutions/{name}.py: has no line \"{CHECK}\"")
    return text.rstrip() + "\n"


def stub(text):
    """A solution as the learner gets it: functions and methods end after their docstrings, those
    called _name are left out. What has the comment `# given` above it stays, and so does __init__."""
    lines = text.split("\n")
    for node in list(to_write(ast.parse(text).body, lines)):
        first = begin(node)
        if node.name.startswith("_") and not node.name.endswith("__"):
            # the comment above it goes with it
            while (lines[first - 1] or "").strip().startswith("#"):
                first -= 1
            lines[first:node.end_lineno] = [None] * (node.end_lineno - first)
            continue
        if not ast.get_docstring(node):
            raise ConfigError(f"{node.name}, line {node.lineno}: what is to be written needs a docstring")
        end = node.body[0].end_lineno
        lines[end:node.end_lineno] = [None] * (node.end_lineno - end)
        lines[end - 1] += f"\n{' ' * node.body[0].col_offset}{YOURS}"
    kept = "\n".join(line for line in lines if line is not None)
    # the gaps that functions left
    return re.sub(r"\n{4,}", "\n\n\n", kept).rstrip() + "\n"


def begin(node):
    """Index of the first line of a definition, its decorators included."""
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1


def to_write(nodes, lines):
    """The functions and methods among these that are the learner's to write."""
    for node in nodes:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name == "__init__":
            continue
        if lines[begin(node) - 1].strip() == "# given":
            continue
        yield from to_write(node.body, lines) if isinstance(node, ast.ClassDef) else [node]


def load(path, name):
    """A file as a module. It is compiled anew: Python's cache may miss a change within a second."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module          # dataclasses look their module up
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def shown(path):
    """A path as a person at the root of the repository sees it."""
    path, root = Path(path), COURSE.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name
