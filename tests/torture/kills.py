"""Training runs that are killed at random moments, checkpoint writes included, and go on until they are done:
what they leave must be, to the last bit, what an undisturbed run leaves."""
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny import KINDS

import train
from runtime import checkpoint
from routers import ROUTERS

from .home import ROOT, same_checkpoints

WRITING = ".ckpt_new.pt.tmp"                                # there while a checkpoint is written
STEPS = {"train.save_every": 2, "train.eval_every": 6}
CLOCK = {"seconds", "tokens_per_second"}                    # columns of log.csv that no two runs share


class Child:
    """A program at work: main(argv) in a fork of this process, which need not import everything again, or a
    process of its own."""

    def __init__(self, main, argv, said, forked=True):
        self.said, self.process = Path(said), None
        argv = [str(word) for word in argv]
        if not forked:
            command = [sys.executable, *argv]
            with open(said, "w") as file:
                self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment())
            self.pid = self.process.pid
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 99
        try:
            file = open(said, "w", buffering=1)
            sys.stdout = sys.stderr = file
            status = main(argv)
        except SystemExit as e:
            status = e.code
        except KeyboardInterrupt:                           # just before main, or after it
            status = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            file.flush()
            os._exit(status)

    def poll(self):
        """None while it works; else its exit status, negative if a signal ended it."""
        if self.process:
            return self.process.poll()
        if self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if not pid:
                return None
            self.pid, self.status = 0, os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, until=lambda: False, seconds=300):
        """Its exit status, or None as soon as until() is true. What hangs is ended."""
        end = time.monotonic() + seconds
        while (status := self.poll()) is None and not until():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"still at work after {seconds} s: {self.said.read_text()}")
            time.sleep(0.001)
        return status

    def end(self, number):
        """Its exit status, once it has got this signal."""
        if self.poll() is None:
            os.kill(self.pid, number)
        return self.wait()


def environment():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


def steps_logged(out):
    """The step of the last whole row of log.csv, 0 if there is none."""
    try:
        rows = (out / "log.csv").read_bytes().split(b"\n")[:-1]
    except OSError:
        return 0
    return next((int(row.split(b",")[0]) for row in reversed(rows) if row.split(b",")[0].isdigit()), 0)


def rows_of(path, without=CLOCK):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


class Tally:
    """What came of it: counts by name, and what went wrong."""

    def __init__(self):
        self.counts, self.problems = {}, []

    def count(self, name, n=1):
        self.counts[name] = self.counts.get(name, 0) + n


def random_model(rng):
    """(name, settings) of a small model, each router and kind in turn by chance."""
    kind = rng.choice([kind for kind in KINDS if kind != "domain"])
    settings = {k: v for k, v in KINDS[kind].items() if not k.startswith("model.")}
    more = rng.choice([{}, {"model.dropout": 0.2}, {"train.grad_accum": 2}, {"train.dtype": "bfloat16"},
                       {"train.keep": "last"}])
    if rng.random() < 0.2 and kind in ROUTERS and ROUTERS[kind].traits.capacity:
        more = more | {"ffn.capacity_factor": 1.0}
    return " ".join([kind, *map(str, more)]), settings | more


def killed_training(rng, home, folder, kills, settings, tally):
    """One training run that is killed `kills` times, with other signals in between; counts what it survived.
    It has so many steps that it is not done before."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = STEPS | settings | {"train.max_steps": 30 * kills}
    whole, out, said = folder / "whole", folder / "killed", folder / "said.txt"
    if (status := Child(train.main, home.command(whole, settings), said).wait()) != 0:
        return tally.problems.append(f"the undisturbed run ended with {status}: {said.read_text()}")
    shots = dict.fromkeys((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), 0)
    steps = settings["train.max_steps"]
    while True:
        fresh, command = rng.random() < 0.08, [*home.command(out, settings), "--overwrite"]
        if checkpoint.can_resume(out):
            command = ["--out", out, "--quiet", "--resume"]
        child = Child(train.main, [ROOT / "train.py", *command] if fresh else command, said, forked=not fresh)
        if shots[signal.SIGKILL] >= kills:
            break
        number = rng.choice([signal.SIGKILL] * 5 + [signal.SIGTERM, signal.SIGINT])
        wait_for_the_moment(rng, child, out, steps_logged(out) + 8 * rng.random())
        status = child.end(number)
        if status == 0 and steps_logged(out) >= steps:
            break                                           # it was done before the signal came
        tally.count("checkpoint writes cut", int(status == -signal.SIGKILL and (out / WRITING).exists()))
        shots[number] += 1
        if problem := wrong_end(number, status, out, said, fresh):
            return tally.problems.append(problem)
    if (status := child.wait()) != 0:
        return tally.problems.append(f"after {shots} it ended with {status}: {said.read_text()}")
    if problem := compare_runs(whole, out):
        return tally.problems.append(f"after {shots} the run differs from the undisturbed one: {problem}")
    for number, n in shots.items():
        tally.count(f"{number.name}s survived", n)
    tally.count("killed runs with the undisturbed end")
    tally.counts["SIGKILLs survived by one run"] = shots[signal.SIGKILL]


def wait_for_the_moment(rng, child, out, step):
    """Returns when it is time to kill: at once or soon, after some step, or while a checkpoint is written."""
    when = rng.random()
    if when < 0.15:
        pause = time.monotonic() + rng.random() * 0.3
        child.wait(lambda: time.monotonic() > pause)
        return
    child.wait(lambda: steps_logged(out) >= step)
    if when < 0.6:
        child.wait(lambda: (out / WRITING).exists())
    pause = time.monotonic() + rng.random() ** 3 * 0.02
    child.wait(lambda: time.monotonic() > pause)


def wrong_end(number, status, out, said, fresh):
    """What is wrong with the end of a run that got a signal; empty if nothing."""
    text = said.read_text(errors="replace")
    if status == -signal.SIGKILL and number == signal.SIGKILL:
        return ""
    if number == signal.SIGKILL:
        return f"ended by itself with {status}: {text}"
    starting = status in (-number, 130) and (fresh or "Traceback" not in text)      # before its first step
    if status == 0 and checkpoint.load(out / checkpoint.LAST).header["step"] == steps_logged(out) or starting:
        return ""
    return f"{signal.Signals(number).name} ended it with {status}: {text}"


def compare_runs(whole, out):
    """What differs between two run folders that should be alike; empty if nothing."""
    if rows_of(whole / "log.csv") != rows_of(out / "log.csv"):
        return "log.csv"
    names = [name for name in (checkpoint.LAST, checkpoint.BEST) if (whole / name).exists()]
    found = [f"{name}: {diff}" for name in names if (diff := same_checkpoints(whole / name, out / name))]
    extra = {p.name for p in out.iterdir()} ^ {p.name for p in whole.iterdir()}
    return "; ".join(found + [name for name in extra if name != checkpoint.PREVIOUS and not name.endswith(".tmp")])
