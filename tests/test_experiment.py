"""Experiments: what a file stands for, runs that fail, stop and go on, verdicts against numbers
computed by hand."""
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from data.prepare import prepare
from lab import experiment
from lab.drawing.logs import thin
from lab.experiment import Experiment
from lab.laws.laws import Krajewski
from lab.papers import jobs, overview, speed
from lab.papers.arms import executable, expand, with_ancestors
from lab.papers.evaluate import evaluate, routing, use_of_experts
from lab.papers.expressions import Table, derive
from lab.papers.spec import read_experiment
from lab.papers.tables import read_table
from lab.papers.verdict import (AGAINST, FOR, HELD, NOT, concerns, judge, judge_fit, judge_law,
                                read_claims)
from model import load_config
from settings import ConfigError

ROOT = Path(__file__).parent.parent
# What stands in for training where only the runner is looked at: it notes that it ran, and fails if
# told to.
SCRIPT = """
import json, pathlib, sys, time
out, loss, *more = sys.argv[1:]
folder = pathlib.Path(out)
with open(folder.parent / "ran.txt", "a") as file:
    file.write(folder.name + chr(10))
if "slow" in more:
    time.sleep(0.6)
if "bad" in more and not pathlib.Path("mended").exists():
    sys.exit("something\\nis broken here")
row = dict(val_loss=float(loss), val_loss_one=2 * float(loss))
(folder / "evaluation.json").write_text(json.dumps(row))
"""
FAST = """
title = "Fast"
caption = "nothing in particular"
seeds = 3
[arms."fast-{n}"]
grid = { n = [1, 2] }
make = "SCRIPT {out} {n}.{seed}"
[arms.bad]
make = "SCRIPT {out} 9 bad"
from = "fast-1"
[arms.child]
make = "SCRIPT {out} 4"
from = ["bad", "fast-2"]
[metrics."fast-{n}"]
gap = "val_loss_one[fast-{n}] - val_loss[fast-{n}]"
[[panel]]
kind = "bars"
y = "val_loss"
[claims.C1]
says = "one is less than two"
source = "arithmetic, table 1"
test = "val_loss: fast-1 < fast-2"
[claims.C2]
says = "two is less than one"
source = "nowhere"
test = "gap[fast-2] < gap[fast-1]"
reason = "the numbers are what they are"
reason_test = "val_loss[fast-2] > 1"
[claims.C3]
says = "a child is worse"
source = "nowhere"
test = "val_loss[child] > 3"
report = true
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in, with the script and the experiment fast.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "fast.toml").write_text(FAST.replace("SCRIPT", str(tmp_path / "script.py")))
    return tmp_path


def main(*words, status=0):
    assert experiment.main([str(word) for word in words]) == status


def ran(here):
    return (here / "runs/fast/cpu/ran.txt").read_text().split()


def rows_of(folder):
    return {(row["arm"], row["seed"]): row for row in read_table(folder / "runs.csv")}


# --- running ---

def test_a_failed_arm_takes_only_its_children_down(here, capsys):
    main("fast.toml", "--jobs", 2, status=1)
    text = capsys.readouterr().err
    assert "bad-0: failed: is broken here (runs/fast/cpu/bad-0/errors.txt)" in text
    assert "child-2: skipped" in text
    rows = rows_of(here / "results/fast/cpu")
    assert sorted(rows) == sorted((f"fast-{n}", seed) for n in (1, 2) for seed in range(3))
    assert rows["fast-2", 1] | dict(val_loss=2.1, gap=2.1, n=2, size="cpu") == rows["fast-2", 1]
    verdict = (here / "results/fast/cpu/verdict.md").read_text()
    assert "bad-1: failed" in verdict
    assert "| C3 | a child is worse | **not measured (child has no val_loss)**" in verdict

    (here / "mended").write_text("")
    before = ran(here)
    main("fast.toml", "--jobs", 2)
    assert sorted(ran(here)[len(before):]) == sorted(
        f"{arm}-{seed}" for arm in ("bad", "child") for seed in range(3))
    assert "6 of 12 runs are done already" in capsys.readouterr().err
    verdict = (here / "results/fast/cpu/verdict.md").read_text()
    for line in ("## C1\n\n**held**\n", "## C2\n\n**did not hold**\n",
                 "## C3\n\n**held**, reported only\n",
                 "`val_loss[fast-1] < val_loss[fast-2]`: difference -1 in all of 3 seeds: held.",
                 "- Why: the numbers are what they are: the runs bear it out.",
                 "(arithmetic, table 1)",
                 f"python {here}/script.py runs/fast/cpu/child-0 4"):
        assert line in verdict, line
    assert (here / "results/fast/cpu/figure.png").read_bytes()[1:4] == b"PNG"
    main("fast.toml")
    # the three bad ones ran twice
    assert len(ran(here)) == 12 + 3


def test_a_changed_arm_runs_again_with_its_children_only(here, capsys):
    (here / "mended").write_text("")
    main("fast.toml", "--seeds", 1)
    path, before = here / "fast.toml", len(ran(here))
    path.write_text(path.read_text().replace("{out} 9 bad", "{out} 8 bad"))
    main("fast.toml", "--seeds", 1)
    assert ran(here)[before:] == ["bad-0", "child-0"]
    assert "bad-0: runs again, changed: make" in capsys.readouterr().err
    assert rows_of(here / "results/fast/cpu")["bad", 0]["val_loss"] == 8
    path.write_text(path.read_text().replace("seeds = 3", 'seeds = 3\nruns = "other"'))
    main("fast.toml", "--seeds", 1, "--only", "fast-2", "--out", here / "elsewhere")
    assert (here / "runs/other/cpu/ran.txt").read_text().split() == ["fast-2-0"]
    assert list(rows_of(here / "elsewhere/cpu")) == [("fast-2", 0)]


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


def test_recorded_rows_are_not_run_again(here, capsys):
    """Results travel with the repository, run folders do not."""
    (here / "mended").write_text("")
    main("fast.toml", "--seeds", 1)
    os.rename(here / "runs", here / "gone")
    before = contents(here / "results")
    capsys.readouterr()
    for words in [], ["--only", "child"]:
        main("fast.toml", "--seeds", 1, *words)
        assert capsys.readouterr() == ("nothing to run: results/fast/cpu/verdict.md\n", "")
    assert contents(here / "results") == before and not (here / "runs").exists()

    path = here / "fast.toml"                                       # one more arm: it alone runs
    alone = f'[arms.alone]\nmake = "{here}/script.py {{out}} 7"\n[metrics'
    path.write_text(path.read_text().replace("[metrics", alone))
    main("fast.toml", "--seeds", 1)
    assert ran(here) == ["alone-0"] and len(rows_of(here / "results/fast/cpu")) == 5

    # a changed child needs its parents' weights
    path.write_text(path.read_text().replace("{out} 4", "{out} 5"))
    main("fast.toml", "--seeds", 1, "--only", "alone")
    assert ran(here) == ["alone-0"]
    main("fast.toml", "--seeds", 1)
    assert sorted(ran(here)[1:]) == ["bad-0", "child-0", "fast-1-0", "fast-2-0"]
    assert rows_of(here / "results/fast/cpu")["child", 0]["val_loss"] == 5


def test_rows_of_other_settings_are_dropped(here):
    (here / "mended").write_text("")
    main("fast.toml", "--seeds", 1)
    os.rename(here / "runs", here / "gone")
    path = here / "fast.toml"
    path.write_text(path.read_text().replace("{out} 4", "{out} 5").replace("{n}.{seed}",
                                                                           "1{n}.{seed}"))
    main("fast.toml", "--seeds", 1, "--only", "fast-1")
    assert list(rows_of(here / "results/fast/cpu")) == [("fast-1", 0)]


# Written and registered, and not run, or not to the end. A file leaves this list with its rows.
TO_RUN = {"real_routing"}                           # reads models that a user downloads


def test_nothing_recorded_has_to_run_again(tmp_path, monkeypatch, capsys):
    """Every row of the results has the key that its arm has today, and no paper's experiment runs
    again what it has, be the text of this machine's Python what it is."""
    monkeypatch.chdir(tmp_path)                                     # where there are no run folders
    monkeypatch.setattr(jobs, "is_of_another_text", lambda arm, recorded: False)
    for path in sorted((ROOT / "configs/papers").glob("*.toml")):
        out = ROOT / "results" / path.stem
        before = contents(out)
        todo = Experiment(str(path), "cpu", out=out)
        keys = {(arm.name, arm.seed): arm.key for arm in todo.arms}
        rows = rows_of(out / "cpu")
        assert len(todo.recorded(todo.arms)) == len(rows), path
        assert {place: row["key"] for place, row in rows.items()} == {p: keys[p] for p in rows}
        assert (len(rows) < len(todo.arms)) == (path.stem in TO_RUN), path
        if path.stem not in TO_RUN:
            main(path, "--out", out)
            assert capsys.readouterr().out == f"nothing to run: {out}/cpu/verdict.md\n"
        assert contents(out) == before
    assert not list(tmp_path.iterdir())


