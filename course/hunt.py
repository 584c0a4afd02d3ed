"""Bug hunts: a learner's test must fail on a file with one bug and pass on the file without it.

course/bugs/N/layer.py is the file, answer.py says what is wrong in it, mine.py is the learner's.
check(N) is what `python -m course.check bugs/N` calls.
"""
import sys
import traceback
import types

import torch

from course.stubs import COURSE, load, shown
from course.wrong import Wrong

BUGS = COURSE / "bugs"
NUMBERS = range(1, 11)
STUB = """\
\"\"\"Hunt NUMBER: find the bug in layer.py, and write the test that catches it.

1. Read layer.py. Its docstring says what is meant; one place in the code does something else.
   `python course/bugs/NUMBER/layer.py` runs it. Leave the file as it is.
2. Write test(layer). `layer` is the module layer.py, with its bug or without it. Make a layer, run
   it, and assert what must hold, with a message that has the numbers:
       assert change < 1e-5, f"... changed by {change:.3f}"
3. `python -m course.check bugs/NUMBER` runs your test on both: it must fail on the one with the bug
   and pass on the right one. Then `--solution bugs/NUMBER` shows another test, and why.
\"\"\"
import torch


def test(layer):
    raise NotImplementedError("yours")
"""


def check(n, path=None):
    """Runs the test of mine.py, or of another file, on both versions of layer.py; returns what to
    say if it tells them apart. Raises Wrong if it does not, and what the file itself raises."""
    path = path or BUGS / str(n) / "mine.py"
    mine = load(path, f"course.bugs.mine{n}")
    if not callable(getattr(mine, "test", None)):
        raise Wrong(f"{shown(path)} has no function test(layer)")
    # what the test raises on each, or None
    buggy, right = (outcome(mine.test, layer(n, fixed), path) for fixed in (False, True))
    if right and buggy:
        raise Wrong(f"the right version fails, too: {said(right)}")
    if right:
        raise Wrong("your test has it the wrong way round: it passes with the bug and fails on the "
                    f"right version: {said(right)}")
    if not buggy:
        raise Wrong("your test does not see the bug yet: it passes on layer.py and on the right "
                    "version")
    if not isinstance(buggy, AssertionError):
        raise Wrong(f"with the bug your test ends by {said(buggy)}; let it fail by an assert, "
                    "whose message says what is wrong")
    return f"passes: the right version passes, and with the bug it fails: {said(buggy)}"


def stub(n):
    """mine.py as a learner gets it."""
    return STUB.replace("NUMBER", str(n))


def layer(n, fixed=False):
    """layer.py of a hunt as a module, as it is or with the bug put right. Raises Wrong if a learner
    has changed it, so that the bug is not in it."""
    path = BUGS / str(n) / "layer.py"
    text = path.read_text("utf-8")
    answer = load(path.with_name("answer.py"), f"course.bugs.answer{n}")
    if text.count(answer.BUG) != 1:
        raise Wrong(f"{shown(path)} was changed; put it back with `git checkout {shown(path)}`: "
                    "your test runs on it, and on a right version that is made from it")
    name = f"course.bugs.{'right' if fixed else 'layer'}{n}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module                          # where a dataclass looks its module up
    text = text.replace(answer.BUG, answer.RIGHT) if fixed else text
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def outcome(test, module, path):
    """What test(module) raises, or None. The stub's NotImplementedError gets out: not begun."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            test(module)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, NotImplementedError) and last.filename == str(path):
            raise
        return error


def said(error):
    """An exception in a few words; an assert without a message as it is written."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError):
        return text or traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__}: {text}"
