"""course/: the tour as a program and as a notebook, and the table of exercises."""
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from test_lectures import wrong_links

from course import notebook
from course.check import overview
from course.stubs import exercises

ROOT = Path(__file__).parent.parent
TEXT = notebook.TOUR.read_text("utf-8")
MADE = json.loads(notebook.NOTEBOOK.read_text("utf-8"))


def sources(kind):
    """The texts of the notebook's cells of one kind."""
    return ["".join(cell["source"]) for cell in MADE["cells"] if cell["cell_type"] == kind]


# ---- the notebook

def test_the_committed_notebook_is_what_the_command_writes(tmp_path, monkeypatch, capsys):
    for name in ("NOTEBOOK", "README"):
        path = tmp_path / getattr(notebook, name).name
        if name == "README":
            path.write_text("a\n<!-- exercises -->\nold\n<!-- end of the exercises -->\nb\n", "utf-8")
        monkeypatch.setattr(notebook, name, path)
    assert notebook.main([]) == 0 and "tour.ipynb" in capsys.readouterr().out
    assert (tmp_path / "tour.ipynb").read_bytes() == (ROOT / "course/tour.ipynb").read_bytes()
    written = (tmp_path / "README.md").read_text("utf-8")
    assert written == f"a\n<!-- exercises -->\n{overview()}\n<!-- end of the exercises -->\nb\n"


def test_it_is_a_notebook_without_outputs():
    assert (MADE["nbformat"], MADE["nbformat_minor"]) == (4, 5)
    assert MADE["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in MADE["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one) for one in ids)
    for cell in MADE["cells"]:
        assert cell["metadata"] == {} and all(isinstance(line, str) for line in cell["source"])
        fields = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            fields |= {"execution_count", "outputs"}
            assert cell["execution_count"] is None and cell["outputs"] == []
        assert set(cell) == fields and cell["cell_type"] in ("code", "markdown")
        # each line but the last ends one
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and not cell["source"][-1].endswith("\n")


def test_the_words_of_the_tour_lead_somewhere():
    text = "\n".join(sources("markdown"))
    assert text.count("glossary.md#") >= 5 and wrong_links(text) == []


def test_it_is_short():
    lines = [line for source in sources("code") for line in source.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 60


@pytest.fixture(scope="module")
def toured(tmp_path_factory):
    """(folder, the namespace) after all cells of the notebook have run, from course/ as a notebook does."""
    before, threads = matplotlib.get_backend(), torch.get_num_threads()
    matplotlib.use("Agg")
    torch.set_num_threads(1)                # what is this small is no faster with two
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("somewhere")
        patch.setattr("tempfile.tempdir", str(folder))
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(ROOT / "course")
        names = {"__name__": "__main__"}
        for source in sources("code"):
            short = source.replace("--train.max_steps 200", "--train.max_steps 60")
            exec(compile(short, "tour.ipynb", "exec"), names)                           # noqa: S102
        names["plt"].close("all")
    matplotlib.use(before)
    torch.set_num_threads(threads)
    return folder / "tour", names


def test_the_notebook_runs(toured):
    folder, names = toured
    assert names["folder"] == folder and (folder / "tour.png").stat().st_size > 5000
    assert names["out"].logits.shape == (1, len(names["text"]) - 1, 256)
    # after a third of the steps it is better than guessing by the bytes' frequencies
    assert names["out"].loss < 2.8
    assert names["experts"].shape == (len(names["text"]) - 1, 2)
    assert names["gates"].sum(1).sub(1).abs().max() < 1e-5


def test_the_program_runs_and_takes_the_run_that_is_there(toured):
    folder, names = toured
    before = (folder / "run/log.csv").read_bytes()
    (folder / "tour.png").unlink()
    done = subprocess.run([sys.executable, "-m", "course.tour", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nats a token" in done.stdout and (folder / "tour.png").exists()
    assert (folder / "run/log.csv").read_bytes() == before


def test_a_mistake_on_its_command_line_is_one_line():
    done = subprocess.run([sys.executable, "-m", "course.tour", "--fodler"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--fodler" in done.stderr


# ---- cells

def test_cells_of_three_kinds():
    text = "# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1  # noqa: E402\n\n# %% [script]\ny = 2\n"
    assert notebook.cells(text) == [("markdown", "# Title\n\ntext"), ("code", "x = 1  # noqa: E402"), ("script", "y = 2")]
    made = json.loads(notebook.notebook(text))["cells"]
    assert [(cell["cell_type"], cell["source"]) for cell in made] == [
        ("markdown", ["# Title\n", "\n", "text"]), ("code", ["x = 1"])]


@pytest.mark.parametrize("text", ["x = 1\n# %%\ny = 2\n", "# %% [raw]\nx = 1\n"])
def test_what_is_no_cell_is_refused(text):
    with pytest.raises(ValueError, match="cells begin with"):
        notebook.cells(text)


# ---- the table of exercises

def test_the_readme_has_the_table_of_all_exercises():
    text = notebook.README.read_text("utf-8")
    assert notebook.TABLE.search(text)[0] == overview() + "\n", "`python -m course.notebook` writes it"
    rows = overview().splitlines()
    assert len(rows) == 2 + len(exercises()) + 1
    assert "| triton |" in next(row for row in rows if "`permute_kernel`" in row)
    assert sum("| triton |" in row for row in rows) == 1


def test_the_weeks_have_every_exercise_once():
    text = notebook.README.read_text("utf-8")
    weeks = re.findall(r"^\| \d+ \|.*\| (.*) \|$", text.partition("**In a term.**")[2].partition("\n## ")[0], re.MULTILINE)
    assert len(weeks) == 12
    named = [name for week in weeks for name in re.findall(r"`(\w+)`", week)]
    assert sorted(named) == sorted(exercises())
