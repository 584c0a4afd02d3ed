"""Where results come from: settings that are chosen on a seed of their own, and texts that are not mixed."""
import os
import platform
import re
import shutil
from types import SimpleNamespace

import pytest

from data.prepare import prepare
from lab.experiment import Experiment
from lab.papers import tuning
from lab.papers.provenance import is_of_another_text, texts
from lab.papers.tables import read_table
from test_experiment import corpora, here, main, rows_of  # noqa: F401 (fixtures)

# 1e-5 is far too small, so that the first rate wins; it is the rate of the file, too.
TUNED = """
seeds = 2
config = "{empty}"
tune = {{ train.lr = [1e-2, 1e-5] }}
[common]
data.name = "one"
data.dir = "{data}"
model = {{ n_layer = 1, n_head = 1, n_embd = 8, block_size = 8 }}
ffn = {{ d_ff = 8, kind = "dense" }}
train = {{ batch_size = 4, warmup_steps = 2, max_steps = 20, eval_every = 0, eval_batches = 2, lr = 1e-2 }}
[arms.plain]
[arms.fixed]
seeds = 1
tune = {{}}
train.lr = 1e-3
"""


@pytest.fixture
def tuned(corpora):  # noqa: F811
    text = TUNED.format(empty=corpora / "empty.toml", data=corpora / "prepared")
    (corpora / "tuned.toml").write_text(text)
    return corpora


def states(capsys, *words):
    """{label: its line} of --list."""
    main("tuned.toml", "--list", *words)
    return dict(re.findall(r"^# (\S+): (.*)$", capsys.readouterr().out, re.M))


def test_a_rate_is_chosen_on_a_seed_of_its_own(tuned, capsys):
    """One file all the way: recorded without tuning, then tuned, resumed, and its page."""
    out, path = tuned / "results/tuned/cpu", tuned / "tuned.toml"
    text = path.read_text()
    # Recorded without tuning, with the rate that will win.
    path.write_text(text.replace("tune = { train.lr = [1e-2, 1e-5] }", ""))
    main("tuned.toml", "--jobs", 2, "--only", "plain")
    assert Experiment("tuned.toml", "cpu").tuning_lines() == [
        "The learning rates of all arms (0.001, 0.01) are those of the file; none was tuned."]
    before = rows_of(out)
    path.write_text(text)
    assert states(capsys) == {
        "plain@lr=0.01-1000": "to do", "plain@lr=1e-05-1000": "to do", "fixed-0": "to do",
        **{f"plain-{seed}": "to do, when its tuning has chosen its settings" for seed in (0, 1)}}
    # Only the candidates run; what they choose is recorded already.
    main("tuned.toml", "--jobs", 2, "--only", "plain")
    tried = read_table(out / "tuning.csv")
    assert [(row["arm"], row["seed"], row["lr"], row["tuned"]) for row in tried] == [
        ("plain@lr=0.01", 1000, 0.01, "plain"), ("plain@lr=1e-05", 1000, 1e-05, "plain")]
    assert tried[0]["val_loss"] < tried[1]["val_loss"]
    assert rows_of(out)["plain", 1] == before["plain", 1]
    assert not list((tuned / "runs/tuned/cpu").glob("fixed*"))
    # What is recorded is enough: a candidate runs no second time, and chooses without its folder.
    shutil.rmtree(tuned / "runs")
    done = ("plain@lr=0.01-1000", "plain@lr=1e-05-1000", "plain-0", "plain-1")
    assert states(capsys) == dict.fromkeys(done, "done") | {"fixed-0": "to do"}
    main("tuned.toml", "--only", "plain")
    assert "nothing to run" in capsys.readouterr().out
    lines = Experiment("tuned.toml", "cpu").tuning_lines()
    assert lines[0] == "One learning rate, 0.001, serves the other arms; it was not tuned for each."
    told = r"\| plain \| \*\*train.lr 0.01: \d\.\d{4}\*\*; train.lr 1e-05: \d\.\d{4} \|"
    assert re.fullmatch(told, lines[-3])
    assert lines[-1] == "At an end of its grid, so that a value beyond may be better: plain."
    # Another grid: its winner is not what was recorded, so that the row of the arm is not taken for it.
    path.write_text(text.replace("[1e-2, 1e-5]", "[1e-5]"))
    assert states(capsys)["plain@lr=1e-05-1000"] == "done" and states(capsys)["plain-0"] == "to do"
    assert Experiment("tuned.toml", "cpu").arms[0].settings["train.lr"] == "1e-05"


