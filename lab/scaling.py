"""Scaling laws of routed models: what the papers' predict, and fits of both to our own runs.

    python -m lab.scaling krajewski --flops 1e20
    python -m lab.scaling clark --router s_base --params 1.3e9 --experts 64
    python -m lab.scaling fit results/fine_grained/cpu/runs.csv --law krajewski

The laws are in lab/laws/laws.py, the columns that a fit reads in lab/laws/fit_runs.py, how it is
done and what its intervals mean in lab/laws/fit.py.
"""
import argparse
import csv
import math
import sys
from fnmatch import fnmatchcase

from lab.laws.fit_runs import FitError, fits_of
from lab.laws.laws import (C_F, C_R, CLARK, CLARK_CUTOFF, CLARK_NAMES, CLARK_REFIT, KRAJEWSKI,
                           clark_loss, compute_optimal, dense_flops, dense_optimal,
                           effective_params, saturated_experts)
from runtime.config import Parser, nearest, parse
from runtime.ending import Ending
from settings import ConfigError

CLARK_TEXT = "log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d   (L in nats per token)"
SATURATION = "1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max   (Ê: the experts that count)"
KRAJEWSKI_TEXT = "L = c + (g / G^gamma + a) / N^alpha + b / D^beta   (nats per token)"


def amount(x):
    """A number for people: 3.91 billion."""
    for size, name in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million"),
                       (1e3, " thousand")):
        if x >= size:
            return f"{x / size:.3g}{name}" if x < 1e15 else f"{x:.3g}"
    return f"{x:.3g}"


def coefficients(law):
    """name value, name value, ..."""
    return ", ".join(f"{name} {value:g}" for name, value in law._asdict().items())


# ---- what the papers predict ----

def krajewski_text(flops, E=64, c_r=C_R):
    """What Krajewski's law says about a training budget, and how a dense model compares."""
    best, dense, own = compute_optimal(flops, E, c_r), dense_optimal(flops), KRAJEWSKI[1]
    sizes = [1, 2, 4, 8, 16, 32, 64]
    losses = [compute_optimal(flops, E, c_r, [G]).loss for G in sizes]
    ratio = dense_flops(best.loss) / flops
    return f"""\
Krajewski et al. 2024 (arXiv 2402.07871): N total parameters without embeddings, D tokens, \
G granularity
  {KRAJEWSKI_TEXT}
  E = {E}: {coefficients(KRAJEWSKI[E])}
  FLOPs = (12 d² c_f + d E G c_r) D n_blocks,  N = d² (8 E + 4) n_blocks,  d = 64 n_blocks,
          c_f = {C_F}, c_r = {c_r:g} (routing)

{flops:g} FLOPs are best spent on
  N = {amount(best.N)}, of which a token passes {amount(best.N * 12 / (8 * E + 4))} \
(d about {best.d_model:.0f}, {best.n_blocks:.0f} blocks)
  D = {amount(best.D)} tokens
  G = {best.G}: {E * best.G} experts of 1/{best.G} of the width, {best.G} for each token
  L = {best.loss:.3f} nats per token

  other G, each with its own best N and D
    G  {"".join(f"{G:8d}" for G in sizes)}
    L  {"".join(f"{loss:8.3f}" for loss in losses)}

Dense, with its own fit, L = {own.c:g} + {own.a:g} / N^{own.alpha:g} + {own.b:g} / D^{own.beta:g}:
  the same FLOPs give N = {amount(dense.N)}, D = {amount(dense.D)} tokens, L = {dense.loss:.3f}
  the loss of the mixture takes {ratio:.0f} times the FLOPs (paper: 20 at 1e20, over 40 beyond 1e25)
Fitted to models of 129 million to 3.7 billion parameters on 16 to 130 billion tokens of C4: \
all else is
extrapolation."""


def clark_text(router, N, E):
    """What Clark's law says about E experts in the place of a dense model of N parameters."""
    law, refit = CLARK[router], CLARK_REFIT[router]
    size, loss, dense = effective_params(law, N, E), clark_loss(law, N, E), clark_loss(law, N, 1)
    return f"""\
Clark et al. 2022 (arXiv 2202.01169), Eq. 1: N parameters of the dense model, E experts, \
one for each token
  {CLARK_TEXT}
  {SATURATION}
  {router}: {coefficients(law)}

N = {amount(N)} with E = {E:g} experts
  Ê = {saturated_experts(law, E):.1f}: E after saturation, from E_start = {law.E_start:g} \
(one expert) to \
E_max = {law.E_max:g} (infinitely many)
  L = {loss:.3f} nats per token; dense, E = 1: {dense:.3f}
  effective parameters {amount(size)}: the dense model of equal loss has {size / N:.3g} times N

With coefficients refitted to the final losses of the paper's released curves
  ({coefficients(refit)}):
  Ê = {saturated_experts(refit, E):.1f}, L = {clark_loss(refit, N, E):.3f}, effective parameters \
{amount(effective_params(refit, N, E))}
Beyond N_cutoff = {amount(CLARK_CUTOFF[router])} (paper) experts do not help, at its \
130 billion tokens.
Fitted to N = 15 million to 1.3 billion, E up to 512: all else is extrapolation."""


# ---- fits ----

