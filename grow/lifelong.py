"""Experts for new text in a trained model (Lifelong-MoE, Chen et al. 2305.12281).

    python -m grow.lifelong expand runs/quick --add 2 --out runs/grown
    python train.py configs/continue.toml --train.init_from runs/grown --data.name docs \\
        --lifelong.distill 1 --out runs/later

The first command makes a run folder. Its sparse layers have more experts and router rows, of which
the old ones are frozen; the number of experts that a token visits stays. The second command trains
it on new text: the new experts, the new rows, and all that every token shares (attention,
embeddings, norms). Forgetting enters by that shared part; grow/retain.py has what holds it.
"""
import sys

import torch

from data.binfile import DataError
from grow.parents import next_command, open_parents, summed, validation
from grow.retain import kl_divergence
from model import GPT, sparse_layers
from routers import ALL, ROUTERS
from runtime import checkpoint
from runtime.config import Parser, from_tables, parse
from runtime.ending import Ending
from settings import ConfigError, show

ROUTER_NOISE = 0.01     # of a copied router row, as a share of the rows' root mean square
NEW_TEXT = ["docs", "math", "python"]       # corpora that need no file and no network


def refuse(model):
    """Raises ConfigError for a model whose experts cannot become more."""
    ffn = model.config.ffn
    layer = model.blocks[model.sparse[0] if model.sparse else 0].ffn
    if layer.not_grown():
        name = ffn.router if ffn.kind == "moe" else ffn.kind
        raise ConfigError(f"a {name} model cannot be expanded: {layer.not_grown()}")
    if ffn.n_groups > 1:
        raise ConfigError(f"a model with ffn.n_groups = {ffn.n_groups} cannot be expanded: groups "
                          "are neighbours, and among more experts the old ones would change groups")


def grown_config(config, add):
    """Config of the expanded model. add: experts as ffn.n_expert counts them, before any
    granularity split; the frozen ones are counted after it."""
    # a copy, whose old experts are the frozen ones
    grown = from_tables(config.to_dict())
    ffn = grown.ffn
    ffn.n_frozen = ffn.experts
    ffn.frozen_routes = True
    ffn.n_expert = ffn.n_expert + add
    # A loss that evens out old and new experts would send new text to experts that cannot learn it,
    # so there is none. The bias of loss_free stays: it balances the new experts alone
    # (MoE.after_step). The loss that it may have beside the bias goes.
    if ffn.balance == "loss_free":
        ffn.balance_loss = 0.0
    else:
        ffn.balance = "none"
    return grown


