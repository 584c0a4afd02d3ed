"""What was measured, on one page: `python -m lab.papers.overview` writes results/README.md, and
prints the sentence that README.md has of it.

Every claim of every verdict.md with its verdict, word for word, then the timings of results/*.json
and *.csv: nothing on the page is typed by hand, so that it cannot differ from what was measured.
"""
import json
import math
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from lab.papers.spec import SIZES
from lab.papers.student import critical
from lab.papers.tables import read_table
from lab.papers.verdict import (AGAINST, FOR, HELD, LEVEL, NOT, NOTHING, UNDECIDED,
                                plain_verdict)
from runtime import checkpoint
from runtime.config import Parser, parse
from runtime.ending import Ending
from settings import ConfigError

# a line of the table in a verdict.md
CLAIM = re.compile(r"^\| (\S+) \| (.+) \| (\*\*.+\*\*.*) \| (\S+) \|$", re.MULTILINE)
NEGATIVE_FIRST = (NOT, AGAINST, UNDECIDED, FOR, HELD, NOTHING)
DTYPES = ("float32", "bfloat16")
MOE_PATHS = {"loop": "a loop over the experts", "padded": "padded slots",
             "grouped_mm": "sort, F.grouped_mm",
             "grouped": "what `auto` takes on a CPU"}


class Claim(NamedTuple):
    """A line of the table in a verdict.md."""
    key: str
    says: str
    words: str                  # the verdict as it is written: **held**, reported only
    p: float                    # NaN where no t test decided

    @property
    def verdict(self):
        """One of VERDICTS."""
        return plain_verdict(self.words.split("**")[1])


class Verdict(NamedTuple):
    """One verdict.md."""
    folder: str                 # of results/, with the size: mixtral/cpu
    title: str
    claims: list                # of Claim, negative ones first
    minutes: float              # of all runs, added up

    def link(self, claim):
        """The address of a claim's numbers, from results/."""
        return f"{self.folder}/verdict.md#{claim.key.lower()}"


# --- the claims ---

def read_verdict(path, results):
    """The Verdict in a file."""
    text = path.read_text(encoding="utf-8")
    size = path.parent.name
    title = text.splitlines()[0].removeprefix("# ").removesuffix(f" ({size})")
    minutes = re.search(r"runs took ([\d.]+) minutes", text)
    claims = [Claim(key, says, words, math.nan if p == "-" else float(p))
              for key, says, words, p in CLAIM.findall(text)]
    claims.sort(key=lambda claim: NEGATIVE_FIRST.index(claim.verdict))
    return Verdict(path.parent.relative_to(results).as_posix(), title, claims,
                   float(minutes[1]) if minutes else 0.0)


def read_verdicts(results):
    return [read_verdict(path, results) for size in SIZES
            for path in sorted(results.glob(f"*/{size}/verdict.md"))]


def claims_table(verdicts):
    """A line for each claim, negative ones first; the first one of an experiment names it."""
    lines = ["| experiment | claim | verdict | p | what the paper says |", "|---|---|---|---|---|"]
    for verdict in verdicts:
        name = (f"[{verdict.title}]({verdict.folder}/verdict.md), "
                f"[figure]({verdict.folder}/figure.png), "
                f"{verdict.folder.rpartition('/')[2]}, {verdict.minutes:.0f} min")
        for claim in verdict.claims:
            p = "-" if math.isnan(claim.p) else f"{claim.p:.2g}"
            lines.append(f"| {name} | [{claim.key}]({verdict.link(claim)}) | {claim.words} | {p} | "
                         f"{claim.says} |")
            name = ""
    return lines


def in_short(verdicts):
    """README.md's sentence: how many claims have which verdict, and where those are that did not
    hold."""
    where = []
    for verdict in verdicts:
        failed = sum(claim.verdict == NOT for claim in verdict.claims)
        name, _, size = verdict.folder.partition("/")
        size = f", {size}" * (size != SIZES[0])
        if failed:
            where.append(f"[{name}{size}](results/{verdict.folder}/verdict.md) {failed}")
    counts = count(verdicts).replace(NOT, f"{NOT} ({', '.join(where)})")
    return f"Of {sum(len(verdict.claims) for verdict in verdicts)} claims: {counts}."


