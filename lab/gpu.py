"""Everything that only a GPU can tell, in one command, for a card that is lent for half an hour:

    python -m lab.gpu [--minutes 9] [--out DIR] [--only PART ...] [--rehearse]

The same command goes on where the last one stopped: what held is not done again, what failed is
tried again after what was never tried. Corpora named python and docs come from the machine's own
Python, so that only experiments of the part papers read them; all else reads generated ones.

    part     minutes   what it does                              writes to DIR
    check    3         fast paths against their twins            check.csv
    compile  3         every kind and router compiled            compile.csv
    bench    6         the tables of lab.bench                   bench.json, bench.png
    train    5         the 124M pair and small configs           train.csv, kernels.csv
    papers   the rest  gpu sizes of configs/papers by value      papers.json

check.csv and compile.csv have a row for each tensor with its relative error and the limit,
bench.json the rows of lab.bench, train.csv tokens/s, utilisation with its formula and peak memory
of each run, kernels.csv the kernels of one step of it, papers.json each experiment's tables and
verdict; status.json the state of every unit. These eight files stay far below 16 MiB each. Each row
says card, torch, triton and commit; outside git set the environment variable COMMIT.

A part that has used up its minutes makes room for the next ones and gets what they leave. On a
fresh machine a call goes on where DIR was left, if that comes along. The parts stand in
lab/timing/gpu_*.py.

On a card every part runs in a process of its own, so that a crash or a hang costs one unit. Any
later call writes the tables of papers.json to results/NAME/gpu where there are none; with `--only
papers --minutes 0` that is all it does, also without a card. `python -m lab.experiment FILE --size
gpu --replot` draws them. Checkpoints and corpora lie in DIR-scratch, runs/ and data/prepared.

--rehearse: the same parts at toy size on a CPU, in this process, kernels in Triton's interpreter.

Exit status: 0 all that was asked for held, 1 something failed, 2 a mistake in what was asked for, 3
nothing failed but the time ended first.
"""
import os
import sys

if "--rehearse" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")      # read when triton is imported

import argparse
import contextlib
import json
import signal
import subprocess
import tempfile
import time
import traceback
from pathlib import Path

import torch

from lab.papers.tables import read_table, write_table
from lab.timing import gpu_bench, gpu_check, gpu_models, gpu_papers, gpu_train
from lab.timing.gpu_unit import CUDA, Place, where
from runtime.checkpoint import write_text
from runtime.config import Parser, parse
from runtime.ending import Ending
from runtime.device import own_threads
from settings import ConfigError

PARTS = {"check": gpu_check.units, "compile": gpu_models.compile_units, "bench": gpu_bench.units,
         "train": gpu_train.units, "papers": gpu_papers.units}
MINUTES = {"check": 3, "compile": 3, "bench": 6, "train": 5}
GRACE = 5               # seconds that a unit may take beyond its time
ROOT = Path(__file__).parent.parent


# ---- what is known of the units: status.json, {"part/unit": {state, said, seconds, call}} ----

def load(place):
    path = place.out / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def put(place, key, **what):
    """Writes the state of a unit: running, held, failed, or left for a later call."""
    status = load(place)
    status[key] = status.get(key, {}) | what
    lines = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in status.items()]
    write_text(place.out / "status.json", "{\n" + ",\n".join(lines) + "\n}\n")


def keep(place, part, unit, rows):
    """Writes the rows of a unit in the place of those that it had; kernels go to a table of their
    own."""
    rows = [dict(unit=unit) | row | where() for row in rows]
    for row in rows:
        if kernels := row.pop("kernels", None):
            keep_rows(place.out / "kernels.csv", unit,
                      [dict(unit=unit, kernel=name, calls=n, ms=ms) | where()
                       for name, n, ms in kernels])
    if part == "bench":
        keep_rows(place.out / "bench.json", unit, rows)
    elif part != "papers":
        keep_rows(place.out / f"{part}.csv", unit, rows)