def test_a_claim_may_ask_for_more_seeds_of_its_arms(here):
    path = here / "fast.toml"
    path.write_text(path.read_text() + """[claims.more]
says = "x"
source = "y"
test = "val_loss[child] < 9"
seeds = 4
""")
    # "child" comes from "bad" and "fast-2", "bad" from "fast-1"
    found = {arm.name for arm in Experiment(str(path), "cpu").arms if arm.seed == 3}
    assert found == {"child", "bad", "fast-2", "fast-1"}
    path.write_text(path.read_text().replace("val_loss[child] < 9", "val_loss[fast-2] < 9"))
    assert [arm.label for arm in Experiment(str(path), "cpu").arms if arm.seed == 3] == ["fast-2-3"]
    assert len(Experiment(str(path), "cpu", 2).arms) == 8
    # a computed column needs the arms of its formula
    text = path.read_text()
    path.write_text(text.replace("val_loss[fast-2] < 9", "gap[fast-2] < 9") + """
[metrics.fast-2]
gap = "val_loss[fast-2] - val_loss[fast-1]"
""")
    assert {arm.name for arm in Experiment(str(path), "cpu").arms if arm.seed == 3} == {"fast-1",
                                                                                       "fast-2"}
    path.write_text(text)
    # a claim that is none is told so, with seeds and without
    text = path.read_text()
    for broken in ('says = "x"', 'says = "x"\nseeds = 4', 'says = "x"\ntest = "child < 9"\nseeds = 4'):
        path.write_text(text + f"[claims.broken]\nsource = 'y'\n{broken}\n")
        with pytest.raises(ConfigError, match="broken"):
            Experiment(str(path), "cpu")