def count(verdicts):
    """"16 did not hold, 5 suggestive against, 19 undecided, 9 suggestive, 53 held"."""
    words = [claim.verdict for verdict in verdicts for claim in verdict.claims]
    return ", ".join(f"{words.count(word)} {word}" for word in NEGATIVE_FIRST if word in words)


def holm(ps, level=LEVEL):
    """Which of the tests {name: p} stand if the chance that any of them is wrong is to stay below
    level: the smallest p against level / n, the next against level / (n - 1), and so on until one
    fails (Holm 1979)."""
    standing = []
    for i, name in enumerate(sorted(ps, key=ps.get)):
        if ps[name] > level / (len(ps) - i):
            break
        standing.append(name)
    return standing


def chance(verdicts):
    """How many verdicts chance alone would bring, and which stand after Holm's correction."""
    tested = {(claim.verdict, f"[{claim.key}]({verdict.link(claim)})"): claim.p
              for verdict in verdicts for claim in verdict.claims if not math.isnan(claim.p)}
    n, standing = len(tested), holm(tested)
    first = LEVEL / max(1, n)

    def named(word):
        names = [name for found, name in standing if found == word]
        n_found = sum(found == word for found, _ in tested)
        listed = f" ({', '.join(names)})" * bool(names)
        return f"{len(names)} of {n_found} that {word}{listed}"

    return [f"A t test decided {n} of the claims, each at a level of 5 %. If all differences were "
            f"chance alone, at most {LEVEL / 2 * n:.1f} of them would have held, and "
            f"{LEVEL / 2 * n:.1f} or more would not have held, since one of several inequalities "
            f"is enough for that. Holm's correction over all {n} keeps the chance of a single "
            f"error below 5 %. It leaves {named(HELD)} and {named(NOT)}. It asks for p < "
            f"{first:.2g} at first, which is |t| > {critical(first, 2):.0f} with three seeds and "
            f"{critical(first, 4):.0f} with five: what it does not leave is not thereby wrong."]


RULE = """A paired t test over the seeds (three or more) decides an inequality. It has *held* if p <
.05 and the difference has the claimed sign, and *did not hold* if p < .05 and it has the other
sign. With .05 <= p < .2 it is *suggestive*, or *suggestive against*; else it is *undecided*. What
three seeds leave suggestive runs with two more and is judged by all five: chance alone decides such
an inequality in 8 % of all cases, not in 5 %. "About as good as" is an equivalence test, and "not
worse than" has its margin: 0.01 nats, one for all claims. A difference that is the same in all
seeds is compared as it is and has no p, nor has a law that is fitted to the runs. A claim of
several inequalities has the verdict of the worst. *Reported only* marks a claim that its file does
not expect to hold at this size; it is judged and counted like every other. *Added* or *changed
after the runs* marks one that is not as it was registered; the original is judged beside it. A
reason is given after the runs, and stands where runs have tested it. A claim's name leads to the
numbers behind it, and from there to the commands."""


def claims_part(results):
    """The first half of the page."""
    verdicts = read_verdicts(results)
    n_claims = sum(len(verdict.claims) for verdict in verdicts)
    minutes = sum(verdict.minutes for verdict in verdicts)
    return ["## The papers' claims", "",
            f"{n_claims} claims of {len(verdicts)} experiments: {count(verdicts)}. The runs took "
            f"{minutes / 60:.1f} hours, added up.", "",
            " ".join(RULE.split()), "", *chance(verdicts), "",
            *claims_table(verdicts), "",
            "`python -m lab.experiment configs/papers/NAME.toml` runs an experiment; NAME is its "
            "folder here. Its minutes are those of all its runs, added up."]


# --- the timings ---

