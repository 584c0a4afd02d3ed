"""What users and machines do to a run: kills, full disks, folders that cannot be written, files that are not
what they should be, settings at random. tests.torture does the same for as long as asked."""
import ast
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torture.configs import check_config
from torture.home import ROOT, Home, call
from torture.inputs import CASES

import sample
import train
from data import prepare as preparing
from grow import btx, lifelong
from lab import experiment, plots
from lab.papers import evaluate
from runtime import checkpoint, report

POSIX = pytest.mark.skipif(os.name != "posix", reason="for systems with a POSIX shell")
ROOT_ALONE = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0,
                                reason="only root can become another user")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("holds") / "home")
    home.build()
    return home


def refused(result, *words):
    """The line in which a program refused, which holds these words."""
    said = result.refusal()
    assert said and all(word in said for word in words), (result.status, result.err)
    return said


# --- at random ---

@settings(max_examples=36, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_a_config_that_is_accepted_works_and_one_that_is_refused_names_its_key(rng, home, tmp_path_factory):
    how, problem, line = check_config(rng, home, tmp_path_factory.getbasetemp() / "random")
    assert not problem, f"{problem}\n  train.py {line}"


@pytest.mark.parametrize("case", CASES)
def test_bad_files_end_in_one_line_that_names_them(case, home, tmp_path):
    counts = {}
    for seed in range(12):
        folder = tmp_path / str(seed)
        folder.mkdir()
        kind, how, problem = CASES[case](random.Random(seed), home, folder)
        assert not problem, f"seed {seed}: {problem}"
        counts[how] = counts.get(how, 0) + 1
    assert counts["refused"] >= 3


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path):
    """In a process of its own, which can fork: this one may have threads."""
    program = [sys.executable, "-m", "tests.torture", "--only", "training", "--trial", "0"]
    program += ["--minutes", "0.1", "--json", tmp_path / "found.json"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    found = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 0 and not found["losses"], done.stdout
    assert found["counts"]["SIGKILLs survived by one run"] >= 3


# --- disks ---

@contextlib.contextmanager
def small_disk(folder, mib, read_only=False):
    """A folder on a disk of its own; skips where that is not permitted."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small disk is not permitted here")
    except OSError:
        pytest.skip("this system has no mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave=0):
    """Takes all room on a disk but for `leave` bytes."""
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    size = (folder / "filler").stat().st_size
    os.truncate(folder / "filler", max(0, size - leave))


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_old_one(home, tmp_path):
    with small_disk(tmp_path / "disk", 4) as disk:
        assert home.train(disk / "run", {}).status == 0
        before = (disk / "run" / checkpoint.LAST).read_bytes()
        fill(disk, 20_000)                                  # enough for the log
        result = call(train.main, "--out", disk / "run", "--resume", "--quiet", "--train.max_steps", "5",
                      "--train.keep", "last")
        assert result.status == 1
        said = refused(result, "disk is full", "ckpt_new.pt")
        assert float(re.search(r"needs at least ([\d.]+) MB", said)[1]) >= 0.9 * len(before) / 1e6
        assert (disk / "run" / checkpoint.LAST).read_bytes() == before and not list((disk / "run").glob(".ckpt*"))
        (disk / "filler").unlink()
        assert call(train.main, "--out", disk / "run", "--resume", "--quiet").status == 0


def test_a_log_that_does_not_fit_on_the_disk_stops_the_run_with_what_is_needed(home, tmp_path):
    with small_disk(tmp_path / "disk", 4) as disk:
        assert home.train(disk / "run", {}).status == 0
        fill(disk, 20_000)
        result = call(train.main, "--out", disk / "run", "--resume", "--quiet", "--train.max_steps", "5000",
                      "--train.eval_every", "0")
        said = refused(result, "log.csv", "disk is full")
        assert result.status == 1 and float(re.search(r"needs at least ([\d.]+) MB", said)[1]) > 0.2
        assert checkpoint.load(disk / "run" / checkpoint.LAST).header["step"] == 2


def test_data_that_does_not_fit_on_the_disk_leaves_the_old(tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        text = tmp_path / "text.txt"
        text.write_text("some text\n" * 1000)
        assert call(preparing.main, text, "--out", disk).status == 0
        before = {path.name: path.read_bytes() for path in (disk / "text-byte").iterdir()}
        text.write_text("other text\n" * 300_000)
        said = refused(call(preparing.main, text, "--out", disk), "disk is full", "train.bin")
        assert float(re.search(r"needs at least ([\d.]+) MB", said)[1]) > 2.9
        assert {path.name: path.read_bytes() for path in (disk / "text-byte").iterdir()} == before


def test_folders_that_cannot_be_written_are_one_line_and_what_only_reads_works(home, tmp_path):
    with small_disk(tmp_path / "disk", 4) as disk:
        assert home.train(disk / "run", {}).status == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        resumed = call(train.main, "--out", disk / "run", "--resume", "--quiet", "--train.max_steps", "5")
        assert "Read-only" in refused(resumed, str(disk / "run"), "--out") and resumed.status == 1
        assert "--out" in refused(home.train(disk / "new", {}), str(disk / "new"))
        prepared = call(preparing.main, home.folder / "one.txt", "--out", disk / "data")
        assert "--out" in refused(prepared, str(disk))
        expand = call(lifelong.main, "expand", home.folder / "moe", "--add", "1", "--out", disk / "grown")
        refused(expand, str(disk / "grown"))
        refused(call(evaluate.main, disk / "run"), "evaluation.json")
        refused(call(plots.main, disk / "run"), "loss.png")
        assert call(sample.main, disk / "run", "--tokens", 3).status == 0


@ROOT_ALONE
def test_another_users_folder_is_one_line(home, tmp_path):
    """As user nobody, who reads but does not write."""
    code = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from runtime import checkpoint; os.setuid(65534)\n"
            "try: checkpoint.Lock('/').__enter__()\n"
            "except checkpoint.CheckpointError as e: print(e)")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Permission denied" in said.stdout and "--out" in said.stdout, said.stderr


AS_NOBODY = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import sample, train
from torture.home import call
os.chdir({folder!r})
run, new = "locked/run", "open/new"
common = ["empty.toml", "--quiet", "--train.max_steps", "1", "--data.dir", "open/data", "--data.name", "one.txt"]
call(train.main, *common, "--out", "open/warm")                         # while Python may read its own folder
os.setuid(65534)
for main, *argv in [
        (sample.main, run), (train.main, *common, "--out", new, "--train.init_from", run),
        (train.main, *common, "--out", new, "--lifelong.distill", "1", "--lifelong.teacher", run),
        (train.main, *common, "--out", run), (train.main, *common, "--out", run, "--overwrite"),
        (train.main, "--out", run, "--resume"), (train.main, run + "/config.toml", "--out", new),
        (sample.main, "mute"), (train.main, *common, "--out", new, "--train.init_from", "mute"),
        (train.main, "--out", "mute", "--resume")]:
    result = call(main, *argv)
    print(result.status, result.out.strip() + result.err.strip().replace(chr(10), " | "))
"""


@ROOT_ALONE
def test_what_a_user_may_not_read_is_one_line_that_says_so(home):
    """As user nobody: a folder that is locked, and a folder whose checkpoints cannot be read."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(home.folder / "moe", folder / "locked" / "run")
        mute = shutil.copytree(home.folder / "moe", folder / "mute")
        for path in mute.glob("ckpt_*"):
            path.chmod(0)
        (folder / "open").mkdir()
        for path in (mute, mute / "run.lock", folder / "open"):
            path.chmod(0o777)
        (folder / "locked").chmod(0)
        (folder / "empty.toml").write_text("")
        shutil.copy(home.folder / "one.txt", folder)
        code = AS_NOBODY.format(root=str(ROOT), folder=name)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        lines = done.stdout.splitlines()
        assert len(lines) == 10 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        for line in lines:
            assert re.match(r"[12] error: .*(locked|mute).*Permission denied", line), line
            assert " | " not in line and "not a checkpoint" not in line, line


def test_a_folder_in_the_place_of_a_file_and_a_missing_folder(home, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "--out" in refused(home.train(tmp_path / "file" / "run", {}), "file")
    none, made = tmp_path / "none", tmp_path / "made"
    for program, *argv in [(sample.main, none), (evaluate.main, none), (plots.main, none),
                           (lifelong.main, "expand", none, "--add", 1, "--out", made),
                           (btx.main, "upcycle", none, "--out", made)]:
        refused(call(program, *argv), "none", "no such")


# --- runs that were changed, or died early ---

def test_settings_changed_in_the_folder_are_applied_or_refused_by_name(home, tmp_path):
    """config.toml is the user's to edit; the checkpoint knows what was trained."""
    assert home.train(tmp_path / "run", {}).status == 0
    path, resume = tmp_path / "run" / "config.toml", ["--out", tmp_path / "run", "--resume", "--quiet"]
    good = path.read_text()
    path.write_text(good.replace("max_steps = 2", "max_steps = 3"))
    result = call(train.main, *resume)
    assert result.status == 0 and "train.max_steps = 3 (was 2)" in result.out
    for key, old, new in ("n_layer", "2", "3"), ("lr", "0.003", "0.1"), ("n_expert", "4", "8"):
        assert f"\n{key} = {old}" in good
        path.write_text(good.replace(f"\n{key} = {old}", f"\n{key} = {new}"))
        refused(call(train.main, *resume), "config.toml", f"{key} = {new}", f"with {old}", "start a new run")


def test_a_run_goes_on_with_its_own_tokens_whatever_became_of_the_text(home, tmp_path):
    text, resume = tmp_path / "own.txt", [
        "--out", tmp_path / "run", "--resume", "--quiet", "--train.max_steps"]
    text.write_text("one text of many words " * 100)
    settings = {"data.name": text, "data.dir": tmp_path / "prepared"}
    assert home.train(tmp_path / "run", settings).status == 0
    assert call(train.main, *resume, 3).status == 0
    text.write_text("another text of many words " * 100)
    changed = call(train.main, *resume, 4)
    assert changed.status == 0 and "a new run reads the text of now" in changed.err
    text.unlink()
    assert call(train.main, *resume, 5).status == 0
    for folder in (tmp_path / "prepared").iterdir():
        if folder.is_dir():
            (folder / "train.bin").unlink()
    refused(call(train.main, *resume, 6), "own.txt")


def test_checkpoints_of_other_code_say_what_differs(home, tmp_path):
    header, model, optimizer = checkpoint.load(home.folder / "moe" / checkpoint.LAST)
    other = json.loads(json.dumps(header))
    other["config"]["ffn"]["n_experts"] = other["config"]["ffn"].pop("n_expert")
    checkpoint.save(tmp_path / "renamed.pt", other, model)
    with pytest.raises(checkpoint.CheckpointError, match=r"renamed.pt: .*ffn.n_experts.*did you mean ffn.n_expert\?"):
        checkpoint.load(tmp_path / "renamed.pt")
    newer = dict(header=json.dumps(header | {"format": 7}), model=model, optimizer={})
    torch.save(newer, tmp_path / "newer.pt")
    with pytest.raises(checkpoint.CheckpointError, match="newer.pt: has format 7, this code reads format 1"):
        checkpoint.load(tmp_path / "newer.pt")
    for part in ("step", "config", "tokenizer", "ancestry"):
        without = {k: v for k, v in header.items() if k != part}
        checkpoint.save(tmp_path / "part.pt", without, model)
        with pytest.raises(checkpoint.CheckpointError, match="part.pt: not a checkpoint of this program"):
            checkpoint.load(tmp_path / "part.pt")


def test_a_run_killed_before_its_first_checkpoint_says_how_to_go_on(home, tmp_path):
    run = tmp_path / "run"
    assert home.train(run, {}).status == 0
    (run / checkpoint.LAST).unlink()
    assert not (run / checkpoint.PREVIOUS).exists()
    refused(call(train.main, "--out", run, "--resume", "--quiet"), "ckpt_best.pt alone", "--overwrite")
    assert home.train(run, {}, "--overwrite").status == 0
    for path in run.glob("ckpt_*"):
        path.unlink()
    assert home.train(run, {}).status == 0                  # a log alone is no run


def test_a_log_that_is_empty_or_cut_goes_on_and_another_one_is_refused(home, tmp_path):
    run, resume = tmp_path / "run", ["--out", tmp_path / "run", "--resume", "--quiet", "--train.max_steps"]
    assert home.train(run, {}).status == 0
    whole = (run / "log.csv").read_bytes()
    head = whole.split(b"\r\n")[0] + b"\r\n"
    for steps, content, expected in [(3, b"", 1), (4, head[:20], 1), (5, head + b"1,64,0.1\r\n", 1),
                                     (6, whole + b"3,19", 4)]:
        (run / "log.csv").write_bytes(content)
        assert call(train.main, *resume, steps).status == 0
        lines = (run / "log.csv").read_bytes().split(b"\r\n")
        assert lines[0] + b"\r\n" == head and len(lines) - 2 == expected
        assert lines[-2].startswith(b"%d," % steps)
    (run / "log.csv").write_bytes(b"a,b\r\n1,2\r\n")
    refused(call(train.main, *resume, 7), "log.csv", "move it away")
    assert (run / "log.csv").read_bytes() == b"a,b\r\n1,2\r\n"


@pytest.mark.parametrize("touch", [
    lambda log: log.replace(b"\r\n", b"\n"), lambda log: log.replace(b"\r\n", b"\r"), lambda log: log.rstrip(b"\r\n"),
    lambda log: b"\xef\xbb\xbf" + log, lambda log: re.sub(rb"(^|,)([^,\r\n]+)", rb'\1"\2"', log, flags=re.M),
    lambda log: log.replace(b"\r\n", b"\r\n\r\n"), lambda log: log.replace(b"\r\n", b"\n").rstrip(b"\n"), lambda log: log],
    ids=["lf", "cr", "no end", "mark", "quotes", "empty lines", "lf, no end", "as it was"])
def test_a_log_that_an_editor_has_touched_is_read_as_what_it_is(touch, tmp_path, capsys):
    path, many = tmp_path / "log.csv", " ".join(["8"] * 100_000)            # more than csv takes for a field
    rows = [["step", "loss", "expert_load"], ["1", "0.5", ""], ["2", "0.25", many], ["3", "0.125", "x"]]
    log = "".join(",".join(row) + "\r\n" for row in rows).encode()
    if touch(log) != log and b'"' in touch(log):
        log = log.replace(many.encode(), b"8 8")
    path.write_bytes(touch(log))
    assert report.cut_log(path, 3, ["step", "loss", "expert_load"]) == rows[0]
    assert path.read_bytes() == log and capsys.readouterr().err == ""
    path.write_bytes(touch(log))
    assert report.cut_log(path, 1, ["step", "loss", "lr", "expert_load"]) == ["step", "loss", "expert_load", "lr"]
    assert path.read_bytes() == b"step,loss,expert_load,lr\r\n1,0.5,,\r\n"


def test_lines_of_a_log_that_are_no_rows_are_told(tmp_path, capsys):
    path = tmp_path / "log.csv"
    path.write_bytes(b"step,loss\n<<<<<<< HEAD\n1,0.5\n=======\n1;0.5\n2,0.25\n")
    report.cut_log(path, 2, ["step", "loss"])
    assert path.read_bytes() == b"step,loss\r\n1,0.5\r\n2,0.25\r\n"
    assert "3 lines are no rows of the log and were left out, the first is line 2" in capsys.readouterr().err
    path.write_bytes(b"step;loss\n1;0,5\n")
    with pytest.raises(checkpoint.CheckpointError, match="its first column is not `step`"):
        report.cut_log(path, 2, ["step", "loss"])
    assert path.read_bytes() == b"step;loss\n1;0,5\n"


@pytest.mark.parametrize("program, argv, where", [
    (train, [], "runtime.start.prepared"),
    (lifelong, ["expand", "x", "--add", "1", "--out", "y"], "grow.lifelong.expand"),
    (evaluate, ["x"], "lab.papers.evaluate.evaluate"), (plots, ["x"], "lab.plots.open_run"),
    (experiment, ["x.toml"], "lab.experiment.Experiment")])
def test_ctrl_c_is_one_line_wherever_it_comes(program, argv, where, home, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    argv = home.command(tmp_path / "run", {}) if program is train else argv
    result = call(program.main, *argv)
    assert (result.status, result.err.strip()) == (130, "interrupted")


def test_a_text_one_token_short_of_a_window(home, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 100)          # 90 to train on, 10 to validate
    wanted = {"data.dir": tmp_path, "data.name": tmp_path / "short.txt"}
    assert home.train(tmp_path / "fits", wanted | {"model.block_size": 9}).status == 0
    refused(home.train(tmp_path / "not", wanted | {"model.block_size": 10}), "val.bin", "model.block_size")


# --- how programs are started, and what they say where nobody can hear it ---

def shell(tmp_path, name, text, **env):
    """Starts a line of the shell in tmp_path; its stdout and stderr go into files."""
    with open(tmp_path / f"{name}.out", "w") as out, open(tmp_path / f"{name}.err", "w") as err:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | env
        return subprocess.Popen(["sh", "-c", text], cwd=tmp_path, stdout=out, stderr=err, env=env)


def said(tmp_path, name):
    return (tmp_path / f"{name}.out").read_text(), (tmp_path / f"{name}.err").read_text()


@POSIX
def test_streams_that_cannot_be_written_end_no_training(home, tmp_path):
    """Full, closed, left by the reader. A corpus is prepared first, which speaks as well."""
    ways = {"full": "{} 2>/dev/full", "closed": "{} 2>&-", "both": "{} >&- 2>&-", "out": "{} >/dev/full",
            "left": "({} 2>&1; echo $? >left.status) | true"}
    started = {}
    for name, way in ways.items():
        settings = {"data.name": home.folder / "one.txt", "data.dir": tmp_path / f"{name}-data", "train.sample_tokens": 5}
        line = shlex.join([str(word) for word in [sys.executable, ROOT / "train.py"] + home.command(name, settings)
                           if word != "--quiet"])
        started[name] = shell(tmp_path, name, way.format(line))
    for name, process in started.items():
        status = process.wait()
        if name == "left":
            status = int((tmp_path / "left.status").read_text())
        assert status == 0, (name, said(tmp_path, name))
        assert checkpoint.load(tmp_path / name / checkpoint.LAST).header["step"] == 2
        log = (tmp_path / name / "log.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in log] == ["step", "0", "1", "2"]          # and nothing else in it


@POSIX
def test_text_that_cannot_be_written_is_a_failure_in_one_line(home, tmp_path):
    words = shlex.join([sys.executable, str(ROOT / "sample.py"), str(home.folder / "moe"), "--tokens", "20"])
    helps = shlex.join([sys.executable, str(ROOT / "train.py"), "--help"])
    cases = {"full": (f"{words} >/dev/full", 1, "error: standard output cannot be written"),
             "closed": (f"{words} >&-", 1, "error: standard output cannot be written"),
             "both": (f"{words} >/dev/full 2>/dev/full", 1, ""), "help": (f"{helps} >/dev/full", 1, "error: standard"),
             "words": (f"{words} 2>/dev/full", 0, ""), "left": (f"({words}; echo $? >&2) | true", 0, "141")}
    started = {name: shell(tmp_path, name, line) for name, (line, _, _) in cases.items()}
    for name, (_, status, start) in cases.items():
        assert started[name].wait() == status, (name, said(tmp_path, name))
        out, err = said(tmp_path, name)
        assert err.startswith(start) and err.count("\n") <= 1 and "Traceback" not in err, (name, err)
        assert (len(out) >= 20) == (name == "words")


@POSIX
@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_ctrl_c_while_importing_is_one_line(program, tmp_path):
    """A torch that gets Ctrl-C as soon as it is imported."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(100)\n")
    done = subprocess.run([sys.executable, ROOT / program, "x"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_an_old_python_is_told_which_one_is_needed(program):
    for path in (ROOT / program, ROOT / "runtime" / "first.py"):
        ast.parse(path.read_text("utf-8"), feature_version=(3, 7))
    code = ("import runpy, sys; sys.version_info = (3, 9, 1, 'final', 0)\n"
            f"runpy.run_path({str(ROOT / program)!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "Python 3.11 or newer is needed; this is Python 3.9\n"


@POSIX
def test_python_may_be_started_in_other_ways(home, tmp_path):
    argv = [ROOT / "sample.py", home.folder / "moe", "--tokens", "5", "--prompt", "ü"]
    ways = {"isolated": ["-I"], "safe path": ["-P"], "no docstrings": ["-OO"], "ascii": []}
    started = {name: shell(tmp_path, name, shlex.join(map(str, [sys.executable, *options, *argv])),
                           **({"PYTHONIOENCODING": "ascii"} if name == "ascii" else {})) for name, options in ways.items()}
    for name, process in started.items():
        assert process.wait() == 0 and "5 tokens in" in said(tmp_path, name)[1], said(tmp_path, name)
    for name in ways:
        assert said(tmp_path, name)[0][0] == ("?" if name == "ascii" else "ü")


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", ""), ("WORLD_SIZE", "two"), ("RANK", ""), ("RANK", "2"),
                                         ("LOCAL_RANK", "x"), ("LOCAL_RANK", None)])
def test_variables_of_torchrun_that_make_no_sense(name, value, home, tmp_path, monkeypatch):
    for key, fine in dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="", TORCHELASTIC_RUN_ID="x").items():
        monkeypatch.setenv(key, fine)
    monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name)
    assert "environment" in refused(home.train(tmp_path / "run", {}), name)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")                   # nobody means them
    assert home.train(tmp_path / "run", {}).status == 0


def test_without_file_locks_it_says_what_that_means(home, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "fcntl", None)
    result = home.train(tmp_path / "run", {})
    assert result.status == 0 and "two runs in one folder are not prevented" in result.err


def test_a_model_that_cannot_be_made_leaves_the_run_in_whose_place_it_would_be(home, tmp_path):
    assert home.train(tmp_path / "run", {}).status == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    moe, dense, none, out = home.folder / "moe", home.folder / "dense", tmp_path / "none", ["--out", tmp_path / "run"]
    for program, *argv in [(lifelong.main, "expand", dense, "--add", 1), (lifelong.main, "expand", none, "--add", 1),
                           (lifelong.main, "expand", tmp_path / "run", "--add", 1), (btx.main, "upcycle", moe),
                           (btx.main, "upcycle", dense, "--n_expert", 10**13), (btx.main, "mix", dense, none),
                           (btx.main, "mix", dense, dense, "--ffn.top_k", 9), (btx.main, "merge", moe, dense)]:
        refused(call(program, *argv, *out, "--overwrite"))
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before, argv


# --- the commands that are proposed ---

def proposed(text):
    """The commands of this repository in a text, as words."""
    found = re.findall(r"`(python [^`]*)`", text) + re.findall(r"^  (python .*)$", text, re.M)
    return [shlex.split(line, comments=True) for line in found]


def test_from_a_full_disk_every_proposed_command_leads_on(home, tmp_path):
    with small_disk(tmp_path / "a disk", 4) as disk:
        run = disk / "a run"
        fill(disk, 40_000)                                      # enough for config and log, not for a checkpoint
        first = refused(home.train(run, {}), "disk is full")
        assert "run the command again with --overwrite" in first and not proposed(first)
        (disk / "filler").unlink()
        assert home.train(run, {}, "--overwrite").status == 0
        # with a checkpoint: on from there
        fill(disk, 40_000)
        result = call(train.main, "--out", run, "--resume", "--quiet", "--train.max_steps", "5")
        (words,) = proposed(refused(result, "disk is full"))
        (disk / "filler").unlink()
        assert words[:2] == ["python", "train.py"] and call(train.main, *words[2:], "--quiet").status == 0
        assert checkpoint.load(run / checkpoint.LAST).header["step"] == 5
        # the first command once more, and what it proposes
        (words,) = proposed(refused(home.train(run, {}), "already holds a run"))
        assert call(train.main, *words[2:], "--quiet").status == 0
        # the best weights alone: nothing to go on from
        for name in (checkpoint.LAST, checkpoint.PREVIOUS):
            (run / name).unlink()
        again = refused(home.train(run, {}), "already holds a run", "--overwrite")
        assert not proposed(again) and "--resume" not in again
        refused(call(train.main, "--out", run, "--resume", "--quiet"), "--overwrite", "--train.init_from")
        assert home.train(disk / "other", {"train.init_from": run} | {"train.keep": "last"}).status in (0, 2)
        assert home.train(run, {}, "--overwrite").status == 0


@pytest.mark.parametrize("name", ["-dash", "a folder", "it's", "-a b"])
def test_what_a_run_proposes_at_its_end_works_from_there(name, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"train.max_steps": 1}
    argv = [word for word in home.command("x", settings) if word not in ("--out", "x", "--quiet")]
    result = call(train.main, *argv, f"--out={name}")
    assert result.status == 0 and (tmp_path / name / checkpoint.LAST).exists()
    sampling, drawing, resuming, _ = proposed(result.err)
    assert sampling[:2] == ["python", "sample.py"] and drawing[:3] == ["python", "-m", "lab.plots"]
    assert call(sample.main, *sampling[2:], "--tokens", "3").status == 0
    assert call(plots.main, *drawing[3:]).status == 0
    assert call(train.main, *resuming[2:]).status == 0
    assert checkpoint.load(tmp_path / name / checkpoint.LAST).header["step"] == 2


@POSIX
def test_from_another_folder_the_proposed_commands_work(home, tmp_path):
    line = shlex.join(map(str, ["python", ROOT / "train.py", *home.command("a run", {"train.max_steps": 1})]))
    assert shell(tmp_path, "train", line.replace(" --quiet", "")).wait() == 0, said(tmp_path, "train")
    lines = [line.strip() for line in said(tmp_path, "train")[1].splitlines() if line.startswith(("  python", "  PYTHONPATH"))]
    assert len(lines) == 4 and Path(shlex.split(lines[3])[2]).is_file()
    for i, line in enumerate(lines[:3]):
        assert shell(tmp_path, f"next{i}", line).wait() == 0, (line, said(tmp_path, f"next{i}"))
    assert checkpoint.load(tmp_path / "a run" / checkpoint.LAST).header["step"] == 2


# --- what is printed ---

SILENT = """
seeds = 1
[arms.a]
make = "{script} {out} 1.5"
"""


def test_quiet_programs_say_nothing_and_no_file_gets_control_characters(home, tmp_path, monkeypatch):
    """Output that is no terminal: captured here, a file for a user."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("import pathlib, sys\n"
                                        "path = pathlib.Path(sys.argv[1], 'evaluation.json')\n"
                                        "path.write_text('{\"val_loss\": 1.5}')\n")
    (tmp_path / "own.toml").write_text(SILENT.replace("{script}", str(tmp_path / "script.py")))
    (tmp_path / "own.txt").write_text("a text of one's own\n" * 100)
    command = home.command(tmp_path / "run", {"train.sample_tokens": 100, "train.sample_every": 1})
    prepare = [preparing.main, tmp_path / "own.txt", "--out", tmp_path]
    for program, *argv in ([train.main, *command], [*prepare, "--quiet"],
                           [experiment.main, "own.toml", "--quiet"]):
        assert call(program, *argv) == (0, "", "")
    loud = [(train.main, *[word for word in command if word != "--quiet"], "--overwrite"),
            (*prepare, "--tokenizer", "bpe", "--vocab_size", 260), (experiment.main, "own.toml", "--list"),
            (experiment.main, "own.toml", "--out", tmp_path / "again"),
            (lifelong.main, "expand", home.folder / "moe", "--add", 1, "--out", tmp_path / "grown"),
            (btx.main, "merge", home.folder / "moe", home.folder / "moe", "--out", tmp_path / "merged"),
            (evaluate.main, tmp_path / "run"), (plots.main, tmp_path / "run"),
            (sample.main, home.folder / "moe", "--tokens", 3, "--prompt", "def", "--show-experts")]
    for program, *argv in loud:
        result = call(program, *argv)
        assert result.status == 0, result.err
        said = result.out + result.err
        assert said and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said), argv
