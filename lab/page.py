"""A page that shows where a model sends the tokens of a text: `python -m lab.page RUN`.

One HTML file that needs no server and no network: the text coloured by expert, layer after layer,
the gates of every token, the load of the experts over training, and which corpora and which kinds
of characters go where. A dense model has nothing to route: its text is coloured by the loss of each
token. Nothing is generated; the text is --text, --prompt, or validation text of the run.

A text longer than model.block_size is read in windows. Each begins half a window after the one
before, and only what is new in it is shown: a token sees at least half a window before it. Tokens
are routed as sample.py routes a prompt: there is no capacity limit, and where experts choose, each
token takes its own best instead.
"""
import argparse
import base64
import codecs
import json
import string
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data.binfile import DTYPES, DataError, dtype_for, explain, open_bin
from data.console import working
from grow.parents import Parent, validation
from grow.routing import expert_shares
from lab.drawing.logs import LogError, describe, open_run
from model import load_model
from runtime.checkpoint import has_run
from runtime.config import Parser, parse
from runtime.ending import Ending
from runtime.files import write_text
from runtime.terminal import MARKED
from sample import remarks
from settings import ConfigError

TEMPLATE = Path(__file__).with_suffix(".html")
CHOICES, LOADS = 140_000, 24_000        # bytes of all layers' choices and loads, before base64
STEPS = 60                              # places of the slider, at most
COLUMNS = 32                            # experts in a map; of more, the busiest
COUNTED = 20_000                        # validation tokens of a corpus that a map counts, at most
UNKNOWN = 65535                         # loss of a token that nothing stands before
SIGNS = MARKED | {ord("\r"): "←"}       # which more fonts have than the sign of a terminal
KINDS = ["letters", "digits", "spaces", "punctuation", "other ASCII", "non-ASCII"]


class Piece(NamedTuple):
    """A text that is read by itself; label: the number of its corpus in the run, or None."""
    title: str
    label: int | None
    ids: torch.Tensor                   # (n,)


# --- the text ---

def own_text(options):
    """The text of --prompt or --text, None without. Raises ConfigError, DataError."""
    text, path = options.prompt, options.text
    if path is not None:
        try:
            text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise DataError(f"{path}: is no text in UTF-8: {e}") from None
        except (OSError, ValueError) as e:              # ValueError: a NUL byte in the path
            raise DataError(explain(e, path, done="read", remedy="give a text file")) from None
    if text == "":
        raise ConfigError(f"{path or '--prompt'} is empty; give a text, or leave it out to read "
                          "validation text of the run")
    return text


