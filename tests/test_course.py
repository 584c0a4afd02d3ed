"""course/: each solution passes its check, its stub does not, and each misconception gets its sentence."""
import ast
import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from course import check, hunt, stubs
from course.check import examine, load, main
from course.stubs import CHECK, EXERCISES, SOLUTIONS, YOURS, exercises, solution, stub
from course.wrong import Wrong, close, grads, shape
from settings import ConfigError

ROOT = Path(__file__).parent.parent
NAMES = list(exercises())
WRONG = [(name, i, *variant) for name in NAMES
         for i, variant in enumerate(load(SOLUTIONS / f"{name}.py", f"course.solutions.{name}").WRONG)]

TWENTY_FOUR = {
    "btm_posterior", "btx", "capacity", "causal_choice", "count_layers", "effective_parameters", "equal_flops",
    "exact_resume", "experts_loop", "hash_route", "lifelong_kl", "loss_free_bias", "outer_step", "peer_forward",
    "permute_kernel", "predict_collapse", "product_key_topk", "quantile_balance", "sinkhorn", "smooth_load",
    "sort_dispatch", "switch_loss", "top_k_gate", "upcycle"}


def answer_to(tmp_path, name, text):
    """The Answer to an exercise whose file holds this text."""
    path = tmp_path / f"{name}.py"
    path.write_text(text, "utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        answer = examine(name, path)
    if answer.text.startswith("cannot be checked here"):            # a kernel, on a machine without Triton
        pytest.skip(answer.text)
    return answer


# ---- every exercise

def test_there_are_twenty_four():
    assert len(TWENTY_FOUR) == 24 and TWENTY_FOUR <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_our_solution_passes(name, tmp_path):
    assert answer_to(tmp_path, name, solution(name)) == (True, "passes")


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_is_not_begun(name, tmp_path):
    text = stub(solution(name))
    answer = answer_to(tmp_path, name, text)
    assert not answer.passes and answer.text.startswith("not begun: ")
    assert YOURS in text and CHECK not in text and "WRONG" not in text


@pytest.mark.parametrize("name,i,old,new,sentence", WRONG, ids=[f"{w[0]}-{w[1]}" for w in WRONG])
def test_a_misconception_gets_its_sentence(name, i, old, new, sentence, tmp_path):
    ours = solution(name)
    assert ours.count(old) == 1, "the old text must occur once, so that it is clear what is replaced"
    answer = answer_to(tmp_path, name, ours.replace(old, new))
    assert not answer.passes and sentence in answer.text, answer.text


@pytest.mark.parametrize("name", NAMES)
def test_three_misconceptions_at_least(name):
    assert sum(w[0] == name for w in WRONG) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_stub_is_the_generated_one(name):
    """Where a learner has written in it, what to do still stands there."""
    mine, fresh = (EXERCISES / f"{name}.py").read_text("utf-8"), stub(solution(name))
    begun = mine.count(YOURS) < fresh.count(YOURS)
    assert mine == fresh or begun and ast.get_docstring(ast.parse(fresh), clean=False) in mine


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_within_their_ranges(name):
    e = exercises()[name]
    assert 1 <= e.lecture <= 5 and 1 <= e.difficulty <= 5 and 1 <= e.importance <= 5
    assert 10 <= e.minutes <= 60 and e.points >= 1 and len(e.title) < 70


# ---- stubs

def test_a_stub_keeps_what_is_given():
    text = '''"""Doc."""
import torch

SIZE = 3


# ours alone
def _helper(x):
    return x


# given
def given(x):
    return 2 * x


@torch.no_grad()
def mine(x,
         y=1):
    """x -> y.

    More.
    """
    # a reason
    return x


class Layer:
    """A layer."""

    def __init__(self, d):
        self.d = d

    def forward(self, x):
        """What it does."""
        return x

    def __call__(self, x):
        """The same."""
        return self.forward(x)
'''
    assert stub(text) == f'''"""Doc."""
import torch

SIZE = 3


# given
def given(x):
    return 2 * x


@torch.no_grad()
def mine(x,
         y=1):
    """x -> y.

    More.
    """
    {YOURS}


class Layer:
    """A layer."""

    def __init__(self, d):
        self.d = d

    def forward(self, x):
        """What it does."""
        {YOURS}

    def __call__(self, x):
        """The same."""
        {YOURS}
'''
    with pytest.raises(ConfigError, match="mine, line 1: .* needs a docstring"):
        stub("def mine(x):\n    return x\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A course of one exercise in a folder of its own."""
    shutil.copy(SOLUTIONS / "top_k_gate.py", tmp_path / "top_k_gate.py")
    for module in (check, stubs):
        monkeypatch.setattr(module, "SOLUTIONS", tmp_path)
        monkeypatch.setattr(module, "EXERCISES", tmp_path / "exercises")
    return tmp_path / "exercises"


def test_a_learners_file_is_never_overwritten(folder, capsys):
    assert main(["--stubs"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 of 11 files were missing\n") and "top_k_gate.py" in out
    (folder / "top_k_gate.py").write_text("mine", "utf-8")
    assert main(["--stubs"]) == 0 and capsys.readouterr().out == "0 of 11 files were missing\n"
    assert (folder / "top_k_gate.py").read_text("utf-8") == "mine"


def test_a_docstring_without_its_facts_is_an_error(folder, capsys):
    path = folder.parent / "top_k_gate.py"
    path.write_text(path.read_text("utf-8").replace("difficulty 2 of 5", "difficulty two"), "utf-8")
    assert main(["--stubs"]) == 2 and "its docstring must hold a line such as" in capsys.readouterr().err
    path.write_text(path.read_text("utf-8").replace("difficulty two", "difficulty 2 of 5")
                    .replace(CHECK, ""), "utf-8")
    assert main(["--solution", "top_k_gate"]) == 2 and "has no line" in capsys.readouterr().err


# ---- the program

def test_the_table_and_its_status(folder, capsys):
    main(["--stubs"])
    capsys.readouterr()
    assert main([]) == 1
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == "exercise lecture difficulty importance minutes points result".split()
    assert row.split() == "top_k_gate 2 2 5 20 4 not begun: gates".split()
    (folder / "top_k_gate.py").write_text(solution("top_k_gate"), "utf-8")
    main([])
    out = capsys.readouterr().out
    assert "passes" in out and "4 of 4 points" in out and "\x1b" not in out


def test_one_exercise_and_its_status(folder, capsys):
    assert main(["top_k_gate"]) == 1
    assert "there is no file top_k_gate.py: `python -m course.check --stubs`" in capsys.readouterr().out
    folder.mkdir()
    (folder / "top_k_gate.py").write_text(solution("top_k_gate"), "utf-8")
    assert main(["top_k_gate"]) == 0
    assert capsys.readouterr().out == "top_k_gate: passes\n"


def test_a_hunt_is_checked_by_hunt(capsys, monkeypatch):
    monkeypatch.setattr(hunt, "check", lambda n: f"passes: {n}")
    assert main(["bugs/3"]) == 0 and capsys.readouterr().out == "bugs/3: passes: 3\n"

    def refuse(n):
        raise Wrong("your test does not see the bug")

    monkeypatch.setattr(hunt, "check", refuse)
    assert main(["bugs/3"]) == 1 and capsys.readouterr().out == "bugs/3: your test does not see the bug\n"
    assert main(["bugs/11"]) == 2 and "no such exercise" in capsys.readouterr().err


def test_the_table_shows_no_print_of_an_exercise(folder, capsys):
    folder.mkdir()
    (folder / "top_k_gate.py").write_text("print('mine')\n" + solution("top_k_gate"), "utf-8")
    main([])
    assert "mine" not in capsys.readouterr().out
    main(["top_k_gate"])
    assert "mine" in capsys.readouterr().out


def test_a_terminal_gets_colours(monkeypatch):
    answers = [check.Answer(True, "passes"), check.Answer(False, "not begun: gates"), check.Answer(False, "all gates are 1")]
    assert [check.painted(a) for a in answers] == [a.text for a in answers]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert [check.painted(a)[:5] for a in answers] == ["\x1b[32m", "\x1b[2mn", "\x1b[31m"]
    assert check.painted(answers[2], 12) == "\x1b[31mall ...\x1b[0m"


def test_an_unknown_name_is_one_line(capsys):
    assert main(["top_gate"]) == 2
    assert capsys.readouterr().err == "error: top_gate: no such exercise (did you mean top_k_gate?)\n"


def test_our_solution_is_shown_with_its_reasons(capsys):
    assert main(["--solution", "top_k_gate"]) == 0
    out = capsys.readouterr().out
    assert out == solution("top_k_gate") and "    # " in out and "def check(" not in out


@pytest.mark.parametrize("text,sentence", [
    ("def gates(:\n    pass\n", "SyntaxError: invalid syntax (top_k_gate.py, line 1)"),
    ("import nothing_of_that_name\n", "ModuleNotFoundError: No module named 'nothing_of_that_name' (top_k_gate.py, "
     "line 1: import nothing_of_that_name)"),
    ("\ndef gates(z, k, order):\n    return z[:, 99]\n", "(top_k_gate.py, line 3: return z[:, 99])"),
    ("def gates(z, k, order):\n    return 1\n", "the check cannot use what your code returned: TypeError"),
    ("ORDERS = 1\n", "the check cannot use what your code returned: AttributeError"),
    ("import sys\nsys.exit(3)\n", "SystemExit: 3 (top_k_gate.py, line 2: sys.exit(3))"),
    ("def gates(z, k, order):\n    return None, None\n", "is None (is a `return` missing?)")])
def test_what_their_code_raises_is_one_answer(text, sentence, tmp_path):
    answer = answer_to(tmp_path, "top_k_gate", text)
    assert not answer.passes and sentence in answer.text and "\n" not in answer.text


def test_it_runs_at_the_root_of_a_clone():
    done = subprocess.run([sys.executable, "-m", "course.check", "top_k_gate", "no_such"], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 2 and done.stderr.startswith("error: no_such: no such exercise")
    assert done.stdout == ""


# ---- the helpers

def test_close_names_the_place_and_both_numbers():
    want = torch.tensor([[1.0, 2.0], [3.0, torch.inf]])
    close("x", want.clone(), want)
    close("x", 2, torch.tensor(2.0))
    with pytest.raises(Wrong, match=r"^x\[1, 0\] is 3.5, not 3: why$"):
        close("x", want + torch.tensor([[0, 0], [0.5, 0]]), want, hint="why")
    with pytest.raises(Wrong, match=r"^x\[0, 1\] is nan, not 2$"):
        close("x", torch.tensor([[1.0, torch.nan], [3.0, torch.inf]]), want)
    with pytest.raises(Wrong, match=r"^x has shape \(2,\), not \(2, 2\)$"):
        close("x", want[0], want)
    with pytest.raises(Wrong, match=r"^x is 1, not 2$"):
        close("x", 1, 2)
    with pytest.raises(Wrong, match=r"^x is a list, not a tensor of shape \(1,\)$"):
        shape("x", [1], (1,))


def test_grads_are_those_of_a_weighted_sum():
    a, b = torch.randn(3), torch.randn(3)
    w = torch.randn(3, generator=torch.Generator().manual_seed(0))
    got = grads(lambda a, b: (a * a, torch.arange(3)), a, b)
    assert torch.allclose(got[0], 2 * a * w) and torch.equal(got[1], torch.zeros(3))
