"""Programs under what users and machines do to them, at random for as long as asked:

    python -m tests.torture [--minutes 10] [--json FILE] [--seed S] [--only KIND ...] [--trial N]

    training      runs killed while they train and while they write checkpoints (SIGKILL, SIGTERM, SIGINT):
                  what they end with must be, to the last bit, what an undisturbed run ends with
    preparation   the same for data/prepare.py
    experiment    the same for lab/experiment.py
    memory        the resident size of a run must not grow over 2,000 steps
    config        random settings: what is accepted trains, resumes and samples, what is refused names its key
    input         damaged, foreign and harmful files: one clear line each

The exit status is 1 at any loss (a promise that was not kept), or below 30 kills of one run, 300 configs or
50 bad inputs in ten minutes. A loss is printed with what repeats its trial: --seed S --only KIND --trial N.
"""
import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

# before torch is imported: a fork inherits neither threads nor a GPU
os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from .configs import check_config
from .home import Home
from .inputs import check_input
from .kills import Child, Tally, killed_training, random_model
from .programs import killed_experiment, killed_preparation, memory_growth

LIMITS = {"training": ("SIGKILLs survived by one run", 30), "config": ("configs", 300),
          "input": ("bad inputs", 50)}                      # in ten minutes
GROWTH = 1.02
EXPERIMENT_TAKES = 200.0                                    # seconds, at most


# --- trials: (rng, home, folder, share of ten minutes, whether it is the first) -> (Tally, text) ---

def training(rng, home, folder, share, first):
    """The first trial is the long one."""
    tally = Tally()
    name, settings = random_model(rng)
    kills = max(3, math.ceil(32 * min(1, share))) if first else rng.randint(3, 8)
    killed_training(rng, home, folder, kills, settings, tally)
    return tally, f"{name}: {tally.counts}"


def preparation(rng, home, folder, share, first):
    tally = Tally()
    killed_preparation(rng, home, folder, tally)
    return tally, ""


def experiment(rng, home, folder, share, first):
    tally = Tally()
    killed_experiment(rng, home, folder, tally)
    return tally, ""


def memory(rng, home, folder, share, first):
    tally, growth = Tally(), memory_growth(home, folder / "run")
    tally.counts["growth of memory"] = round(growth, 4)
    if growth > GROWTH:
        tally.problems.append(f"the resident size grew by a factor of {growth:.3f} in 1,500 steps")
    return tally, ""


def config(rng, home, folder, share, first):
    tally = Tally()
    how, problem, line = check_config(rng, home, folder / "run")
    tally.count("configs")
    tally.count(f"configs {how}")
    tally.problems += [f"{problem}\n  train.py {line}"] * bool(problem)
    return tally, line


def an_input(rng, home, folder, share, first):
    tally = Tally()
    case, damage, how, problem = check_input(rng, home, folder / "case")
    tally.count("bad inputs", int(how == "refused"))
    tally.count("bad inputs that did no harm", int(how == "done without"))
    tally.problems += [f"{case}: {problem}"] * bool(problem)
    return tally, f"{case} {damage}"


TRIALS = dict(training=training, preparation=preparation, experiment=experiment, memory=memory, config=config,
              input=an_input)
WORKERS = ["training", "memory", "preparation", "experiment"], ["config", "config", "config", "input"]


# --- workers ---

