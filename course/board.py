"""The board: the lowest bits a byte on `python` for a fixed number of active FLOPs, about five
minutes of two CPU cores. The rules stand in board.md.

    python -m course.board RUN ...       a row for each run folder, or what in it breaks the rules
    python -m course.board --baselines   trains a model of each ffn.kind, one after the other, and
                                         writes their rows into board.md; a second call goes on
"""
import argparse
import math
import platform
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import train
from data.binfile import open_bin, read_header
from data.prepare import prepare, prepared
from data.tokenizers import Tokenizer
from lab.papers.jobs import commit
from lab.timing.measure import machine_name
from model import GPT, load_config, load_model
from runtime.checkpoint import can_resume, has_run, load_last
from runtime.config import Parser, parse
from runtime.ending import Ending, program, quoted
from runtime.files import write_text
from settings import Config, ConfigError

COURSE = Path(__file__).parent
CONFIGS, PAGE = COURSE / "board", COURSE / "board.md"
BEGIN, END = "<!-- baselines -->", "<!-- end of the baselines -->"
COLUMNS = ["bits a byte", "run", "layer", "tokenizer", "parameters", "active", "TFLOP", "tokens",
           "minutes", "seed", "Python", "text"]
TOKENIZERS = "byte", "char", "bpe"      # those that know no other text
BATCH = 8192                            # tokens of a batch of the evaluation
PYTHON = platform.python_version()


class Rules(NamedTuple):
    """What a run may use."""
    flops: float = 20e12                # of the training: three times forward, of active parameters
    corpus: str = "python"
    dir: str = ""                       # folder of the prepared corpora (empty: data/prepared)


class Entry(NamedTuple):
    """A run folder after its last step."""
    folder: Path
    model: GPT
    config: Config
    tokenizer: Tokenizer
    header: dict

    @property
    def tokens(self):
        """Tokens that it was trained on."""
        return self.header["step"] * self.config.train.batch_size * self.config.model.block_size

    @property
    def flops(self):
        return 3 * self.model.flops_per_token() * self.tokens


def read(folder):
    """The Entry in a run folder; ConfigError where there is none."""
    if not has_run(folder):
        raise ConfigError(f"{folder}: is no run folder; `{program('train.py')} CONFIG.toml --out "
                          f"{quoted(folder)}` makes one")
    return Entry(Path(folder), *load_model(folder, which="last"))


# ---- the rules ----

def judge(entry, rules):
    """(sentences about broken rules, row of the table); the row is empty if there are any."""
    found = [*unfinished(entry), *foreign(entry), *over_budget(entry, rules),
             *other_text(entry, rules)]
    if not found:
        tokens, _ = open_bin(text_folder(rules, entry.config.data) / "val.bin")
        found = [*leaks(entry.model, tokens)]
    return found, "" if found else row(entry, rules, tokens)


def unfinished(entry):
    step, wanted = entry.header["step"], entry.config.train.max_steps
    if step < wanted:
        yield (f"stopped after step {step} of {wanted}; go on with `{program('train.py')} --out "
               f"{quoted(entry.folder)} --resume`")


def foreign(entry):
    """What it knows from other models."""
    ancestry, lifelong = entry.header["ancestry"], entry.config.lifelong
    origin = entry.config.train.init_from or " and ".join(p["run"] for p in ancestry["parents"])
    if origin or ancestry["kind"] != "train":
        made = f"a model that was made ({ancestry['kind']})"
        yield f"does not start from random weights of its own but from {origin or made}"
    if lifelong.teacher:
        yield f"learns from another model, lifelong.teacher = {lifelong.teacher}"


def over_budget(entry, rules):
    if entry.flops > rules.flops:
        most = steps_within(rules, entry.model, entry.config)
        took, allowed = entry.flops / 1e12, rules.flops / 1e12
        yield (f"took {took:.4g} TFLOP in training, more than {allowed:.4g}; of this model and "
               f"batch at most {most} steps are within")