def training(results):
    """Final losses of the shipped configs."""
    rows = read_table(results / "first-runs.csv")
    loss = {(row["arm"], row["seed"]): row["val_loss"] for row in rows if "val_loss" in row}
    gains = [loss["dense", seed] - loss["quick", seed] for arm, seed in loss if arm == "quick"]
    lines = ["### Training runs", "",
             "`python train.py configs/CONFIG.toml --train.seed SEED --data.seed SEED` "
             "([first-runs.csv](first-runs.csv)); the loss is the validation cross-entropy in nats "
             "per token.",
             "", "| config | seed | loss | active parameters | parameters | training tokens |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        shown = f"{row['val_loss']:.3f}" if "val_loss" in row else "not recorded"
        lines.append(f"| {row['arm']} | {row['seed']} | {shown} | {row['active_params']:,} | "
                     f"{row['total_params']:,} | {row['tokens']:,} |")
    return lines + ["",
                    "`quick`, a mixture, and `dense` do equal work for a token and see the same "
                    f"batches: the loss of `quick` is lower in {sum(gain > 0 for gain in gains)} "
                    f"of {len(gains)} seeds, by {sum(gains) / len(gains):.3f} nats on average."]


def read_bench(results, name):
    """(rows of a bench on the CPU that have a time, sentence on its command and machine)."""
    file = f"bench-{name}-cpu.json"
    rows = json.loads((results / file).read_text(encoding="utf-8"))
    machine = rows[0]["shape"].partition(" on ")[2]
    rows = [row for row in rows if row["ms"]]
    return rows, f"`python -m lab.bench {name}` on {machine} ([{file}]({file}))."


def step_time(results):
    """A training step of whole models."""
    rows, source = read_bench(results, "model")
    lines = ["### A training step", "",
             f"Forward, backward, clipping and AdamW of `quick.toml` (8 experts, 2 for "
             f"each token) beside `dense.toml`, which does equal work for a token. {source}", "",
             "| sequences | dtype | dense, ms | experts, ms | ratio |", "|---|---|---|---|---|"]
    steps = [row for row in rows if not row["path"].startswith("ceiling")]
    for dense, experts in zip(steps, steps[1:]):
        # a pair of one table
        if dense["path"] != "dense" or experts["ratio_to_dense"] is None:
            continue
        lines.append(f"| {re.search(r' B([0-9]+)', dense['shape'])[1]} | {dense['dtype']} | "
                     f"{dense['ms']:.0f} | {experts['ms']:.0f} | {experts['ratio_to_dense']:.2f} |")
    return lines


def moe_layer(results):
    """One MoE layer by every dispatch path."""
    rows, source = read_bench(results, "moe")
    time = {(row["dtype"], row["path"], row["shape"]): row["ratio_to_dense"] for row in rows
            if row["direction"] == "fwd+bwd"}
    shapes = list(dict.fromkeys(shape for _, _, shape in time))
    lines = ["### One mixture-of-experts layer", "",
             "Forward and backward, router and sort included, as a "
             "multiple of the time of the dense layer that does equal work for a token (T tokens "
             f"of width d, E experts of hidden width n, k for each token). {source}", "",
             f"| dtype | path | {' | '.join(shapes)} |", "|---" * (2 + len(shapes)) + "|"]
    for dtype in DTYPES:
        for path, meaning in MOE_PATHS.items():
            found = [time.get((dtype, path, shape)) for shape in shapes]
            cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in found]
            lines.append(f"| {dtype} | `{path}`: {meaning} | {' | '.join(cells)} |")
    return lines


def peer_layer(results):
    """Whole PEER layers."""
    rows, source = read_bench(results, "peer")
    lines = ["### One PEER layer", "",
             "Forward and backward in float32; the peak is the memory beyond tables and "
             "gradients (N experts, T tokens of width d, h heads, k experts for each head). "
             f"`dense` does equal work for a token; `lean` is the path that a CPU takes. {source}",
             "",
             "| layer | path | ms | times dense | peak MiB |", "|---|---|---|---|---|"]
    for row in rows:
        known = row["ratio_to_dense"] is not None and row["peak_mib"] is not None
        if row["shape"].endswith(" layer") and row["direction"] == "fwd+bwd" and known:
            lines.append(f"| {row['shape'].removesuffix(' layer')} | {row['path']} | "
                         f"{row['ms']:,.1f} | {row['ratio_to_dense']:.2f} | {row['peak_mib']:,.1f} "
                         "|")
    return lines


