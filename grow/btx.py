"""Models made from models: sparse upcycling (Komatsuzaki et al. 2212.05055; Qwen2 2407.10671), Branch-Train-
MiX (Sukhbaatar et al. 2403.07816) and Branch-Train-Merge (Li et al. 2208.03306).

    python train.py CONFIG --out runs/seed                                    a seed model
    python train.py CONFIG --train.init_from runs/seed --data.name math --out runs/a
                                          a branch; the others like it, at any time and on any machine
    python -m grow.btx mix runs/a runs/b runs/c --out runs/mix                     their layers as experts
    python train.py CONFIG --train.init_from runs/mix --out runs/btx          now the router learns

The seed may itself be one of the runs that are mixed, as in the paper. Two things differ from it: with the
router sample_top1 every layer samples (there the first layer is soft), and the balance loss is the router's
usual one unless --ffn.balance btx asks for the paper's.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from grow import ensemble, routing
from grow.hidden_units import (average, blended, from_units, hidden_units,
                               put_together, slices)
from grow.parents import (LAYOUT, check_branches, check_layers, check_settings,
                          check_tokenizers, joined_config, open_parents,
                          strangers)
from model import GPT, check, resolve, sparse_layers
from routers import ROUTERS, help_text
from runtime import checkpoint
from runtime.config import (Ending, Parser, add_settings, from_tables, parse,
                            set_text)
from settings import ConfigError

# What of [ffn] follows from the parents and cannot be chosen.
GIVEN = {"upcycle": ("kind", "activation", "d_ff", "d_dense"),
         "mix": ("kind", "activation", "d_ff", "d_dense", "n_expert", "granularity", "d_expert", "n_shared",
                 "d_shared", "shared_gate", "output_norm", "n_frozen", "frozen_routes")}


# --- making ---

def sparse_config(parents, ffn, overrides):
    """Config of the model to be made: the runs', with this [ffn] and the overrides. Raises ConfigError."""
    config = from_tables(joined_config(parents) | {"ffn": ffn}, str(parents[0].folder))
    for key, value in overrides:
        set_text(config, key, value)
    if config.ffn.hash_table == "balanced" and not ROUTERS[config.ffn.router].traits.logits:
        config.fail("ffn.hash_table", "needs the counts of a corpus, which nobody reads here; use \"random\"")
    return check(resolve(config))


def refuse_given(overrides, command):
    for key, _ in overrides:
        if key.removeprefix("ffn.") in GIVEN[command]:
            raise ConfigError(f"--{key} cannot be chosen here: it follows from the runs and other options")


@torch.no_grad()
def upcycle(parent, overrides, shuffle=False, reinit=0.0, seed=0):
    """(Config, GPT): a run's dense layers as experts; the shared expert, if there is one, starts as the dense
    layer, too. Without a shared expert, whole copies whose gates sum to 1 are the dense model's
    function; a shared expert wider than the dense layer repeats its units. Raises ConfigError."""
    f, width = parent.config.ffn, parent.width
    if f.kind != "dense":
        raise ConfigError(f"{parent.folder} has ffn.kind = \"{f.kind}\"; only a dense model can be upcycled")
    refuse_given(overrides, "upcycle")
    ffn = dict(kind="moe", activation=f.activation, d_ff=width, d_dense=width)
    config = sparse_config([parent], ffn, overrides)
    E, n, generator = config.ffn.experts, config.ffn.expert_width, torch.Generator().manual_seed(seed)
    model = put_together(config, [parent], lambda: slices(width, E, n, generator if shuffle else None), seed,
                         reinit, generator)
    for layer in sparse_layers(config):
        shared = model.blocks[layer].ffn.shared
        if shared is not None:
            table = slices(width, 1, shared.w_out.in_features)
            w_in, w_out = from_units(hidden_units(parent.model.blocks[layer].ffn), table)
            shared.w_in.weight.copy_(w_in[0])
            shared.w_out.weight.copy_(w_out[0])
    return config, model


