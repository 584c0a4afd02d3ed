"""One model trained by several workers that seldom meet: DiLoCo (Douillard et al. 2311.08105) and
elastic averaging (Zhang et al. 1412.6651).

    python -m grow.outer configs/quick.toml --workers 4 --every 50 --out runs/diloco
        in one process, the workers take turns
    torchrun --standalone --nproc_per_node=4 -m grow.outer configs/quick.toml --workers 4
        one worker a process; the processes exchange nothing but what a meeting needs
    python -m grow.outer --out runs/diloco --resume
        to the last bit what one run would be

Every worker is a copy of the model, the centre. It takes H = --every steps on its own part of each
batch (train.batch_size is that of all workers together) with its own inner optimizer, whose state
stays with it; the learning rate's schedule runs over all steps. Then they meet:

- nesterov (DiLoCo, algorithm 1): the mean of old minus new weights is the gradient of an outer SGD
  with Nesterov's momentum, which moves the centre; all workers go on from there.
- average: the same with rate 1 and no momentum, so that the centre is the workers' mean.
- elastic (EASGD): each worker moves a share alpha towards the centre, and the centre moves by the
  sum of these moves the other way. The workers stay apart. There is no penalty in the loss besides.
  With --inner sgd, whose momentum is Nesterov's, this is EAMSGD.

At every meeting the buffers that training changes (biases of loss-free balancing, prices,
BatchNorm) become their mean over the workers, in the centre and in all of them. What is frozen
stays.

The run folder is an ordinary one of the centre. ckpt_last.pt also holds each worker's optimizer
state and, where they stay apart, its weights. It is written after a meeting alone: a signal waits
for the next one, and a run that was killed goes on from the last one saved. log.csv has a row a
step, means over the workers (of the first process); between two meetings the centre stands still.
"""
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from torch import nn

from grow.workers import Team
from model import GPT, check, load_config
from routers import help_text
from runtime import parallel
from runtime.config import parse
from runtime.ending import Ending, program, quoted
from runtime.report import Log, StopSignal, progress, speaker
from runtime.start import build_parser, make_ready, open_parsed
from settings import ConfigError
from train import build, keep_best, sample_of


class Options(NamedTuple):
    """How the workers work together; part of what a run is, and so of its ancestry."""
    workers: int                        # k
    every: int                          # H, inner steps between two meetings
    outer: str                          # nesterov, average or elastic
    outer_lr: float                     # of nesterov
    outer_momentum: float
    alpha: float                        # of elastic
    inner: str                          # adamw or sgd
    inner_momentum: float               # of sgd
    split: str                          # shards or domains


DEFAULTS = dict(workers=4, every=50, outer="nesterov", outer_lr=0.7, outer_momentum=0.9, alpha=None,
                inner="adamw", inner_momentum=0.9, split="shards")
# Options that one choice alone reads.
READ_WITH = dict(outer_lr=("outer", "nesterov"), outer_momentum=("outer", "nesterov"),
                 alpha=("outer", "elastic"), inner_momentum=("inner", "sgd"))


# --- a run ---


def train_apart(team, valid, out, say, bar, log, stop):
    """Rounds of inner steps and a meeting, until max_steps or a signal. Evaluates and saves after
    the meetings in whose rounds it became due."""
    centre, every = team.centre, team.options.every
    t = centre.config.train

    def passed(period):
        return period and centre.done // period > (centre.done - every) // period

    if centre.done == 0:
        row, news = keep_best(centre, centre.evaluate(valid), out)
        log.write([dict(step=0, tokens=0, seconds=0.0)], **row)
        say(news)
    ends = centre.done >= t.max_steps
    while not ends:
        for _ in range(every):
            log.rows.append(team.step())
            bar.update()
        team.meet()
        rows, row, news = log.settle(), dict(bytes_sent=team.sent), ""
        ends = centre.done >= t.max_steps or stop.asked()
        # what is evaluated is the centre
        if centre.done >= t.max_steps or passed(t.eval_every):
            more, news = keep_best(centre, centre.evaluate(valid), out)
            row |= more | team.worker_loss(valid)
        bar.set_postfix_str(f"loss {rows[-1]['loss']:.3f}, "
                            f"{rows[-1]['tokens_per_second']:,.0f} tokens/s", False)
        log.write(rows, **row)
        if ends or passed(t.save_every or t.eval_every):
            team.save(out)
        if news:
            say(news)
        if passed(t.sample_every) and not ends:
            say(sample_of(centre))
        log.since = time.perf_counter()