def fit_text(fit, title, published=None):
    """Coefficients with intervals beside the published ones, and errors."""
    # What was fitted: how many runs, over which sizes.
    grid = "; ".join(f"{name} {describe(x)}" for name, x in fit.inputs.items())
    left_out = f" ({fit.left_out} more without a val_loss)" if fit.left_out else ""
    lines = [title, f"  {len(fit.loss)} runs{left_out}; {grid}",
             f"  {'':8} {'fitted':>10}   {'95 % interval':^24} {'published':>10}"]
    # A line for each coefficient.
    for name, (low, high) in fit.interval.items():
        value = getattr(fit.law, name)
        paper = f"{getattr(published, name):.4g}" if published else "-"
        note = "" if fit.identified[name] else "   not identified"
        lines.append(f"  {name:8} {value:10.4g}   {low:10.4g} to {high:<10.4g} {paper:>10}{note}")
    # The errors.
    digits = 3 if fit.unit == "nats" else 4
    own, out, without = (f"{e:.{digits}f}" for e in (fit.rmse, fit.held_out, fit.held_out_without))
    lines += [f"  rms error in {fit.unit}: {own} over these runs; {out} over runs held out, "
              f"{fit.folds}",
              f"  at a time ({without} without the law's term in {list(fit.inputs)[-1]})"]
    if not all(fit.identified.values()):
        lines.append("  not identified: these runs say too little, so claim nothing (see "
                     "lab/laws/fit.py)")
    return "\n".join(lines)


def describe(x):
    low, high = amount(x.min()), amount(x.max())
    return low if low == high else f"{low} to {high}"


def fit_texts(rows, law, floor=0.0):
    """The texts of the fits of a law to rows, one for each router if it is Clark's. Raises
    FitError."""
    for router, fit in fits_of(law, rows, floor).items():
        if law == "krajewski":
            yield fit_text(fit, KRAJEWSKI_TEXT, KRAJEWSKI[64])
        else:
            yield fit_text(fit, f"{CLARK_TEXT}\n{SATURATION}\nrouter {router or '(not given)'}",
                           CLARK.get(CLARK_NAMES.get(router)))


def read_rows(path, only=()):
    """Rows of a runs.csv, of those that match each of `only`: COLUMN=VALUE or
    COLUMN=PATTERN,PATTERN, where * in a pattern stands for any text. Raises FitError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise FitError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}; `python -m "
                       f"lab.experiment` writes runs.csv") from None
    if not rows:
        raise FitError(f"{path}: has no runs")
    # Each condition keeps the rows that fit it.
    for text in only:
        column, _, value = text.partition("=")
        if column not in rows[0]:
            hint = nearest(column, rows[0])
            raise FitError(f"--only {text}: {path} has no column {column}{hint}")
        known = sorted({row[column] or "" for row in rows})
        rows = [row for row in rows if any(fnmatchcase(row[column] or "", v)
                                           for v in value.split(","))]
        if not rows:
            raise FitError(f"--only {text}: no run has it; {column} is {', '.join(known[:8])}")
    return rows


# ---- the program ----

def build_parser():
    parser = Parser(prog="python -m lab.scaling", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True, metavar="{krajewski,clark,fit}")
    best = what.add_parser("krajewski",
                           help="the best N, D and G for a training budget, beside dense")
    best.add_argument("--flops", type=float, required=True, help="training budget in FLOPs")
    best.add_argument("--expansion", type=int, default=64, choices=[64, 16],
                      help="E = N_MoE / N_ff, of the "
                      "two published fits (default 64)")
    best.add_argument("--routing-cost", type=float, default=C_R,
                      help="c_r, FLOPs per token, d_model and "
                      "expert (default 14; the paper tries 6 to 20)")
    size = what.add_parser("clark", help="what E experts are worth in a dense model's place")
    size.add_argument("--router", required=True, help=f"{', '.join(CLARK)}")
    size.add_argument("--params", type=float, required=True,
                      help="N, parameters of the dense model")
    size.add_argument("--experts", type=float, required=True, help="E, experts of a layer")
    fit = what.add_parser("fit", help="a law fitted to a runs.csv")
    fit.add_argument("runs", metavar="RUNS_CSV")
    fit.add_argument("--law", required=True, choices=["clark", "krajewski"])
    fit.add_argument("--only", action="append", default=[], metavar="COLUMN=VALUE",
                     help="fit these rows only, as in arm=tokens-*,flops-*; may be given several "
                          "times")
    fit.add_argument("--floor", type=float, default=0.0,
                     help="krajewski: entropy of the data in nats per "
                     "token, below which c cannot be (default 0)")
    return parser


def check_range(option, value, low, high):
    if not low <= value <= high:                        # NaN fails too
        raise ConfigError(f"{option} {value:g}: must be between {low:g} and {high:g}")


def texts(options):
    """What to print. Raises ConfigError, FitError."""
    if options.what == "krajewski":
        check_range("--flops", options.flops, 1e12, 1e30)
        check_range("--routing-cost", options.routing_cost, 0, 1000)
        return [krajewski_text(options.flops, options.expansion, options.routing_cost)]
    if options.what == "clark":
        if options.router not in CLARK:
            raise ConfigError(f"--router {options.router}: Clark's routers are {', '.join(CLARK)}"
                              f"{nearest(options.router, CLARK)}")
        check_range("--params", options.params, 1e3, 1e15)
        check_range("--experts", options.experts, 1, 1e6)
        return [clark_text(options.router, options.params, options.experts)]
    check_range("--floor", options.floor, 0, math.log(1e9))
    return fit_texts(read_rows(options.runs, options.only), options.law, options.floor)


def main(argv=None):
    """Prints the answer; returns the exit status."""
    with Ending() as end:
        options, _ = parse(build_parser(), argv)
        for text in texts(options):
            print(text)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
