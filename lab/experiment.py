"""A paper's experiment: its runs, a table, a figure and a verdict.

    python -m lab.experiment configs/papers/NAME.toml [--size cpu|gpu] [--seeds 3] [--only ARM ...]
                             [--jobs N] [--out results/NAME] [--list] [--replot]

Runs go to runs/NAME/SIZE/ARM-SEED. What is finished there, or stands in the results with the same
settings, is not run again, and a call that was stopped or killed goes on where it was. The results
go to results/NAME/SIZE:

    runs.csv        a row per arm and seed
    tuning.csv      the same of the runs that chose settings, where there are any
    curves.csv      the runs' losses over training, thinned
    routing.csv     which corpus went to which expert, where there are few experts
    figure.png, verdict.md

The format of the experiment files: lab/papers/spec.py; how claims are judged:
lab/papers/verdict.py; a table of all verdicts: python -m lab.papers.overview.
"""
import argparse
import sys
from pathlib import Path

from lab.drawing.logs import CURVE
from lab.papers.arms import expand, shown, with_ancestors
from lab.papers.expressions import Table, derive
from lab.papers.figure import check_panels, experiment_figure
from lab.papers import tuning
from lab.papers.jobs import is_done, is_meant, is_trained, lacks_speed, read_record
from lab.papers.page import verdict_page
from lab.papers.runner import Runner, cores, prepare_corpora
from lab.papers.spec import SIZES, read_experiment
from lab.papers.tables import read_table, write_table
from lab.papers.verdict import concerns, read_claims
from runtime import checkpoint
from runtime.config import Parser, parse
from runtime.ending import Ending
from settings import ConfigError

MEASURED = ["val_loss", "val_bpb", "active_params", "total_params", "flops_per_token", "tokens",
            "tokens_total", "tokens_per_second", "peak_mib", "max_expert_share", "min_expert_share",
            "dropped", "experts_used", "unevenness", "entropy", "specialisation", "diagonal",
            "train_loss", "train_dropped", "train_max_expert_share"]
LAST = ["seconds", "commit", "device", "threads", "torch", "python", "corpus", "key"]


