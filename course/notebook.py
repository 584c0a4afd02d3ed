"""Writes what is made of other files of the course: tour.ipynb of tour.py, and the table of exercises in
README.md.

    python -m course.notebook

In tour.py a cell begins with `# %%`. `# %% [markdown]` begins a cell of text, whose lines are comments;
`# %% [script]` one that the program alone runs. The notebook has no outputs: the same text gives the same
file to the last byte.
"""
import json
import re
import sys

from course.check import overview
from course.stubs import COURSE
from runtime.config import Parser, parse
from runtime.ending import Ending
from runtime.files import write_text

TOUR, NOTEBOOK, README = COURSE / "tour.py", COURSE / "tour.ipynb", COURSE / "README.md"
BEGINS = re.compile(r"^# %%(?: \[(\w+)\])?\n", re.MULTILINE)
TABLE = re.compile(r"(?<=<!-- exercises -->\n).*?(?=<!-- end of the exercises -->)", re.DOTALL)


def cells(text):
    """[(kind, text)] of a program: kind is "markdown", "script" or "code". ValueError for another kind,
    or for what stands before the first cell."""
    before, *parts = BEGINS.split(text)
    kinds = [kind or "code" for kind in parts[::2]]
    unknown = [kind for kind in kinds if kind not in ("markdown", "script", "code")]
    if before.strip() or unknown:
        raise ValueError("cells begin with # %%, # %% [markdown] or # %% [script], not with "
                         f"{unknown or before!r}")
    bodies = [body.strip("\n") for body in parts[1::2]]
    return [(kind, re.sub("^# ?", "", body, flags=re.MULTILINE) if kind == "markdown" else body)
            for kind, body in zip(kinds, bodies)]


def cell(number, kind, text):
    """One cell in the format of notebooks, version 4.5."""
    made = dict(cell_type=kind, id=f"cell-{number}", metadata={}, source=text.splitlines(keepends=True))
    return made if kind == "markdown" else made | dict(execution_count=None, outputs=[])


def notebook(text):
    """A program of cells -> the text of its notebook."""
    # what stops flake8 and lines up comments is for the file alone
    shown = [(kind, re.sub(r" +# noqa.*", "", body)) for kind, body in cells(text) if kind != "script"]
    kernel = dict(display_name="Python 3", language="python", name="python3")
    made = dict(cells=[cell(n, *one) for n, one in enumerate(shown)],
                metadata=dict(kernelspec=kernel, language_info=dict(name="python")),
                nbformat=4, nbformat_minor=5)
    return json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(prog="python -m course.notebook", description=__doc__.split("\n\n")[0])
    with Ending() as end:
        parse(parser, argv)
        write_text(NOTEBOOK, notebook(TOUR.read_text("utf-8")))
        write_text(README, TABLE.sub(lambda _: overview() + "\n", README.read_text("utf-8")))
        print(NOTEBOOK.name, "and the table in", README.name, "are written")
    return end.status


if __name__ == "__main__":
    sys.exit(main())