def test_an_arm_may_have_its_own_number_of_seeds(here, capsys):
    (here / "mended").write_text("")
    path = here / "fast.toml"
    text = path.read_text()
    before = {arm.label: arm.key for arm in Experiment(str(path), "cpu").arms}
    path.write_text(text.replace("[arms.child]", "[arms.child]\nseeds = 1"))
    after = {arm.label: arm.key for arm in Experiment(str(path), "cpu").arms}
    assert after == {label: key for label, key in before.items()
                     if label not in ("child-1", "child-2")}
    main("fast.toml", "--jobs", 2)
    assert [label for label in ran(here) if label.startswith("child")] == ["child-0"]
    assert "undecided (1 seed)" in (here / "results/fast/cpu/verdict.md").read_text()
    main("fast.toml")
    assert "nothing to run" in capsys.readouterr().out
    # who asks for so many seeds gets them of every arm
    assert len(Experiment(str(path), "cpu", 2).arms) == 8
    # a child needs the weights of its parents
    path.write_text(text.replace("[arms.bad]", "[arms.bad]\nseeds = 2"))
    main("fast.toml", status=2)
    assert "arm child has a seed 2 and comes from bad, which has 2" in capsys.readouterr().err
    path.write_text(text.replace("[arms.bad]", "[arms.bad]\nseeds = 0"))
    main("fast.toml", status=2)
    assert "[arms.bad]: seeds = 0 must be at least 1" in capsys.readouterr().err


def test_killed_without_warning_goes_on(here):
    path = here / "fast.toml"
    path.write_text(path.read_text().replace("{n}.{seed}", "{n}.{seed} slow"))
    (here / "mended").write_text("")
    process = subprocess.Popen([sys.executable, "-m", "lab.experiment", "fast.toml", "--jobs", "1",
                                "--seeds", "1"],
                               stderr=subprocess.DEVNULL, env=os.environ
                               | {"PYTHONPATH": str(ROOT)})
    assert happens(lambda: (here / "results/fast/cpu/runs.csv").exists())
    process.kill()
    process.wait()
    # what it had started ends by itself
    time.sleep(1)
    done = list(rows_of(here / "results/fast/cpu"))
    main("fast.toml", "--jobs", 2, "--seeds", 1)
    assert len(rows_of(here / "results/fast/cpu")) == 4
    assert all(ran(here).count(f"{arm}-{seed}") == 1 for arm, seed in done) and done


def happens(what, seconds=60):
    end = time.time() + seconds
    while not what() and time.time() < end:
        time.sleep(0.02)
    return what()


def test_list_and_replot_run_nothing(here, capsys):
    main("fast.toml", "--list")
    out = capsys.readouterr().out
    assert not (here / "runs").exists() and out.count("to do") == 12
    assert f"# child-2: to do\npython {here}/script.py runs/fast/cpu/child-2 4\n" in out
    main("fast.toml", "--replot", status=2)
    (here / "mended").write_text("")
    main("fast.toml", "--seeds", 1)
    folder = here / "results/fast/cpu"
    (folder / "runs.csv").write_text((folder / "runs.csv").read_text().replace("cpu,1,1,",
                                                                               "cpu,1,1.5,"))
    (folder / "figure.png").unlink()
    os.rename(here / "runs", here / "gone")
    main("fast.toml", "--replot")
    assert "| fast-1 | 1 | 1.5000 |" in (folder / "verdict.md").read_text()
    assert (folder / "figure.png").exists()


# --- training ---

REAL = """
seeds = 1
config = "{empty}"
evaluate = ["one", "two"]
[common]
data.name = "one"
data.dir = "{data}"
model = {{ n_layer = 1, n_head = 1, n_embd = 8, block_size = 8 }}
ffn = {{ d_ff = 8, n_expert = 4 }}
train = {{ batch_size = 4, warmup_steps = 2, eval_every = 1000, eval_batches = 2, device = "cpu" }}
[arms.first]
train.max_steps = 150
[arms.second]
from = "first"
data.name = ["one", "two"]
train.max_steps = 2
"""


