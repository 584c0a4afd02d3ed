"""Models made from models: sparse upcycling (Komatsuzaki et al. 2212.05055; Qwen2 2407.10671),
Branch-Train-MiX (Sukhbaatar et al. 2403.07816), Branch-Train-Merge (Li et al. 2208.03306).

    python train.py configs/dense.toml --out runs/seed
        a seed model
    python train.py configs/continue.toml --train.init_from runs/seed --data.name math --out runs/a
        a branch; the others likewise, at any time and on any machine
    python -m grow.btx mix runs/seed runs/a runs/b --out runs/mix
        their layers as experts
    python train.py configs/continue.toml --train.init_from runs/mix --out runs/btx
        now the router learns

The seed may itself be one of the runs that are mixed, as in the paper. Two things differ from it.
With the router sample_top1 every layer samples; in the paper the first layer is soft. The balance
loss is the router's usual one; --ffn.balance btx is the paper's.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from grow import ensemble, routing
from grow.hidden_units import average, blended, from_units, hidden_units, put_together, slices
from grow.parents import (LAYOUT, check_branches, check_layers, check_settings, check_tokenizers,
                          joined_config, next_command, open_parents, strangers)
from model import GPT, check, resolve, sparse_layers
from routers import ROUTERS, help_text
from runtime import checkpoint
from runtime.config import Parser, add_settings, from_tables, parse, set_text
from runtime.ending import Ending
from settings import ConfigError, FFNConfig

# What of [ffn] follows from the parents and cannot be chosen.
GIVEN = {"upcycle": ("kind", "activation", "d_ff", "d_dense"),
         "mix": ("kind", "activation", "d_ff", "d_dense", "n_expert", "granularity", "d_expert",
                 "n_shared", "d_shared", "shared_gate", "output_norm", "n_frozen",
                 "frozen_routes")}


# --- making ---


def sparse_config(parents, ffn, overrides):
    """Config of the model to be made: the runs', with this [ffn] and the overrides. Raises
    ConfigError."""
    # [model], [data] and [train] from the parents, [ffn] new, then what the command line says
    config = from_tables(joined_config(parents) | {"ffn": ffn}, str(parents[0].folder))
    for key, value in overrides:
        set_text(config, key, value)
    config = resolve(config)
    # a hash table that is balanced over a corpus would be balanced over none
    if config.ffn.hash_table == "balanced" and not ROUTERS[config.ffn.router].traits.logits:
        config.fail("ffn.hash_table", "needs the counts of a corpus, which nobody reads here; use "
                    "\"random\"")
    return check(config)


def refuse_given(overrides, command):
    for key, _ in overrides:
        if key.removeprefix("ffn.") in GIVEN[command]:
            raise ConfigError(f"--{key} cannot be chosen here: it follows from the runs and other "
                              "options")


@torch.no_grad()
def upcycle(parent, overrides, shuffle=False, reinit=0.0, seed=0):
    """(Config, GPT): a run's dense layers as experts (Komatsuzaki). Without a shared expert,
    whole copies whose gates sum to 1 are the dense model's function. shuffle: the hidden units of
    each copy before the cut; reinit: share of an expert's numbers that are drawn anew (Qwen2
    sec. 2.2.2). Raises ConfigError."""
    ffn, width = parent.config.ffn, parent.width
    if ffn.kind != "dense":
        raise ConfigError(f"{parent.folder} has ffn.kind = \"{ffn.kind}\"; only a dense model can "
                          "be upcycled")
    refuse_given(overrides, "upcycle")
    # the width of a copy is given; how many copies, and the router, are the overrides
    table = dict(kind="moe", activation=ffn.activation, d_ff=width, d_dense=width)
    config = sparse_config([parent], table, overrides)
    # routed experts: slices of copies of the layer, dealt anew in each layer; all shuffles and all
    # numbers that are drawn anew come from this one generator
    generator = torch.Generator().manual_seed(seed)

    def deal():
        E, w = config.ffn.experts, config.ffn.expert_width
        return slices(width, E, w, generator if shuffle else None)

    model = put_together(config, [parent], deal, seed, reinit, generator)
    # a shared expert: the layer as well; a wider one holds some units twice
    for layer in sparse_layers(config):
        shared = model.blocks[layer].ffn.shared
        if shared is not None:
            units = hidden_units(parent.model.blocks[layer].ffn)
            w_in, w_out = from_units(units, slices(width, 1, shared.w_out.in_features))
            shared.w_in.weight.copy_(w_in[0])
            shared.w_out.weight.copy_(w_out[0])
    return config, model


def mix(parents, overrides, router=FFNConfig.router, top_k=0, blend=False, split=1, freeze=False,
        seed=0):
    """(Config, GPT): Branch-Train-MiX (sec. 3.2). A dense branch is one expert of every sparse
    layer; a sparse branch, a mix for instance, brings all of its own. top_k 0: 2, or 1 if the
    router knows no other. blend, split (sec. 3.3): cut dense layers into parts; top_k then counts
    parts. Raises ConfigError."""
    # what does not fit together
    check_branches(parents)
    refuse_given(overrides, "mix")
    sparse, width = [p for p in parents if p.is_moe], parents[0].width
    parts = len(parents) if blend else split
    if parts > 1 and sparse:
        raise ConfigError(f"{sparse[0].folder} is sparse already; only dense layers can be cut by "
                          "--blend and --split")
    if width % parts:
        raise ConfigError(f"the layers' {width} hidden units cannot be cut into {parts} equal "
                          "parts")
    # E experts with w hidden units each; split makes more and narrower ones, blend does not
    E, w = split * sum(p.experts for p in parents), width // split
    # --ffn.router is the same setting
    router = dict(overrides).get("ffn.router", router)
    if not top_k:
        top_k = 1 if one_expert(router) else min(2, E)
    ffn = dict(kind="moe", activation=parents[0].config.ffn.activation, d_ff=w, d_dense=width,
               n_expert=E, router=router, top_k=top_k)
    # the experts stay as they are, the router learns
    if freeze:
        ffn |= dict(n_frozen=E, frozen_routes=False)
    # where the sparse layers stand, and what every token visits, is as in the sparse branches
    if sparse:
        ffn |= {name: getattr(sparse[0].config.ffn, name) for name in LAYOUT}
    config = sparse_config(parents, ffn, overrides)
    for p in parents:
        check_layers(p, config)
    # the units of all branches one after the other; blend gives each expert a part of every branch
    table = blended(E, w) if blend else torch.arange(E * w).view(E, w)
    return config, put_together(config, parents, lambda: table, seed)


def merge(parents, weights=None):
    """(Config, GPT): the average of all parameters and buffers (BTM), uniform, or with weights in
    any unit. Runs of different seeds are averaged, too. Raises ConfigError."""
    if weights and (len(weights) != len(parents) or min(weights) < 0
                    or not 0 < sum(weights) < float("inf")):
        raise ConfigError(f"--weights {' '.join(map(str, weights))}: give a number for each of the "
                          f"{len(parents)} runs, none below 0 and not all 0")
    # one shape: tokenizer, [model], and of [ffn] what a tensor depends on
    check_tokenizers(parents)
    check_settings(parents, "model")
    check_settings(parents, "ffn", names=["kind", "activation", "d_ff"])
    if parents[0].config.ffn.kind != "dense":
        check_settings(parents, "ffn")
    config = check(resolve(from_tables(joined_config(parents), str(parents[0].folder))))
    # every tensor: its average, with weights that sum to 1
    shares = [weight / sum(weights) for weight in weights or []]
    states = [p.model.state_dict() for p in parents]
    made = {name: average([state[name] for state in states], shares) for name in states[0]}
    # of the biases of loss-free balancing only the differences count; their mean may have drifted
    for name in made:
        if name.endswith("router.bias"):
            made[name] = made[name] - made[name].mean()
    model = GPT(config).eval()
    model.load_state_dict(made)
    return config, model


def one_expert(router):
    """Whether a router sends every token to one expert; one that does not exist: False."""
    return router in ROUTERS and ROUTERS[router].traits.k == 1


# --- the commands ---


def save(options, kind, parents, config, model, **more):
    """Writes the model as a run folder, says what it is. Raises ConfigError, CheckpointError."""
    out = options.out
    # who it descends from: the ancestries of its parents, and theirs
    ancestry = dict(kind=kind, **more, parents=[p.header["ancestry"] for p in parents])
    checkpoint.sign(ancestry, out, model.embedding.weight)
    # held by this process while it looks, clears and writes; the tokenizer goes along
    with checkpoint.Lock(out):
        checkpoint.check_free(out, options.overwrite, [p.folder for p in parents])
        checkpoint.clear_run(out)
        checkpoint.carry_tokenizer(config, parents[0].tokenizer, Path(out))
        checkpoint.save_made(out, config, model.state_dict(), parents[0].tokenizer, ancestry)
    # what it is, and how to train it
    count, layers = model.num_params(), config.ffn.kind
    if model.sparse:
        first = model.blocks[model.sparse[0]].ffn
        layers = f"in layers {model.sparse} {first.describe(torch.float32)}"
    print(f"{out}: {layers}; {count.total:,} parameters, {count.active:,} active")
    print(next_command(out, config.data.names, config.data))


@torch.no_grad()
def drift(parent, model):
    """(mean KL(p_parent || p) in nats a token, largest difference of a logit) of two models on
    random tokens."""
    settings, generator = parent.config.model, torch.Generator().manual_seed(0)
    idx = torch.randint(settings.vocab_size, (4, settings.block_size), generator=generator)
    theirs, mine = parent(idx).logits, model(idx).logits
    kl = F.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none")
    # of equal predictions rounding can leave a mean just below 0
    return max(0.0, float(kl.sum(-1).mean())), float((theirs - mine).abs().max())


def upcycle_command(options, overrides):
    if not 0 <= options.reinit <= 1:
        raise ConfigError(f"--reinit {options.reinit} must be a share between 0 and 1")
    # three options are settings of [ffn] under a short name
    chosen = [(f"ffn.{name}", str(getattr(options, name)))
              for name in ("n_expert", "top_k", "granularity")]
    (parent,) = open_parents([options.run])
    config, model = upcycle(parent, chosen + overrides, options.shuffle, options.reinit,
                            options.seed)
    # how far the copies are from the dense model: 0 but for rounding, unless they are cut or drawn
    kl, most = drift(parent.model, model)
    print(f"on random tokens: KL from {options.run} {kl:.2e} nats a token, logits differ by "
          f"{most:.2e} at most")
    save(options, "upcycle", [parent], config, model)


def mix_command(options, overrides):
    if options.split < 1 or options.top_k < 0:
        raise ConfigError(f"--split {options.split} and --top_k {options.top_k} must be at least 1")
    parents = open_parents(two_or_more(options.runs))
    config, model = mix(parents, overrides, options.router, options.top_k, options.blend,
                        options.split, options.freeze_experts, options.seed)
    # how the experts were cut, for the ancestry
    form = {}
    if options.blend:
        form = dict(form="blend")
    elif options.split > 1:
        form = dict(form=f"split {options.split}")
    save(options, "mix", parents, config, model, **form)


def merge_command(options, overrides):
    parents = open_parents(two_or_more(options.runs))
    config, model = merge(parents, options.weights)
    # allowed here, unlike in a mix
    for folder in strangers(parents):
        print(f"warning: {folder} did not grow from the same seed as the other runs: expect noise",
              file=sys.stderr)
    save(options, "merge", parents, config, model, weights=options.weights or "uniform")


def two_or_more(runs):
    if len(runs) < 2:
        raise ConfigError(f"{runs[0]} alone: give two runs or more")
    return runs


# --- the program ---


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
        parser.add_argument("--seed", type=int, default=0, metavar="S",
                            help=f"of {drawn} (default: 0)")
        add_settings(parser, ["ffn"], more={"ffn.router": help_text()})


def add_upcycle(commands):
    p = add_command(commands, "upcycle", upcycle_command, "a dense run's layers as experts",
                    several=False)
    p.add_argument("--n_expert", type=int, default=8, metavar="E", help="copies (default: 8)")
    p.add_argument("--top_k", type=int, default=2, metavar="K",
                   help="copies that a token visits (default: 2)")
    p.add_argument("--granularity", type=int, default=1, metavar="G",
                   help="parts that a copy is cut into: G E experts, G K of them for a token, "
                        "which then weigh too little unless --ffn.route_scale is G (default: 1)")
    p.add_argument("--shuffle", action="store_true",
                   help="shuffle the hidden units before the cut (Qwen2)")
    p.add_argument("--reinit", type=float, default=0.0, metavar="SHARE",
                   help="share of every expert's numbers to draw anew (Qwen2: 0.5; default: 0)")
    add_output(p, "router, shuffle and what is drawn anew")


def add_mix(commands):
    p = add_command(commands, "mix", mix_command,
                    "Branch-Train-MiX: the layers of several branches as experts")
    p.add_argument("--router", choices=list(ROUTERS), default=FFNConfig.router, metavar="NAME",
                   help="how tokens will choose, as --ffn.router; the paper has topk, switch, soft "
                   f"and sample_top1 (default: {FFNConfig.router})")
    p.add_argument("--top_k", type=int, default=0, metavar="K",
                   help="experts that a token visits (default: 2; 1 where the router fixes it)")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--blend", action="store_true",
                     help="every expert gets a part of every branch's layer")
    how.add_argument("--split", type=int, default=1, metavar="C",
                     help="cut each layer into C experts, whose gates, summing to 1, weigh too "
                     "little unless --ffn.route_scale is C")
    p.add_argument("--freeze_experts", action="store_true",
                   help="the experts will never change in training")
    add_output(p, "the router")


def build_parser():
    """(parser, {command: its parser})."""
    parser = Parser(prog="python -m grow.btx", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # three that make a run folder
    add_upcycle(commands)
    add_mix(commands)
    p = add_command(commands, "merge", merge_command, "the average of the weights of several runs")
    p.add_argument("--weights", type=float, nargs="+", metavar="W",
                   help="one per run (default: uniform)")
    add_output(p)
    # two that look at runs
    p = add_command(commands, "ensemble", ensemble.command,
                    "Branch-Train-Merge: the predictions of several runs, mixed by how well each "
                    "has predicted the text so far")
    ensemble.add_options(p)
    p = add_command(commands, "route", routing.command,
                    "the share of each expert in every corpus and layer: a table, routing.csv and "
                    "routing.png", several=False)
    routing.add_options(p)
    return parser, commands.choices


def main(argv=None, build_parser=build_parser):
    """The program; returns its exit status: 0 done, 1 a file or folder that cannot be used, 2 a
    mistake in what was asked for. build_parser: of another program that has commands, too."""
    argv = sys.argv[1:] if argv is None else argv
    with Ending() as end:
        parser, commands = build_parser()
        # without a command: help, or an error; either ends the program
        if not argv or argv[0] not in commands:
            parser.parse_args(argv)
        options, overrides = parse(commands[argv[0]], argv[1:])
        options.work(options, overrides)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