def finish(team, out, stop, say):
    """The last words: a sample, the result, what was sent, what to do next."""
    centre, resume = team.centre, f"{program('grow.outer')} --out {quoted(out)} --resume"
    if stop.asked():
        return say(f"stopped by {stop.name} after step {centre.done}; everything is saved. Go on "
                   f"with:\n  {resume}")
    if sample := sample_of(centre):
        say(f"--- sample ---\n{sample}\n--------------")
    said = f"best validation loss {centre.best:.4f} nats a token; {centre.done} steps took "\
           f"{centre.seconds:.0f} s"
    if team.bytes:
        said += (f"\neach worker sent {team.sent / 2**20:,.1f} MiB in "
                 f"{centre.done // team.options.every} meetings; a gradient at every step would be "
                 f"about {team.options.every} times that")
    say(f"{said}. Next:\n  {program('sample.py')} {quoted(out)}\n"
        f"  {program('lab.plots')} {quoted(out)}\n"
        f"  {resume} --train.max_steps {2 * centre.config.train.max_steps}")


# --- the program ---


def add_options(parser):
    """Makes train.py's parser this program's."""
    parser.prog = "python -m grow.outer"
    parser.description = ("Train one model by several workers that meet every so many steps: "
                          "DiLoCo and elastic averaging. Settings are those of train.py; the run "
                          "folder is runs/<config name>-outer if --out does not say.")
    parser.usage = "%(prog)s [CONFIG.toml] [--workers K] [--every H] " \
                   "[--outer nesterov|average|elastic] [--out DIR] [--resume | --overwrite] " \
                   "[--quiet] [--section.key VALUE ...]"
    for name, kind, choices, meaning in [
            ("workers", int, None, "k, among which train.batch_size is cut (default: 4)"),
            ("every", int, None, "steps H between two meetings (DiLoCo: 500; default: 50)"),
            ("outer", str, ["nesterov", "average", "elastic"], "what they do when they meet "
             "(default: nesterov, which is DiLoCo)"),
            ("outer_lr", float, None, "nesterov: rate of the outer step (default: 0.7)"),
            ("outer_momentum", float, None, "nesterov: its momentum (default: 0.9)"),
            ("alpha", float, None, "elastic: share of its way to the centre that a worker goes "
             "(default: 0.9 / K)"),
            ("inner", str, ["adamw", "sgd"], "optimizer of a worker (default: adamw)"),
            ("inner_momentum", float, None, "sgd: Nesterov's momentum (default: 0.9)"),
            ("split", str, ["shards", "domains"], "what a worker reads: its share of every batch, "
             "or one corpus of data.name alone (default: shards)")]:
        parser.add_argument(f"--{name}", type=kind, choices=choices, help=meaning,
                            metavar=name.upper() if not choices else None)
    return parser


def options_of(given, config, saved):
    """The Options that a command line gives, {name: value or None}, beside the defaults or those of
    the run that goes on. Raises ConfigError."""
    given = {name: given[name] for name in Options._fields if given[name] is not None}
    known = saved.header["ancestry"] if saved else DEFAULTS
    known = {name: known[name] for name in Options._fields}
    options = Options(**known | given)
    for name, value in given.items():
        if saved and value != known[name]:
            raise ConfigError(f"--{name} {value}: but this run was started with {known[name]}; "
                              "start a new run with --out")
        choice, needed = READ_WITH.get(name, ("workers", options.workers))
        if getattr(options, choice) != needed:
            raise ConfigError(f"--{name} {value} has no effect: it is read with --{choice} "
                              f"{needed}")
    check_ranges(options)
    if options.alpha is None:
        options = options._replace(alpha=0.9 / options.workers)
    check_fit(options, config)
    return options


