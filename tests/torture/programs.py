"""Preparations and experiments that are killed at random moments and go on until they are done; the memory of
a run."""
import os
import random
import shutil
import signal
import time
from pathlib import Path

import train
from data import building
from data import prepare as preparing
from data.binfile import DataError
from data.folders import inspect_folder

from .kills import Child, rows_of, steps_logged


def killed_preparation(rng, home, folder, tally):
    """Preparing a text over an older state of it, killed at random moments: at every one of them the folder
    holds the old files or the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = rng.choice(["byte", "char", "bpe"])
    text, out, said = folder / "text.txt", folder / "out", folder / "said.txt"
    argv = [text, "--tokenizer", kind, "--vocab_size", "300"]
    text.write_text("an old text, all of it. " * 100)
    if Child(preparing.main, [*argv, "--out", out], said).wait() != 0:
        return tally.problems.append(f"preparing failed: {said.read_text()}")
    prepared, = (path for path in out.iterdir() if path.is_dir())
    old = contents(prepared)
    letters = random.Random(rng.random())
    text.write_text("".join(letters.choices("etaoin shrdlu\n", k=rng.choice([3_000, 30_000, 300_000]))))
    start = time.monotonic()
    if Child(preparing.main, [*argv, "--out", folder / "whole"], said).wait() != 0:
        return tally.problems.append(f"preparing failed: {said.read_text()}")
    took, new = time.monotonic() - start, contents(folder / "whole" / prepared.name)
    for _ in range(6):
        child = Child(preparing.main, [*argv, "--out", out], said)
        pause = time.monotonic() + rng.random() * took * 1.2
        child.wait(lambda: time.monotonic() > pause)
        status = child.end(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT]))
        if status not in (0, 130, -signal.SIGKILL) or "Traceback" in said.read_text():
            return tally.problems.append(f"a killed preparation ended with {status}: {said.read_text()}")
        tally.count("killed preparations", int(status != 0))
        if problem := neither(prepared, old, new):
            return tally.problems.append(f"a killed preparation left {problem}")
    status = Child(preparing.main, [*argv, "--out", out], said).wait()
    # the folder and .lock, and the tokens of before, which a run may need
    left = [path for path in out.iterdir() if "-old-" not in path.name]
    if status != 0 or contents(prepared) != new or len(left) != 2:
        tally.problems.append(f"after kills preparing ended with {status}: {said.read_text()} {left}")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in building.FILES}


def neither(folder, old, new):
    """What is wrong with a prepared folder after a kill; empty if it is old, new, or seen to be half."""
    try:
        known = inspect_folder(folder, verify=True)
    except DataError as e:
        return f"damage: {e}"
    return "" if not known or contents(folder) in (old, new) else "a mixture that passes for good"


# --- experiments ---

EXPERIMENT = """
title = "Killed"
seeds = 1
config = "{empty}"
[common]
data = {{ name = "one", dir = "{data}" }}
model = {{ n_layer = 1, n_head = 1, n_embd = 8, block_size = 8 }}
ffn = {{ d_ff = 8, n_expert = 4 }}
train = {{ batch_size = 4, save_every = 5, eval_every = 20, eval_batches = 2, device = "cpu" }}
[arms.dense]
ffn.kind = "dense"
train.max_steps = 400
[arms.moe]
train.max_steps = 400
[arms.more]
from = "moe"
data.name = "two"
train.max_steps = 200
"""
LOCAL = {"seconds", "commit", "device", "threads", "torch", "tokens_per_second", "peak_mib", "key"}


def killed_experiment(rng, home, folder, tally, kills=4):
    """A small experiment whose runner, and sometimes whose training runs too, are killed."""
    tables = {}
    for name, n in (("whole", 0), ("killed", kills)):
        here = folder / name
        here.mkdir(parents=True)
        (here / "killed.toml").write_text(EXPERIMENT.format(empty=home.empty, data=home.data))
        argv, said = ["-m", "lab.experiment", "killed.toml", "--jobs", "2"], here / "said.txt"
        old = os.getcwd()
        os.chdir(here)                                      # runs and results are made where one is
        try:
            for i in range(n):
                child = Child(None, argv, said, forked=False)
                pause = time.monotonic() + rng.uniform(3, 12)
                child.wait(lambda: time.monotonic() > pause)
                others = children_of(child.pid)
                status = child.end(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                for pid in others if status and rng.random() < 0.6 else []:     # else they work on without it
                    kill_if_there(pid)
                if status not in (0, 1, -signal.SIGKILL, -signal.SIGTERM) or "Traceback" in said.read_text():
                    problem = f"a killed experiment ended with {status}: {said.read_text()}"
                    return tally.problems.append(problem)
                tally.count("killed experiments", int(status != 0))
            status = Child(None, argv, said, forked=False).wait()
        finally:
            os.chdir(old)
        if status != 0:
            return tally.problems.append(f"the experiment {name} ended with {status}: {said.read_text()}")
        tables[name] = rows_of(here / "results" / "killed" / "cpu" / "runs.csv", LOCAL)
    if tables["whole"] != tables["killed"]:
        tally.problems.append(f"a killed experiment differs: {tables['killed']} instead of {tables['whole']}")


def children_of(pid):
    """Processes that a process of ours started, where the system tells."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill_if_there(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def memory_growth(home, folder, steps=2000):
    """Largest resident size of a run of tiny steps after its first quarter, as a multiple of that at it."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = {"train.max_steps": steps, "train.eval_every": 250, "train.save_every": 250}
    child = Child(train.main, home.command(folder, settings), f"{folder}.said")
    child.wait(lambda: steps_logged(folder) >= steps // 4)
    early, late = resident(child.pid), 0
    while child.wait(lambda: True) is None:
        late = max(late, resident(child.pid) or late)
        time.sleep(0.02)
    return late / early


def resident(pid):
    """Bytes of memory that a process has; 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