@pytest.fixture
def corpora(here):
    for name, line in (("one", "def f(x): return x + 1\n"),
                       ("two", "all happy families are alike. ")):
        (here / name).write_text(line * 120)
        prepare([str(here / name)], out=here / "prepared", quiet=True)
    (here / "empty.toml").write_text("")
    (here / "real.toml").write_text(REAL.format(empty=here / "empty.toml", data=here / "prepared"))
    return here


def test_stopped_training_goes_on_to_the_same_result(corpora, capsys):
    first = corpora / "runs/real/cpu/first-0"

    def stop():
        happens(lambda: (first / "log.csv").exists()
                and (first / "log.csv").read_text().count("\n") > 5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    main("real.toml", "--jobs", 1, status=1)
    assert "stopped by SIGTERM; the same command goes on" in capsys.readouterr().err
    stopped_at = torch.load(first / "ckpt_last.pt", weights_only=True)
    assert 0 < json.loads(stopped_at["header"])["step"] < 150

    main("real.toml", "--jobs", 1, "--only", "first")
    rows = rows_of(corpora / "results/real/cpu")
    whole, second = Experiment("real.toml", "cpu").arms
    whole.folder = corpora / "whole"
    # undisturbed, to compare
    assert train.main(whole.arguments()[1:]) == 0
    row = evaluate(corpora / "whole", ["one", "two"])
    for name in ("val_loss", "val_loss_one", "val_loss_two", "max_expert_share", "unevenness",
                 "train_loss"):
        assert rows["first", 0][name] == pytest.approx(row[name], rel=1e-6), name
    with open(corpora / "whole/log.csv") as file:
        last = list(csv.DictReader(file))[-1]
        assert row["val_loss_one"] == pytest.approx(float(last["val_loss"]),
                                                    rel=1e-6)
    assert row["val_loss"] == pytest.approx((row["val_loss_one"] + row["val_loss_two"]) / 2)
    assert train.main(executable(second.arguments())[2:]) == 0
    after = evaluate(second.folder, ["one", "two"])
    assert after["val_loss_two"] < row["val_loss_two"]
    known = [dict(arm="second", seed=0, tokens=after["tokens"]), rows["first", 0]]
    assert Experiment("real.toml", "cpu").tokens_total(known[0], known) == 64 + 150 * 32
    points = [row for row in read_table(corpora / "results/real/cpu/curves.csv")
              if row["arm"] == "first"]
    assert 50 <= len(points) <= 100 and points[-1]["step"] == 150 and "val_loss" in points[0]
    path = read_table(corpora / "results/real/cpu/routing.csv")
    assert sum(row["share"] for row in path
               if row["arm"] == "first" and row["corpus"] == "two") == pytest.approx(1)

    arm = Experiment("real.toml", "cpu").arms[0]
    assert jobs.is_done(arm, jobs.read_record(arm))
    text = (corpora / "real.toml").read_text()
    (corpora / "real.toml").write_text(text.replace('evaluate = ["one", "two"]',
                                                    'evaluate = ["two"]'))
    # other corpora: trained, not evaluated
    arm = Experiment("real.toml", "cpu").arms[0]
    assert jobs.is_trained(arm, jobs.read_record(arm)) and not jobs.is_done(arm,
                                                                            jobs.read_record(arm))


def test_speed_and_memory_of_an_arm(corpora, capsys, monkeypatch):
    words = [*Experiment("real.toml", "cpu").arms[0].speed_arguments()[2:], "--steps", "2"]
    file = Path(words[words.index("--json") + 1])
    file.parent.mkdir(parents=True)
    assert speed.main(words) == 0
    found = json.loads(file.read_text())
    assert found["tokens_per_second"] > 0 and found["peak_mib"] > 50
    # as on Windows
    monkeypatch.setattr(speed, "resource", None)
    assert speed.main(words) == 0
    assert json.loads(file.read_text())["peak_mib"] is None
    assert "memory unknown" in capsys.readouterr().out


def test_two_runners_do_not_share_a_folder(here, capsys):
    from runtime.checkpoint import Lock
    with Lock(here / "runs/fast/cpu"):
        main("fast.toml", status=1)
    assert "another process is using" in capsys.readouterr().err
    assert not (here / "runs/fast/cpu/ran.txt").exists()


# --- what a file stands for ---

def arms_of(text, here, size="cpu", seeds=range(2)):
    (here / "x.toml").write_text(text)
    return expand(read_experiment(here / "x.toml"), here / "x.toml", size, seeds)


GRID = """
config = "configs/dense.toml"
[common]
train.max_steps = 7
model.n_embd = 32
[cpu]
train.max_steps = 6
[arms."moe-{n_expert}-{word}"]
grid = { ffn.n_expert = [4, 8], word = ["a", "b"] }
ffn.kind = "moe"
data.name = "/corpus/{word}"
column = { family = "moe" }
cpu.train.lr = 1e-3
gpu.grid = { ffn.n_expert = [64], word = ["a"] }
[arms.foreign]
ffn.kind = "moe"
ffn.n_expert = 2
train.seed = "1{seed}"
train.max_steps = 5
[arms.late]
from = ["moe-4-a", "foreign"]
ffn.balance_loss = 0.1
sizes = ["cpu"]
"""


def test_grid_settings_and_seeds(here):
    arms = {arm.label: arm for arm in arms_of(GRID, here)}
    assert list(arms)[:6] == ["moe-4-a-0", "moe-4-b-0", "moe-8-a-0", "moe-8-b-0", "foreign-0",
                              "late-0"]
    arm = arms["moe-8-b-1"]
    assert arm.columns == {"n_expert": 8, "word": "b", "family": "moe"} and arm.steps == 6
    assert arm.folder == Path("runs/x/cpu/moe-8-b-1") and arm.config == "configs/dense.toml"
    wanted = {"train.max_steps": "6", "model.n_embd": "32", "ffn.n_expert": "8",
              "data.name": "/corpus/b",
              "train.seed": "1", "data.seed": "1", "train.lr": "0.001", "train.keep": "last"}
    assert wanted.items() <= arm.settings.items() and "word" not in str(arm.settings)
    assert arms["foreign-1"].settings["train.seed"] == "11" and arms["foreign-1"].steps == 5
    # in grids of others
    assert arms["foreign-1"].columns == {"n_expert": 2} and not arms["late-1"].columns
    late = arms["late-1"]
    assert late.settings["train.init_from"] == "runs/x/cpu/moe-4-a-1"
    assert late.config == "configs/continue.toml"
    assert not any(key.startswith("model.") for key in late.settings)
    assert late.settings["ffn.balance_loss"] == "0.1"
    # its [train] goes on as before
    dense = load_config(ROOT / "configs/dense.toml")
    assert late.settings["train.batch_size"] == str(dense.train.batch_size)
    assert [arm.name for arm in arms_of(GRID, here, "gpu", [0])] == ["moe-64-a", "foreign"]
    assert [arm.label for arm in with_ancestors(list(arms.values()), ["late"], "")] == [
        "moe-4-a-0", "foreign-0", "late-0", "moe-4-a-1", "foreign-1", "late-1"]


def test_keys_change_with_what_is_learned_and_with_nothing_else(here):
    def keys(old="", new=""):
        return {arm.label: arm.key for arm in arms_of(GRID.replace(old, new) if old else GRID,
                                                      here)}

    whole = keys()
    assert len(set(whole.values())) == len(whole)
    changed = keys("grid = { ffn.n_expert = [4, 8]",
                   "ffn.top_k = 1\nffn.router = \"switch\"\ngrid = { ffn.n_expert = [4, 8]")
    assert {label for label in whole if whole[label] == changed[label]} == {"foreign-0",
                                                                            "foreign-1"}
    assert keys('family = "moe"', 'family = "other"') == whole
    assert keys("train.max_steps = 7", "train.max_steps = 7\ndata.dir = \"elsewhere\"") == whole


@pytest.mark.parametrize("old, new, words", [
    ("seeds = 3", "sedes = 3", ["unknown key sedes", "did you mean seeds?"]),
    ("seeds = 3", "seeds = \"3\"", ["seeds = \"3\" is not a whole number"]),
    ("[arms.bad]", "[arms.bad]\nmakes = \"x\"", ["[arms.bad]", "did you mean make?"]),
    ("[arms.bad]", "[arms.bad]\nffn.n_expert = 4", ["arm bad", "takes no settings (ffn.n_expert)"]),
    ("[arms.child]", "[arms.other]\nffn.n_exprt = 4\n[arms.child]",
     ["arm other", "ffn.n_exprt", "did you mean ffn.n_expert?"]),
    ("[arms.child]", "[arms.other]\nffn.top_k = 99\n[arms.child]", ["arm other", "ffn.top_k = 99"]),
    ("[arms.child]", "[arms.other]\nconfig = \"configs/quik.toml\"\n[arms.child]",
     ["no config file", "configs/quick.toml"]),
    ("[arms.child]", "[arms.other]\nfrom = \"bad\"\nmodel.n_layer = 3\n[arms.child]",
     ["model.n_layer comes from bad"]),
    ("from = \"fast-1\"", "from = \"fast-3\"",
     ["bad comes from fast-3, which does not exist", "did you mean fast-"]),
    ("from = \"fast-1\"", "from = \"child\"",
     ["the arms bad, child come from one another in a circle"]),
    ("[arms.\"fast-{n}\"]", "[arms.\"fast-{m}\"]", ["has no m to fill in"]),
    ("[arms.\"fast-{n}\"]", "[arms.fast]", ["two arms are called fast"]),
    ("fast-1 < fast-2", "fast-1 < fast-7", ["[claims.C1]", "there is no arm fast-7",
                                            "did you mean fast-"]),
    ("val_loss: fast-1 < fast-2", "val_loss[fast-1]", ["compares nothing"]),
    ("val_loss: fast-1 < fast-2", "val_loss[fast-*] < 1", ["a * stands for several arms"]),
    ("val_loss: fast-1 < fast-2", "__import__('os').remove('x') < 1",
     ["[claims.C1]", "neither column[arm]"]),
    ("val_loss: fast-1 < fast-2", "val_loss[fast-1] < = 2", ["no inequality"]),
    ("reason_test = \"val_loss[fast-2] > 1\"", "", ["a reason needs a reason_test"]),
    ("source = \"nowhere\"\ntest = \"val_loss[child] > 3\"", "test = \"val_loss[child] > 3\"",
     ["[claims.C3]: source is missing"]),
    ("kind = \"bars\"", "kind = \"bras\"", ["[[panel]] 1", "did you mean bars?"]),
    ("kind = \"bars\"", "kind = \"scatter\"", ["scatter needs x"]),
    ("y = \"val_loss\"", "y = \"val_loss\"\narms = [\"fats-*\"]", ["there is no arm fats-*"]),
    ("gap = \"val_loss_one[fast-{n}]", "gap = \"val_loss_one[fats-{n}]",
     ["gap of fast-1: there is no arm fats-1"]),
    ("[claims.C1]", "[claims.C1", ["not valid TOML"]),
])
def test_a_malformed_file_is_one_clear_line(old, new, words, here, capsys):
    path = here / "fast.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    main("fast.toml", status=2)
    error = capsys.readouterr().err
    assert error.startswith("error: fast.toml") and error.count("\n") == 1
    for word in words:
        assert word in error, error
    assert not (here / "runs").exists()


def test_options_that_make_no_sense(here, capsys):
    for words, text in ((["fats.toml"], "did you mean fast.toml?"),
                        (["fast.toml", "--seeds", 0], "at least 1"),
                        (["fast.toml", "--only", "chidl"], "did you mean child?"),
                        (["fast.toml", "--jbos", 1], "--jobs")):
        main(*words, status=2)
        assert text in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs/papers").glob("*.toml")),
                         ids=lambda path: path.stem)