def steps_within(rules, model, config):
    """Optimizer steps that a budget allows."""
    batch = config.train.batch_size * config.model.block_size
    return int(rules.flops // (3 * model.flops_per_token() * batch))


def other_text(entry, rules):
    """What it was trained on beside the corpus of this Python, whole."""
    data, tokenizer = entry.config.data, entry.config.data.tokenizer
    if data.names != [rules.corpus]:
        yield f"is trained on {', '.join(data.names)}, not on {rules.corpus} alone"
    elif tokenizer not in TOKENIZERS:
        yield (f"reads with a tokenizer that knows other text, {tokenizer}; take one of "
               f"{', '.join(TOKENIZERS)}")
    elif data.max_tokens:
        yield f"reads a part of the text, data.max_tokens = {data.max_tokens}; leave that out"
    else:
        here = read_header(text_folder(rules, data) / "train.bin")
        theirs = (entry.header.get("data") or ["none"])[0]
        if theirs != here["sha256"] or entry.tokenizer.fingerprint != here["fingerprint"]:
            yield (f"is trained on other text than the {rules.corpus} of Python {PYTHON}: its "
                   f"tokens have the checksum {theirs[:12]}, those here {here['sha256'][:12]}")


def text_folder(rules, data=Config().data):
    """The prepared folder of the whole corpus, with the tokenizer of a DataConfig (of bytes)."""
    dir = rules.dir or None
    return prepare([rules.corpus], data.tokenizer, data.vocab_size, out=dir, quiet=True)[0]


@torch.no_grad()
def leaks(model, tokens):
    """Sentences about what changes a prediction beside the tokens before it: then its bits are not
    what the text costs a reader from left to right."""
    T = model.config.model.block_size
    rows = min(8, len(tokens) // T)
    idx = torch.from_numpy(tokens[:rows * T].astype("int64")).view(rows, T)
    logits, half = model(idx).logits, T // 2
    # other tokens in the second half of each row, and each row alone
    other = torch.cat([idx[:, :half], idx.roll(1, 0)[:, half:]], 1)
    changes = {"a later token": (model(other).logits - logits)[:, :half],
               "another sequence of the batch":
                   torch.cat([model(one).logits for one in idx.split(1)]) - logits}
    for what, change in changes.items():
        # of each row the largest; one row may differ where two experts tied and rounding decided
        change = change.abs().flatten(1).amax(1) if change.numel() else torch.zeros(rows)
        if (change > 1e-3).sum() > 1:
            yield f"{what} changes what it predicts, a logit by up to {change.max():.3g}"


# ---- what is measured ----

@torch.no_grad()
def bits_per_byte(model, tokens, lengths):
    """(bits a byte, bytes) of a text in windows of block_size tokens side by side: of all tokens
    after the first. lengths (V,): bytes of each token."""
    T, n = model.config.model.block_size, len(tokens) - 1
    step, whole, nats = max(1, BATCH // T) * T, n // T * T, 0.0
    # batches of whole windows, and what is left after the last one
    pieces = [(start, min(whole, start + step), T) for start in range(0, whole, step)]
    pieces += [(whole, n, n - whole)] * (whole < n)
    for start, end, width in pieces:
        piece = torch.from_numpy(tokens[start:end + 1].astype("int64"))
        loss = model(piece[:-1].view(-1, width), piece[1:].view(-1, width)).loss
        nats += loss.item() * (end - start)
    n_bytes = int(lengths[tokens[1:]].sum())
    return nats / math.log(2) / n_bytes, n_bytes


def row(entry, rules, tokens):
    """The run's row of the table."""
    bits, _ = bits_per_byte(entry.model, tokens, entry.tokenizer.token_lengths())
    params, f = entry.model.num_params(), entry.config.ffn
    # the kind, and what tells two layers of it apart
    columns = entry.model.blocks[entry.model.sparse[0]].ffn.columns if entry.model.sparse else ()
    layer = [f.kind, *(f"{name} {getattr(f, name)}" for name in columns if getattr(f, name))]
    text = read_header(text_folder(rules) / "train.bin")["sha256"]
    return cells([f"{bits:.4f}", entry.folder.name, ", ".join(layer), entry.tokenizer.name,
                  f"{params.total:,}", f"{params.active:,}", f"{entry.flops / 1e12:.4g}",
                  f"{entry.tokens:,}", f"{entry.header['seconds'] / 60:.1f}",
                  entry.config.train.seed, PYTHON, text[:12]])


def cells(values):
    return f"| {' | '.join(map(str, values))} |"


def table(rows):
    """A table of Markdown, the lowest bits a byte first."""
    rows = sorted(rows, key=lambda text: float(text.split()[1]))
    return "\n".join([cells(COLUMNS), "|" + "---|" * len(COLUMNS), *rows])


# ---- the baselines ----

def baselines(rules, out, page=PAGE):
    """Trains a model of each config in course/board as far as the budget goes, goes on with what
    was begun, and writes their rows into the page. Returns the exit status."""
    rows = []
    for path in sorted(CONFIGS.glob("*.toml")):
        folder = Path(out) / path.stem
        if status := complete(path, folder, rules):
            return status
        found, text = judge(read(folder), rules)
        if found:
            return tell(folder, found)
        print(text, flush=True)
        rows.append(text)
    new = f"{BEGIN}\n{table(rows)}\n\n{machine_name('cpu')}, commit {commit() or 'unknown'}.\n{END}"
    text, places = re.subn(f"{BEGIN}.*{END}", lambda _: new, page.read_text("utf-8"), flags=re.S)
    if not places:
        raise ConfigError(f"{page}: has no place for the table, from {BEGIN} to {END}")
    write_text(page, text)
    return 0


def complete(path, folder, rules):
    """Trains a config for the steps that the budget allows, or what is left of them; returns the
    exit status of train.py."""
    data = {"data.name": rules.corpus, "data.dir": rules.dir}
    config = load_config(path, data)
    config.model.vocab_size = prepared(config.data)[1].vocab_size
    with torch.device("meta"):
        steps = steps_within(rules, GPT(config), config)
    begun = can_resume(folder)
    if begun and load_last(folder).header["step"] >= steps:
        return 0
    more = [f"--{key}={value}" for key, value in (data | {"train.max_steps": steps}).items()]
    how = "--resume" if begun else "--overwrite"
    return train.main([str(path), "--out", str(folder), how, *more])


# ---- the program ----

def tell(folder, found):
    """Prints what breaks the rules; returns the exit status 1."""
    for sentence in found:
        print(f"{folder}: {sentence}")
    return 1


def main(argv=None, rules=Rules()):
    """Returns the exit status: 0, 1 if a rule is broken, 2 for what is no run folder."""
    parser = Parser(prog="python -m course.board", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders")
    parser.add_argument("--baselines", action="store_true", help="train those of course/board")
    parser.add_argument("--out", default="runs/board", metavar="DIR",
                        help="where the baselines' run folders are (default: %(default)s)")
    with Ending() as end:
        options, _ = parse(parser, argv)
        if bool(options.runs) == options.baselines:
            raise ConfigError("give run folders, or --baselines; see --help")
        if options.baselines:
            end.status = baselines(rules, options.out)
        rows = []
        for entry in [read(folder) for folder in options.runs]:
            found, text = judge(entry, rules)
            if found:
                end.status = tell(entry.folder, found)
            else:
                rows.append(text)
        if rows:
            print(table(rows))
    return end.status


if __name__ == "__main__":
    sys.exit(main())
