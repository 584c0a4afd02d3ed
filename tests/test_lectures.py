"""What the pages of course/ say is so: quoted lines, links, commands, exercises, verdicts and their numbers."""
import re
import shlex
from pathlib import Path

import pytest

from lab.drawing import course
from model import load_config
from settings import ConfigError

ROOT = Path(__file__).parent.parent
COURSE = ROOT / "course"
LECTURES = ["1-one-layer", "2-choosing", "3-fast", "4-scaling", "5-models-from-models"]
EXERCISES = {name: lecture for lecture, names in enumerate((
    "count_layers experts_loop exact_resume",
    "top_k_gate switch_loss smooth_load capacity loss_free_bias predict_collapse quantile_balance causal_choice "
    "hash_route sinkhorn",
    "sort_dispatch permute_kernel",
    "product_key_topk peer_forward equal_flops effective_parameters",
    "upcycle btx btm_posterior outer_step lifelong_kl"), 1) for name in names.split()}
PAGES = sorted(COURSE.glob("*.md"))
GIVEN = [path for path in PAGES if path.stem in LECTURES]
LONGEST = 160


# ---- what a page says ----

def quotes(text):
    """[(file, its quoted lines)]; the file is None for a block of Python without a source above it."""
    found = re.findall(r"(?:<!-- (from|runs)(?: (\S+))? -->\n+)?```python\n(.*?)```", text, re.DOTALL)
    return [(file or None, [line.strip() for line in body.splitlines() if line.strip()])
            for kind, file, body in found if kind != "runs"]


def programs(text):
    """Blocks of Python that the page asks a reader to run."""
    return re.findall(r"<!-- runs -->\n+```python\n(.*?)```", text, re.DOTALL)


def commands(text):
    """The words of each line of a block of commands, comments left out."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines for part in line.partition("#")[0].split("&&") if (words := shlex.split(part))]


def section(text, title):
    """What stands under a heading of the second level, or an empty text."""
    found = re.search(rf"^## (?:{title})\b.*?\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# ---- what is wrong with it: lists of sentences ----

def wrong_quotes(text):
    """Each line must stand in the file, in the order in which it is quoted; a line `...` leaves some out."""
    found = []
    for file, lines in quotes(text):
        if file is None or not (ROOT / file).is_file():
            found.append(f"a block of Python has no file above it, or one that is not there: {file}, {lines[:1]}")
            continue
        rest = iter([line.strip() for line in (ROOT / file).read_text("utf-8").splitlines()])
        missing = next((line for line in lines if line != "..." and line not in rest), None)
        if missing is not None:
            found.append(f"{file} has no line (here, or after the one before it): {missing}")
    return found


def wrong_links(text, folder=COURSE):
    """Relative links and images lead to something; of a page, the heading exists, too."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        path, _, anchor = target.partition("#")
        file = folder / path
        coming = file.stem in LECTURES and not file.exists()            # a lecture that is not written yet
        if re.match(r"[a-z]+:", target) or not path or coming:
            continue
        if not file.exists():
            found.append(f"no such file: {target}")
        elif anchor and anchor not in map(slug, re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)):
            found.append(f"no such heading: {target}")
    return found


def wrong_command(words):
    """Why a command cannot be right, or None: its program exists, its config loads with the settings it is given."""
    if words[0] == "torchrun":
        words = ["python", *[word for word in words[1:] if not word.startswith("--standalone") and "nproc" not in word]]
    if words[0] == "pip" or words[1:3] in (["-m", "venv"], ["-m", "pytest"]):
        return None
    if words[0] != "python" or len(words) < 2:
        return f"no program of this repository: {words}"
    name = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
    if not (ROOT / name).is_file() and not (ROOT / name[:-3] / "__init__.py").is_file():
        return f"no such program: {name}"
    missing = [word for word in words if word.startswith("configs/") and not (ROOT / word).is_file()]
    if missing:
        return f"no such config: {missing}"
    if name == "course/check.py":
        asked = [word for word in words[3:] if not word.startswith("-") and not word.isupper()]
        unknown = [word for word in asked if word not in EXERCISES and not re.match(r"bugs/([1-9]|10|N)$", word)]
        return f"no such exercise: {unknown}" if unknown else None
    return wrong_settings(words) if name == "train.py" else None