def test_the_papers_experiments_are_well_formed(path):
    for size in ("cpu", "gpu"):
        assert len(Experiment(str(path), size).seeds) >= 3


# --- verdicts ---

def table(**columns):
    """A Table of val_loss by arm: a=[loss of seed 0, of seed 1, ...]."""
    return Table([dict(arm=arm, seed=seed, val_loss=v, other=10 * v)
                  for arm, values in columns.items()
                  for seed, v in enumerate(values)])


def test_verdict_by_hand():
    """Differences -.3, -.1, -.2: mean -.2, standard error .1 / sqrt 3, t = -3.46; with 2 degrees of
    freedom p = .0742 and the critical t is 4.303. With a fourth seed at -.2, p = .0163."""
    t = table(a=[1.0, 2.0, 3.0], b=[1.3, 2.1, 3.2])
    (pair,), verdict = judge("val_loss[a] < val_loss[b]", t)
    assert verdict == FOR and pair.text == "val_loss[a] < val_loss[b]" and pair.n == 3
    assert pair.mean == pytest.approx(-0.2) and pair.error == pytest.approx(0.1 / math.sqrt(3))
    assert (pair.t, pair.p) == pytest.approx((-math.sqrt(12), 0.0741799))
    assert (pair.low, pair.high) == pytest.approx((-0.2 - 0.248414, -0.2 + 0.248414), abs=1e-5)
    assert pair.differences == pytest.approx({0: -0.3, 1: -0.1, 2: -0.2})
    assert judge("val_loss[a] > val_loss[b]", t)[1] == AGAINST
    t = table(a=[1.0, 2.0, 3.0, 4.0], b=[1.3, 2.1, 3.2, 4.2])
    assert judge("val_loss: a < b", t)[1] == HELD
    assert judge("val_loss[a] > val_loss[b]", t)[1] == NOT
    # -0.05 +- 0.041, of four seeds
    assert judge("val_loss[a] < val_loss[b] - 0.15", t)[1] == "undecided"
    assert judge("other[b] - other[a] > 0.9", t)[1] == FOR
    assert judge("val_loss[a] == val_loss[b]", t)[1] == NOT
    assert judge("val_loss[a] < val_loss[b]", table(a=[1, 2], b=[2, 3]))[1] == "undecided (2 seeds)"
    assert judge("val_loss[a] < val_loss[b]",
                 table(a=[1.0, 1.0, 1.0, 0.0], b=[1.1, 1.3, 1.2]))[0][0].n == 3
    # too noisy to differ, and too noisy to be shown equal
    assert judge("val_loss[a] == val_loss[b]",
                 table(a=[1, 2, 3], b=[1.1, 1.9, 3.05]))[1] == "undecided"
    assert judge("val_loss[a] == val_loss[b]",
                 table(a=[1, 2, 3], b=[1.001, 1.999, 3.0005]))[1] == HELD
    assert judge("val_loss[a] < val_loss[b]",
                 table(a=[1, 2, 3], b=[1.1, 1.9, 3.05]))[1] == "undecided"
    # one seed's doing
    assert judge("val_loss[a] < val_loss[b]",
                 table(a=[1, 1, 1], b=[1.01, 1.01, 9]))[1] == "undecided"


