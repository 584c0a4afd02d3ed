"""Branch-Adapt-Route (BAR, Ai2 2026, 2604.18473): experts that are trained apart, from one base
model, and put together without changing what the base model knew.

    python -m grow.bar branch runs/base --out runs/a-start
        a mixture of two: the base model's layers as an anchor, which never changes, and a copy
    python train.py configs/continue.toml --train.init_from runs/a-start --data.name docs \\
        --lifelong.freeze 'embedding*,*norm*,*attention*' --out runs/a
        the copy learns a domain; all that the branches share stays as it was
    python -m grow.bar join runs/a runs/b --out runs/bar-start
        one mixture: the anchor, and what each branch has learned
    python train.py configs/continue.toml --train.init_from runs/bar-start \\
        --lifelong.freeze 'embedding*,*norm*,*attention*' --out runs/bar
        the router alone learns, on a little text of all domains

A branch for questions and answers (--data.answers_only true) may leave 'embedding*' out: what the
branches share is averaged when they are joined. To replace an expert, join again with another
branch in its place; only the router is trained again.

With every token at the anchor both mixtures are the base model, as long as what is shared was
frozen.
"""
import argparse
import sys

import torch

from grow import btx
from grow.btx import add_command, add_output, refuse_given, save, sparse_config, upcycle
from grow.hidden_units import put_together
from grow.parents import LAYOUT, check_branches, open_parents
from model import sparse_layers
from runtime.config import Parser
from settings import ConfigError

SHARED = "embedding*,*norm*,*attention*"      # no expert and no router, for lifelong.freeze
# the anchor stays; its row of the router learns, as that of the copy does
ANCHORED = {"ffn.n_expert": "2", "ffn.top_k": "2", "ffn.n_frozen": "1",
            "ffn.frozen_routes": "false"}


def branch(parent, overrides, seed=0):
    """(Config, GPT): a dense run as a mixture of two equal experts, of which the first is frozen.
    Their gates sum to 1, so that it is the run's function. Raises ConfigError."""
    for key, _ in overrides:
        if key in ANCHORED:
            raise ConfigError(f"--{key} cannot be chosen here: a branch has an anchor and one "
                              "expert that learns, and every token visits both")
    # a balance loss would send the text of other domains to the expert that learns this one
    given = ANCHORED | {"ffn.balance": "none"} | dict(overrides)
    return upcycle(parent, list(given.items()), seed=seed)


def check_anchors(parents):
    """Raises ConfigError unless all runs are branches of one base model with its layers as their
    first experts."""
    for p in parents:
        if not p.is_moe or p.experts != 2 or p.config.ffn.n_frozen != 1:
            raise ConfigError(f"{p.folder} is no branch with an anchor; make one with `python -m "
                              "grow.bar branch`")
    check_branches(parents)
    first = parents[0]
    for p in parents[1:]:
        for i in sparse_layers(p.config):
            ours, theirs = (q.model.blocks[i].ffn.experts for q in (first, p))
            if not all(torch.equal(a[0], b[0]) for a, b in zip(ours.parameters(),
                                                               theirs.parameters())):
                raise ConfigError(f"{p.folder} has another anchor than {first.folder} in layer "
                                  f"{i}: branch all of them from one base model")


def join(parents, overrides, top_k=2, seed=0):
    """(Config, GPT): the anchor and the second expert of every branch, all frozen, with a new
    router; what the branches share is averaged. Raises ConfigError."""
    check_anchors(parents)
    refuse_given(overrides, "mix")
    w, E = parents[0].width, 1 + len(parents)
    # of each branch two experts lie one after the other; the anchor is taken once
    ffn = dict(kind="moe", activation=parents[0].config.ffn.activation, d_ff=w, n_expert=E,
               top_k=top_k, balance="none", n_frozen=E, frozen_routes=False)
    ffn |= {name: getattr(parents[0].config.ffn, name) for name in LAYOUT}
    config = sparse_config(parents, ffn, overrides)
    units = torch.arange(2 * w * len(parents)).view(-1, w)
    table = torch.cat([units[:1], units[1::2]])                                         # (E, w)
    return config, put_together(config, parents, lambda: table, seed)


# --- the program ---


def branch_command(options, overrides):
    (parent,) = open_parents([options.run])
    config, model = branch(parent, overrides, options.seed)
    save(options, "anchor", [parent], config, model)
    print(f"with --lifelong.freeze '{SHARED}', and --data.name of what it is to learn")


def join_command(options, overrides):
    if options.top_k < 1:
        raise ConfigError(f"--top_k {options.top_k} must be at least 1")
    parents = open_parents(options.runs)
    config, model = join(parents, overrides, options.top_k, options.seed)
    save(options, "join", parents, config, model)
    print(f"with --lifelong.freeze '{SHARED}', so that the router alone learns")


def build_parser():
    """(parser, {command: its parser})."""
    parser = Parser(prog="python -m grow.bar", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = add_command(commands, "branch", branch_command, "a dense run as an anchor and an expert "
                    "that will learn", several=False)
    add_output(p, "the router")
    p = add_command(commands, "join", join_command, "one mixture of the anchor and the experts of "
                    "several branches")
    p.add_argument("--top_k", type=int, default=2, metavar="K",
                   help="experts that a token visits (default: 2)")
    add_output(p, "the router")
    return parser, commands.choices


def main(argv=None):
    """The program; returns its exit status."""
    return btx.main(argv, build_parser)


if __name__ == "__main__":
    sys.exit(main())