def work(kinds, options, folder, pipe):
    """Runs trials of these kinds in turn until the time is over; tells each one's start and its end."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)                                # a fork does not have the other threads
    folder.mkdir()
    home, n, seen = Home(folder / "home"), -1, set()
    if (status := Child(lambda argv: home.build(), [], folder / "said.txt").wait()) != 0:
        raise RuntimeError(f"the home of the trials ended with {status}: {(folder / 'said.txt').read_text()}")
    end = time.monotonic() + 60 * options.minutes
    while options.trial is not None or time.monotonic() < end:
        n += 1
        kind, number = kinds[n % len(kinds)], n if options.trial is None else options.trial
        too_late = kind == "experiment" and end - time.monotonic() < EXPERIMENT_TAKES
        if len(kinds) > 1 and (too_late or kind == "memory" and kind in seen):
            continue
        pipe.send(("start", kind, number))
        here = folder / "trial"
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        rng = random.Random(f"{options.seed} {kind} {number}")
        tally, text = TRIALS[kind](rng, home, here, options.minutes / 10, number == 0)
        seen.add(kind)
        pipe.send(("end", kind, number, tally.counts, tally.problems, text))
        if options.trial is not None:
            return


class Score:
    """What all workers found."""

    def __init__(self, options):
        self.options, self.started = options, time.monotonic()
        self.counts, self.losses, self.at_work = {}, [], {}

    def take(self, worker, message):
        what, kind, number, *found = message
        self.at_work[worker] = kind, number
        if what == "end":
            counts, problems, text = found
            for name, n in counts.items():
                best = name.endswith("by one run") or name.startswith("growth")
                self.counts[name] = max(n, self.counts.get(name, 0)) if best else n + self.counts.get(name, 0)
            self.lose(worker, problems)
            if self.options.trial is not None:
                self.say(text)

    def lose(self, worker, problems):
        kind, number = self.at_work.get(worker, ("home", 0))
        for problem in problems:
            o = self.options
            again = f"--minutes {o.minutes:g} --seed {o.seed} --only {kind} --trial {number}"
            self.losses.append(dict(kind=kind, repeat=again, problem=problem))
            self.say(f"LOSS ({again}): {problem}")

    def say(self, text):
        print(f"[{(time.monotonic() - self.started) / 60:5.1f} min] {text}", flush=True)

    def line(self):
        counts = [f"{n} {name}" for name, n in sorted(self.counts.items())]
        return ", ".join([*counts, f"losses: {len(self.losses)}"])

    def missed(self):
        """The limits that were not reached, as texts."""
        found, share = [], self.options.minutes / 10
        for kind, (name, n) in LIMITS.items():
            n = max(1, math.floor(n * (min(1, share) if kind == "training" else share)))
            if kind in self.options.only and self.options.trial is None and self.counts.get(name, 0) < n:
                found.append(f"only {self.counts.get(name, 0)} {name}, {n} are asked for")
        return found


def run(options, folder):
    """Two workers side by side; the Score once both have ended."""
    context, score, pipes = multiprocessing.get_context("fork"), Score(options), {}
    for number, kinds in enumerate(WORKERS):
        if chosen := [kind for kind in kinds if kind in options.only]:
            mine, theirs = context.Pipe(duplex=False)
            arguments = chosen, options, folder / str(number), theirs
            process = context.Process(target=work, args=arguments, daemon=True)     # it ends with this one
            process.start()
            theirs.close()
            pipes[mine] = number, process
    shown = time.monotonic()
    while pipes:
        for pipe in wait(list(pipes), timeout=1):
            worker, process = pipes[pipe]
            try:
                score.take(worker, pipe.recv())
            except EOFError:
                process.join()
                del pipes[pipe]
                if process.exitcode:
                    score.lose(worker, [f"the trial ended its process with status {process.exitcode}"])
        if time.monotonic() - shown > 10:
            score.say(score.line())
            shown = time.monotonic()
    return score


def report(score, options):
    """Prints the end, writes the JSON; returns the exit status."""
    missed, minutes = score.missed(), (time.monotonic() - score.started) / 60
    score.say(score.line())
    for text in missed:
        print(text)
    print("every promise was kept" if not missed and not score.losses else "not every promise was kept")
    if options.json:
        found = dict(minutes=round(minutes, 2), seed=options.seed, counts=score.counts, losses=score.losses,
                     missed=missed, machine=platform.platform(), cores=os.cpu_count(),
                     python=platform.python_version(), torch=torch.__version__)
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(missed or score.losses))


def main(argv=None):
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="how long (default: 10)")
    parser.add_argument("--json", metavar="FILE", help="write counts and losses there")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is random (default: 0)")
    parser.add_argument("--only", nargs="+", choices=list(TRIALS), default=list(TRIALS), metavar="KIND",
                        help=f"some of {', '.join(TRIALS)} (default: all)")
    parser.add_argument("--trial", type=int, metavar="N", help="this trial alone, of one KIND")
    options = parser.parse_args(argv)
    if options.trial is not None and len(options.only) > 1:
        parser.error("--trial needs --only KIND")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))   # then what is below cleans up
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        os.environ["HOME"] = folder                         # whatever a program keeps for its user
        return report(run(options, Path(folder)), options)


if __name__ == "__main__":
    sys.exit(main())