def test_chains_lists_and_arithmetic():
    t = table(**{"x-1": [1, 2, 3], "x-2": [2, 3.1, 4], "x-3": [1.5, 2.5, 3.5]})
    pairs, verdict = judge("val_loss: x-1 < x-2 < x-3", t)
    assert [pair.verdict for pair in pairs] == [HELD, NOT] and verdict == NOT
    assert judge(["val_loss: x-1 < x-2", "val_loss: x-3 < x-2"], t)[1] == HELD
    assert judge("max(val_loss[x-*]) - min(val_loss[x-*]) > 0.9", t)[0][0].mean == pytest.approx(
        (0.1 + 0.2 + 0.1) / 3)
    assert judge("mean(val_loss[x-1], val_loss[x-2]) == val_loss[x-3]",
                 t)[0][0].mean == pytest.approx(
        0.05 / 3)
    assert judge("-2 * abs(val_loss[x-1] - val_loss[x-2]) / 4 < log(2.0)", t)[1] == HELD
    assert judge("val_loss[nobody] < 1", t)[1] == "not measured (nobody has no val_loss)"
    assert "did you mean val_loss" in judge("val_los[x-1] < 1", t)[1]


@pytest.mark.parametrize("law", ["clark", "krajewski"])
def test_a_law_without_runs_has_no_verdict(law):
    claim = dict(fit=law, arms=["law-*"], test="c > 0")
    (line,), verdict = judge_fit(claim, [dict(arm="dense", seed=0, val_loss=1.0)])
    assert line.startswith("- Measured: no fit: ") and verdict == "undecided (no fit)"