def mix(parents, overrides, router="topk", top_k=0, blend=False, split=1, freeze=False, seed=0):
    """(Config, GPT): Branch-Train-MiX (sec. 3.2). A dense branch is one expert of every sparse layer; a
    sparse branch, a mix for instance, brings all of its own. top_k 0: 2, or 1 if the router knows no other.
    blend, split (sec. 3.3): cut dense layers into parts; top_k then counts parts. Raises ConfigError."""
    check_branches(parents)
    refuse_given(overrides, "mix")
    sparse, width = [p for p in parents if p.is_moe], parents[0].width
    parts = len(parents) if blend else split
    if parts > 1 and sparse:
        raise ConfigError(f"{sparse[0].folder} is sparse already; --blend and --split cut dense layers")
    if width % parts:
        raise ConfigError(f"the layers' {width} hidden units cannot be cut into {parts} equal parts")
    E, n = split * sum(p.n_expert for p in parents), width // split
    router = dict(overrides).get("ffn.router", router)
    ffn = dict(kind="moe", activation=parents[0].config.ffn.activation, d_ff=n, d_dense=width, n_expert=E,
               router=router, top_k=top_k or (1 if one_expert(router) else min(2, E)))
    ffn |= dict(n_frozen=E, frozen_routes=False) if freeze else {}
    ffn |= {name: getattr(sparse[0].config.ffn, name) for name in LAYOUT} if sparse else {}
    config = sparse_config(parents, ffn, overrides)
    for p in parents:
        check_layers(p, config)
    table = blended(E, n) if blend else torch.arange(E * n).view(E, n)
    return config, put_together(config, parents, lambda: table, seed)


def merge(parents, weights=None):
    """(Config, GPT): the average of all parameters and buffers (BTM), uniform, or with weights in any unit.
    Runs of different seeds are averaged, too, for whoever wants to see it fail. Raises ConfigError."""
    if weights and (len(weights) != len(parents) or min(weights) < 0 or not 0 < sum(weights) < float("inf")):
        raise ConfigError(f"--weights {' '.join(map(str, weights))}: give a number for each of the "
                          f"{len(parents)} runs, none below 0 and not all 0")
    check_tokenizers(parents)
    check_settings(parents, "model")
    check_settings(parents, "ffn", names=["kind", "activation", "d_ff"])
    if parents[0].config.ffn.kind != "dense":
        check_settings(parents, "ffn")
    weights, states = [w / sum(weights) for w in weights or []], [p.model.state_dict() for p in parents]
    config = check(resolve(from_tables(joined_config(parents), str(parents[0].folder))))
    model = GPT(config).eval()
    model.load_state_dict({name: average([state[name] for state in states], weights) for name in states[0]})
    return config, model


# --- the program ---

def save(o, kind, parents, config, model, **more):
    """Writes the model as a run folder and says what it is. Raises ConfigError, CheckpointError."""
    ancestry = dict(kind=kind, **more, parents=[p.header["ancestry"] for p in parents])
    checkpoint.sign(ancestry, o.out, model.embedding.weight)
    with checkpoint.Lock(o.out):
        checkpoint.check_free(o.out, o.overwrite, [p.folder for p in parents])
        checkpoint.clear_run(o.out)
        checkpoint.carry_tokenizer(config, parents[0].tokenizer, Path(o.out))
        checkpoint.save_made(o.out, config, model.state_dict(), parents[0].tokenizer, ancestry)
    count, kind = model.num_params(), config.ffn.kind
    if model.sparse:
        kind = f"in layers {model.sparse} {model.blocks[model.sparse[0]].ffn.describe(torch.float32)}"
    print(f"{o.out}: {kind}; {count.total:,} parameters, {count.active:,} active. Next:\n"
          f"  python train.py CONFIG.toml --train.init_from {o.out} --out DIR")


@torch.no_grad()
def drift(old, new):
    """(mean KL(old || new) in nats a token, largest difference of a logit) on random tokens."""
    m = old.config.model
    idx = torch.randint(m.vocab_size, (4, m.block_size), generator=torch.Generator().manual_seed(0))
    a, b = old(idx).logits, new(idx).logits
    kl = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    return max(0.0, float(kl)), float((a - b).abs().max())


def run_upcycle(o, overrides):
    if not 0 <= o.reinit <= 1:
        raise ConfigError(f"--reinit {o.reinit} must be a share between 0 and 1")
    chosen = [(f"ffn.{name}", str(getattr(o, name))) for name in ("n_expert", "top_k", "granularity")]
    (parent,) = open_parents([o.run])
    config, model = upcycle(parent, chosen + overrides, o.shuffle, o.reinit, o.seed)
    kl, most = drift(parent.model, model)
    print(f"on random tokens: KL from {o.run} {kl:.2e} nats a token, logits differ by {most:.2e} at most")
    save(o, "upcycle", [parent], config, model)


