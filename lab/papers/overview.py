"""What was measured, on one page: `python -m lab.papers.overview` writes results/README.md.

Every claim of every verdict.md with its verdict, word for word, then the timings of results/*.json
and *.csv: nothing on the page is typed by hand, so that it cannot differ from what was measured.
"""
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from lab.papers.spec import SIZES
from lab.papers.tables import read_table
from runtime import checkpoint
from runtime.config import Parser, parse
from runtime.ending import Ending
from settings import ConfigError

# a line of the table in a verdict.md
CLAIM = re.compile(r"\| (\S+) \| (.+) \| (\*\*.+?\*\*.*) \|")
DTYPES = ("float32", "bfloat16")
MOE_PATHS = {"loop": "a loop over the experts", "padded": "padded slots",
             "grouped_mm": "sort, F.grouped_mm",
             "grouped": "what `auto` takes on a CPU"}


class Verdict(NamedTuple):
    """One verdict.md."""
    folder: str                 # of results/, with the size: mixtral/cpu
    title: str
    claims: list                # [(id, what the paper says, the verdict as it is written)]
    minutes: float              # of all runs, added up


# --- the claims ---

def read_verdict(path, results):
    """The Verdict in a file."""
    text = path.read_text(encoding="utf-8")
    size = path.parent.name
    title = text.splitlines()[0].removeprefix("# ").removesuffix(f" ({size})")
    minutes = re.search(r"runs took ([\d.]+) minutes", text)
    return Verdict(path.parent.relative_to(results).as_posix(), title, CLAIM.findall(text),
                   float(minutes[1]) if minutes else 0.0)


def claims_table(verdicts):
    """A line for each claim; the first one of an experiment names it."""
    lines = ["| experiment | claim | verdict | what the paper says |", "|---|---|---|---|"]
    for verdict in verdicts:
        place = f"{verdict.folder}/verdict.md"
        name = (f"[{verdict.title}]({place}), [figure]({verdict.folder}/figure.png), "
                f"{verdict.folder.rpartition('/')[2]}, {verdict.minutes:.0f} min")
        for key, says, word in verdict.claims:
            lines.append(f"| {name} | [{key}]({place}#{anchor(f'{key}: {word}')}) | {word} | "
                         f"{says} |")
            name = ""
    return lines


def anchor(heading):
    """The address that GitHub gives a heading: small letters, no punctuation, a hyphen for each
    blank."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def count(verdicts):
    """"56 held, 20 did not hold, 17 are undecided"."""
    words = [word for verdict in verdicts for _, _, word in verdict.claims]
    held = sum(word.startswith("**held**") for word in words)
    failed = sum(word.startswith("**did not hold**") for word in words)
    return f"{held} held, {failed} did not hold, {len(words) - held - failed} are undecided"


def claims_part(results):
    """The first half of the page."""
    verdicts = [read_verdict(path, results) for size in SIZES
                for path in sorted(results.glob(f"*/{size}/verdict.md"))]
    n_claims = sum(len(verdict.claims) for verdict in verdicts)
    minutes = sum(verdict.minutes for verdict in verdicts)
    return ["## The papers' claims", "",
            f"{n_claims} claims of {len(verdicts)} experiments: {count(verdicts)}. The runs took "
            f"{minutes / 60:.1f} hours, added up.", "",
            "A claim has held if at least three seeds were run, the difference has the claimed "
            "sign in each of them, and its mean is more than two standard errors from zero. It did "
            "not hold if the same is true of the other sign. Otherwise it is undecided. *Reported "
            "only* marks a claim that its file does not expect to hold at this size; it is judged "
            "and counted like every other. A claim's name leads to the numbers behind it, and from "
            "there to the commands.", "",
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
             peer_layer(results), million(results), torture(results)]
    if not gpu:
        parts.append(["### GPU", "", "Nothing has been measured on a GPU yet."])
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
        print(results / "README.md")
    return end.status


if __name__ == "__main__":
    sys.exit(main())
