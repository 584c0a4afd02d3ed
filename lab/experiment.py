"""A paper's experiment: its runs, a table, a figure and a verdict.

    python -m lab.experiment configs/papers/NAME.toml [--size cpu|gpu] [--seeds 3] [--only ARM ...] [--jobs N]
                             [--out results/NAME] [--list] [--replot]

Runs go to runs/NAME/SIZE/ARM-SEED; what is finished there is not run again, and a call that was stopped or
killed goes on where it was. The results go to results/NAME/SIZE:

    runs.csv        a row per arm and seed
    curves.csv      the runs' losses over training, thinned
    routing.csv     which corpus went to which expert, where there are few experts
    figure.png, verdict.md

The format of the experiment files: lab/arms.py; how claims are judged: lab/verdict.py.
"""
import argparse
import csv
import io
import math
import os
import sys
from pathlib import Path

from runtime import checkpoint
from runtime.config import ConfigError, Parser, fail, parse
from data.binfile import DataError
from lab.papers.arms import expand, shown, with_ancestors
from lab.drawing.curves import CURVE
from lab.papers.expressions import Table, derive
from lab.papers.figures import check_panels, experiment_figure
from lab.papers.jobs import is_done, read_record
from lab.papers.page import verdict_page
from lab.papers.runner import Runner, cores, prepare_corpora
from lab.papers.spec import SIZES, read_experiment
from lab.papers.verdict import concerns, read_claims

MEASURED = ["val_loss", "val_bpb", "active_params", "total_params", "flops_per_token", "tokens",
            "tokens_total", "tokens_per_second", "peak_mib", "max_expert_share", "min_expert_share",
            "dropped", "experts_used", "unevenness", "entropy", "specialisation", "diagonal",
            "train_loss", "train_dropped", "train_max_expert_share"]
LAST = ["seconds", "commit", "device", "threads", "torch", "key"]


class Experiment:
    """An experiment file at one size: its arms, and the tables of their results."""

    def __init__(self, path, size, seeds=None, out=None):
        self.path, self.size, self.spec = path, size, read_experiment(path)
        self.seeds = range(seeds or self.spec.get("seeds", 3))
        every = {s: expand(self.spec, path, s, self.seeds) for s in SIZES}
        self.arms = every[size]
        names = {arm.name for arms in every.values() for arm in arms}
        self.claims = read_claims(self.spec, names, path)
        check_panels(self.spec, names, path)
        if not self.arms:
            raise ConfigError(f"{path}: has no arm at size {size}")
        self.out = Path(out or Path("results") / Path(path).stem) / size
        self.failed = {}

    def collect(self):
        """Writes runs.csv, curves.csv and routing.csv: the rows of finished runs; of the others the rows that
        the files already hold, if they were measured with the same settings."""
        old = {(row["arm"], row["seed"]): row for row in read_table(self.out / "runs.csv")}
        kept = {name: {} for name in ("curves", "routing")}
        for name, groups in kept.items():
            for row in read_table(self.out / f"{name}.csv"):
                groups.setdefault((row["arm"], row["seed"]), []).append(row)
        rows, curves, paths = [], [], []
        for arm in self.arms:
            record, place = read_record(arm), (arm.name, arm.seed)
            if is_done(arm, record):
                rows.append(self.row(arm, record))
                who = dict(arm=arm.name, seed=arm.seed)
                curves += [who | point for point in record["curve"]]
                paths += [who | dict(layer=layer, corpus=corpus, expert=e, share=share)
                          for layer, corpus, shares in record["row"].get("routing", ())
                          for e, share in enumerate(shares)]
            elif old.get(place, {}).get("key") == arm.key:
                rows.append(old[place])
                curves, paths = curves + kept["curves"].get(place, []), paths + kept["routing"].get(place, [])
        for row in rows:                                # a parent may have run since, or another file's runs
            row["tokens_total"] = self.tokens_total(row, rows)
        derive(self.spec.get("metrics", {}), rows, curves, self.path)
        write_table(self.out / "runs.csv", rows, self.columns(rows))
        write_table(self.out / "curves.csv", curves, ["arm", "seed", *CURVE])
        if paths:
            write_table(self.out / "routing.csv", paths, list(paths[0]))

    def row(self, arm, record):
        """The row of runs.csv of a finished arm."""
        measured = {k: v for k, v in record["row"].items() if k not in ("routing", "step", "seconds")}
        if arm.make:
            measured["tokens"] = 0
        who = dict(arm=arm.name, seed=arm.seed, size=self.size) | arm.columns
        return who | measured | record.get("speed", {}) | dict(
            seconds=record["seconds"], commit=record["commit"], threads=record.get("threads"), key=arm.key)

    def tokens_total(self, row, rows):
        """Training tokens of an arm and of all that it comes from, each once; None if one is missing."""
        own = {(r["arm"], r["seed"]): r.get("tokens") or 0 for r in rows}
        arm = next(arm for arm in self.arms if (arm.name, arm.seed) == (row["arm"], row["seed"]))
        family, more = {}, [arm]
        while more:
            one = more.pop()
            family[one.name, one.seed] = own.get((one.name, one.seed))
            more += one.parents
        return None if None in family.values() else sum(family.values())

    def columns(self, rows):
        """Columns of runs.csv: who, the grid, what is always measured, the rest, where it was measured."""
        first = ["arm", "seed", "size", *dict.fromkeys(c for arm in self.arms for c in arm.columns)]
        found = list(dict.fromkeys(c for row in rows for c in row))
        corpora = [c for c in found if c.startswith("val_loss_")]
        rest = [c for c in found if c not in {*first, *MEASURED, *corpora, *LAST}]
        return list(dict.fromkeys(first + MEASURED[:2] + corpora + MEASURED[2:] + rest + LAST))

    def draw(self):
        """Writes figure.png and verdict.md from the tables."""
        names = {arm.name for arm in self.arms}
        rows, curves, paths = ([row for row in read_table(self.out / f"{table}.csv") if row["arm"] in names]
                               for table in ("runs", "curves", "routing"))
        if not rows:
            raise ConfigError(f"{self.out}/runs.csv: holds no finished run to draw; run the experiment first")
        title, table = self.spec.get("title", Path(self.path).stem), Table(rows, curves)
        here = {key: claim for key, claim in self.claims.items() if concerns(claim, self.size, names)}
        page = verdict_page(f"{title} ({self.size})", self.spec, here, rows, table, self.arms, self.failed)
        checkpoint.write_text(self.out / "verdict.md", page)
        figure = experiment_figure(self.spec.get("panel", []), title, self.spec.get("caption", ""), rows,
                                   curves, paths)
        if figure:
            figure.savefig(self.out / "figure.part", format="png")
            (self.out / "figure.part").replace(self.out / "figure.png")