def test_a_pattern_stands_for_the_same_arms_in_every_seed():
    """A seed in which one of them is missing has no difference, or the span of one arm would be 0."""
    t = table(**{"x-1": [1, 2, 3, 4], "x-2": [2, 3.1, 4]})
    pair = judge("max(val_loss[x-*]) - min(val_loss[x-*]) > 0.9", t)[0][0]
    assert pair.differences == pytest.approx({0: 0.1, 1: 0.2, 2: 0.1})


def test_reach_is_interpolated_between_evaluations():
    rows = [dict(arm="slow", seed=s, val_loss=2.0) for s in range(3)] + [
        dict(arm="fast", seed=s, val_loss=1.5) for s in range(3)]
    curves = [dict(arm="fast", seed=s, step=step, val_loss=loss) for s in range(3)
              for step, loss in ((0, 5.0), (100, 2.5), (150, None), (200, 1.5), (400, 1.0))]
    t = Table(rows, curves)
    assert t.reach("fast", "slow", 0) == pytest.approx(150 / 400)
    assert judge("reach(fast, slow) < 0.7", t)[1] == HELD
    t.rows["slow", 0]["val_loss"] = t.rows["slow", 1]["val_loss"] = t.rows["slow",
                                                                           2]["val_loss"] = 0.5
    assert judge("reach(fast, slow) < 0.7", t)[1] == NOT                        # never reached


def test_derived_columns():
    rows = [dict(arm=f"{phase}-kl", seed=0, val_loss_one=loss)
            for phase, loss in (("p1", 1.0), ("p2", 1.4))]
    derive({"p2-{m}": {"forgetting": "val_loss_one[p2-{m}] - val_loss_one[p1-{m}]"}}, rows, [],
           "x.toml")
    assert rows[1]["forgetting"] == pytest.approx(0.4) and "forgetting" not in rows[0]


def test_claims_may_come_from_any_size():
    claims = {"claims": {"A": dict(says="x", source="y", test="val_loss[big] < 1")}}
    assert read_claims(claims, {"big"}, "x.toml")
    claim = claims["claims"]["A"]
    assert concerns(claim, "gpu", {"big"}) and not concerns(claim, "cpu", {"small"})
    assert not concerns(claim | dict(sizes=["cpu"]), "gpu", {"big"})
    with pytest.raises(ConfigError, match="no arm big"):
        read_claims(claims, {"small"}, "x.toml")