def saved_bytes(results):
    """What a layer keeps for its backward pass."""
    found = json.loads((results / "saved-bytes.json").read_text(encoding="utf-8"))
    size = {(row["layer"], row["path"], row["dtype"]): row["bytes"] for row in found["rows"]}
    lines = ["### What a layer keeps for backward", "",
             f"Bytes for each token and layer of width {found['d']}, the layer's input included. "
             "The grouped and fused paths gather rows and apply the activation again in backward, "
             "PEER's read the table again: a second read costs less than memory for all rows. "
             "`python -m lab.timing.saved` ([saved-bytes.json](saved-bytes.json)).", "",
             "| layer | path | float32 | bfloat16 |", "|---|---|---|---|"]
    for layer, path in dict.fromkeys((layer, path) for layer, path, _ in size):
        cells = [f"{size[layer, path, dtype]:,}" for dtype in DTYPES]
        lines.append(f"| {layer} | {path} | {' | '.join(cells)} |")
    return lines


def million(results):
    """A training run with a million experts."""
    found = json.loads((results / "peer-million-cpu.json").read_text(encoding="utf-8"))
    losses = {row["step"]: row["loss"] for row in read_table(results / "peer-million-cpu.csv")
              if "loss" in row}
    return ["### A million experts in training", "",
            f"`{found['command']}` on {found['device']} "
            "([peer-million-cpu.json](peer-million-cpu.json)): 20 steps took "
            f"{found['seconds_of_20_steps']} s and brought the training loss from {losses[1]:.2f} "
            f"to {losses[20]:.2f} nats. Peak memory {found['peak_resident_mib'] / 1024:.1f} GiB, "
            f"{found['peak_resident_mib_resumed'] / 1024:.1f} GiB when resumed; the checkpoint "
            f"holds {found['checkpoint_mib'] / 1024:.1f} GiB."]


def torture(results):
    """What was done to the programs, and what came of it."""
    found = json.loads((results / "torture-cpu.json").read_text(encoding="utf-8"))
    lines = ["### Kills, full disks and bad inputs", "",
             f"`python -m tests.torture --minutes {found['minutes']:.0f}` on {found['cores']} "
             f"cores ([torture-cpu.json](torture-cpu.json)): {len(found['losses'])} promises "
             "broken.", "",
             "| what | how often |", "|---|---|"]
    return lines + [f"| {what} | {n:,} |" for what, n in found["counts"].items()]


def page(results):
    """The whole page as text."""
    gpu = [*results.glob("*/gpu/verdict.md"), *results.glob("bench-*-cuda.json")]
    parts = [["# What was measured", "",
              "`python -m lab.papers.overview` writes this page from the files beside it."],
             claims_part(results), ["## Timings"], training(results), step_time(results),
             moe_layer(results),
             peer_layer(results), saved_bytes(results), million(results), torture(results)]
    cards = sorted(path.parent.name for path in results.glob("gpu/*/README.md"))
    links = ", ".join(f"[{card}](gpu/{card}/README.md)" for card in cards)
    if not gpu:
        parts.append(["### GPU", "", f"On cards: {links}." if cards else
                      "Nothing has been measured on a GPU yet."])
    return "\n\n".join("\n".join(map(wrapped, part)) for part in parts) + "\n"


def wrapped(line):
    """A paragraph in lines of at most 125 characters; a row of a table stays one line."""
    if line.startswith("|"):
        return line
    return textwrap.fill(line, 125, break_long_words=False, break_on_hyphens=False)


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(prog="python -m lab.papers.overview", description=__doc__.split("\n")[0])
    parser.add_argument("--results", metavar="DIR", default="results", help="default: %(default)s")
    with Ending() as end:
        options, _ = parse(parser, argv)
        results = Path(options.results)
        if not results.is_dir():
            raise ConfigError(f"--results {options.results}: there is no such folder")
        checkpoint.write_text(results / "README.md", page(results))
        print(results / "README.md", in_short(read_verdicts(results)), sep="\n")
    return end.status


if __name__ == "__main__":
    sys.exit(main())