def wrong_settings(words):
    """The same of train.py's settings."""
    # --key=value and --key value
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = [(key[2:], value) for key, value in zip(words, words[1:]) if re.match(r"--\w+\.\w+$", key)]
    given_file = [word for word in words if word.endswith(".toml")]
    config = given_file[0] if given_file else "configs/quick.toml" if "--resume" not in words else None
    try:
        load_config(config and ROOT / config, given)
    except ConfigError as e:
        return str(e)


def wrong_claims(text, folder=COURSE):
    """A row that begins with a claim of results/ says its verdict, and numbers that stand there, maybe rounded."""
    found = []
    for claim, target, row in re.findall(r"^\| \[([\w-]+)\]\((\S+?)/verdict\.md#\S+\) \|(.*)\|$", text, re.MULTILINE):
        page = (folder / target / "verdict.md").read_text("utf-8")
        said = re.search(r"\*\*(.+?)\*\*", row)
        is_so = re.search(rf"^\| {re.escape(claim)} \|.*\| \*\*(.+?)\*\*.*\|$", page, re.MULTILINE)
        if not (said and is_so and said[1] == is_so[1]):
            found.append(f"{claim}: the verdict is {is_so and is_so[1]}, here {said and said[1]}")
        known = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*(?:e[+-]?\d+)?", page)
                 if number.strip(",")]
        for number in re.findall(r"(?<![\w.])(?:\d+\.\d+|\d{1,3}(?:,\d{3})+)(?![\w.])", row):
            digits = len(number.partition(".")[2])
            if not any(f"{value:,.{digits}f}" == number for value in known):
                found.append(f"{claim}: {number} stands nowhere in {target}/verdict.md")
    return found


def wrong_lecture(text, number):
    """What every lecture has."""
    found = [f"nothing under ## {title}" for title in
             ("What was found here", "Two questions", "Run live", "Exercises", "Further reading")
             if not section(text, title).strip()]
    asked = section(text, "Two questions")
    if asked.count("<details>") != 2 or asked.count("</details>") != 2 or asked.count("<summary>") != 2:
        found.append("there are not two questions with folded answers")
    if "```sh" not in section(text, "Run live"):
        found.append("there is no command to run live")
    named = set(re.findall(r"`(\w+)`", section(text, "Exercises")))
    if named != (own := {name for name, lecture in EXERCISES.items() if lecture == number}):
        found.append(f"exercises of lecture {number} that are missing or not its own: {sorted(named ^ own)}")
    if not re.search(r"\b\d{4}\.\d{5}\b", section(text, "Further reading")):
        found.append("no paper is named by its arXiv number")
    if len(re.findall(r"!\[[^]]+\]\(", text)) < 2:
        found.append("fewer than two pictures, each with a text for who cannot see it")
    return found


def too_long(text):
    return [line for line in text.splitlines() if len(line) > LONGEST and not line.startswith("|")]


# ---- the pages ----

@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_says_what_is_so(path):
    text = path.read_text("utf-8")
    wrong = [why for words in commands(text) if (why := wrong_command(words))]
    assert wrong_quotes(text) + wrong_links(text) + wrong + wrong_claims(text) + too_long(text) == []


@pytest.mark.parametrize("path", GIVEN, ids=lambda path: path.stem)
def test_a_lecture_has_its_parts(path):
    assert wrong_lecture(path.read_text("utf-8"), LECTURES.index(path.stem) + 1) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_its_programs_run(path, capsys):
    for body in programs(path.read_text("utf-8")):
        exec(compile(body, path.name, "exec"), {})                              # noqa: S102
        assert capsys.readouterr().out.strip()


