"""In and out: models that the world uses as run folders, and run folders as such models.

    python -m grow.hub import FOLDER --out runs/NAME
        a downloaded folder (config.json, *.safetensors, tokenizer.json) as a run, which samples,
        routes, is plotted, upcycled, and trained on (--train.init_from runs/NAME)
    python -m grow.hub export runs/NAME --out FOLDER
        config.json and *.safetensors by the names of a family that has all the run's layers

Families are in grow/hub_families.py. Weights move a tensor at a time. Special tokens and chat
templates are not interpreted, and export writes no tokenizer.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

from data.binfile import DataError, explained
from data.bytelevel import tokenizer_of
from data.foreign import read_json
from grow import btx
from grow.hub_families import FAMILIES, SHARED, config_of, factors, settings_of, unread
from model import GPT, check, load_model, readers, resolve, sparse_layers
from routers import visited
from runtime import checkpoint, shards
from runtime.config import Parser, all_fields, from_tables
from runtime.ending import program, quoted
from runtime.files import Outline
from settings import ConfigError, show

LONGEST = 1 << 20       # positions of a rotary table
SHARD = 5 * 10**9       # bytes of a file


def layout(family, config, tensors):
    """{ours: (whether experts are stacked, [[(their name, shape)]])}: for each expert, or once,
    what lies one below the other in a tensor of ours."""
    found, m = {}, config.model
    for name, t in tensors.items():
        i = name.split(".")[1] if name.startswith("blocks.") else ""
        theirs = family.tensors[name.replace(f".{i}.", ".{i}.", 1) if i else name]
        stacked = "{e}" in theirs[0]
        rows, *columns = t.shape[1:] if stacked else t.shape
        # queries, keys and values by their heads; gate and up are halves
        shares = [m.n_head, m.n_kv_head, m.n_kv_head] if len(theirs) == 3 else [1] * len(theirs)
        shapes = [(rows * share // sum(shares), *columns) for share in shares]
        found[name] = stacked, [[(text.format(i=i, e=e), s) for text, s in zip(theirs, shapes)]
                                for e in range(t.shape[0] if stacked else 1)]
    if m.tie_embeddings:
        found.pop("head.weight", None)
    return found


def read_config(folder, block_size):
    """(family's name, config.json, Config). Raises DataError, ConfigError."""
    theirs, where = read_json(folder, "config.json"), folder / "config.json"
    name = theirs.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise DataError(f"{where}: model_type {str(name)[:80]} is none of {', '.join(FAMILIES)}")
    try:
        settings = settings_of(theirs, FAMILIES[name])
    except ValueError as e:
        raise DataError(f"{where}: {e}") from None
    settings["model"] |= {"block_size": block_size} if block_size else {}
    config = from_tables(settings, str(where))
    m = config.model
    m.head_dim = 0 if m.head_dim * m.n_head == m.n_embd else m.head_dim
    if m.block_size > LONGEST:
        raise DataError(f"{where}: a context of {m.block_size} positions; give --block_size")
    return name, theirs, check(resolve(config))


def outline(config, folder, n):
    """{name: tensor without numbers} of a Config's model, n: their tensors. Raises DataError."""
    L, E = config.model.n_layer, config.ffn.experts if sparse_layers(config) else 0
    if L > n or E > 1000 * n:
        raise DataError(f"{folder}: has {n} tensors, too few for {L} layers and {E} experts")
    try:
        with torch.device("meta"):
            return GPT(config).state_dict()
    except (RuntimeError, OverflowError, TypeError) as e:
        raise DataError(f"{folder}: config.json has sizes that no model can have "
                        f"({str(e).splitlines()[0][:80]})") from None


def joined(place, entries, factor, dtype):
    """A tensor of ours from theirs."""
    def piece(name):
        t = shards.read_tensor(entries, name)
        by = next((value for end, value in factor.items() if name.endswith(end)), 1.0)
        return (t if by == 1 else t.float() * by).to(dtype)

    stacked, rows = place
    parts = [torch.cat([piece(name) for name, _ in pieces]) for pieces in rows]
    return torch.stack(parts) if stacked else parts[0]


def import_model(o, _):
    """Reads, checks, and then writes. Raises ConfigError, DataError, CheckpointError."""
    shards.needed()
    folder, out = Path(o.source), Path(o.out)
    name, theirs, config = read_config(folder, o.block_size)
    entries, m = shards.read_headers(folder), config.model
    # what there should be and what there is, before memory is taken
    model = outline(config, folder, len(entries))
    places = layout(FAMILIES[name], config, model)
    wanted = dict(piece for _, rows in places.values() for pieces in rows for piece in pieces)
    shards.check(folder, entries, wanted, tuple(SHARED["spare"]))
    factor = factors(theirs, FAMILIES[name], m.head_width, m.tie_embeddings)
    tokenizer, notes = tokenizer_of(folder, m.vocab_size)
    narrow = {entry.dtype for entry in entries.values()} == {torch.bfloat16}
    dtype = getattr(torch, o.dtype or ("bfloat16" if narrow else "float32"))
    if factor and dtype == torch.bfloat16:
        notes.append("multipliers became part of the weights and round them; not so in float32")
    keys = unread(theirs, FAMILIES[name])
    notes += [f"config.json has keys that are not read: {ascii(keys)[:200]}"] if keys else []
    # the run folder
    made = {ours: Outline(ours if ours in places else "embedding.weight", dtype, tuple(t.shape))
            for ours, t in model.items()}
    read = (joined(place, entries, factor, dtype) for place in places.values())
    ancestry = dict(kind="hub", parents=[], family=name, source=str(folder.absolute()),
                    config=theirs)
    with checkpoint.Lock(out):
        checkpoint.check_free(out, o.overwrite, [o.source])
        checkpoint.clear_run(out)
        checkpoint.carry_tokenizer(config, tokenizer, out)
        checkpoint.sign(ancestry, out, joined(places["embedding.weight"], entries, factor, dtype))
        checkpoint.save_read(out, config, made, read, tokenizer, ancestry)
    size = sum(model[ours].numel() for ours in places)
    show_experts = " --show_experts" if sparse_layers(config) else ""
    print(f"{out}: {name}, {size:,} parameters, {str(dtype)[6:]}", *notes,
          f"Next:\n  {program('sample.py')} {quoted(out)}{show_experts}", sep="\n")


def meaning(config):
    """{setting: value} of what decides what a Config's model computes, each said in one way."""
    m, f, layers = config.model, config.ffn, sparse_layers(config)
    kinds = [(names, config.get(f"ffn.{choice}") == value) for choice, value, names in readers()]
    unread = {name for names, _ in kinds for name in names} - {
        name for names, chosen in kinds if chosen for name in names}
    other = {f"ffn.{name}" for name in unread} | checkpoint.RETRAINABLE
    found = {key: config.get(key) for key, _ in all_fields() if key.startswith(("model.", "ffn."))
             and (key not in other or key == "ffn.eval_capacity_factor")}
    found |= {"model.head_dim": m.head_width, "ffn.moe_layers": layers}
    if layers:
        shared, narrow = f.d_shared or f.n_shared * f.expert_width, len(layers) < m.n_layer
        found |= {"ffn.n_expert": f.experts, "ffn.top_k": visited(f), "ffn.granularity": 1,
                  "ffn.d_expert": f.expert_width, "ffn.d_dense": f.d_dense if narrow else 0,
                  "ffn.d_shared": shared, "ffn.n_shared": shared // f.expert_width, "ffn.d_ff": 0,
                  "ffn.moe_every": 1, "ffn.n_dense_first": 0}
    # a softmax over the chosen is one over all, divided by its sum over the chosen
    if found.get("ffn.gate_order") == "topk_then_softmax":
        found["ffn.gate_order"] = "softmax_then_topk_renorm"
    return found


def pick_family(config, run, names):
    """(name, config.json) of the first family that has all of a Config. Raises ConfigError."""
    mine, wrong = meaning(config), {}
    for name in names:
        theirs = config_of(mine, name)
        # read again: what has another meaning then stands in the way
        back = meaning(resolve(from_tables(settings_of(theirs, FAMILIES[name]))))
        wrong[name] = [key for key in mine if key not in back or back[key] != mine[key]]
        if not wrong[name]:
            return name, theirs
    nearest = min(wrong, key=lambda name: len(wrong[name]))
    every = [key for key in wrong[nearest] if all(key in keys for keys in wrong.values())]
    key = (every or wrong[nearest])[0]
    who = "no family" if every else f"{nearest}, which comes nearest, never"
    raise ConfigError(f"{run}: {key} = {show(config.get(key))}: {who} has it")


def export_model(o, _):
    """Raises ConfigError, DataError, CheckpointError."""
    shards.needed()
    model, config, _, header = load_model(o.run, dtype=None)
    origin, out, dtype = header["ancestry"], Path(o.out), model.embedding.weight.dtype
    known = [name for name in FAMILIES if name == origin.get("family")]
    name, theirs = pick_family(config, o.run, [o.family] if o.family else [*known, *FAMILIES])
    state, pieces = model.state_dict(), {}
    for ours, (stacked, rows) in layout(FAMILIES[name], config, state).items():
        for t, some in zip(state[ours] if stacked else [state[ours]], rows):
            parts = t.split([shape[0] for _, shape in some])
            pieces |= {text: part.to(dtype) for (text, _), part in zip(some, parts)}
    theirs |= {key: value for key, value in origin.get("config", {}).items()
               if key.endswith("_token_id")} | dict(torch_dtype=str(dtype)[6:])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already; choose another folder with --out")
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        shards.write(out, pieces, SHARD)
        (out / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
    print(f"{out}: {name}, {str(dtype)[6:]}, {len(pieces)} tensors, without a tokenizer")


def build_parser():
    """(parser, {command: its parser})."""
    parser = Parser(prog="python -m grow.hub", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(required=True, metavar="COMMAND")
    reads = sub.add_parser("import", help="a downloaded folder becomes a run")
    reads.add_argument("source", metavar="FOLDER", help="with config.json and *.safetensors")
    reads.add_argument("--dtype", choices=["float32", "bfloat16"],
                       help="of the weights (default: bfloat16 where all are, else float32)")
    reads.add_argument("--block_size", type=int, metavar="T", help="a shorter context")
    reads.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
    writes = sub.add_parser("export", help="a run becomes a folder of a published family")
    writes.add_argument("run", metavar="RUN", help="run folder")
    writes.add_argument("--family", choices=list(FAMILIES), help="(default: the first that fits)")
    for command, work in (reads, import_model), (writes, export_model):
        command.add_argument("--out", metavar="DIR", required=True, help="folder to make")
        command.set_defaults(work=work)
    return parser, dict(sub.choices)


def main(argv=None):
    """The program; returns its exit status."""
    return btx.main(argv, build_parser)


if __name__ == "__main__":
    sys.exit(main())