def check_ranges(o):
    """Raises ConfigError for an option outside its range."""
    for name, fine, rule in [
            ("workers", 1 <= o.workers < 2**20, "at least 1"),
            ("every", 1 <= o.every < 2**40, "at least 1"),
            ("outer_lr", 0 < o.outer_lr < float("inf"), "above 0 and finite"),
            ("outer_momentum", 0 <= o.outer_momentum < 1, "at least 0 and below 1"),
            ("alpha", o.alpha is None or 0 <= o.alpha <= 1, "at least 0 and at most 1"),
            ("inner_momentum", 0 <= o.inner_momentum < 1, "at least 0 and below 1")]:
        if not fine:
            raise ConfigError(f"--{name} {getattr(o, name)} must be {rule}")


def check_fit(options, config):
    """Raises ConfigError for options that do not go with the settings or the processes."""
    k, H, t, n = options.workers, options.every, config.train, len(config.data.names)
    if k % parallel.world():
        raise ConfigError(f"--workers {k} cannot be shared by {parallel.world()} processes")
    if t.batch_size % (t.grad_accum * k):
        config.fail("train.batch_size", f"cannot be cut into train.grad_accum = {t.grad_accum} x "
                    f"{k} workers")
    if t.max_steps % H:
        config.fail("train.max_steps", f"is no multiple of --every {H}, and the last round would "
                    f"be cut; take {max(1, t.max_steps // H) * H}")
    if options.split == "domains" and (k % n or config.data.weights):
        config.fail("data.weights" if config.data.weights else "data.name", "does not go with "
                    f"--split domains, where each of {n} corpora has as many of {k} workers")
    if parallel.world() > 1 and t.parallel != "ddp":
        config.fail("train.parallel", "cuts the model that each worker has as a whole: use ddp")


def open_outer(argv, held):
    """(config, run folder, Checkpoint to go on from or None, quiet, Options) of a command line.
    Raises ConfigError."""
    options, overrides = parse(add_options(build_parser({"ffn.router": help_text()})), argv)
    if options.out is None:
        options.out = str(Path("runs") / f"{Path(options.config or 'quick').stem}-outer")
    config, out, saved, quiet = open_parsed(options, overrides, held, load_config, check)
    if saved and saved.header["ancestry"]["kind"] != "outer":
        raise ConfigError(f"{out} is a run of one worker, with which `{program('train.py')} --out "
                          f"{quoted(out)} --resume` goes on; or start from it with "
                          "--train.init_from")
    return config, out, saved, quiet, options_of(vars(options), config, saved)


def replicas_of(options):
    """A function of a Config that makes all models which one process holds, to see whether they fit
    into memory."""
    n = 1 + options.workers // parallel.world()
    return lambda config: nn.ModuleList(GPT(config) for _ in range(n))


def main(argv=None):
    """The program; returns its exit status: 0 done, 1 a failure, 2 a mistake in what was asked
    for."""
    with Ending(parallel.first, output=False) as end, parallel.processes(), ExitStack() as held:
        config, out, saved, quiet, options = parallel.from_rank0(lambda: open_outer(argv, held))
        config, origin, folders, tokenizer = parallel.from_rank0(
            lambda: make_ready(config, saved, quiet, check, replicas_of(options)))
        quiet = quiet or parallel.rank() > 0
        say = speaker(quiet)
        centre, valid = build(config, origin, folders, tokenizer, out, saved, say)
        centre.ancestry |= dict(kind="outer", **options._asdict())
        team = Team(centre, folders, options)
        say(f"workers    {team}")
        with Log(out / "log.csv", centre, say) as log, StopSignal() as stop, \
                progress(centre, quiet) as bar:
            train_apart(team, valid, out, say, bar, log, stop)
        finish(team, out, stop, say)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