def test_all_exercises_have_a_lecture():
    assert len(EXERCISES) == 24
    for folder in ("exercises", "solutions"):
        for path in (COURSE / folder).glob("[!_]*.py"):
            stated = re.search(r"^lecture (\d) ", path.read_text("utf-8"), re.MULTILINE)
            assert stated and EXERCISES.get(path.stem) == int(stated[1]), path


def test_the_drawings_are_written(tmp_path, capsys):
    assert course.main(["--out", str(tmp_path)]) == 0
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in (COURSE / "drawings").glob("*.png"))
    assert len(capsys.readouterr().out.splitlines()) == len(course.DRAWINGS) == len(written)


# ---- the checks can fail ----

def test_a_wrong_quote_is_found():
    right = "<!-- from routers.py -->\n```python\nlogits = self.score(x)\n...\nprobs = logits.softmax(-1)\n```\n"
    assert wrong_quotes(right) == []
    assert "no line" in wrong_quotes(right.replace("softmax(-1)", "softmax(0)"))[0]
    assert wrong_quotes(right.replace("routers.py", "router.py")) and wrong_quotes(right.partition("\n")[2])
    # out of order
    assert wrong_quotes("<!-- from minimal.py -->\n```python\nT = 5\nimport math\n```\n")
    assert wrong_quotes("<!-- from minimal.py -->\n```python\nimport time\nimport math\n```\n")


def test_a_wrong_link_is_found():
    assert wrong_links("[a](../README.md) [b](../results/routers/cpu/verdict.md#a7-dense) [c](https://arxiv.org)") == []
    assert len(wrong_links("[a](../READM.md) ![b](drawings/none.png) [c](../README.md#two-command)")) == 3


@pytest.mark.parametrize("line, why", [
    ("python train.py configs/quick.toml --ffn.balance_loss 0", None),
    ("python train.py configs/quick.toml --out runs/a --ffn.balance_los=0", "unknown setting"),
    ("python train.py configs/quick.toml --ffn.top_k=9", "ffn.top_k"),
    ("python train.py configs/quik.toml", "no such config"),
    ("python trian.py", "no such program"),
    ("python -m lab.plot runs/quick", "no such program"),
    ("make all", "no program"),
    ("python -m course.check top_k_gates", "no such exercise"),
    ("python -m course.check top_k_gate bugs/3 --solution NAME", None),
    ("pip install torch", None),
    ("torchrun --standalone --nproc_per_node=2 train.py configs/quick.toml --train.parallel expert", None),
    ("python -m kernels", None),
])
def test_a_wrong_command_is_found(line, why):
    (words,) = commands(f"```sh\n{line}   # a comment\n```\n")
    assert (wrong_command(words) is None) if why is None else why in wrong_command(words)


def test_a_wrong_verdict_or_number_is_found():
    row = "| [A7-dense](../results/routers/cpu/verdict.md#a7-dense) | **did not hold** | +0.092 nats |\n"
    assert wrong_claims(row) == []
    assert "the verdict is did not hold" in wrong_claims(row.replace("did not hold", "held"))[0]
    assert "0.093 stands nowhere" in wrong_claims(row.replace("0.092", "0.093"))[0]
    assert wrong_claims(row.replace("+0.092 nats", "81,684 tokens a second")) == []
    assert "81,685" in wrong_claims(row.replace("+0.092 nats", "81,685 tokens a second"))[0]


def test_a_lecture_without_its_parts_is_found():
    text = (COURSE / "1-one-layer.md").read_text("utf-8")
    for cut, why in (("## Run live", "Run live"), ("<summary>", "two questions"), ("`experts_loop`", "experts_loop"),
                     ("## Further", "Further reading")):
        assert any(why in sentence for sentence in wrong_lecture(text.replace(cut, "", 1), 1)), cut
    assert any("exercises of lecture 2" in sentence for sentence in wrong_lecture(text, 2))
    assert too_long("x" * 200) and not too_long("| " + "x" * 200)
