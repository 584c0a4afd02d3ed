"""The house itself: which file may import which, how much a reader meets, and how far it is to the first product."""
import ast
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path

import pytest
import torch

import model
import train

ROOT = Path(__file__).parent.parent
COURSE = ["train", "sample", "model", "ffn", "moe", "routers", "balance", "peer", "mamba", "settings",
          "minimal"]
# A room may import rooms of a lower floor, and files of its own.
FLOOR = dict(course=9, lab=8, train=7, grow=6, sample=5, model=4, moe=3, peer=3, mamba=3, ffn=2, balance=2, routers=1,
             runtime=1, data=0.5, settings=0, kernels=0, minimal=0)
# Two files of grow/ train several models with train.Trainer; the room below does not know them.
FLOOR |= {"grow.outer": 7.5, "grow.workers": 7.5}


def floor(name):
    return FLOOR.get(name, FLOOR[name.split(".")[0]])


@cache
def modules():
    """{dotted name: syntax tree} of all files but the tests and what learners write."""
    files = [*ROOT.glob("*.py"), *(p for room in ("runtime", "grow", "kernels", "data", "lab", "course")
                                   for p in (ROOT / room).rglob("*.py") if not {"exercises", "mine.py"} & {*p.parts})]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): ast.parse(p.read_text("utf-8")) for p in files}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


@cache
def graph():
    found = modules()
    return {name: {target for target in imports(tree) if target in found and target != name}
            for name, tree in found.items()}


def test_arrows_point_downward():
    upward = [f"{a} imports {b}" for a, targets in graph().items() for b in targets
              if a.split(".")[0] != b.split(".")[0]
              and floor(b) >= floor(a)]
    assert upward == []


def test_there_is_no_circle():
    arrows, done = graph(), set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for target in arrows[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in arrows:
        visit(name, [])


def test_minimal_and_kernels_stand_alone():
    assert graph()["minimal"] == set()
    assert all(b.startswith("kernels.") for a, targets in graph().items() if a.startswith("kernels.") for b in targets)
    for room, others in (("lab", ("lab", "course")), ("course", "course")):
        assert not any(b.startswith(room) for a, targets in graph().items() if not a.startswith(others) for b in targets)


def test_the_top_level_is_eleven_files_that_fit_into_a_sitting():
    files = sorted(ROOT.glob("*.py"))
    assert sorted(p.stem for p in files) == sorted(COURSE)
    lines = {p.name: len(p.read_text("utf-8").splitlines()) for p in files}
    assert sum(lines.values()) <= 3000, lines
    assert lines["minimal.py"] <= 200


def test_the_model_alone_is_nine_files():
    code = ("import sys, os; import model; root = os.path.dirname(model.__file__)\n"
            "print(*(m.__file__ for m in list(sys.modules.values()) if (getattr(m, '__file__', None) or '').startswith(root)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [path for path in done.stdout.split() if Path(path).stat().st_size]         # not an empty __init__
    assert len(files) <= 9, files


def test_the_first_product_is_seven_frames_away(tmp_path, monkeypatch, corpora):
    """From `python train.py` (the module itself is one frame) to the first matrix product of a run."""
    depths = []

    def linear(self, x):
        if not depths:
            ours = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
            depths.append([f.name for f in ours])
        return torch.nn.functional.linear(x, self.weight, self.bias)

    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    assert train.main(arguments(corpora, tmp_path / "run")) == 0
    assert depths[0] == ["main", "train", "evaluate", "forward", "forward", "forward"]


def test_kinds_and_routers_are_named_where_they_are_defined():
    """Texts that are exactly the name of a router stand in routers.py, configs and tests alone."""
    names = set(model.ROUTERS) - {"soft", "base", "hash", "domain", "switch", "gshard"}     # words of their own
    for name, tree in modules().items():
        if name.split(".")[0] not in ("routers", "lab", "course") and name != "settings":
            texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} - {"sigmoid"}    # peer's gate
            assert not texts & names, (name, texts & names)


from test_train import arguments, corpora  # noqa: E402,F401 (a fixture)


@pytest.mark.parametrize("name", COURSE)
def test_text_stands_beside_the_code(name):
    """Comments on lines of their own, for each 100 lines of code; not in the list of settings."""
    source = (ROOT / f"{name}.py").read_text("utf-8")
    doc = {line for node in ast.walk(ast.parse(source)) if isinstance(getattr(node, "body", None), list) and node.body
           and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
           for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = [line.strip() for i, line in enumerate(source.splitlines(), 1) if i not in doc and line.strip()]
    comments = sum(line.startswith("#") for line in lines)
    assert comments >= 0.08 * (len(lines) - comments) or name == "settings"