def grow(state, config, grown, init, seed):
    """Weights of the expanded model by name: in each sparse layer the old experts and router rows,
    and the new ones behind them. state: the weights of the old Config; grown: the new Config.

    init "copy": each new expert copies another old one, drawn by `seed` (one twice only if more are
    added than there are). "random": new experts are drawn, as a new model of this seed has them.
    """
    torch.manual_seed(seed)
    fresh, made = GPT(grown).state_dict(), dict(state)
    E, more = config.ffn.experts, grown.ffn.experts - config.ffn.experts
    for layer in sparse_layers(config):
        # the old expert that each new one copies
        rounds = -(-more // E)
        chosen = torch.cat([torch.randperm(E) for _ in range(rounds)])[:more]           # (more,)
        for name, new in fresh.items():
            # tensors with a row for each expert: w_in, w_out, rows and bias of the router
            if name.startswith(f"blocks.{layer}.ffn.") and new.shape != state[name].shape:
                rows = new_rows(name, state[name], new[E:], chosen, init)
                made[name] = torch.cat([state[name], rows])
    return made


def new_rows(name, old, drawn, chosen, init):
    """The rows of the new experts in one tensor, (more, ...): copies of old[chosen], or `drawn`."""
    if init == "copy" and name.endswith("weight"):
        # An expert and its copy with equal router rows would tie, and no token could prefer either.
        noise = torch.randn_like(drawn)
        return old[chosen] + ROUTER_NOISE * old.square().mean().sqrt() * noise
    if init == "copy":
        return old[chosen]
    # A bias of loss_free counts against those of the other experts, and their mean drifts. At 0 the
    # new experts would get no token.
    if name.endswith("router.bias"):
        return torch.full_like(drawn, old.mean().item())
    return drawn


def expand(run, add, out, init="copy", seed=0, overwrite=False, say=print):
    """Makes the run folder `out`: the best weights of `run` with `add` more experts (times
    ffn.granularity) in each sparse layer, the old ones frozen. Raises ConfigError,
    CheckpointError."""
    (parent,) = open_parents([run])
    refuse(parent.model)
    config = grown_config(parent.config, add)
    with checkpoint.Lock(out):
        checkpoint.check_free(out, overwrite, [run])
        # everything is made before anything in the folder is replaced
        state = grow(parent.model.state_dict(), parent.config, config, init, seed)
        checkpoint.clear_run(out)
        # the parent's folder as it was given, not where it was trained
        before = parent.header["ancestry"] | dict(run=str(run))
        ancestry = dict(kind="expand", run=str(out), added=add, init=init, seed=seed,
                        parents=[before])
        checkpoint.save_made(out, config, state, parent.tokenizer, ancestry)
    # what changed, measured on the model that was written
    model = GPT(config).eval()
    model.load_state_dict(state)
    say(f"{out}: {init} experts, {compare(parent, model)}")
    say(next_step(out, parent))


def next_step(out, parent):
    """The command that trains the expanded run on text that its parent has not seen."""
    names = [name for name in NEW_TEXT if name not in parent.corpora][:1]
    # a tokenizer of characters knows those of its own text alone
    if not names or parent.tokenizer.kind == "char":
        names = parent.corpora
    more = ["--lifelong.distill", "1"]
    # distillation needs logits, which a loss in slices never makes
    if parent.config.model.loss_chunks > 1:
        more += ["--model.loss_chunks", "1"]
    return next_command(out, names, parent.config.data, *more)


# --- what changed ---


def comparison(parent):
    """(batches as EvalBatches has them, what they are): validation text of the run's corpora; where
    that cannot be had, one batch of random tokens."""
    config, rows = parent.config, min(parent.config.train.batch_size, 32)
    try:
        valid = validation(parent, parent.corpora, batch_size=rows, n_batches=4)
        return valid, f"validation text of {show(config.data.name)}"
    # the corpus is gone, or its new text does not fit the tokenizer
    except DataError as e:
        x = torch.randint(parent.tokenizer.vocab_size, (rows, config.model.block_size),
                          generator=torch.Generator().manual_seed(0))
        why = str(e).partition(";")[0]
        domain = torch.zeros(rows, dtype=torch.long)
        return [(x, x, domain, 0)], f"one batch of random tokens (no text: {why})"


def mean_divergence(teacher, model, batches):
    """KL(p_teacher || p), nats, mean over the tokens of all batches."""
    def divergence(x, y, domain):
        logits = (m(x, domain=domain).logits for m in (teacher, model))
        return [kl_divergence(*logits).item() * x.numel()]

    # [KL times tokens, tokens, bytes] of each corpus
    sums = summed(batches, divergence).values()
    return sum(kl for kl, _, _ in sums) / sum(tokens for _, tokens, _ in sums)


def compare(parent, model):
    """What the expansion of a Parent to this model changed, in lines: experts, parameters, FLOPs,
    balancing, and how far the predictions moved."""
    teacher, traits = parent.model, ROUTERS[parent.config.ffn.router].traits
    old, new = parent.config.ffn, model.config.ffn
    before, after = teacher.num_params(), model.num_params()
    batches, text = comparison(parent)
    kl = mean_divergence(teacher, model, batches)
    # a router of all experts computes the new ones, too; any other has only longer rows to score
    why = "every expert is visited" if traits.k == ALL else "the new router rows"
    lines = [f"{old.experts} -> {new.experts} in each of layers {model.sparse}; the first "
             f"{new.n_frozen} and their router rows are frozen",
             f"parameters {before.total:,} -> {after.total:,}, "
             f"active {before.active:,} -> {after.active:,}",
             f"forward FLOPs per token {teacher.flops_per_token():,} -> "
             f"{model.flops_per_token():,}: {why}",
             f"KL(teacher || grown) = {kl:.4g} nats a token at step 0, on {text}"]
    if old.balance != new.balance:
        lines.append(f"balance {old.balance} -> none: a loss would send new text to frozen experts")
    if traits.across == "in training":
        lines.append(f"note: in training {old.router} gives old and new experts equal shares, by "
                     "construction")
    return "\n".join(lines)


# --- the program ---


def build_parser():
    parser = Parser(prog="python -m grow.lifelong",
                    description="Expand a trained mixture of experts: new experts and router rows, "
                    "the old ones frozen. Train the result with train.py, whose [lifelong] "
                    "settings say how the old knowledge is held.")
    parser.add_argument("command", choices=["expand"], help="what to do")
    parser.add_argument("run", metavar="RUN", help="run folder of a trained mixture of experts")
    parser.add_argument("--add", type=int, required=True, metavar="N",
                        help="experts to add to every sparse layer, counted like ffn.n_expert: "
                        "times ffn.granularity in a split layer")
    parser.add_argument("--out", required=True, metavar="DIR", help="run folder to make")
    parser.add_argument("--init", choices=["copy", "random"], default="copy",
                        help="new experts and router rows: copies of old ones, the rows with a "
                        "little noise, or fresh (default: copy)")
    parser.add_argument("--seed", type=int, default=0, metavar="S",
                        help="seed of what is drawn (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in DIR")
    return parser


def main(argv=None):
    """The program; returns its exit status: 0 done, 1 a run folder that cannot be used, 2 a mistake
    in what was asked for."""
    with Ending() as end:
        options, _ = parse(build_parser(), argv)
        if options.add < 1 or not 0 <= options.seed < 2**62:
            raise ConfigError(f"--add {options.add} must be at least 1, --seed {options.seed} at "
                              "least 0")
        expand(options.run, options.add, options.out, options.init, options.seed,
               options.overwrite)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