def choose_pieces(options, parent):
    """(what the text is, its Pieces) of at most --tokens tokens. Raises ConfigError, DataError."""
    text, most = own_text(options), options.tokens
    if most < 1:
        raise ConfigError(f"--tokens {most} must be at least 1")
    if text is not None:
        ids = torch.tensor(parent.tokenizer.encode(text))
        what = Path(options.text).name if options.text else "the prompt"
        cut = f", the first of its {len(ids):,}" if len(ids) > most else ""
        return what + cut, [Piece("", None, ids[:most])]
    try:
        files = validation(parent, parent.corpora).files
    except DataError as e:
        raise DataError(f"{e}; or give a text: --text FILE, --prompt TEXT") from None
    # the same number of tokens of each corpus
    share = max(1, most // len(files))
    starts = [open_bin(file.path)[0][:share].astype(np.int64) for file in files]
    return "the beginning of the run's validation text", [
        Piece(name, i, torch.from_numpy(ids))
        for i, (name, ids) in enumerate(zip(parent.corpora, starts))]


def spell(tokens):
    """[(text, hex)] of tokens, bytes each. Hex is empty but for a token that is no whole character:
    its bytes, and the text is the character that it completes, if it does."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    texts = [decoder.decode(token) for token in tokens]
    return [(text.translate(SIGNS), "" if text.encode() == token else token.hex(" ").upper())
            for text, token in zip(texts, tokens)]


def kind_of(token):
    """Number in KINDS of a token's first byte that is no white space."""
    first = (token.strip() or token)[:1]
    return [first.isalpha(), first.isdigit(), first.isspace(),
            first in string.punctuation.encode(), first.isascii(), True].index(True)


def words_of(tokenizer, pieces):
    """The distinct tokens, [text, hex, kind], and which of them each token is."""
    known, places = {}, []
    for piece in pieces:
        tokens = [tokenizer.decode_bytes([i]) for i in piece.ids.tolist()]
        words = [(*spelt, kind_of(token)) for spelt, token in zip(spell(tokens), tokens)]
        places += [known.setdefault(word, len(known)) for word in words]
    return dict(words=list(known), at=pack(places, len(known)))


# --- what the model does with it ---

def windows(n, block):
    """Yields (start, new): windows of `block` of n tokens; those from place `new` on are new."""
    step = max(block // 2, 1)
    yield 0, 0
    for start in range(step, n - block + step, step):
        yield start, block - step


def choices(stats):
    """Experts (T, k) and gates (T, k) of one sequence's Stats, the largest gate first. A layer of
    very many experts tells the first of each token alone: (T, 1) and gates (T, 0)."""
    if stats.routing is None:
        return stats.top_expert.view(-1, 1), torch.empty(stats.top_expert.numel(), 0)
    experts, gates = stats.routing.by_token()
    gates, order = gates.sort(dim=-1, descending=True, stable=True)
    return experts.gather(1, order), gates


@torch.no_grad()
def read(model, piece):
    """(losses (n,), {layer: (experts (n, k), gates (n, k))}) of the n tokens of a piece. Loss: nats
    by which the token surprised, NaN where nothing stands before it."""
    n, block = len(piece.ids), model.config.model.block_size
    loss, found = np.full(n, np.nan), {i: [] for i in model.sparse}
    domain = None if piece.label is None else torch.tensor([piece.label])
    for start, new in windows(n, block):
        x = piece.ids[start:start + block].unsqueeze(0)
        out = model(x, cache=model.new_cache(), domain=domain)
        # the logits of a position are of the next token
        first = max(new, 1)
        nats = F.cross_entropy(out.logits[0, first - 1:-1], x[0, first:], reduction="none")
        loss[start + first:start + block] = nats
        for i in model.sparse:
            found[i].append([part[new:] for part in choices(out.stats[i])])
    return loss, {i: [torch.cat(parts).numpy() for parts in zip(*each)]
                  for i, each in found.items()}


# --- what the page gets ---

def pack(numbers, size):
    """Whole numbers below `size` as text: the bytes of each, and all of them in base64."""
    numbers = np.asarray(numbers).astype(DTYPES[dtype_for(size)])
    return f"{numbers.itemsize}:{base64.b64encode(numbers.tobytes()).decode()}"


def in_bytes(amounts):
    """Amounts in steps of a 255th of the largest; what is more than 0 stays so."""
    top = float(amounts.max(initial=0)) or 1.0
    steps = np.where(amounts > 0, np.rint(255 * amounts / top).clip(1), 0)
    return dict(top=top, packed=pack(steps, 256))


def choices_of(ffn, experts, gates, room):
    """A layer's choices, of each token as many as fit into `room` bytes. experts, gates (n, k)."""
    n, k = experts.shape
    each = 1 + DTYPES[dtype_for(ffn.n_expert)].itemsize
    kept = min(k, max(1, room // (n * each)))
    return dict(n_expert=ffn.n_expert, k=max(k, ffn.n_active), kept=kept,
                experts=pack(experts[:, :kept], ffn.n_expert), gates=in_bytes(gates[:, :kept]))


def load_of(run, i, ffn, room):
    """The experts' shares of the choices in training, a row for each group of logged steps, or a
    text on why there are none."""
    load = run.log["expert_load"].get(i, np.empty((0, 1)))
    rows = np.flatnonzero(~np.isnan(load).any(1))
    if not len(rows):
        return (f"a log does not hold the load of each of {ffn.n_expert:,} experts" if ffn.many
                else "the run has logged no load: it was not trained, or its log.csv is gone")
    most = max(2, min(STEPS, room // load.shape[1]))
    groups = np.array_split(rows, min(len(rows), most))
    total = np.array([load[group].sum(0) for group in groups])                      # (groups, E)
    steps = [[int(run.log["step"][group[end]]) for end in (0, -1)] for group in groups]
    return dict(steps=steps, shares=in_bytes(total / total.sum(1, keepdims=True).clip(1)))


def maps_of(parent):
    """{layer: map of corpora and experts}, or a text on why there are none. share: of a corpus'
    validation tokens the thousandths whose expert of largest weight it is."""
    t, names = parent.config.train, parent.corpora
    if len(names) < 2:
        return "the run has one corpus; of several this shows which experts each of them uses"
    rows = max(1, COUNTED // parent.config.model.block_size)
    t.batch_size = min(t.batch_size, rows)
    t.eval_batches = min(t.eval_batches, rows // t.batch_size)
    try:
        shares = expert_shares(parent, names)
    except DataError as e:
        return f"the validation text of the run cannot be read: {e}"
    found = {}
    for i in parent.model.sparse:
        share = np.stack([shares[name, i]["top"] for name in names])                # (corpora, E)
        busiest = np.argsort(-share.sum(0), kind="stable")[:COLUMNS]
        order = np.arange(share.shape[1]) if share.shape[1] <= COLUMNS else busiest
        found[i] = dict(names=names, experts=order.tolist(),
                        share=np.rint(1000 * share[:, order]).astype(int).tolist())
    return found


def page_data(options, run, parent):
    """All that the page shows, as JSON-able values. Raises ConfigError, DataError."""
    model, sparse = parent.model, parent.model.sparse
    what, pieces = choose_pieces(options, parent)
    with working("reading the text", quiet=False):
        losses, found = zip(*(read(model, piece) for piece in pieces))
    loss = (1000 * np.concatenate(losses)).round().clip(0, UNKNOWN - 1)         # keeps NaN
    with working("counting validation text of each corpus", quiet=False):
        maps = maps_of(parent) if sparse else ""
    layers = []
    for i in sparse:
        ffn, parts = model.blocks[i].ffn, zip(*(each[i] for each in found))
        layers.append(dict(layer=i, load=load_of(run, i, ffn, LOADS // len(sparse)),
                           map=maps if isinstance(maps, str) else maps[i])
                      | choices_of(ffn, *map(np.concatenate, parts), CHOICES // len(sparse)))
    return dict(run=run.name, about=describe(run), remarks=remarks(model, parent.header),
                source=what, block=parent.config.model.block_size, kinds=KINDS,
                pieces=[[piece.title, len(piece.ids)] for piece in pieces],
                loss=pack(np.nan_to_num(loss, nan=UNKNOWN), UNKNOWN + 1), layers=layers,
                **words_of(parent.tokenizer, pieces))


def page_text(data):
    """The page, with the data inside; no text of a user's can end the element that holds it."""
    plain = json.dumps(data, separators=(",", ":"))
    for sign in "<>&":
        plain = plain.replace(sign, f"\\u{ord(sign):04x}")
    return TEMPLATE.read_text("utf-8").replace("@DATA@", plain)


# --- the program ---

def build_parser():
    parser = Parser(prog="python -m lab.page", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run folder of a trained model")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE",
                      help="a text file to read (default: the validation text of the run)")
    text.add_argument("--prompt", metavar="TEXT", help="a text to read; nothing is generated")
    parser.add_argument("--tokens", metavar="N", type=int, default=2000,
                        help="show at most so many tokens of the text (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE",
                        help="the page, or a folder for page.html (default: RUN)")
    return parser


def make_page(options):
    """Writes the page; returns its path. Raises what its parts raise."""
    run = open_run(options.run, begun=False)
    if not has_run(run.folder):
        raise LogError(f"{run.folder}: holds no checkpoint; `python train.py` makes a run")
    parent = Parent(run.folder, *load_model(run.folder))
    text = page_text(page_data(options, run, parent))
    path = Path(options.out or run.folder).expanduser()
    path = path / "page.html" if path.is_dir() else path
    write_text(path, text)
    return path


def main(argv=None):
    """The program; returns its exit status."""
    with Ending() as end:
        options, _ = parse(build_parser(), argv)
        print(make_page(options))
    return end.status


if __name__ == "__main__":
    sys.exit(main())