def test_claims_about_a_fit():
    """gamma spreads over 0.4 to 0.6, alpha over -0.1 to 0.3; the runs say nothing about c."""
    spread = np.linspace(-1, 1, 201)[:, None]
    law = Krajewski(18.0, 0.1, 30.0, 0.15, 2.1, 0.5, 0.47)
    bootstrap = Krajewski(*(np.full((201, 1), v) for v in law))._replace(
        gamma=0.5 + 0.1 * spread, alpha=0.1 + 0.2 * spread)
    fit = SimpleNamespace(law=law, bootstrap=bootstrap,
                          identified=dict.fromkeys(law._fields, True) | {"c": False},
                          rmse=0.01, held_out=0.02, held_out_without=0.05)
    for test, verdict in (("gamma > 0", HELD), ("gamma < 0.3", NOT), ("gamma > 0.5", "undecided"),
                          ("alpha > 0", "undecided"), ("gamma - 0.3 > 0", HELD),
                          ("held_out < 0.03", HELD),
                          ("held_out < 0.3 * held_out_without", NOT),
                          ("c > 0", "undecided (these runs do not identify c)")):
        assert judge_law(test, "krajewski", fit)[2] == verdict, test
    low, high, _ = judge_law("gamma > 0", "krajewski", fit)
    assert (low, high) == pytest.approx((0.405, 0.595))
    for test, text in (("gama > 0", "did you mean gamma?"), ("gamma", "no inequality"),
                       ("gamma > f(1)", "unknown f")):
        with pytest.raises(ConfigError, match=re.escape(text)):
            read_claims({"claims": {"K": dict(says="x", source="y", test=test, fit="krajewski")}},
                        set(),
                        "x.toml")


# --- measuring and drawing ---

def test_use_of_experts_and_routing_by_hand():
    loads = {1: {"one": torch.tensor([6.0, 2.0, 0.0]), "two": torch.tensor([2.0, 6.0, 0.0])}}
    row = use_of_experts(loads)
    assert (row["max_expert_share"], row["min_expert_share"]) == (0.5, 0)
    assert row["experts_used"] == pytest.approx(2 / 3)
    assert row["unevenness"] == pytest.approx(math.log(3) - math.log(2))
    row = routing(loads, ["one", "two"])
    assert row["diagonal"] == pytest.approx(0.5) and row["routing"][0] == [1, "one",
                                                                           [0.75, 0.25, 0.0]]
    assert row["specialisation"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert routing({1: dict(reversed(loads[1].items()))},
                   ["two", "one"])["diagonal"] == pytest.approx(-0.5)


def test_curves_are_thinned_but_keep_evaluations(tmp_path):
    lines = ["step,tokens,seconds,loss,val_loss"]
    lines += [f"{s},{10 * s},{s / 2},{1000 - s},{s if s in (0, 333, 1000) else ''}"
              for s in range(1001)]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n77,cut off")
    rows = thin(tmp_path / "log.csv")
    assert len(rows) == 51 and rows[-1]["step"] == 1000 and rows[-1]["tokens"] == 10000
    assert [(row["step"], row["val_loss"]) for row in rows if row["val_loss"] is not None] == [
        (0, 0), (333, 333), (1000, 1000)]
    # a mean, without a lag
    assert rows[20]["loss"] == pytest.approx(1000 - rows[20]["step"])


# --- the page of all results ---

def test_the_page_of_results_is_what_its_command_writes(tmp_path, capsys):
    results = ROOT / "results"
    assert (results / "README.md").read_text() == overview.page(results)
    for folder in [results, *(path for path in results.rglob("*") if path.is_dir())]:
        (tmp_path / "copy" / folder.relative_to(results)).mkdir(parents=True)
    for path in [*results.glob("*.json"), *results.glob("*.csv"), *results.rglob("verdict.md"),
                 *results.glob("gpu/*/README.md")]:
        (tmp_path / "copy" / path.relative_to(results)).write_text(path.read_text())
    assert overview.main(["--results", str(tmp_path / "copy")]) == 0
    first, short = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}/copy/README.md"
    # what README.md says of the verdicts, in whatever lines
    assert short in " ".join((ROOT / "README.md").read_text().split())
    assert (tmp_path / "copy/README.md").read_text() == (results / "README.md").read_text()


def test_the_page_of_results_has_every_claim_and_only_links_that_lead_somewhere():
    results, text = ROOT / "results", (ROOT / "results/README.md").read_text()
    for path in results.rglob("verdict.md"):
        headings = re.findall(r"^## (\S+)\n\n(\*\*.*)$", path.read_text(), re.MULTILINE)
        folder = path.parent.relative_to(results).as_posix()
        for key, verdict in headings:
            assert f"| [{key}]({folder}/verdict.md#{key.lower()}) | {verdict} | " in text
        assert text.count(f"| [{headings[0][0]}]({folder}/verdict.md#") == 1
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (results / link).exists(), link