def run_mix(o, overrides):
    if o.split < 1 or o.top_k < 0:
        raise ConfigError(f"--split {o.split} and --top_k {o.top_k} must be at least 1")
    parents = open_parents(two_or_more(o.runs))
    config, model = mix(parents, overrides, o.router, o.top_k, o.blend, o.split, o.freeze_experts, o.seed)
    form = dict(form="blend") if o.blend else dict(form=f"split {o.split}") if o.split > 1 else {}
    save(o, "mix", parents, config, model, **form)


def run_merge(o, overrides):
    parents = open_parents(two_or_more(o.runs))
    config, model = merge(parents, o.weights)
    for folder in strangers(parents):
        print(f"warning: {folder} did not grow from the same seed as the other runs: expect noise",
              file=sys.stderr)
    save(o, "merge", parents, config, model, weights=o.weights or "uniform")


def one_expert(router):
    """Whether a router sends every token to one expert; one that does not exist is refused later."""
    return router in ROUTERS and ROUTERS[router].traits.k == 1


def two_or_more(runs):
    if len(runs) < 2:
        raise ConfigError(f"{runs[0]} alone: give two runs or more")
    return runs


def add_command(commands, name, work, meaning, several=True):
    parser = commands.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
    parser.set_defaults(work=work)
    if several:
        parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    else:
        parser.add_argument("run", metavar="RUN", help="run folder")
    return parser


def add_output(parser, drawn=""):
    parser.add_argument("--out", metavar="DIR", required=True, help="run folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    if drawn:
        parser.add_argument("--seed", type=int, default=0, metavar="S", help=f"of {drawn} (default: 0)")
        add_settings(parser, ["ffn"], more={"ffn.router": help_text()})


def build_parser():
    """(parser, {command: its parser})."""
    parser = Parser(prog="python -m grow.btx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = add_command(commands, "upcycle", run_upcycle, "a dense run's layers as experts", several=False)
    p.add_argument("--n_expert", type=int, default=8, metavar="E", help="copies (default: 8)")
    p.add_argument("--top_k", type=int, default=2, metavar="K",
                   help="copies that a token visits (default: 2)")
    p.add_argument("--granularity", type=int, default=1, metavar="G",
                   help="parts that a copy is cut into: G E experts, G K of them for a token, which then "
                        "weigh too little unless --ffn.route_scale is G (default: 1)")
    p.add_argument("--shuffle", action="store_true", help="shuffle the hidden units before the cut (Qwen2)")
    p.add_argument("--reinit", type=float, default=0.0, metavar="SHARE",
                   help="share of every expert's numbers to draw anew (Qwen2: 0.5; default: 0)")
    add_output(p, "router, shuffle and what is drawn anew")
    p = add_command(commands, "mix", run_mix, "Branch-Train-MiX: the layers of several branches as experts")
    p.add_argument("--router", choices=["topk", "switch", "soft", "sample_top1"], default="topk",
                   help="how tokens will choose (default: topk; others as --ffn.router)")
    p.add_argument("--top_k", type=int, default=0, metavar="K",
                   help="experts that a token visits (default: 2, or 1 with switch and sample_top1)")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--blend", action="store_true", help="every expert gets a part of every branch's layer")
    how.add_argument("--split", type=int, default=1, metavar="C", help="cut each layer into C experts, whose "
                     "gates, summing to 1, weigh too little unless --ffn.route_scale is C")
    p.add_argument("--freeze_experts", action="store_true", help="the experts will never change in training")
    add_output(p, "the router")
    p = add_command(commands, "merge", run_merge, "the average of the weights of several runs")
    p.add_argument("--weights", type=float, nargs="+", metavar="W", help="one per run (default: uniform)")
    add_output(p)
    p = add_command(commands, "ensemble", ensemble.run, "Branch-Train-Merge: the predictions of several "
                    "runs, mixed by how well each has predicted the text so far")
    ensemble.add_options(p)
    p = add_command(commands, "route", routing.run, "the share of each expert in every corpus and "
                    "layer: a table, routing.csv and routing.png", several=False)
    routing.add_options(p)
    return parser, commands.choices


def main(argv=None):
    """The program; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    with Ending() as end:
        parser, commands = build_parser()
        if not argv or argv[0] not in commands:
            parser.parse_args(argv)                                     # help, or an error: ends the program
        options, overrides = parse(commands[argv[0]], argv[1:])
        try:
            options.work(options, overrides)
        except OSError as e:                                            # of --json, or of route's --out
            if isinstance(e, BrokenPipeError):
                raise
            raise ConfigError(f"{e.filename}: {e.strerror}") from None
    return end.status


if __name__ == "__main__":
    sys.exit(main())