# --- tables ---

def read_table(path):
    """Rows of a CSV file as dicts, numbers as numbers, empty cells left out; [] if there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: plain_value(name, text) for name, text in row.items() if text}
                for row in csv.DictReader(file)]


def plain_value(name, text):
    if name in ("arm", "key", "commit", "torch", "device", "size"):     # a key may look like a number
        return text
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and abs(number) < 2**53 and "." not in text else number


def write_table(path, rows, columns):
    """Writes a CSV file atomically; floats to seven digits."""
    def text(value):
        if value is None or isinstance(value, float) and math.isnan(value):
            return ""
        return f"{value:.7g}" if isinstance(value, float) else value

    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({c: text(row.get(c)) for c in columns} for row in rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(path, buffer.getvalue())


# --- the program ---

def list_arms(experiment):
    """Prints every arm's commands, and whether it is done."""
    for arm in experiment.arms:
        state = "done" if is_done(arm, read_record(arm)) else "to do"
        print(f"# {arm.label}: {state}\n{shown(arm.arguments())}\n{shown(arm.evaluate_arguments())}")


def run(experiment, options):
    """Runs what is missing; returns the exit status."""
    arms = experiment.arms
    if options.only:
        arms = with_ancestors(arms, options.only, experiment.path)
    jobs = options.jobs or experiment.spec.get(options.size, {}).get("jobs") or (
        cores() if options.size == "cpu" else 1)
    with checkpoint.Lock(arms[0].folder.parent):
        for arm in arms:
            arm.folder.mkdir(parents=True, exist_ok=True)
        prepare_corpora(arms, options.quiet)
        with Runner(arms, jobs, experiment.collect, options.quiet) as runner:
            complete = runner.run()
            if complete and experiment.spec.get("speed"):
                complete = runner.measure_speed(int(experiment.spec["speed"]))
        experiment.failed = runner.failed
        experiment.collect()
    if runner.stopped:
        print(f"stopped by {runner.stopped}; the same command goes on", file=sys.stderr)
        return 1
    if read_table(experiment.out / "runs.csv"):
        experiment.draw()
        if not options.quiet:
            print(f"{experiment.out}/verdict.md")
    return 0 if complete else 1


def build_parser():
    parser = Parser(prog="python -m lab.experiment", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.toml", help="an experiment: ls configs/papers")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (default: the file's)")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms (* fits anything) and what "
                        "they come from")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time, each on an equal part of "
                        "the cores (default: the file's; else cpu: one per core, gpu: 1)")
    parser.add_argument("--out", metavar="DIR", help="results (default: results/NAME); the size is added")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--replot", action="store_true", help="figure and verdict again, from the tables")
    return parser


def main(argv=None):
    """The program; returns its exit status: 0 done, 1 an arm failed or it was stopped, 2 a mistake in what
    was asked for."""
    try:
        options, _ = parse(build_parser(), argv)
        for name in ("seeds", "jobs"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise ConfigError(f"--{name} {getattr(options, name)}: must be at least 1")
        experiment = Experiment(options.file, options.size, options.seeds, options.out)
        if options.list:
            list_arms(experiment)
        elif options.replot:
            experiment.draw()
            print(f"{experiment.out}/verdict.md")
        else:
            return run(experiment, options)
    except (ConfigError, DataError, KeyboardInterrupt) as e:
        return fail(e)
    except checkpoint.CheckpointError as e:
        fail(e)
        return 1
    except BrokenPipeError:                             # the reader of --list, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