def keep_rows(path, unit, rows):
    """Replaces the rows of a unit in a CSV file, or in a JSON file with a row per line."""
    if path.suffix == ".json":
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    else:
        old = read_table(path)
    rows = [row for row in old if row["unit"] != unit] + rows
    if path.suffix == ".json":
        write_text(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    else:
        write_table(path, rows, list(dict.fromkeys(name for row in rows for name in row)))


# ---- a part in this process ----

def plan(part, place, call, toy=False):
    """The Units of a part that this call can still do, those that failed last; notes all of them in
    status.json."""
    try:
        units = PARTS[part](toy, place)
    except Exception as error:              # a part that cannot even say what it would do
        put(place, f"{part}/units", state="failed", said=text_of(error), seconds=0, call=call)
        return []
    settle(place, f"{part}/units")
    status = load(place)
    for unit in units:
        if f"{part}/{unit.name}" not in status:
            put(place, f"{part}/{unit.name}", state="left", said="not begun", seconds=0, call="")
    status = load(place)
    state = {unit.name: status[f"{part}/{unit.name}"] for unit in units}
    open_ones = [unit for unit in units if state[unit.name]["state"] != "held"
                 and state[unit.name]["call"] != call]
    return sorted(open_ones, key=lambda unit: state[unit.name]["state"] == "failed")


def settle(place, key):
    """Takes back that a part failed as a whole in an earlier call."""
    if key in load(place):
        put(place, key, state="held", said="")


def fits(unit, until, end):
    """Whether a unit may begin: none does after `until`, none that the end would cut."""
    return time.time() < until and time.time() + unit.least <= end


def work(part, place, until, end, call, toy=False):
    """Does what plan() gives. Returns False where the card can do no more in this process."""
    for unit in plan(part, place, call, toy):
        if fits(unit, until, end) and not do(part, unit, place, end, call):
            return False
    return True


def do(part, unit, place, end, call):
    """One unit. Returns False where the card can do no more in this process."""
    key, start = f"{part}/{unit.name}", time.time()
    put(place, key, state="running", said="", call=call, since=start, limit=unit.limit,
        card=where()["card"])
    print(f"{key} ...", flush=True)
    try:
        rows = unit.run(min(end, start + unit.limit))
        keep(place, part, unit.name, rows)
        state, said = judge(rows)
    except Exception as error:              # whatever it is, the others go on
        traceback.print_exc()
        state, said = "failed", text_of(error)
    put(place, key, state=state, said=said, seconds=round(time.time() - start, 2))
    print(f"{key}: {state} {said}", flush=True)
    return state != "failed" or works()


def judge(rows):
    """(state, what to say) of a unit's rows."""
    wrong = [row for row in rows if row.get("held", True) is False]
    if wrong:
        row = wrong[0]
        told = ", ".join(f"{name} {row[name]}" for name in ("case", "dtype", "quantity")
                         if name in row)
        if "error" in row:
            told += f": error {row['error']:.1e} above {row['limit']:.0e}"
        return "failed", f"{len(wrong)} of {len(rows)} rows, first {told}"
    if any(row.get("held", True) is None for row in rows):
        return "left", "the time ended; the next call goes on"
    return "held", f"{len(rows)} rows"


def text_of(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def works():
    """Whether the card still answers: an illegal access ends all that a process can do with it."""
    try:
        if CUDA:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


# ---- a part in processes of its own ----

def watch(part, place, until, end, call, command=None):
    """Does a part in a process, and in a new one after a crash, until nothing is left to try."""
    command = command or [sys.executable, "-m", "lab.gpu", "--out", str(place.out), "--inside",
                          part, "--until", str(until), "--end", str(end), "--call", call]
    while any(fits(unit, until, end) for unit in plan(part, place, call)):
        before = tried(place, call)
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        why = wait(process, place, end)
        for key, entry in load(place).items():
            if entry["state"] == "running":
                state = "left" if why == "the time ended" else "failed"
                put(place, key, state=state, said=why,
                    seconds=round(time.time() - entry["since"], 2))
        if process.returncode == 0:
            return settle(place, f"{part}/process")
        if tried(place, call) == before:
            return put(place, f"{part}/process", state="failed", said=why, seconds=0, call=call)


def tried(place, call):
    """How many units this call has begun."""
    return sum(entry["call"] == call for entry in load(place).values())


def wait(process, place, end):
    """Waits for a process, and ends it where a unit or the call takes too long; returns why it
    ended."""
    try:
        while process.poll() is None:
            time.sleep(0.2)
            now = time.time()
            limits = [e["since"] + e["limit"] for e in load(place).values()
                      if e["state"] == "running"]
            # A unit gets a few seconds to end by itself.
            if now > min([end, *limits]) + GRACE:
                return "the time ended" if now > end else "took longer than its limit"
        return f"its process ended with status {process.returncode}"
    finally:
        # SIGTERM, so that runs of train.py save themselves
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)


# ---- the program ----

@own_threads
def go(options, place, end, call):
    """Parts in turn: first each within its minutes, then what is left of them, then papers."""
    if options.rehearse:
        torch.set_num_threads(1)            # a second thread costs toys more than it takes over
    # what a call was at when it was killed
    for key, entry in load(place).items():
        if entry["state"] == "running":
            put(place, key, state="left", said="its call was killed")
    parts = options.only or list(PARTS)
    turns = [(part, 60 * MINUTES[part]) for part in MINUTES if part in parts]
    turns += [(part, float("inf")) for part in PARTS if part in parts]
    for part, budget in turns:
        spent = sum(e["seconds"] for key, e in load(place).items() if key.startswith(part + "/"))
        until = min(end, time.time() + budget - spent)
        if options.rehearse:
            work(part, place, until, end, call, toy=True)
        else:
            watch(part, place, until, end, call)
    if (place.out / "bench.json").exists():
        gpu_bench.draw(place.out / "bench.json", place.out / "bench.png")


def print_status(place, parts):
    """The table of what held and what failed; returns the exit status."""
    print(f"\n{', '.join(f'{name} {value}' for name, value in where().items())}")
    print(f"{'part':<9}{'held':>6}{'failed':>8}{'left':>6}{'seconds':>9}")
    status, states = load(place), []
    for part in parts:
        own = [e for key, e in status.items() if key.startswith(part + "/")]
        held, failed = (sum(e["state"] == state for e in own) for state in ("held", "failed"))
        seconds = sum(e["seconds"] for e in own)
        print(f"{part:<9}{held:>6}{failed:>8}{len(own) - held - failed:>6}{seconds:>9.0f}")
        states += [e["state"] for e in own] or ["left"]
    for key, entry in status.items():
        if entry["state"] == "failed" and key.split("/")[0] in parts:
            print(f"failed: {key}: {entry['said']}")
    print(f"{place.out}", flush=True)
    if "failed" in states:
        return 1
    return 0 if set(states) == {"held"} else 3


def build_parser():
    parser = Parser(prog="python -m lab.gpu", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, metavar="M",
                        help="of this call (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR",
                        help="results (default: runs/gpu; of a rehearsal a fresh folder)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART",
                        help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    for word in ("--inside", "--until", "--end", "--call"):      # how it calls itself
        parser.add_argument(word, help=argparse.SUPPRESS)
    return parser


def make_place(options):
    """The Place of a call. Raises ConfigError."""
    out = Path(options.out or (tempfile.mkdtemp() if options.rehearse else ROOT / "runs" / "gpu"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: must be a folder: {error.strerror}") from None
    place = Place(out.resolve(), out.resolve().with_name(out.resolve().name + "-scratch"))
    others = {e["card"] for e in load(place).values() if "card" in e} - {where()["card"]}
    if others and options.minutes:
        raise ConfigError(f"--out {out}: holds results of {', '.join(sorted(others))}; "
                          "give another folder")
    return place


def main(argv=None):
    """Returns the exit status."""
    with Ending() as ending:
        options, _ = parse(build_parser(), argv)
        if not options.minutes >= 0:
            raise ConfigError(f"--minutes {options.minutes}: must be at least 0")
        if options.minutes and not (options.rehearse or CUDA):
            raise ConfigError("PyTorch finds no CUDA device here; --rehearse runs on a CPU")
        start, place = time.time(), make_place(options)
        if options.inside:
            alive = work(options.inside, place, float(options.until), float(options.end),
                         options.call)
            ending.status = 0 if alive else 4
        else:
            go(options, place, start + 60 * options.minutes, str(start))
            ending.status = print_status(place, options.only or list(PARTS))
    return ending.status


if __name__ == "__main__":
    sys.exit(main())