class Experiment:
    """An experiment file at one size: its arms, and the tables of their results."""

    def __init__(self, path, size, seeds=None, out=None):
        self.path, self.size = path, size
        self.spec = read_experiment(path)
        self.out = Path(out or Path("results") / Path(path).stem) / size
        self.wanted = range(seeds) if seeds else None
        # The runs that choose settings, and the arms with what those have chosen so far.
        self.tried = tuning.candidates(self.spec, path, size)
        self.arms = self.chosen_arms()
        # Claims and panels may name arms of any size, so that all sizes are expanded.
        names = {arm.name for s in SIZES for arm in expand(self.spec, path, s, self.wanted)}
        self.claims = read_claims(self.spec, names, path)
        check_panels(self.spec, names, path)
        if not self.arms:
            raise ConfigError(f"{path}: has no arm at size {size}")
        self.seeds = sorted({arm.seed for arm in self.arms})
        self.failed = {}

    def chosen_arms(self):
        """The arms, those that are tuned with what the rows of their candidates choose."""
        chosen = tuning.choose(self.tried, self.tuning_rows())
        return expand(self.spec, self.path, self.size, self.wanted, chosen=chosen)

    def recorded(self, arms, table="runs.csv"):
        """Those of the arms that have a row in a table, measured with the settings and on the text
        of today. An arm whose run folder holds the training but another evaluation, say on other
        corpora, is not among them."""
        old = self.rows_of(table)
        known = [arm for arm in arms if is_meant(arm, old.get((arm.name, arm.seed), {}))]
        records = {arm.label: read_record(arm) for arm in known}
        return [arm for arm in known
                if is_done(arm, records[arm.label]) or not is_trained(arm, records[arm.label])]

    def rows_of(self, table):
        """{(arm, seed): row} of a table of the results."""
        return {(row["arm"], row["seed"]): row for row in read_table(self.out / table)}

    def missing(self, arms, table="runs.csv"):
        """Those of the arms that must run: neither their run folder nor the table has their result,
        or such an arm comes from them and their run folder does not have their weights."""
        recorded = {arm.label for arm in self.recorded(arms, table)}
        needed, found = set(), []
        for arm in reversed(arms):                      # children come after their parents
            if is_done(arm, read_record(arm)) or arm.label in recorded - needed:
                continue
            found.append(arm)
            needed |= {parent.label for parent in arm.parents}
        return found[::-1]

    def speed_seeds(self):
        """Of how many seeds the speed is measured."""
        return int(self.spec.get("speed", 0))

    def nothing_to_run(self, arms, tried):
        """Whether the results hold all that a call could add to them."""
        return (len(self.recorded(arms)) == len(arms) and not lacks_speed(arms, self.speed_seeds())
                and len(self.recorded(tried, tuning.TABLE)) == len(tried)
                and (self.out / "verdict.md").exists())

    def tuning_rows(self):
        """The rows of the candidates that have run: from their run folders, else from the table."""
        old, rows = self.rows_of(tuning.TABLE), []
        for arm in self.tried:
            record, row = read_record(arm), old.get((arm.name, arm.seed), {})
            if is_done(arm, record):
                rows.append(self.row(arm, record))
            elif is_meant(arm, row):
                rows.append(row)
        return rows

    def collect_tuning(self):
        """Writes tuning.csv."""
        rows = self.tuning_rows()
        write_table(self.out / tuning.TABLE, rows, self.columns(rows, self.tried))

    def tuning_lines(self):
        """What verdict.md says of the learning rates, lines of markdown."""
        return tuning.tuning_lines(self.arms, self.tried, self.tuning_rows())

    def collect(self):
        """Writes runs.csv, curves.csv and routing.csv: the rows of finished runs; of the others the
        rows that the files already hold, if they were measured with the same settings."""
        # What the files hold already, by arm and seed.
        old = self.rows_of("runs.csv")
        kept = {"curves": {}, "routing": {}}
        for name, groups in kept.items():
            for row in read_table(self.out / f"{name}.csv"):
                groups.setdefault((row["arm"], row["seed"]), []).append(row)
        rows, curves, paths = [], [], []
        for arm in self.arms:
            record = read_record(arm)
            place = arm.name, arm.seed
            if is_done(arm, record):
                rows.append(self.row(arm, record))
                who = dict(arm=arm.name, seed=arm.seed)
                curves += [who | point for point in record["curve"]]
                paths += [who | dict(layer=layer, corpus=corpus, expert=e, share=share)
                          for layer, corpus, shares in record["row"].get("routing", ())
                          for e, share in enumerate(shares)]
            elif is_meant(arm, old.get(place, {})):
                rows.append(old[place])
                curves += kept["curves"].get(place, [])
                paths += kept["routing"].get(place, [])
        # Columns that depend on other rows are computed anew.
        for row in rows:
            row["tokens_total"] = self.tokens_total(row, rows)
        derive(self.spec.get("metrics", {}), rows, curves, self.path)
        write_table(self.out / "runs.csv", rows, self.columns(rows, self.arms))
        write_table(self.out / "curves.csv", curves, ["arm", "seed", *CURVE])
        if paths:
            write_table(self.out / "routing.csv", paths, list(paths[0]))

    def row(self, arm, record):
        """The row of runs.csv of a finished arm."""
        measured = {k: v for k, v in record["row"].items()
                    if k not in ("routing", "step", "seconds")}
        if arm.make:
            measured["tokens"] = 0
        who = dict(arm=arm.name, seed=arm.seed, size=self.size) | arm.columns
        return who | measured | record.get("speed", {}) | dict(
            seconds=record["seconds"], commit=record["commit"], threads=record.get("threads"),
            python=record.get("python"), corpus=record.get("corpus"), key=arm.key)

    def tokens_total(self, row, rows):
        """Training tokens of an arm and of all that it comes from, each once; None if one is
        missing."""
        own = {(r["arm"], r["seed"]): r.get("tokens") or 0 for r in rows}
        arm = next(arm for arm in self.arms if (arm.name, arm.seed) == (row["arm"], row["seed"]))
        # The tokens of the arm and of each ancestor, by name and seed, so that no one counts twice.
        family, more = {}, [arm]
        while more:
            one = more.pop()
            family[one.name, one.seed] = own.get((one.name, one.seed))
            more += one.parents
        return None if None in family.values() else sum(family.values())

    def columns(self, rows, arms):
        """Columns of a table: who, the grid, what is always measured, the rest, where it was
        measured."""
        first = ["arm", "seed", "size", *dict.fromkeys(c for arm in arms for c in arm.columns)]
        found = list(dict.fromkeys(c for row in rows for c in row))
        corpora = [c for c in found if c.startswith("val_loss_")]
        rest = [c for c in found if c not in {*first, *MEASURED, *corpora, *LAST}]
        return list(dict.fromkeys(first + MEASURED[:2] + corpora + MEASURED[2:] + rest + LAST))

    def draw(self):
        """Writes figure.png and verdict.md from the tables."""
        names = {arm.name for arm in self.arms}
        rows, curves, paths = (
            [row for row in read_table(self.out / f"{table}.csv") if row["arm"] in names]
            for table in ("runs", "curves", "routing"))
        if not rows:
            raise ConfigError(f"{self.out}/runs.csv: holds no finished run to draw; run the "
                              "experiment first")
        title = self.spec.get("title", Path(self.path).stem)
        table = Table(rows, curves)
        # The verdict.
        here = {key: claim for key, claim in self.claims.items()
                if concerns(claim, self.size, names)}
        page = verdict_page(f"{title} ({self.size})", self.spec, here, rows, table, self.arms,
                            self.failed, self.tuning_lines())
        checkpoint.write_text(self.out / "verdict.md", page)
        # The figure.
        figure = experiment_figure(self.spec, here, rows, curves, paths)
        if figure:
            figure.savefig(self.out / "figure.part", format="png")
            (self.out / "figure.part").replace(self.out / "figure.png")


