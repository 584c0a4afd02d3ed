"""Checks what a learner wrote in course/exercises and course/bugs, and says what is wrong.

    python -m course.check                          all: a table of what passes
    python -m course.check top_k_gate bugs/3        some of them
    python -m course.check --solution top_k_gate    ours, with the reason at each step
    python -m course.check --stubs                  writes the exercises that are missing, no others

An exercise is checked by the function check(mine) of course/solutions/NAME.py. It compares with the
repository itself, and raises Wrong with a sentence.
"""
import contextlib
import io
import os
import shutil
import sys
import textwrap
import traceback
from typing import NamedTuple

import torch

from course import hunt
from course.stubs import COURSE, EXERCISES, SOLUTIONS, exercises, load, shown, solution, stub
from course.wrong import Wrong, ask, close, grads, shape  # noqa: F401 (for the solutions)
from runtime.config import Parser, nearest, parse
from runtime.ending import Ending, program
from settings import ConfigError


# ---- one answer, whatever the learner's code does ----

class Answer(NamedTuple):
    passes: bool
    text: str                           # "passes", "not begun: FUNCTION", or what is wrong


@contextlib.contextmanager
def repeatable():
    """The same numbers each time: a fixed seed, and one thread, which is faster for what is tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def judge(path, run):
    """The Answer of run(), the check of the learner's file `path`, whatever their code raises."""
    if not path.exists():
        remedy = f"`{program('course.check')} --stubs` writes it"
        return Answer(False, f"there is no file {shown(path)}: {remedy}")
    try:
        with repeatable():
            return Answer(True, run() or "passes")
    except Wrong as wrong:
        return Answer(False, str(wrong))
    except (Exception, SystemExit) as error:
        return Answer(False, told(error, path))


def told(error, path):
    """What their code raised, and where; of a stub that it is not begun."""
    kind, text = type(error).__name__, textwrap.shorten(str(error), 300)
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{kind}: {error.msg} ({shown(path)}, line {error.lineno})"
    steps = traceback.extract_tb(error.__traceback__)
    theirs = [step for step in steps if step.filename == str(path)]
    if not theirs:
        ours = [step for step in steps if step.filename.startswith(str(COURSE))][-1]
        place = f"{shown(ours.filename)}, line {ours.lineno}"
        return f"the check cannot use what your code returned: {kind}: {text} ({place})"
    last = theirs[-1]
    if (last.line or "").startswith("raise NotImplementedError"):
        return f"not begun: {last.name}"
    return f"{kind}: {text} ({shown(path)}, line {last.lineno}: {last.line})"


def examine(name, path=None):
    """The Answer to an exercise, or to bugs/N. path: of another file than the learner's."""
    if name.startswith("bugs/"):
        return judge(COURSE / name / "mine.py", lambda: hunt.check(int(name[5:])))
    path = path or EXERCISES / f"{name}.py"
    ours = load(SOLUTIONS / f"{name}.py", f"course.solutions.{name}")
    return judge(path, lambda: ours.check(load(path, f"course.exercises.{name}")))


def overview():
    """The exercises as the table of course/README.md, its last row the sums."""
    lectures = {path.name[0]: path.name for path in COURSE.glob("[1-5]-*.md")}
    known = exercises().values()
    rows = ["| exercise | what | lecture | difficulty | importance | minutes | points | needs |",
            "|---|---|---|---|---|---|---|---|"]
    for e in known:
        needs = "triton" if "@triton.jit" in solution(e.name) else "-"
        lecture = f"[{e.lecture}]({lectures[str(e.lecture)]})"
        rows.append(f"| [`{e.name}`](exercises/{e.name}.py) | {e.title} | {lecture} | {e.difficulty} "
                    f"| {e.importance} | {e.minutes} | {e.points} | {needs} |")
    minutes, points = (sum(getattr(e, name) for e in known) for name in ("minutes", "points"))
    return "\n".join([*rows, f"| {len(known)} | | | | | {minutes} | {points} | |"])


# ---- the program ----

def painted(answer, room=1000):
    """An answer in at most `room` characters; on a terminal green, faint if not begun, or red."""
    text = textwrap.shorten(answer.text, room, placeholder=" ...")
    code = 32 if answer.passes else 2 if text.startswith("not begun") else 31
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() else text


def table(known, names):
    """Prints a line for each name as soon as it is checked, and the points. Whether all pass."""
    wide = max(map(len, names))
    head = f"{'exercise':{wide}}  lecture  difficulty  importance  minutes  points  "
    room = max(30, shutil.get_terminal_size((1000, 0)).columns - len(head))
    print(f"{head}result")
    passed = []
    for name in names:
        with contextlib.redirect_stdout(io.StringIO()):     # what their code and predictions print
            answer = examine(name)
        answer = answer._replace(text="passes") if answer.passes else answer
        facts = known[name][2:] if name in known else [""] * 5
        row = "".join(f"{fact:>{width}}" for fact, width in zip(facts, (9, 12, 12, 9, 8)))
        print(f"{name:{wide}}{row}  {painted(answer, room)}", flush=True)
        passed += [name] * answer.passes
    points = sum(known[name].points for name in passed if name in known)
    every = sum(e.points for e in known.values())
    print(f"{len(passed)} of {len(names)} pass, {points} of {every} points")
    return passed == names


def write_stubs(known):
    """Writes the learner's files that are missing, and prints their names."""
    files = {EXERCISES / f"{name}.py": stub(solution(name)) for name in known}
    files |= {COURSE / "bugs" / str(n) / "mine.py": hunt.stub(n) for n in hunt.NUMBERS}
    missing = [path for path in files if not path.exists()]
    for path in missing:
        path.parent.mkdir(exist_ok=True)
        path.write_text(files[path], "utf-8")
    print(f"{len(missing)} of {len(files)} files were missing", *map(shown, missing), sep="\n")


def build_parser():
    parser = Parser(prog="python -m course.check", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="exercise or bugs/N (default: all)")
    parser.add_argument("--solution", metavar="NAME", help="print our solution")
    parser.add_argument("--stubs", action="store_true", help="write the exercises that are missing")
    return parser


def main(argv=None):
    """Returns the exit status: 0 if all that was asked for passes, 1 if not, 2 for unknown names."""
    with Ending() as end:
        options, _ = parse(build_parser(), argv)
        known = exercises()
        names = [*known, *(f"bugs/{n}" for n in hunt.NUMBERS)]
        for name in [*options.names, *filter(None, [options.solution])]:
            if name not in names:
                raise ConfigError(f"{name}: no such exercise{nearest(name, names)}")
        if options.solution:
            bug = COURSE / options.solution / "answer.py"
            print(bug.read_text("utf-8") if bug.exists() else solution(options.solution), end="")
        elif options.stubs:
            write_stubs(known)
        elif not options.names:
            end.status = 0 if table(known, names) else 1
        else:
            answers = [examine(name) for name in options.names]
            for name, answer in zip(options.names, answers):
                print(f"{name}: {painted(answer)}")
            end.status = 0 if all(answer.passes for answer in answers) else 1
    return end.status


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")          # the permute kernel needs no card
    sys.exit(main())