def test_the_lowest_loss_wins_and_all_candidates_must_have_run():
    arms = [SimpleNamespace(name=f"a@lr={lr}", key=str(lr), chooses=("a", {"train.lr": lr}))
            for lr in (1, 2, 3)]
    rows = [dict(arm=arm.name, key=arm.key, val_loss=loss) for arm, loss in zip(arms, (1.5, 1.25, 1.75))]
    assert tuning.choose(arms, rows) == {"a": {"train.lr": 2}}
    assert tuning.choose(arms, rows[:2]) == {}
    ends = [tuning.at_an_end({"train.lr": float(lr)}, arms) for lr in (1, 2, 3)]
    assert ends == [True, False, True] and not tuning.at_an_end({}, arms)
    del rows[1]["val_loss"]                                     # it diverged
    assert tuning.choose(arms, rows) == {"a": {"train.lr": 1}}
    rows[0]["key"] = "other"
    assert tuning.choose(arms, rows) == {}


@pytest.mark.parametrize("old, new, words", [
    ("tune = {}", "tune = 3", ["[arms.fixed]", "tune = 3 is not a table"]),
    ("tune = {}", "tune = { train.lr = 3e-3 }", ["tune: train.lr = 0.003 is not a list of values"]),
    ("tune = {}", "tune = { train.lr = [] }", ["is not a list of values of a setting"]),
    ("tune = {}", "tune = { lr = [1.0] }", ["tune: lr = [1.0]"]),
    ("tune = {}", "tune = { train.rl = [1.0] }", ["arm fixed@rl=1.0", "train.rl", "did you mean train.lr?"]),
    ("tune = {}", "from = \"plain\"\ntune = { train.lr = [1.0] }", ["only an arm that is trained from scratch"]),
])
def test_a_malformed_table_is_one_clear_line(old, new, words, tuned, capsys):
    path = tuned / "tuned.toml"
    path.write_text(path.read_text().replace(old, new, 1))
    main("tuned.toml", "--list", status=2)
    error = capsys.readouterr().err
    assert error.startswith("error: tuned.toml") and error.count("\n") == 1
    for word in words:
        assert word in error, error


def test_a_row_of_another_text_is_not_taken(tuned, capsys):
    path, out = tuned / "tuned.toml", tuned / "results/tuned/cpu"
    path.write_text(path.read_text().replace("[1e-2, 1e-5] }", "[1e-2] }\nevaluate = [\"one\", \"two\"]"))
    main("tuned.toml", "--only", "fixed")
    row = rows_of(out)["fixed", 0]
    assert row["python"] == platform.python_version() and row["torch"]
    assert re.fullmatch(r"one:[0-9a-f]{12} two:[0-9a-f]{12}", row["corpus"])
    assert states(capsys)["fixed-0"] == "done"
    # One of its texts changes: the row, and the run folder, no longer count.
    (tuned / "two").write_text("every unhappy family is unhappy in its own way. " * 90)
    prepare([str(tuned / "two")], out=tuned / "prepared", quiet=True)
    assert states(capsys)["fixed-0"] == "to do"
    main("tuned.toml", "--only", "fixed")
    assert "fixed-0: runs again, changed: the text of its corpora" in capsys.readouterr().err
    again = rows_of(out)["fixed", 0]
    assert again["corpus"].split()[0] == row["corpus"].split()[0] and again["corpus"] != row["corpus"]
    # A row without checksums is taken as it is, and so is one of a text that is not prepared here.
    (arm,) = [arm for arm in Experiment("tuned.toml", "cpu").arms if arm.name == "fixed"]
    assert texts(arm) == again["corpus"]
    assert is_of_another_text(arm, row["corpus"]) and not is_of_another_text(arm, None)
    os.rename(tuned / "prepared", tuned / "gone")
    assert texts(arm) == "" and not is_of_another_text(arm, row["corpus"])