# --- the program ---

def list_arms(experiment):
    """Prints every arm's commands, and whether it is done."""
    todo = experiment.missing(experiment.tried, tuning.TABLE)
    todo = {arm.label for arm in todo + experiment.missing(experiment.arms)}
    for arm in experiment.tried + experiment.arms:
        if arm.waits:
            print(f"# {arm.label}: to do, when its tuning has chosen its settings")
            continue
        state = "to do" if arm.label in todo else "done"
        print(f"# {arm.label}: {state}")
        print(shown(arm.arguments()))
        print(shown(arm.evaluate_arguments()))


def asked_for(experiment, options):
    """(arms, candidates that choose their settings) of --only."""
    arms = experiment.arms
    if options.only:
        arms = with_ancestors(arms, options.only, experiment.path)
    names = {arm.name for arm in arms}
    return arms, [arm for arm in experiment.tried if arm.chooses[0] in names]


def run_arms(experiment, arms, table, jobs, quiet):
    """Runs those of the arms whose result is missing, each collected as it ends; the Runner, at the
    end of its work."""
    # Once more after the corpora: a text that was just prepared may be another than that of a row.
    for _ in range(2):
        todo = experiment.missing(arms, table)
        prepare_corpora(todo, quiet)
    todo = experiment.missing(arms, table)
    for arm in todo:
        arm.folder.mkdir(parents=True, exist_ok=True)
    choosing = table == tuning.TABLE
    collect = experiment.collect_tuning if choosing else experiment.collect
    with Runner(arms, todo, jobs, collect, quiet) as runner:
        if runner.run() and not choosing:
            runner.measure_speed(experiment.speed_seeds())
    collect()
    return runner


def run(experiment, options):
    """Runs what is missing; returns the exit status."""
    arms, tried = asked_for(experiment, options)
    if experiment.nothing_to_run(arms, tried):
        if not options.quiet:
            print(f"nothing to run: {experiment.out}/verdict.md")
        return 0
    default = cores() if options.size == "cpu" else 1
    jobs = options.jobs or experiment.spec.get(options.size, {}).get("jobs") or default
    with checkpoint.Lock(arms[0].folder.parent):
        runners = []
        # First what chooses settings. An arm of which a candidate failed waits on.
        if tried:
            runners.append(run_arms(experiment, tried, tuning.TABLE, jobs, options.quiet))
            experiment.arms = experiment.chosen_arms()
            arms = [arm for arm in asked_for(experiment, options)[0] if not arm.waits]
        if not any(runner.stopped for runner in runners):
            runners.append(run_arms(experiment, arms, "runs.csv", jobs, options.quiet))
    for runner in runners:
        experiment.failed |= runner.failed
    if stopped := runners[-1].stopped:
        print(f"stopped by {stopped}; the same command goes on", file=sys.stderr)
        return 1
    if read_table(experiment.out / "runs.csv"):
        experiment.draw()
        if not options.quiet:
            print(f"{experiment.out}/verdict.md")
    return 1 if experiment.failed else 0


def build_parser():
    parser = Parser(prog="python -m lab.experiment", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.toml", help="an experiment: ls configs/papers")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, metavar="N",
                        help="seeds 0 to N - 1 of every arm (default: the file's)")
    parser.add_argument("--only", nargs="+", metavar="ARM",
                        help="these arms (* fits anything) and what "
                        "they come from")
    parser.add_argument("--jobs", type=int, metavar="N",
                        help="runs at a time, each on an equal part of "
                        "the cores (default: the file's; else cpu: one per core, gpu: 1)")
    parser.add_argument("--out", metavar="DIR",
                        help="results (default: results/NAME); the size is added")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--replot", action="store_true",
                        help="figure and verdict again, from the tables")
    return parser


def main(argv=None):
    """The program; returns its exit status: 0 done, 1 an arm failed or it was stopped, 2 a mistake
    in what was asked for."""
    with Ending() as end:
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
            end.status = run(experiment, options)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
